"""The loss of a large model at the transferred value, foretold from the smaller ones; or no number, and the reason.

Three families of laws, averaged by how well they explain the losses: floor + a / size^p with p from 0.3 to 1.5 on each
axis (theory has width^-1/2 and depth^-1: Bordelon et al., arXiv 2309.16620; measured were others), c / size^p without a
floor, and c - a log(size). An axis on which the fitted sizes do not differ has no term.
A number is given only where the law has foretold the larger of the fitted sizes from the smaller ones, and better than
"as the next smaller size", and no further beyond the fitted sizes than these span.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import fdtri

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Curve
from depthmup.launch.findings.intervals import CONFIDENCE, compute_interval
from depthmup.launch.findings.verdict import Analysis

AXES = ("width", "depth")
EXPONENTS = np.linspace(0.3, 1.5, 13)
TERMS = {"width": "a / width^p", "depth": "b / depth^q"}
DRAWS = 4000
BACKTEST = 0.99  # a size outside of the interval of this confidence, foretold from smaller ones, refutes the laws
LEAST_ERROR = 2e-3  # of a loss: no law is truer than that, whatever the seeds say


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
    def said(self) -> str:
        """'0.51, 90% interval 0.49 to 0.53', or 'none: ' and why."""
        if self.predicted is None or self.interval is None:
            return f"none: {self.remark}"
        return f"{self.predicted:.3g}, {CONFIDENCE:.0%} interval {self.interval[0]:.3g} to {self.interval[1]:.3g}"

    @property
    def inside(self) -> bool | None:
        """Whether what was seen lies in the interval; None without the one or the other."""
        if self.seen is None or self.interval is None:
            return None
        return self.interval[0] <= self.seen <= self.interval[1]


def read_losses_at(curve: Curve, x: float) -> np.ndarray:
    """Metric at x of every seed that ran at the nearest value, infinite where so many failed that most may: from there
    to x by the curve's model, where it reaches. (seeds,)"""
    nearest = curve.at(x)
    found = curve.usable[:, nearest]
    found = found[~np.isnan(found)]
    if curve.failures(nearest).leave_open:
        return np.full(len(found), math.inf)
    if curve.posterior is None or abs(curve.x[nearest] - x) < 1e-6:
        return found
    shift = float(np.median(curve.posterior.at(x) - curve.posterior.at(float(curve.x[nearest]))))
    return np.asarray(found * math.exp(shift)) if math.isfinite(shift) else found


def list_terms(sizes: Sequence[Size], axes: Sequence[str], exponents: Sequence[float]) -> np.ndarray:
    """One row per size: 1 and size^-exponent per axis, log(size) where the exponent is 0."""
    columns = [np.array([float(getattr(size, axis)) for size in sizes]) for axis in axes]
    powers = [np.log(c) if p == 0 else c**-p for c, p in zip(columns, exponents, strict=True)]
    return np.column_stack([np.ones(len(sizes)), *powers])


@dataclass(frozen=True)
class Extrapolation:
    """Draws of the target's mean loss, and whether any of the laws explains the losses within their noise."""

    draws: np.ndarray
    fits: bool


