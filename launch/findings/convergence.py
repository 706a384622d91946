"""How fast do networks approach a limit as they grow? Fitted rates beside the theory's.

All of it is a pure function of vectors. Of each size there is an array (seeds, entries): a loss curve or a kernel of
every seed. The limit of a study's networks is not known, and the largest size stands for it. The laws say what is left
between it and a smaller one. Where the limit is known: launch.findings.grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Comparison
from depthmup.launch.findings.intervals import CONFIDENCE

Measure = Literal["mean", "scatter"]
MIN_SEEDS, MIN_SIZES = 3, 3  # a variance that outlives the jackknife; two distances to the largest
EXPONENTS = (0.05, 4.0)  # searched; an exponent at either end is none


@dataclass(frozen=True)
class Law:
    """What theory says of the distance to the limit: of order size^-exponent along `axis`."""

    axis: Literal["width", "depth"]
    measure: Measure
    exponent: float

    def shape(self, exponent: float, sizes: np.ndarray, largest: float) -> np.ndarray:
        """The distance between each of `sizes` and the largest, but for a factor. (sizes,)

        Means differ by what x^-q changes; runs scatter about them independently, each by x^-q.
        """
        if self.measure == "scatter":
            return np.sqrt(sizes ** (-2 * exponent) + largest ** (-2 * exponent))
        return sizes**-exponent - largest**-exponent


# Over width runs scatter by N^-1/2 and their mean is off by 1/N (Bordelon and Pehlevan, arXiv 2304.03408, section 3).
# Over depth the mean is off by 1/L under 1/sqrt(L) branches (Bordelon et al., arXiv 2309.16620, section 4); the
# scatter, which a finite width makes, does not fall with depth.
LAWS = (Law("width", "mean", 1.0), Law("width", "scatter", 0.5), Law("depth", "mean", 1.0))


@dataclass(frozen=True)
class Rate:
    """How the distance of smaller sizes to the largest falls. Arrays have one entry for each of these, ascending."""

    law: Law
    sizes: np.ndarray
    largest: int
    distance: np.ndarray  # relative to the norm of the largest's mean; NaN where it is lost in the noise
    error: np.ndarray  # half the distance's interval over seeds
    noise: np.ndarray  # what seeds alone would give; 0 for the scatter
    exponent: float | None  # None where `remark` says why
    interval: tuple[float, float] | None
    factor: float | None  # distance = factor * law.shape(exponent, ...)
    remark: str


def measure_squared_distance(values: np.ndarray, limit: np.ndarray, measure: Measure) -> tuple[float, float]:
    """(squared distance, its part that is noise of the seeds), relative to the squared norm of the limit's mean.

    values, limit: (seeds, entries), row i of both with one seed, and so one order of samples: its noise cancels in the
    difference d_i. Mean: |mean d|^2, less the variance of that mean, which it holds on average. Scatter: the mean of
    |d_i - mean d|^2.
    """
    difference, count = values - limit, len(values)
    mean = difference.mean(axis=0)
    variance = float(((difference - mean) ** 2).sum()) / (count - 1)
    norm = float((limit.mean(axis=0) ** 2).sum())
    if measure == "scatter":
        return variance / norm, 0.0
    return (float((mean**2).sum()) - variance / count) / norm, variance / count / norm


def fit_exponent(law: Law, sizes: np.ndarray, largest: float, distance: np.ndarray) -> tuple[float, float] | None:
    """(exponent, factor) by least squares in log(distance); None where no exponent in EXPONENTS is best."""

    def residuals(exponent: float) -> np.ndarray:
        return np.log(distance) - np.log(law.shape(exponent, sizes, largest))

    low, high = EXPONENTS
    grid = np.geomspace(low, high, 200)
    best = int(np.argmin([residuals(exponent).var() for exponent in grid]))
    if best in (0, len(grid) - 1):
        return None
    found = minimize_scalar(
        lambda exponent: residuals(exponent).var(), bounds=(grid[best - 1], grid[best + 1]), method="bounded"
    )
    return float(found.x), float(math.exp(residuals(found.x).mean()))


def compute_student_half_width(without: np.ndarray) -> float:
    """Of Student's interval of a number, from what it is without each seed (jackknife)."""
    count = len(without)
    variance = (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)


