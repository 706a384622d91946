"""How fast do networks on a grid of widths and depths approach limits that are known?

Pure functions of vectors. Of each size there is an array (seeds, entries); of the limit at infinite width and each
depth, and at infinite width and depth, an array (2, entries): two independent halves of a Monte Carlo, whose
difference is its error.

The distance of a point is modelled as  factor * size^-p * exp(c / size):  p is common to all points of a law, c is
the next order, which sizes from 32 or from 3 on still feel, and each line of points has a factor of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from depthmup.launch.findings.convergence import (
    MIN_SEEDS,
    MIN_SIZES,
    Law,
    compute_student_half_width,
    measure_squared_distance,
)
from depthmup.launch.findings.intervals import CONFIDENCE

EXTRAPOLATED = 2  # orders of 1 / width: a first order alone leaves an error that does not fall with depth
CLEAR = 2.0  # standard errors by which a squared distance has to exceed 0


@dataclass(frozen=True)
class Point:
    """Networks beside their limit."""

    line: float  # the size along the other axis, math.inf where points are extrapolated to it
    size: int  # along the law's axis
    values: np.ndarray  # (seeds, entries)
    limit: np.ndarray  # (2, entries)


@dataclass(frozen=True)
class GridRate:
    """Arrays have one entry for each point."""

    law: Law
    lines: np.ndarray
    sizes: np.ndarray
    distance: np.ndarray  # relative to the norm of the limit; NaN where it is lost in the noise
    error: np.ndarray  # standard error
    exponent: float | None  # None where `remark` says why
    interval: tuple[float, float] | None
    next_order: float | None  # c
    factors: dict[float, float]  # of each line that is fitted
    remark: str

    def fitted(self, line: float, sizes: np.ndarray) -> np.ndarray:
        """The distances that the model has on one of `factors`' lines."""
        assert self.exponent is not None
        assert self.next_order is not None
        found: np.ndarray = self.factors[line] * sizes**-self.exponent * np.exp(self.next_order / sizes)
        return found


def extrapolate_width(values: Mapping[int, np.ndarray]) -> np.ndarray:
    """What networks of one depth would be at infinite width, by seed: width -> (seeds, entries) to (seeds, entries).

    A parabola in 1 / width, of least squares with weights that are the widths, as variances fall with these.
    """
    widths = np.array(sorted(values), dtype=float)
    design = widths ** -np.arange(EXTRAPOLATED + 1)[:, None]
    intercept = np.linalg.solve(design * widths @ design.T, design * widths)[0]  # (widths,): sums to 1
    found: np.ndarray = np.tensordot(intercept, np.stack([values[int(width)] for width in widths]), axes=1)
    return found


def list_points(
    law: Law, values: Mapping[tuple[int, int], np.ndarray], limits: Mapping[float, np.ndarray]
) -> list[Point]:
    """values: (width, depth) -> (seeds, entries); limits: depth -> (2, entries).

    Over width, every depth is a line of points beside the infinitely wide network of that depth. Over depth there is
    one line, of networks extrapolated to infinite width, beside the limit of both: an error of order 1 / width does not
    fall with depth, and would bend the line.
    """
    if law.axis == "width":
        return [Point(depth, width, found, limits[depth]) for (width, depth), found in sorted(values.items())]
    by_depth: dict[int, dict[int, np.ndarray]] = {}
    for (width, depth), found in sorted(values.items()):
        by_depth.setdefault(depth, {})[width] = found
    several = {depth: of for depth, of in by_depth.items() if len(of) > EXTRAPOLATED}
    return [Point(math.inf, depth, extrapolate_width(of), limits[math.inf]) for depth, of in sorted(several.items())]


def fit_grid(law: Law, points: Sequence[Point]) -> GridRate:
    """By least squares in log(distance), every point weighted by its error. Points count that are CLEAR of 0, at sizes
    at which most are.

    The interval is Student's from a jackknife over seeds, and holds the error of the limit's Monte Carlo.
    """
    lines, sizes = np.array([point.line for point in points]), np.array([float(point.size) for point in points])
    count = len(points[0].values) if points else 0
    distance = error = np.full(len(points), np.nan)

    def rate(remark: str) -> GridRate:
        return GridRate(law, lines, sizes, distance, error, None, None, None, {}, remark)

    if count < MIN_SEEDS:
        return rate(f"needs {MIN_SEEDS} seeds that train, found {count}")

    def squared(seeds: np.ndarray, half: int | None = None) -> np.ndarray:
        """(points,), from some seeds and the limit's mean, or one half of it."""
        targets = (point.limit.mean(axis=0) if half is None else point.limit[half] for point in points)
        pairs = zip(points, targets, strict=True)
        return np.array([measure_squared_distance(p.values[seeds], t[None], law.measure)[0] for p, t in pairs])

    every = np.arange(count)
    found = squared(every)
    again = np.array([squared(np.delete(every, seed)) for seed in every])  # (seeds, points)
    variance = (count - 1) / count * ((again - again.mean(axis=0)) ** 2).sum(axis=0)
    if law.measure == "mean":
        spread = (np.diff(point.limit, axis=0)[0] / 2 for point in points)
        norms = (point.limit.mean(axis=0) for point in points)
        known = np.array([float((s**2).sum() / (n**2).sum()) for s, n in zip(spread, norms, strict=True)])
        variance += 4 * np.maximum(found, known) * known
    deviation = np.sqrt(variance)
    halves = np.array([squared(every, half) for half in (0, 1)])
    clear = (found > CLEAR * deviation) & (again > 0).all(axis=0) & (halves > 0).all(axis=0)
    # of a size at which most are lost, those that noise made large are left: it does not count at all
    clear &= np.array([clear[sizes == size].mean() > 0.5 for size in sizes])
    distance = np.sqrt(np.where(clear, found, np.nan))
    error = deviation / 2 / np.sqrt(np.where(clear, found, deviation))
    own = sorted(set(lines[clear]))
    design = np.stack([*(lines[clear] == line for line in own), -np.log(sizes[clear]), 1 / sizes[clear]], axis=1)
    if len(design) <= design.shape[1] or len(set(sizes[clear])) < MIN_SIZES:
        return rate(f"not resolved: {int((~clear).sum())} of {len(points)} distances are lost in the noise")
    weights = (2 * found / deviation)[clear]

    def fit(squares: np.ndarray) -> np.ndarray:
        solution: np.ndarray = np.linalg.lstsq(
            design * weights[:, None], np.log(squares[clear]) / 2 * weights, rcond=None
        )[0]
        return solution

    best, exponents = fit(found), np.array([fit(row)[-2] for row in again])
    of_limit = float(ndtri((1 + CONFIDENCE) / 2)) * abs(fit(halves[0])[-2] - fit(halves[1])[-2]) / 2
    half = math.hypot(compute_student_half_width(exponents), of_limit)
    lost = int((~clear).sum())
    return GridRate(
        law,
        lines,
        sizes,
        distance,
        error,
        exponent=float(best[-2]),
        interval=(float(best[-2]) - half, float(best[-2]) + half),
        next_order=float(best[-1]),
        factors=dict(zip(own, np.exp(best[: len(own)]).tolist(), strict=True)),
        remark=f"{lost} of {len(points)} distances are lost in the noise" if lost else "",
    )