def extrapolate(known: dict[Size, np.ndarray], target: Size, axes: Sequence[str], seeds: int) -> Extrapolation | None:
    """The average over the laws; None where nothing tells the errors, or the sizes do not tell the terms apart.

    Each law is linear once its exponents are fixed: least squares in relative errors, whose variance is that between
    seeds, pooled with the residuals; a Student distribution. Laws are weighted by their likelihood, coefficients and
    variance integrated over; flat priors on the loss's change over the fitted sizes and on exponents.
    """
    sizes, relative = list(known), [losses / losses.mean() - 1 for losses in known.values()]
    means, counts = np.array([known[size].mean() for size in sizes]), np.array([len(each) for each in relative])
    noise, noise_freedom = sum(float((each**2).sum()) for each in relative), int(counts.sum()) - len(sizes)
    freedom = len(sizes) - 1 - len(axes)
    if freedom < 0 or freedom + noise_freedom < 1:
        return None
    powers = list(product(EXPONENTS, repeat=len(axes)))
    zeros = (0.0,) * len(axes)
    families = [[(each, False) for each in powers], [(zeros, True)], [(zeros, False)]]
    beliefs = (0.6, 0.2, 0.2)  # theory has a floor
    found, scores, residuals = [], [], []
    for family, belief in zip(families, beliefs, strict=True):
        for exponents, in_logs in family:
            rows, row = list_terms(sizes, axes, exponents), list_terms([target], axes, exponents)[0]
            spans = np.append(1.0, np.ptp(rows[:, 1:], axis=0))
            rows, row = rows / spans, row / spans
            weights = np.sqrt(counts) * (1.0 if in_logs else 1 / means)
            weighted, wanted = rows * weights[:, None], (np.log(means) if in_logs else means) * weights
            if np.linalg.matrix_rank(weighted) < rows.shape[1]:
                return None
            information = weighted.T @ weighted
            coefficients = np.linalg.solve(information, weighted.T @ wanted)
            residual = float(((weighted @ coefficients - wanted) ** 2).sum())
            total = residual + noise + (freedom + noise_freedom) * LEAST_ERROR**2
            predicted = float(row @ coefficients)
            own = 1.0 if in_logs else predicted
            leverage = float(row @ np.linalg.solve(information, row)) + own**2 / seeds
            found.append((predicted, math.sqrt(total / (freedom + noise_freedom) * leverage), in_logs))
            # logs of the determinant in relative units, so that families in losses and in logs compare
            scale = 0.0 if in_logs else 2 * rows.shape[1] * math.log(float(means.mean()))
            determinant = float(np.linalg.slogdet(information)[1]) + scale
            likelihood = -0.5 * (determinant + (freedom + noise_freedom) * math.log(total))
            scores.append(likelihood + math.log(belief / len(family)))
            residuals.append(residual)
    likely = np.exp(np.array(scores) - max(scores))
    generator = np.random.default_rng(0)
    chosen = generator.choice(len(found), DRAWS, p=likely / likely.sum())
    centres, spreads, in_log = (np.array(column)[chosen] for column in zip(*found, strict=True))
    draws = centres + spreads * generator.standard_t(freedom + noise_freedom, DRAWS)
    draws = np.where(in_log, np.exp(np.minimum(draws, 700.0)), draws)
    least = noise + noise_freedom * LEAST_ERROR**2
    fits = not (freedom and noise_freedom) or (
        min(residuals) / freedom <= least / noise_freedom * fdtri(freedom, noise_freedom, BACKTEST)
    )
    return Extrapolation(draws, bool(fits))


def select_smaller(known: dict[Size, np.ndarray], target: Size) -> dict[Size, np.ndarray]:
    """Of sizes that differ from the target in width and depth alone: no law here has experts, batch or samples."""
    alike = {s: each for s, each in known.items() if s != target and s.is_beside_in_shape(target)}
    return {s: each for s, each in alike.items() if s.width <= target.width and s.depth <= target.depth}


def list_varied_axes(sizes: Sequence[Size]) -> list[str]:
    return [axis for axis in AXES if len({getattr(size, axis) for size in sizes}) > 1]


def backtest_laws(known: dict[Size, np.ndarray]) -> str:
    """Why the laws may not be continued: a size that they do not foretell from the smaller ones, or that the next
    smaller one foretells as well, or no size to try it on. '' where they may."""
    errors, control = [], []
    for size, seen in known.items():
        before = select_smaller(known, size)
        axes = list_varied_axes(list(before))
        if any(getattr(size, axis) != getattr(other, axis) for other in before for axis in AXES if axis not in axes):
            continue
        found = extrapolate(before, size, axes, len(seen)) if axes else None
        if found is None:
            continue
        low, high = np.quantile(found.draws, [(1 - BACKTEST) / 2, (1 + BACKTEST) / 2])
        mean = float(seen.mean())
        if not low <= mean <= high:
            return f"from the smaller sizes {low:.3g} to {high:.3g} was foretold for {size}, and {mean:.3g} was seen"
        nearest = max(before, key=lambda each: each.width * each.depth)
        errors.append(abs(float(np.median(found.draws)) - mean) / mean)
        control.append(abs(float(before[nearest].mean()) - mean) / mean)
    if not errors:
        return "too few sizes: no law can be tried on the larger of them"
    if sum(errors) >= sum(control):
        return "the next smaller size foretells the larger ones as well as a law does"
    return ""


