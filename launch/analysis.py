"""Does the optimum stay put? Curves, drifts with intervals, regret, and a verdict whose rule is stated.

All of it is a pure function of the runs' results. x is the swept hyperparameter in octaves, y the metric.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from launch.config import Size
from launch.optimum import (
    CONFIDENCE,
    Optimum,
    Side,
    Spread,
    difference,
    excess_interval,
    fit_optimum,
    interval,
    jackknife,
    level,
    window,
)

TRAINED = 0.95  # a loss above this share of a guess's loss, ln(number of classes), says that nothing was learned
Verdict = Literal["transfers", "does not transfer", "inconclusive"]


@dataclass(frozen=True)
class Result:
    """One finished run. `metric` is infinite where it diverged."""

    parameterization: str
    size: Size
    value: float
    seed: int
    metric: float


@dataclass(frozen=True)
class Curve:
    """All runs of one parameterization and size. `metric`: (seeds, values), infinite: diverged, NaN: no run."""

    parameterization: str
    size: Size
    values: np.ndarray
    x: np.ndarray
    metric: np.ndarray
    optimum: Optimum
    spread: Spread | None  # of the optimum's x, over seeds; None with one seed

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds, infinite where any seed diverged. (values,)"""
        return level(self.metric)

    @property
    def trains(self) -> bool:
        """False where runs end, but at the loss of a guess."""
        return self.optimum.x is not None or math.isinf(self.optimum.metric)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the optimum's x; None with one seed, and without an optimum."""
        if self.optimum.x is None:
            return None
        sides = frozenset({self.optimum.censored} if self.optimum.censored else ())
        return interval(self.optimum.x, self.spread, resolution=self.optimum.resolution, open_sides=sides)

    def near_optimum(self) -> list[float]:
        """The values that the optimum was fitted to."""
        return [float(value) for value in self.values[window(self.mean)]]

    def at(self, x: float) -> int:
        """Index of the value nearest to x."""
        return int(np.abs(self.x - x).argmin())


@dataclass(frozen=True)
class Comparison:
    """One size against the base of its parameterization."""

    curve: Curve
    drift: float | None  # octaves: x of this optimum minus x of the base's
    interval: tuple[float, float] | None  # None with one seed at either size
    at_base_optimum: float  # metric at the base's optimum (nearest grid point); infinite: diverged, NaN: it has none
    regret: float  # that minus this size's best
    regret_interval: tuple[float, float] | None  # over seeds; None with one seed and where the regret is not finite


@dataclass(frozen=True)
class Judgement:
    parameterization: str
    verdict: Verdict
    reason: str
    unsure: tuple[Size, ...] = ()  # the sizes at which more seeds could settle an inconclusive verdict


def curves(
    results: Sequence[Result], octaves: Callable[[float], float] = math.log2, chance: float = math.inf
) -> list[Curve]:
    """One curve per (parameterization, size), in order of appearance. `chance`: the loss of a guess."""
    grouped: dict[tuple[str, Size], dict[tuple[int, float], float]] = {}
    for result in results:
        grouped.setdefault((result.parameterization, result.size), {})[result.seed, result.value] = result.metric
    found = []
    for (parameterization, size), metrics in grouped.items():
        seeds = sorted({seed for seed, _ in metrics})
        values = sorted({value for _, value in metrics}, key=octaves)
        x = np.array([octaves(value) for value in values])
        metric = np.array([[metrics.get((seed, value), math.nan) for value in values] for seed in seeds])
        optimum = fit_optimum(x, level(metric))
        if math.isfinite(optimum.metric) and optimum.metric > TRAINED * chance:
            optimum = replace(optimum, x=None)
        found.append(Curve(parameterization, size, np.array(values), x, metric, optimum, jackknife(x, metric)))
    return found


def compare(base: Curve, curve: Curve) -> Comparison:
    """Drift, its interval (seeds of both curves) and regret of `curve` against `base`."""
    if base.optimum.x is None:
        return Comparison(curve, None, None, math.nan, math.nan, None)
    drift = found = None
    if curve.optimum.x is not None:
        drift = curve.optimum.x - base.optimum.x
        sides: set[Side] = {curve.optimum.censored} if curve.optimum.censored else set()
        if base.optimum.censored:  # the further down the base's optimum lies, the further up is the drift
            sides.add("high" if base.optimum.censored == "low" else "low")
        found = interval(
            drift,
            difference(curve.spread, base.spread),
            resolution=curve.optimum.resolution + base.optimum.resolution,
            open_sides=frozenset(sides),
        )
    carried_over = curve.at(base.optimum.x)
    at_base = float(curve.mean[carried_over])
    regret = at_base - curve.optimum.metric if math.isfinite(at_base) else math.inf
    return Comparison(curve, drift, found, at_base, regret, excess_interval(curve.metric, carried_over))


def rule(tolerance: float) -> str:
    """The verdict's rule in words; `judge` is its code."""
    return (
        f"transfers: at every size the optimum lies within {tolerance:g} octave(s) of the base's, the {CONFIDENCE:.0%} "
        f"interval of this drift within {2 * tolerance:g}, the optimum is not on the grid's edge, and no seed diverges "
        f"at the base's optimum. does not transfer: at some size every value diverges or learns nothing, or the base's "
        f"optimum diverges, or the drift exceeds {tolerance:g} octave(s) together with its whole interval. "
        f"inconclusive: anything else, and one seed always unless nothing trains."
    )


