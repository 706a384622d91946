"""Where the lowest point of a metric against a hyperparameter lies, and how sure that is.

x is in octaves of the hyperparameter, ascending. metric: (seeds, values), infinite where a run diverged, NaN where
there is none.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.9
REACH = 2  # the fit takes the points within two of the lowest

Side = Literal["low", "high"]


@dataclass(frozen=True)
class Optimum:
    """The fitted optimum of one curve; `x` is None where every value diverged, or none trains."""

    x: float | None
    metric: float  # the mean over seeds at the best grid point
    censored: Side | None  # the best grid point is the first or last of the grid
    resolution: float  # octaves by which x may be off however many seeds ran; 0 where a parabola has its vertex


@dataclass(frozen=True)
class Spread:
    """Sampling variance of an optimum's x, and its degrees of freedom."""

    variance: float
    freedom: float


def level(metric: np.ndarray) -> np.ndarray:
    """Mean over seeds, (values,): infinite where any seed diverged, NaN where no seed ran.

    A value that only some seeds ran is freed of those seeds' mean offset at the values that all of them ran.
    """
    shared = metric[:, np.isfinite(metric).all(axis=0)]
    offset = shared.mean(axis=1, keepdims=True) - shared.mean() if shared.size else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a value without a run is meant to become NaN
        return np.nanmean(metric - offset, axis=0)


def window(y: np.ndarray) -> slice:
    """The points within REACH of the lowest finite one. `y` has a finite point."""
    best = int(np.where(np.isfinite(y), y, math.inf).argmin())
    return slice(max(best - REACH, 0), best + REACH + 1)


def fit_optimum(x: np.ndarray, y: np.ndarray) -> Optimum:
    """Vertex of a parabola through the points within two of the lowest, weighted by (lowest / y)^2.

    The weight makes relative errors count alike, so that the steep flanks do not bend the fit. The vertex stays within
    one grid step of the lowest point; a lowest point on the grid's edge is reported as it is, as censored.

    Without a vertex (fewer than three finite points near, as where the neighbours diverge; no curvature; a vertex that
    lies further off) the lowest point itself says where the optimum is, and that to a step of the grid only: a curve
    with one minimum has it somewhere between the lowest point's neighbours. Seeds that agree do not change that.
    """
    finite = np.isfinite(y)
    if not finite.any():
        return Optimum(None, math.inf, None, math.inf)
    best = int(np.where(finite, y, math.inf).argmin())
    censored: Side | None = "low" if best == 0 else "high" if best == len(x) - 1 else None
    near = np.arange(len(x))[window(y)]
    near = near[finite[near]]
    step = float(np.diff(x)[max(best - 1, 0) : best + 1].max(initial=0.0)) or math.inf  # one value has no neighbours
    if censored or len(near) < 3:
        return Optimum(float(x[best]), float(y[best]), censored, step)
    # np.polyfit multiplies residuals by w, so w = lowest / y weights their squares by its square
    curvature, slope, _ = np.polyfit(x[near] - x[best], y[near], 2, w=y[best] / y[near])
    offset = -slope / (2 * curvature) if curvature > 0 else 0.0
    inside = float(np.clip(offset, x[best - 1] - x[best], x[best + 1] - x[best]))
    return Optimum(float(x[best] + inside), float(y[best]), None, 0.0 if curvature > 0 and inside == offset else step)


def jackknife(x: np.ndarray, metric: np.ndarray) -> Spread | None:
    """Spread of the optimum over seeds, each left out in turn; None with fewer than two seeds near the optimum.

    Chosen over resampling the seeds, which with two or three of them gives intervals that are far too narrow.
    """
    y = level(metric)
    if not np.isfinite(y).any():
        return None
    metric = metric[np.isfinite(metric[:, window(y)]).any(axis=1)]
    count = len(metric)
    if count < 2:
        return None
    left_out = [fit_optimum(x, level(np.delete(metric, seed, axis=0))).x for seed in range(count)]
    known = np.array([each for each in left_out if each is not None])
    return Spread(float((count - 1) / count * ((known - known.mean()) ** 2).sum()), count - 1)


def difference(first: Spread | None, second: Spread | None) -> Spread | None:
    """Spread of the difference of two independent optima, with Welch's and Satterthwaite's degrees of freedom."""
    if first is None or second is None:
        return None
    parts = first.variance**2 / first.freedom + second.variance**2 / second.freedom
    variance = first.variance + second.variance
    return Spread(variance, variance**2 / parts if parts else first.freedom + second.freedom)


def half_width(spread: Spread) -> float:
    """Of Student's interval of CONFIDENCE."""
    return float(stdtrit(spread.freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(spread.variance)


def interval(
    centre: float, spread: Spread | None, *, resolution: float = 0.0, open_sides: frozenset[Side] = frozenset()
) -> tuple[float, float] | None:
    """Student's interval of CONFIDENCE about `centre`, infinite on `open_sides` and on each other side at least
    `resolution` wide; None without a spread."""
    if spread is None:
        return None
    half = max(half_width(spread), resolution)
    low = -math.inf if "low" in open_sides else centre - half
    high = math.inf if "high" in open_sides else centre + half
    return low, high


def excess_interval(metric: np.ndarray, at: int) -> tuple[float, float] | None:
    """How far the mean at value number `at` lies above the lowest, with CONFIDENCE; None where fewer than two seeds
    ran, or one diverged there.

    The values near the lowest are compared with it one by one, paired by seed, by Student's t. The lowest is one of
    them: the excess is at least the largest lower bound, and at most the largest upper one. So it is not 0 for sure
    where `at` happens to be the lowest of a few seeds.
    """
    y = level(metric)
    if not np.isfinite(y[at]):
        return None
    low = high = 0.0
    for other in np.arange(len(y))[window(y)]:
        difference = metric[:, at] - metric[:, other]
        difference = difference[np.isfinite(difference)]
        count = len(difference)
        if other == at or not np.isfinite(y[other]):
            continue
        if count < 2:
            return None
        half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * float(difference.std(ddof=1)) / math.sqrt(count)
        low, high = max(low, difference.mean() - half), max(high, difference.mean() + half)
    return low, high