def fit_rate(law: Law, values: Mapping[int, np.ndarray]) -> Rate:
    """The rate along one axis. values: size -> (seeds, entries), the same seeds at each.

    Sizes count whose squared distance exceeds its noise. Intervals are Student's, from a jackknife over seeds.
    """
    ordered = sorted(values)
    largest, smaller = ordered[-1], ordered[:-1]
    sizes, count = np.array(smaller, dtype=float), len(values[largest])
    distance = error = noise = np.full(len(sizes), np.nan)

    def rate(remark: str, fitted: tuple[float, float] | None = None, bounds: tuple[float, float] | None = None) -> Rate:
        exponent, factor = fitted or (None, None)
        return Rate(law, sizes, largest, distance, error, noise, exponent, bounds, factor, remark)

    if len(ordered) < MIN_SIZES or count < MIN_SEEDS:
        return rate(f"needs {MIN_SIZES} sizes and {MIN_SEEDS} seeds that train, found {len(ordered)} and {count}")

    def squared(of: Mapping[int, np.ndarray]) -> np.ndarray:
        """Of each smaller size (squared distance, its noise). (sizes, 2)"""
        return np.array([measure_squared_distance(of[size], of[largest], law.measure) for size in smaller])

    found = squared(values)
    clear = found[:, 0] > found[:, 1]
    distance, noise = np.sqrt(np.where(clear, found[:, 0], np.nan)), np.sqrt(found[:, 1])
    rest = ({size: np.delete(rows, seed, axis=0) for size, rows in values.items()} for seed in range(count))
    again = np.array([squared(each)[:, 0] for each in rest])  # (seeds, sizes)
    again = np.sqrt(np.where(clear & (again > 0), again, np.nan))
    error = np.array([compute_student_half_width(column) for column in again.T])
    if clear.sum() < MIN_SIZES - 1:
        return rate(f"not resolved: {int((~clear).sum())} of {len(smaller)} distances are lost in the seeds' noise")
    fitted = fit_exponent(law, sizes[clear], largest, distance[clear])
    if fitted is None:
        return rate("does not fall as a power of the size")
    lost = "" if clear.all() else f"without {law.axis} {', '.join(f'{x:g}' for x in sizes[~clear])}: lost in the noise"
    refitted = [fit_exponent(law, sizes[clear], largest, row) for row in again[:, clear] if np.isfinite(row).all()]
    exponents = np.array([each[0] for each in refitted if each])
    if len(exponents) < count:
        return rate("; ".join(filter(None, [lost, "interval unknown: one seed decides"])), fitted)
    half = compute_student_half_width(exponents)
    return rate(lost, fitted, (fitted[0] - half, fitted[0] + half))


def fit_rates(values: Mapping[int, np.ndarray], axis: str, laws: Sequence[Law] = LAWS) -> list[Rate]:
    """One per law of `axis`."""
    return [fit_rate(law, values) for law in laws if law.axis == axis]


@dataclass(frozen=True)
class Line:
    """One parameterization along one axis. Values are size along the axis -> (seeds, entries)."""

    parameterization: str
    axis: str
    value: float  # of the hyperparameter
    seeds: tuple[int, ...]
    steps: np.ndarray  # of the loss curves' entries
    values: dict[str, dict[int, np.ndarray]]  # by quantity
    left_out: str  # which sizes, and why

    def rates(self, quantity: str) -> list[Rate]:
        return fit_rates(self.values[quantity], self.axis)


def select_along_axis(comparisons: list[Comparison], base: Size, axis: str) -> list[Comparison]:
    """The sizes that differ from the base in `axis` alone, and the base, in order."""
    same = [c for c in comparisons if c.curve.size.is_beside(base, axis)]
    return sorted(same, key=lambda c: getattr(c.curve.size, axis))
