"""The loss of a large model at the transferred value, foretold from the smaller ones.

The law is linear: loss = floor + a / sqrt(width) + b / depth, with the exponents at which losses approach their limit
in theory (Bordelon et al., arXiv 2309.16620), and without the term of an axis on which the fitted sizes do not differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri, stdtrit

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Curve
from depthmup.launch.findings.curve_model import CONFIDENCE
from depthmup.launch.findings.verdict import Analysis

EXPONENTS = {"width": 0.5, "depth": 1.0}
TERMS = {"width": "a / sqrt(width)", "depth": "b / depth"}


@dataclass(frozen=True)
class Forecast:
    """What was foretold of `target`, and what was seen. `predicted` is None where `remark` says why not."""

    parameterization: str
    target: Size
    fitted: int  # number of sizes
    law: str
    predicted: float | None
    interval: tuple[float, float] | None
    seen: float | None  # mean over the target's seeds; infinite if one diverged; None: not trained
    remark: str

    @property
    def inside(self) -> bool | None:
        """Whether what was seen lies in the interval; None without the one or the other."""
        if self.seen is None or self.interval is None:
            return None
        return self.interval[0] <= self.seen <= self.interval[1]


def losses(curve: Curve, x: float) -> np.ndarray:
    """Metric of every seed that ran at the value nearest to x, infinite where it failed. (seeds,)"""
    found = curve.usable[:, curve.at(x)]
    return found[~np.isnan(found)]


def design(sizes: Sequence[Size], axes: Sequence[str]) -> np.ndarray:
    """One row per size: 1 and size^-exponent per axis."""
    return np.array([[1.0, *(getattr(size, axis) ** -EXPONENTS[axis] for axis in axes)] for size in sizes])


def predict(
    known: dict[Size, np.ndarray], target: Size, target_seeds: int = 1
) -> tuple[str, float | None, tuple[float, float] | None, str]:
    """(law, prediction, interval of the mean over the target's seeds, remark) from the losses of each smaller size.

    Least squares in relative errors. Their variance is that between seeds, pooled with the fit's residuals where an F
    test at CONFIDENCE finds no misfit, else that of the residuals alone; Student's interval.
    """
    sizes = list(known)
    axes = [axis for axis in EXPONENTS if len({getattr(size, axis) for size in sizes}) > 1]
    law = " + ".join(["floor", *(TERMS[axis] for axis in axes)])
    for axis in EXPONENTS:
        if axis not in axes and any(getattr(size, axis) != getattr(target, axis) for size in sizes):
            return law, None, None, f"the smaller sizes do not differ in {axis}"
    if failed := [size for size in sizes if not np.isfinite(known[size]).all()]:
        return law, None, None, f"runs at the transferred value fail at {failed[0]}"
    rows, means = design(sizes, axes), np.array([known[size].mean() for size in sizes])
    freedom = len(sizes) - rows.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(rows) < rows.shape[1]:
        return law, None, None, f"too few sizes: the law needs {rows.shape[1] + 1} that are smaller, found {len(sizes)}"
    counts = np.array([len(known[size]) for size in sizes])
    weights = np.sqrt(counts) / means
    weighted = rows * weights[:, None]
    coefficients = np.linalg.lstsq(weighted, means * weights, rcond=None)[0]
    residual = float(((weighted @ coefficients - means * weights) ** 2).sum())
    noise = float(sum((((known[size] - mean) / mean) ** 2).sum() for size, mean in zip(sizes, means, strict=True)))
    noise_freedom = int(counts.sum()) - len(sizes)
    variance, remark = residual / freedom, ""
    if not noise_freedom:
        remark = "one seed: the interval rests on the fit's residuals"
    elif variance * noise_freedom > noise * fdtri(freedom, noise_freedom, CONFIDENCE):
        remark = "the law does not fit within the seeds' noise"
    else:
        freedom += noise_freedom
        variance = (residual + noise) / freedom
    row = design([target], axes)[0]
    predicted = float(row @ coefficients)
    leverage = float(row @ np.linalg.inv(weighted.T @ weighted) @ row)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(
        variance * (leverage + predicted**2 / target_seeds)
    )
    return law, predicted, (predicted - half, predicted + half), remark


def targets(sizes: Sequence[Size], base: Size) -> list[Size]:
    """The largest size along each axis from the base, and the largest of all if one is so in both axes."""
    found = []
    for axis, other in (("width", "depth"), ("depth", "width")):
        along = [size for size in sizes if getattr(size, other) == getattr(base, other)]
        found.append(max(along, key=lambda size: getattr(size, axis)))
    width, depth = (max(getattr(size, axis) for size in sizes) for axis in EXPONENTS)
    found += [size for size in sizes if size.width == width and size.depth == depth]
    return [size for size in dict.fromkeys(found) if size != base]


def forecasts(analysis: Analysis, sizes: Sequence[Size]) -> list[Forecast]:
    """One per parameterization and target among `sizes` (the first is the base), fitted on all smaller sizes."""
    found = []
    for judgement in analysis.judgements:
        own = {c.size: c for c in analysis.curves if c.parameterization == judgement.parameterization}
        x = own[sizes[0]].optimum.x
        if x is None:
            continue
        for target in targets(sizes, sizes[0]):
            known = {
                size: losses(curve, x)
                for size, curve in own.items()
                if size != target and size.width <= target.width and size.depth <= target.depth
            }
            known = {size: values for size, values in known.items() if len(values)}
            seen = losses(own[target], x) if target in own else np.array([])
            law, predicted, interval, remark = predict(known, target, max(len(seen), 1))
            mean = float(seen.mean()) if len(seen) else None
            found.append(
                Forecast(judgement.parameterization, target, len(known), law, predicted, interval, mean, remark)
            )
    return found


def calibration(found: Sequence[Forecast]) -> str:
    """'3 of 4 forecasts hold' over those that can be checked, as a sentence.

    One and the same forecast of several parameterizations, made of runs that they share, counts once."""
    checked = {(f.target, f.predicted, f.interval, f.seen): f.inside for f in found if f.inside is not None}
    if not checked:
        return "No forecast can be checked yet."
    held = sum(inside is True for inside in checked.values())
    return f"{held} of {len(checked)} forecasts hold what was seen in their {CONFIDENCE:.0%} interval."