def predict_loss(
    known: dict[Size, np.ndarray], target: Size, target_seeds: int = 1
) -> tuple[str, float | None, tuple[float, float] | None, str]:
    """(law, prediction, interval of the mean over the target's seeds, why there is no number) from the losses of each
    smaller size."""
    sizes = list(known)
    axes = list_varied_axes(sizes)
    law = " + ".join(["floor", *(TERMS[axis] for axis in axes)])
    for axis in AXES:
        values = [getattr(size, axis) for size in sizes]
        if axis not in axes and any(value != getattr(target, axis) for value in values):
            return law, None, None, f"the smaller sizes do not differ in {axis}"
        if axis in axes and getattr(target, axis) * min(values) > max(values) ** 2:
            beyond, span = getattr(target, axis) / max(values), max(values) / min(values)
            return law, None, None, f"too far: {beyond:.3g} times the largest {axis}, and the sizes span {span:.3g}"
    if failed := [size for size in sizes if not np.isfinite(known[size]).all()]:
        return law, None, None, f"runs at the transferred value fail at {failed[0]}"
    if len(sizes) < 2 + len(axes):
        return law, None, None, f"too few sizes: the law needs {2 + len(axes)} that are smaller, found {len(sizes)}"
    found = extrapolate(known, target, axes, target_seeds)
    if found is None:
        return law, None, None, "too few sizes or seeds to tell the law's terms apart"
    if not found.fits:
        return law, None, None, "no law fits within the seeds' noise"
    if refused := backtest_laws(known):
        return law, None, None, refused
    return law, float(np.median(found.draws)), compute_interval(found.draws), ""


def choose_targets(sizes: Sequence[Size], base: Size) -> list[Size]:
    """The largest size along each axis from the base, and the largest of all if one is so in both axes; all of the
    base's experts, batch and samples."""
    sizes = [size for size in sizes if size.is_beside_in_shape(base)]
    found = []
    for axis in AXES:
        along = [size for size in sizes if size.is_beside(base, axis)]
        found.append(max(along, key=lambda size: getattr(size, axis)))
    width, depth = (max(getattr(size, axis) for size in sizes) for axis in AXES)
    found += [size for size in sizes if size.width == width and size.depth == depth]
    return [size for size in dict.fromkeys(found) if size != base]


def foretell_loss(own: Sequence[Curve], x: float, target: Size) -> Forecast:
    """Of the loss at x octaves, from the curves of one parameterization; what was seen, if the target is among them."""
    known = {curve.size: found for curve in own if len(found := read_losses_at(curve, x))}
    before, seen = select_smaller(known, target), known.get(target, np.array([]))
    mean = float(seen.mean()) if len(seen) else None
    law, predicted, interval, remark = predict_loss(before, target, max(len(seen), 1))
    return Forecast(own[0].parameterization, target, len(before), law, predicted, interval, mean, remark)


def make_forecasts(analysis: Analysis, sizes: Sequence[Size]) -> list[Forecast]:
    """One per parameterization and target among `sizes` (the first is the base), fitted on all smaller sizes."""
    found = []
    for judgement in analysis.judgements:
        own = [curve for curve in analysis.curves if curve.parameterization == judgement.parameterization]
        x = next(curve for curve in own if curve.size == sizes[0]).optimum.x
        if x is not None:
            found += [foretell_loss(own, x, target) for target in choose_targets(sizes, sizes[0])]
    return found


def describe_calibration(found: Sequence[Forecast]) -> str:
    """'3 of 4 forecasts hold' over those that can be checked, as a sentence.

    One and the same forecast of several parameterizations, made of runs that they share, counts once."""
    checked = {(f.target, f.predicted, f.interval, f.seen): f.inside for f in found if f.inside is not None}
    if not checked:
        return "No forecast can be checked yet."
    held = sum(inside is True for inside in checked.values())
    return f"{held} of {len(checked)} forecasts hold what was seen in their {CONFIDENCE:.0%} interval."
