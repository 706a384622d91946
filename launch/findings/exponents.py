"""What becomes of the weights in residual branches as depth L grows? Exponents, and the regime that they mean.

Pure functions of numbers. Of one network and one tensor of its blocks, A_k, k = 1 ... L, is the weight of block k with
the branch multiplier in it; stages follow each other, and between them there is no increment. Cohen, Cont, Rossier and
Xu (arXiv 2105.12245) tell regimes of deep residual networks by how these grow:

    max norm              max_k |A_k|
    increments            max_k |A_k+1 - A_k| / max_k |A_k|: theirs is L^b max_k |A_k+1 - A_k|, b the norm's exponent
    root sum of squares   (sum_k |A_k|^2)^(1/2)
    quadratic variation   sum_k |A_k+1 - A_k|^2, times L over the number of increments

Increments that vanish: weights are smooth in k / L, and layers become an ODE. If they do not, and the quadratic
variation stays finite: layers become an SDE, as with independent weights and branches 1 / sqrt(L) (2206.06929). Else
there is no limit of that kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from depthmup.launch.findings.intervals import CONFIDENCE

MEASURES = ("max norm", "increments", "root sum of squares", "quadratic variation")
MIN_DEPTHS = 3
WIDE = 0.5  # half width of an interval that says nothing of whether an exponent is 0
SMALL = 0.1  # an exponent that counts as 0: logarithms and the first few blocks make as much


@dataclass(frozen=True)
class Slope:
    """Of log(measure) against log(depth), with its interval."""

    exponent: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def measure_weights(stages: Sequence[np.ndarray]) -> dict[str, float]:
    """Of the weights (blocks, entries) of every stage. Without two blocks in one stage there are no increments: NaN."""
    norms = np.concatenate([np.linalg.norm(stage, axis=1) for stage in stages])
    steps = np.concatenate([np.linalg.norm(np.diff(stage, axis=0), axis=1) for stage in stages])
    largest, variation = (steps.max(), len(norms) * (steps**2).mean()) if len(steps) else (np.nan, np.nan)
    relative = largest / norms.max() if norms.max() > 0 else np.nan
    found = (norms.max(), relative, np.linalg.norm(norms), variation)
    return dict(zip(MEASURES, map(float, found), strict=True))


def fit_slope(values: Mapping[int, Sequence[float]]) -> Slope | None:
    """values: depth -> the measure of every seed. None for fewer than MIN_DEPTHS depths at which it is above 0.

    The interval is the wider of two: Student's from the depths' means about the line, which a curve that is no power
    makes wide, and from the seeds' scatter.
    """
    logs = {depth: np.log(of) for depth, of in sorted(values.items()) if min(of, default=0) > 0}
    if len(logs) < MIN_DEPTHS:
        return None
    x = np.log(np.array(list(logs), dtype=float))
    y = np.array([of.mean() for of in logs.values()])
    lever = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(lever @ y)
    residuals = y - y.mean() - slope * (x - x.mean())
    freedom, quantile = len(x) - 2, (1 + CONFIDENCE) / 2
    of_line = stdtrit(freedom, quantile) * np.sqrt((residuals**2).sum() / freedom * (lever**2).sum())
    seeds = min(len(of) for of in logs.values())
    of_seeds = 0.0
    if seeds > 1:
        scatter = np.array([of.var(ddof=1) / len(of) for of in logs.values()])
        of_seeds = stdtrit(seeds - 1, quantile) * np.sqrt((lever**2 * scatter).sum())
    half = float(max(of_line, of_seeds))
    return Slope(slope, slope - half, slope + half)


def name_regime(slopes: Mapping[str, Slope | None]) -> str:
    """In words. slopes: by measure."""
    increments, variation = slopes["increments"], slopes["quadratic variation"]
    if increments is None or variation is None:
        return "not resolved: too few depths"
    if increments.high < -SMALL:
        return "smooth: increments vanish (ODE)"
    if (variation.high - variation.low) / 2 > WIDE:
        return "not resolved: the intervals are wide"
    if variation.low < SMALL and variation.high > -SMALL:
        return "noise of finite quadratic variation (SDE)"
    return f"neither: the quadratic variation {'grows' if variation.low > 0 else 'vanishes'}"
