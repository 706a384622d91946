"""What more runs would tell of a curve's slope at one value: the variance of the model of launch.findings.curve_model,
with its noise and its curvature taken as known. It depends on where runs are, and not on what they find.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from depthmup.launch.findings.analysis import Curve
from depthmup.launch.findings.curve_model import (
    MEAN_SKEW_DEVIATION,
    QUARTIC_DEVIATION,
    ROUGHNESS,
    SKEW_DEVIATION,
    compute_integrated_noise,
    select_fitted_values,
)
from depthmup.launch.findings.failures import ASSUMED_NOISE, LEAST_SEED_NOISE
from depthmup.launch.findings.value_effects import estimate_effects
from depthmup.launch.findings.verdict import SURE, Limits

Run = tuple[float, int]  # octaves, seed
STEP = 0.25  # octaves: a slope is the difference of the curve over two of them
SURENESS = NormalDist().inv_cdf(SURE)


def estimate_noise(curves: Sequence[Curve]) -> float:
    """Standard deviation of a run's log loss about its curve, seeds' offsets taken off, pooled over `curves`."""
    square, freedom = 0.0, 0
    for curve in curves:
        mean = np.log(curve.mean)
        if np.isfinite(mean).any():
            kept = select_fitted_values(curve.x, mean)
            effects = estimate_effects(curve.x[kept], np.log(curve.usable[:, kept]))
            square, freedom = square + effects.residual, freedom + effects.freedom
    return max(math.sqrt(square / freedom), LEAST_SEED_NOISE) if freedom else ASSUMED_NOISE


def estimate_curvature(curve: Curve, x: float) -> float:
    """Of the log loss per squared octave about x: the median of the model's draws, over as wide a piece as there is."""
    assert curve.posterior is not None
    grid = curve.posterior.grid
    half = min(1.0, (grid[-1] - grid[0]) / 2)
    centre = min(max(x, grid[0] + half), grid[-1] - half)
    left, middle, right = (curve.posterior.at(centre + side * half) for side in (-1, 0, 1))
    return max(float(np.median(left - 2 * middle + right)) / half**2, 1e-4)


def compute_slope_variance(runs: Sequence[Run], x: float, noise: float, curvature: float) -> float:
    """Of the slope at x, by universal kriging: quadratic and seeds' offsets free. Infinite where runs
    cannot tell it."""
    octaves, seeds = np.array([run[0] for run in runs]), np.array([run[1] for run in runs])
    names = np.unique(seeds)
    points = np.concatenate([octaves, [x - STEP, x + STEP]]) - x
    contrast = np.array([-1.0, 1.0]) / (2 * STEP)
    cubic, quartic = points**3 / 6, QUARTIC_DEVIATION * points**4 / 24
    skew = MEAN_SKEW_DEVIATION**2 / 4 + np.mean(SKEW_DEVIATION**2)  # the common part is half known
    rough = ROUGHNESS[1] ** 2 * compute_integrated_noise(points - points.min(), points - points.min())
    prior = curvature**2 * (skew * np.outer(cubic, cubic) + np.outer(quartic, quartic) + rough)
    count = len(runs)
    weight = np.linalg.inv(prior[:count, :count] + noise**2 * np.eye(count))
    free = np.column_stack([seeds[:, None] == names, points[:count], points[:count] ** 2])
    information = free.T @ weight @ free
    if np.linalg.matrix_rank(free) < free.shape[1]:
        return math.inf
    shared = prior[:count, count:] @ contrast
    wanted = np.zeros(free.shape[1])
    wanted[-2:] = contrast @ np.column_stack([points[count:], points[count:] ** 2])
    left = wanted - free.T @ weight @ shared
    own = contrast @ prior[count:, count:] @ contrast - shared @ weight @ shared
    return float(own + left @ np.linalg.solve(information, left))


@dataclass(frozen=True)
class Aim:
    """What is known of a curve about one value, and what would be enough."""

    runs: tuple[Run, ...]
    x: float
    noise: float
    curvature: float
    distance: float  # octaves: the optimum less x
    deviation: float  # of the distance

    @cached_property
    def slope(self) -> float:
        """Deviation of the curve's slope, by the present runs."""
        return math.sqrt(compute_slope_variance(self.runs, self.x, self.noise, self.curvature))

    def after(self, runs: Sequence[Run]) -> float:
        """The distance's deviation with `runs` in place of the present ones: that of the slope; or, if that is less,
        what is known now times what the runs lessen the slope's by. Beside failing values the slope alone, which
        supposes the shape, can be known worse than the optimum, and would say that no run teaches anything.
        """
        slope = math.sqrt(compute_slope_variance(runs, self.x, self.noise, self.curvature))
        by_shape = slope / self.curvature
        if math.isinf(self.slope):
            return min(by_shape, self.deviation)
        return min(by_shape, self.deviation * min(slope / self.slope, 1.0))

    def outcomes(self, deviation: float, limits: Limits) -> tuple[float, float]:
        """Probabilities that the value is known to transfer, and that it is known not to, once the distance's deviation
        has come down to this: the distance that is then found scatters by what was learned."""
        spread = math.sqrt(max(self.deviation**2 - deviation**2, 0.0))
        found = np.abs(self.distance + spread * NormalDist().inv_cdf(0.999) * QUANTILES)
        high = self.curvature / 2 * (found + SURENESS * deviation) ** 2
        low = self.curvature / 2 * np.maximum(found - SURENESS * deviation, 0.0) ** 2
        transfer, cost = math.log1p(limits.transfer), math.log1p(limits.cost)
        against = (low > cost) | ((low > transfer) & (high <= cost))
        return float(WEIGHTS @ (high <= transfer)), float(WEIGHTS @ against)

    def settles(self, deviation: float, limits: Limits) -> float:
        """Probability that the regret is then known well enough."""
        return sum(self.outcomes(deviation, limits))


QUANTILES = np.linspace(-1, 1, 201)
WEIGHTS = np.exp(-((NormalDist().inv_cdf(0.999) * QUANTILES) ** 2) / 2)
WEIGHTS /= WEIGHTS.sum()


def list_moves(
    runs: Sequence[Run], x: float, values: Sequence[float], seeds: Sequence[int], fresh: int
) -> list[list[Run]]:
    """Ways to go on: the seed `fresh` at two values about x that there are, the furthest two, the next two, ...; or one
    of `values` with `seeds`. A seed's offset is known only from values that other seeds ran."""
    there = sorted({value for value, _ in runs if abs(value - x) <= max(abs(v - x) for v in values)})
    pairs = [(low, high) for low, high in zip(there, reversed(there), strict=True) if low < high]
    found = [[(value, fresh) for value in pair] for pair in pairs]
    for value in values:
        found.append([(value, seed) for seed in seeds if (value, seed) not in runs])
    return [move for move in found if move]


def choose_best_move(aim: Aim, runs: Sequence[Run], options: Sequence[list[Run]]) -> list[Run]:
    """The one that lessens the variance most per run."""
    before = compute_slope_variance(runs, aim.x, aim.noise, aim.curvature)

    def gain(move: list[Run]) -> float:
        return (before - compute_slope_variance([*runs, *move], aim.x, aim.noise, aim.curvature)) / len(move)

    return max(options, key=gain)
