"""From a study's runs to curves, and from curves to what carrying the base's optimum over costs at every size.

All of it is a pure function of the runs' results. x is the swept hyperparameter in octaves. Every interval comes from
the one model of launch.findings.curve_model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from depthmup.launch.config import LATTICE, Size
from depthmup.launch.findings.curve_model import Posterior, average_seeds, fit_curves
from depthmup.launch.findings.failures import (
    ERRORS,
    NO_RUNS,
    Failures,
    find_dead_runs,
    find_failing_values,
    find_lost_runs,
    seed_noise,
    select_usable_runs,
)
from depthmup.launch.findings.intervals import CONFIDENCE, bound_regret, compute_interval, compute_quantile

Side = Literal["low", "high"]
AS_IF_RUN = 1 / (2 * LATTICE)  # octaves: what runs at a value so near say of failing holds for the carried one
LEAST_LOSS = 1e-7  # what single precision can tell from a loss of 0, which has no logarithm


def average_losses(usable: np.ndarray) -> np.ndarray:
    """(seeds, values) -> (values,): geometric means over the seeds that trained, free of the seeds' offsets, infinite
    where the value fails."""
    found: np.ndarray = np.exp(average_seeds(np.log(usable)))
    return found


@dataclass(frozen=True)
class Result:
    """One finished run. `metric` is infinite where it diverged."""

    parameterization: str
    size: Size
    value: float
    seed: int
    metric: float


@dataclass(frozen=True)
class Optimum:
    """Of one curve. `x` is None where no value trains."""

    x: float | None  # the median of the model's draws
    metric: float  # `Curve.mean` at the best value that was run; infinite where all failed
    censored: Side | None  # the side on which the optimum may lie beyond the values that were run
    interval: tuple[float, float] | None  # infinite on a side on which it may lie beyond; None where nothing tells it


@dataclass(frozen=True)
class Curve:
    """All runs of one parameterization and size."""

    parameterization: str
    size: Size
    values: np.ndarray
    x: np.ndarray
    seeds: tuple[int, ...]
    metric: np.ndarray  # (seeds, values): infinite where a run diverged, NaN where there is none
    failed: np.ndarray  # (seeds, values): diverged, learned nothing, or broke down
    fails: np.ndarray  # (values,): whether a value fails; elsewhere failed runs are single ones, and are left out
    learns: bool  # whether the best value beats chance by more than noise
    chance: float  # the loss of a guess, above which no regret is sought
    posterior: Posterior | None = field(repr=False)
    optimum: Optimum

    @cached_property
    def usable(self) -> np.ndarray:
        """`metric`, infinite where a value fails, NaN where a single run did."""
        return select_usable_runs(self.metric, self.failed, self.fails)

    @cached_property
    def mean(self) -> np.ndarray:
        """`average_losses` of the usable runs. (values,)"""
        return average_losses(self.usable)

    def failures(self, index: int) -> Failures:
        """Of the runs at one value."""
        return Failures(int(self.failed[:, index].sum()), int((~np.isnan(self.metric[:, index])).sum()))

    def surely_fails(self, index: int) -> bool:
        """Whether a value that fails does so by more than bad luck: all of several runs fail, or many do, there or at a
        neighbour; or its only run, unless those to both sides train."""
        own = self.failures(index)
        beside = [each for each in (index - 1, index + 1) if 0 <= each < len(self.x)]
        if own.runs == 1:
            return len(beside) < 2 or not np.isfinite(self.mean[beside]).all()
        return own.are_many or any(self.failures(each).are_many for each in beside)

    def find_doubtful_best(self) -> int | None:
        """Index of a value at which runs fail, perhaps by bad luck, and but for that the best may lie: the only run
        between the best value and another that trains; or, where no edge is known as no value surely fails, a value
        whose other runs have a lower loss than the best value has."""
        if self.optimum.x is None:
            return None
        best = int(np.where(np.isfinite(self.mean), self.mean, math.inf).argmin())
        doubtful = [int(index) for index in np.flatnonzero(self.fails) if not self.surely_fails(int(index))]
        trained = average_losses(np.where(self.failed, math.nan, self.metric))
        found = [index for index in doubtful if abs(index - best) == 1 and np.isnan(trained[index])]
        if len(doubtful) == self.fails.sum():
            found += [index for index in doubtful if trained[index] < self.optimum.metric]
        return min(found, key=lambda index: np.nan_to_num(trained[index]), default=None)

    @property
    def num_seeds(self) -> int:
        """Most seeds that a value was run with."""
        return int((~np.isnan(self.metric)).sum(axis=0).max())

    def at(self, x: float) -> int:
        """Index of the value nearest to x."""
        return int(np.abs(self.x - x).argmin())

    def list_values_near_optimum(self) -> list[float]:
        """The values that say most of the optimum: those within its interval, and their neighbours."""
        low, high = self.optimum.interval or (self.x[0], self.x[-1])
        first = max(int(np.searchsorted(self.x, low, side="right")) - 1, 0)
        last = int(np.searchsorted(self.x, high))
        return [float(value) for value in self.values[first : last + 1]]


@dataclass(frozen=True)
class Comparison:
    """What carrying the base's optimum to one size does. Regrets are shares of the size's lowest loss."""

    curve: Curve
    drift: float | None  # octaves: this optimum minus the base's
    interval: tuple[float, float] | None  # of the drift
    at_base_optimum: float  # loss at the carried value; infinite: runs fail there, NaN: the base has no optimum
    measured: bool  # whether runs at the very value that is carried say so
    regret: float  # NaN where there is none to carry, infinite where runs fail
    regret_interval: tuple[float, float] | None
    regret_bound: float  # the regret is below this with a probability of (1 + CONFIDENCE) / 2
    carried: float | None = None  # octaves of the value that is carried over
    failures: Failures = NO_RUNS  # at the value nearest to it; where runs may train, at the nearest that trains
    needs_run: bool = False  # whether only runs at the carried value could tell: at an edge, or beyond all values run


# ---------------------------------------------------------------- curves


def beats_chance(usable: np.ndarray, chance: float) -> bool:
    """Whether the lowest mean of a curve lies below chance by more than ERRORS standard errors.

    usable: (seeds, values), infinite where a value fails."""
    logs = np.log(usable)
    mean = average_seeds(logs)
    if not np.isfinite(mean).any():
        return False
    best = int(np.where(np.isfinite(mean), mean, math.inf).argmin())
    noise = seed_noise(np.where(np.isinf(logs), math.nan, logs))
    return bool(math.log(chance) - mean[best] > ERRORS * noise / math.sqrt(np.isfinite(logs[:, best]).sum()))


def find_optimum(x: np.ndarray, usable: np.ndarray, learns: bool, posterior: Posterior | None) -> Optimum:
    """usable: (seeds, values), infinite where a value fails.

    Without a posterior (fewer than three values about the best train, or nothing tells the noise) the optimum is
    known to lie between the neighbours of the best value, no better.
    """
    mean = average_losses(usable)
    finite = np.isfinite(mean)
    if not finite.any():
        return Optimum(None, math.inf, None, None)
    best = int(np.where(finite, mean, math.inf).argmin())
    if not learns:
        return Optimum(None, float(mean[best]), None, None)
    side: Side | None = "low" if best == 0 else "high" if best == len(x) - 1 else None
    if posterior is None:
        low = -math.inf if best == 0 else float(x[best - 1])
        high = math.inf if best == len(x) - 1 else float(x[best + 1])
        return Optimum(float(x[best]), float(mean[best]), side, (low, high) if len(x) > 1 else None)
    optima, (low, high) = posterior.optima, compute_interval(posterior.optima)
    trained = x[finite]
    beyond = (1 - CONFIDENCE) / 2  # share of draws whose lowest point is the last value that was fitted, and trained
    if posterior.grid[0] in trained and (optima <= posterior.grid[0]).mean() > beyond:  # up to the next one that trains
        low = float(max(trained[trained < posterior.grid[0]], default=-math.inf))
    if posterior.grid[-1] in trained and (optima >= posterior.grid[-1]).mean() > beyond:
        high = float(min(trained[trained > posterior.grid[-1]], default=math.inf))
    return Optimum(float(np.median(optima)), float(mean[best]), side, (low, high))


def make_curves(results: Sequence[Result], octaves: Callable[[float], float], chance: float) -> list[Curve]:
    """One curve per (parameterization, size), in order of appearance. Curves of the same runs are fitted once, in an
    order of their own: the same runs give the same draws, in whatever order they come."""
    grouped: dict[tuple[str, Size], dict[tuple[int, float], float]] = {}
    for result in results:
        grouped.setdefault((result.parameterization, result.size), {})[result.seed, result.value] = (
            max(result.metric, LEAST_LOSS) if math.isfinite(result.metric) else math.inf  # no number: diverged
        )
    made = []
    for name, metrics in grouped.items():
        seeds = sorted({seed for seed, _ in metrics})
        values = np.array(sorted({value for _, value in metrics}, key=octaves))
        x = np.array([octaves(value) for value in values])
        metric = np.array([[metrics.get((seed, value), math.nan) for value in values] for seed in seeds])
        dead = find_dead_runs(metric, chance)
        lost = find_lost_runs(metric, chance) & ~dead
        failed, fails = dead | lost, find_failing_values(metric, dead, lost)
        usable = select_usable_runs(metric, failed, fails)
        made.append((name, values, x, tuple(seeds), metric, failed, fails, usable, beats_chance(usable, chance)))
    distinct = {
        (size, x.tobytes(), usable.tobytes()): (x, np.log(usable)) for (_, size), _, x, _, _, _, _, usable, _ in made
    }
    ordered = sorted(distinct, key=lambda key: (sorted(key[0].axes.items()), *key[1:]))
    posteriors = dict(zip(ordered, fit_curves([distinct[key] for key in ordered]), strict=True))
    found = []
    for (parameterization, size), values, x, names, metric, failed, fails, usable, learns in made:
        posterior = posteriors[size, x.tobytes(), usable.tobytes()] if learns else None
        optimum = find_optimum(x, usable, learns, posterior)
        runs = metric, failed, fails
        found.append(Curve(parameterization, size, values, x, names, *runs, learns, chance, posterior, optimum))
    return found


# ---------------------------------------------------------------- comparisons


def compare_optima(base: Curve, curve: Curve) -> tuple[float | None, tuple[float, float] | None]:
    """(drift, its interval) in octaves."""
    if base.optimum.x is None or curve.optimum.x is None:
        return None, None
    drift = curve.optimum.x - base.optimum.x
    if base.optimum.interval is None or curve.optimum.interval is None:
        return drift, None
    (base_low, base_high), (low, high) = base.optimum.interval, curve.optimum.interval
    if base.posterior is None or curve.posterior is None:
        return drift, (low - base_high, high - base_low)
    found = compute_interval(curve.posterior.optima - base.posterior.optima)
    is_open = math.isinf(low) or math.isinf(base_high), math.isinf(high) or math.isinf(base_low)
    return drift, (-math.inf if is_open[0] else found[0], math.inf if is_open[1] else found[1])


def lies_beyond(curve: Curve, x: float) -> bool:
    """Whether x lies beyond all values that were run, but not beyond an edge: behind a failing value, seen from those
    that train, runs fail too."""
    trains = np.isfinite(curve.mean)
    if curve.x[0] - AS_IF_RUN <= x <= curve.x[-1] + AS_IF_RUN:
        return False
    return bool(trains[curve.at(x)] or not trains.any())


def estimate_failing_probability(curve: Curve, x: float) -> float:
    """That runs at x fail: known where a value so near was run, and between values that both train or both fail.
    Between the last value that trains and one that fails lies the edge, anywhere."""
    trains = np.isfinite(curve.mean)
    nearest, above = curve.at(x), int(np.searchsorted(curve.x, x))
    is_near = abs(curve.x[nearest] - x) <= AS_IF_RUN
    if is_near or above in (0, len(curve.x)) or trains[above - 1] == trains[above]:
        return float(not trains[nearest])
    share = float((x - curve.x[above - 1]) / (curve.x[above] - curve.x[above - 1]))
    return share if trains[above - 1] else 1 - share


def log_regrets(curve: Curve, x: float) -> np.ndarray | None:
    """Draws of the log of the loss at x over the lowest, at most that of a guess, infinite where runs fail; None
    without a posterior."""
    if curve.posterior is None:
        return None
    most = math.log(curve.chance) - curve.posterior.lowest
    failing = estimate_failing_probability(curve, x)
    if curve.posterior.grid[0] <= x <= curve.posterior.grid[-1]:
        regrets = np.clip(curve.posterior.at(x) - curve.posterior.lowest, 0.0, most)
        return np.where(np.isinf(curve.posterior.regrets(x)), math.inf, regrets) if failing else regrets
    # beyond the values that the curve is fitted to: what was measured there, with the noise of that mean; beside a
    # value at which runs fail it is the loss of the last one that trains, which a curve's loss is no lower than there
    logs = np.log(curve.usable)
    means = average_seeds(logs)
    trains = np.isfinite(means)
    nearest = np.flatnonzero(trains)[np.abs(curve.x[trains] - x).argmin()]
    mean = means[nearest] if failing else np.interp(x, curve.x[trains], means[trains])
    ran = int(np.isfinite(logs[:, nearest]).sum())
    noise = seed_noise(np.where(np.isinf(logs), math.nan, logs)) / math.sqrt(max(ran, 1))
    generator = np.random.default_rng(0)
    errors = noise * generator.standard_normal(len(curve.posterior.lowest))
    found = np.clip(mean + errors - curve.posterior.lowest, 0.0, most)
    return np.where(generator.random(len(found)) < failing, math.inf, found)


def compare(base: Curve, curve: Curve, carried: float | None) -> Comparison:
    """carried: octaves of the value that is carried over."""
    drift, interval = compare_optima(base, curve)
    if carried is None:
        return Comparison(curve, drift, interval, math.nan, False, math.nan, None, math.nan)
    nearest = curve.at(carried)
    measured, failures = bool(abs(curve.x[nearest] - carried) < 1e-6), curve.failures(nearest)
    beyond, failing = lies_beyond(curve, carried), estimate_failing_probability(curve, carried)
    if failing > (1 + CONFIDENCE) / 2 and not beyond:
        return Comparison(curve, drift, interval, math.inf, measured, math.inf, None, math.inf, carried, failures)
    needs_run = beyond or 0 < failing < 1
    trained = np.flatnonzero(np.isfinite(curve.mean))
    regrets = log_regrets(curve, carried) if len(trained) else None
    if beyond:  # no lower than at the last value that was run, if the curve rises up to that
        low = math.expm1(compute_interval(regrets)[0]) if regrets is not None and not curve.optimum.censored else 0.0
        known = math.nan, False, math.nan, (low, math.inf), math.inf
        return Comparison(curve, drift, interval, *known, carried, needs_run=True)
    nearest = int(trained[np.abs(curve.x[trained] - carried).argmin()])
    at_nearest, failures = float(curve.mean[nearest]), curve.failures(nearest)
    if regrets is None:
        regret = at_nearest / curve.optimum.metric - 1
        told = carried, failures, needs_run
        return Comparison(curve, drift, interval, at_nearest, measured, regret, None, math.inf, *told)
    assert curve.posterior is not None
    low, high = bound_regret(curve.posterior.optima, regrets, carried)
    # where runs may fail, of the draws in which they train
    regret = math.expm1(max(float(np.median(regrets[np.isfinite(regrets)])), low))
    expected = math.exp(float(np.median(curve.posterior.lowest))) * (1 + regret)
    return Comparison(
        curve,
        drift,
        interval,
        at_nearest if measured else expected,
        measured,
        regret,
        (math.expm1(low), math.expm1(high)),
        math.expm1(compute_quantile(regrets, (1 + CONFIDENCE) / 2)),
        carried,
        failures,
        needs_run,
    )


Carry = Callable[[Curve, Sequence[Curve]], float | None]  # (the base's, those of all sizes) -> octaves


def carry_optimum(base: Curve, curves: Sequence[Curve]) -> float | None:
    """The base's optimum, which may lie between the values that were run."""
    return base.optimum.x


def analyse_sizes(
    results: Sequence[Result],
    base_size: Size,
    octaves: Callable[[float], float] = math.log2,
    chance: float = math.inf,
    carry: Carry = carry_optimum,
) -> tuple[list[Curve], list[Comparison]]:
    """All curves, and of every parameterization with results at the base size the comparison of each size with it,
    the base itself first. `chance`: the loss of a guess. `carry` says which value is carried over."""
    curves = make_curves(results, octaves, chance)
    comparisons = []
    for base in (curve for curve in curves if curve.size == base_size):
        own = [curve for curve in curves if curve.parameterization == base.parameterization]
        own.sort(key=lambda curve: curve.size != base_size)
        x = carry(base, own)
        comparisons += [compare(base, curve, x) for curve in own]
    return curves, comparisons