def show_drift(octaves: float) -> str:
    """'-1.2', and '+0.0' for what rounds to nothing."""
    return f"{octaves if abs(octaves) >= 0.05 else 0.0:+.1f}"


def show_interval(found: tuple[float, float]) -> str:
    """'-1.2 to +0.3', or 'below -1.2' where one side is open."""
    low, high = map(show_drift, found)
    if math.isinf(found[0]) and math.isinf(found[1]):
        return "unknown"
    if math.isinf(found[0]):
        return f"below {high}"
    return f"above {low}" if math.isinf(found[1]) else f"{low} to {high}"


def show_range(found: tuple[float, float] | None) -> str:
    """'0.012 to 0.03' of an interval of a metric."""
    return f"{found[0]:.2g} to {found[1]:.2g}" if found else ""


def without_optimum(curve: Curve) -> str:
    if math.isinf(curve.optimum.metric):
        return f"every value diverged at {curve.size}"
    return (
        f"does not train at {curve.size} (best loss {curve.optimum.metric:.3g}, above {TRAINED:.0%} of that of a guess)"
    )


def judge_size(
    base: Curve, comparison: Comparison, tolerance: float
) -> tuple[Literal["failed", "doubtful"], str] | None:
    """What stands against a transfer to one size; None when nothing does."""
    curve, size = comparison.curve, comparison.curve.size
    if comparison.drift is None:
        return "failed", without_optimum(curve)
    if comparison.interval is None:
        return "doubtful", f"one seed at {base.size if base.spread is None else size}"
    low, high = comparison.interval
    drift = f"drift {show_drift(comparison.drift)}"
    if not math.isfinite(comparison.at_base_optimum):
        return "failed", f"the base's optimum diverges at {size}"
    if low > tolerance or high < -tolerance:
        return "failed", f"{drift} octaves at {size}"
    if curve.optimum.censored:
        return "doubtful", f"the optimum at {size} is on the {curve.optimum.censored} edge of the grid"
    if abs(comparison.drift) > tolerance:
        return "doubtful", f"{drift} at {size}, but its interval reaches into the tolerance"
    if max(-low, high) > 2 * tolerance and not base.optimum.censored:
        return "doubtful", f"{drift} at {size} is known to {show_interval(comparison.interval)} only"
    return None


def judge(base: Curve, comparisons: Sequence[Comparison], tolerance: float) -> Judgement:
    """The verdict on one parameterization, and the sizes that decided it."""
    name = base.parameterization
    if base.optimum.x is None:
        return Judgement(name, "inconclusive", f"the base: {without_optimum(base)}")
    if not comparisons:
        return Judgement(name, "inconclusive", "the study has one size only")
    if len(base.values) == 1:
        return Judgement(name, "inconclusive", "the study has one value only")
    against = [(c.curve, found) for c in comparisons if (found := judge_size(base, c, tolerance))]
    if failed := [reason for _, (kind, reason) in against if kind == "failed"]:
        return Judgement(name, "does not transfer", "; ".join(failed))
    doubtful = list(dict.fromkeys(reason for _, (_, reason) in against))
    if base.optimum.censored:
        doubtful.insert(0, f"the base's optimum is on the {base.optimum.censored} edge of the grid")
    if doubtful:
        unsure = tuple(curve.size for curve, _ in against if not curve.optimum.resolution)
        return Judgement(name, "inconclusive", "; ".join(doubtful), unsure)
    largest = max(comparisons, key=lambda comparison: abs(comparison.drift or 0.0))
    drift = show_drift(largest.drift or 0.0)
    return Judgement(name, "transfers", f"largest drift {drift} octaves, at {largest.curve.size}")


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows, per parameterization in the study's order."""

    curves: list[Curve]
    comparisons: list[Comparison]  # every size, the base itself first
    judgements: list[Judgement]


def analyse(
    results: Sequence[Result],
    base_size: Size,
    tolerance: float,
    octaves: Callable[[float], float] = math.log2,
    chance: float = math.inf,
) -> Analysis:
    """Analyses all results; a parameterization without results at the base size is left out."""
    found = curves(results, octaves, chance)
    comparisons, judgements = [], []
    for base in (curve for curve in found if curve.size == base_size):
        compared = [compare(base, curve) for curve in found if curve.parameterization == base.parameterization]
        compared.sort(key=lambda comparison: comparison.curve.size != base_size)
        comparisons += compared
        judgements.append(judge(base, [c for c in compared if c.curve.size != base_size], tolerance))
    return Analysis(found, comparisons, judgements)


def seeds_wanted(analysis: Analysis, base_size: Size) -> dict[tuple[str, Size], list[float]]:
    """Where one more seed could settle a verdict: values near the optimum, per (parameterization, size).

    Of every parameterization that is inconclusive for want of seeds: the sizes in doubt and the base. Curves on the
    edge of their grid are left out: these need values first.
    """
    wanted = {}
    for judgement in analysis.judgements:
        sizes = {*judgement.unsure, base_size} if judgement.unsure else set()
        for curve in analysis.curves:
            known = curve.optimum.x is not None and not curve.optimum.censored
            if known and curve.size in sizes and curve.parameterization == judgement.parameterization:
                wanted[curve.parameterization, curve.size] = curve.near_optimum()
    return wanted
