"""Does the optimum stay put? Fits, drifts with intervals, regret, and a verdict whose rule is stated.

All of it is a pure function of the runs' results. x is log2 of the swept hyperparameter (octaves), y the metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.config import Size

CONFIDENCE = 0.9
BOOTSTRAP_SAMPLES = 1000
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
class Optimum:
    """The fitted optimum of one curve. `x` is log2 of the hyperparameter; None where every value diverged."""

    x: float | None
    metric: float  # the mean over seeds at the best grid point
    censored: Literal["low", "high"] | None  # the best grid point is the first or last of the grid


@dataclass(frozen=True)
class Curve:
    """All runs of one parameterization and size. `metric`: (seeds, values), infinite where a run diverged."""

    parameterization: str
    size: Size
    x: np.ndarray
    metric: np.ndarray
    optimum: Optimum
    interval: tuple[float, float] | None  # of the optimum's x, over seeds

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds, infinite where any seed diverged. (values,)"""
        return self.metric.mean(axis=0)


@dataclass(frozen=True)
class Comparison:
    """One size against the base of its parameterization."""

    curve: Curve
    drift: float | None  # octaves: x of this optimum minus x of the base's
    interval: tuple[float, float] | None
    regret: float  # metric at the base's optimum (nearest grid point) minus this size's best; infinite if diverged
    at_base_optimum: float  # that metric


@dataclass(frozen=True)
class Judgement:
    parameterization: str
    verdict: Verdict
    reason: str


def fit_optimum(x: np.ndarray, y: np.ndarray) -> Optimum:
    """Vertex of a parabola through the points within two of the lowest, weighted by (lowest / y)^2.

    The weight makes relative errors count alike, so that the steep flanks do not bend the fit. The vertex stays within
    one grid step of the lowest point; a lowest point on the grid's edge is reported as it is, as censored.
    """
    finite = np.isfinite(y)
    if not finite.any():
        return Optimum(None, math.inf, None)
    best = int(np.where(finite, y, math.inf).argmin())
    censored: Literal["low", "high"] | None = "low" if best == 0 else "high" if best == len(x) - 1 else None
    near = np.array([i for i in range(max(best - 2, 0), min(best + 3, len(x))) if finite[i]])
    if censored or len(near) < 3:
        return Optimum(float(x[best]), float(y[best]), censored)
    # np.polyfit multiplies residuals by w, so w = lowest / y weights their squares by its square
    curvature, slope, _ = np.polyfit(x[near] - x[best], y[near], 2, w=y[best] / y[near])
    offset = -slope / (2 * curvature) if curvature > 0 else 0.0
    step_down, step_up = x[best] - x[best - 1], x[best + 1] - x[best]
    return Optimum(float(x[best] + np.clip(offset, -step_down, step_up)), float(y[best]), None)


def bootstrap_optima(x: np.ndarray, metric: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Optimum's x over resampled seeds, NaN where a resample has none. (BOOTSTRAP_SAMPLES,)"""
    seeds = generator.integers(len(metric), size=(BOOTSTRAP_SAMPLES, len(metric)))
    seen: dict[tuple[int, ...], float] = {}  # few seeds make few distinct resamples
    optima = np.empty(BOOTSTRAP_SAMPLES)
    for i, chosen in enumerate(np.sort(seeds, axis=1)):
        key = tuple(chosen.tolist())
        if key not in seen:
            fitted = fit_optimum(x, metric[chosen].mean(axis=0)).x
            seen[key] = math.nan if fitted is None else fitted
        optima[i] = seen[key]
    return optima


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def curves(results: Sequence[Result]) -> list[Curve]:
    """One curve per (parameterization, size), in order of appearance. Values or seeds that lack a run are left out."""
    grouped: dict[tuple[str, Size], dict[tuple[int, float], float]] = {}
    for result in results:
        grouped.setdefault((result.parameterization, result.size), {})[result.seed, result.value] = result.metric
    found = []
    for (parameterization, size), metrics in grouped.items():
        seeds = sorted({seed for seed, _ in metrics})
        values = [v for v in sorted({v for _, v in metrics}) if all((seed, v) in metrics for seed in seeds)]
        if not values:
            continue
        x = np.log2(values)
        metric = np.array([[metrics[seed, value] for value in values] for seed in seeds])
        interval = percentile_interval(bootstrap_optima(x, metric, np.random.default_rng(0)))
        found.append(Curve(parameterization, size, x, metric, fit_optimum(x, metric.mean(axis=0)), interval))
    return found


def compare(base: Curve, curve: Curve) -> Comparison:
    """Drift, its interval (seeds of both curves resampled) and regret of `curve` against `base`."""
    if base.optimum.x is None:
        return Comparison(curve, None, None, math.inf, math.inf)
    drift = interval = None
    if curve.optimum.x is not None:
        drift = curve.optimum.x - base.optimum.x
        drifts = bootstrap_optima(curve.x, curve.metric, np.random.default_rng(1)) - bootstrap_optima(
            base.x, base.metric, np.random.default_rng(2)
        )
        interval = percentile_interval(drifts)
    at_base = float(curve.mean[int(np.abs(curve.x - base.optimum.x).argmin())])
    return Comparison(curve, drift, interval, at_base - curve.optimum.metric, at_base)


def rule(tolerance: float) -> str:
    """The verdict's rule in words; `judge` is its code."""
    return (
        f"transfers: at every size the optimum lies within {tolerance:g} octave(s) of the base's, is not on the grid's "
        f"edge, and no seed diverges at the base's optimum. does not transfer: at some size every value diverges, or "
        f"the base's optimum does, or the drift exceeds {tolerance:g} octave(s) together with its whole "
        f"{CONFIDENCE:.0%} interval. inconclusive: anything else."
    )


def judge(base: Curve, comparisons: Sequence[Comparison], tolerance: float) -> Judgement:
    """The verdict on one parameterization, and the sizes that decided it."""
    name = base.parameterization
    if base.optimum.x is None:
        return Judgement(name, "inconclusive", "every run of the base size diverged")
    failed, doubtful = [], []
    if base.optimum.censored:
        doubtful.append(f"the base's optimum is on the {base.optimum.censored} edge of the grid")
    for comparison in comparisons:
        curve, size = comparison.curve, comparison.curve.size
        if comparison.drift is None or comparison.interval is None:
            failed.append(f"every value diverged at {size}")
            continue
        low, high = comparison.interval
        if not math.isfinite(comparison.at_base_optimum):
            failed.append(f"the base's optimum diverges at {size}")
        elif abs(comparison.drift) > tolerance and (low > tolerance or high < -tolerance):
            failed.append(f"drift {comparison.drift:+.1f} octaves at {size}")
        elif curve.optimum.censored:
            doubtful.append(f"the optimum at {size} is on the {curve.optimum.censored} edge of the grid")
        elif abs(comparison.drift) > tolerance:
            doubtful.append(f"drift {comparison.drift:+.1f} at {size}, but its interval reaches into the tolerance")
    if failed:
        return Judgement(name, "does not transfer", "; ".join(failed))
    if doubtful:
        return Judgement(name, "inconclusive", "; ".join(doubtful))
    if not comparisons:
        return Judgement(name, "inconclusive", "the study has one size only")
    largest = max(comparisons, key=lambda comparison: abs(comparison.drift or 0.0))
    return Judgement(name, "transfers", f"largest drift {largest.drift:+.1f} octaves, at {largest.curve.size}")


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows, per parameterization in the study's order."""

    curves: list[Curve]
    comparisons: list[Comparison]  # every size, the base itself first
    judgements: list[Judgement]


def analyse(results: Sequence[Result], base_size: Size, tolerance: float) -> Analysis:
    """Analyses all results; a parameterization without results at the base size is left out."""
    found = curves(results)
    comparisons, judgements = [], []
    for base in (curve for curve in found if curve.size == base_size):
        compared = [compare(base, curve) for curve in found if curve.parameterization == base.parameterization]
        compared.sort(key=lambda comparison: comparison.curve.size != base_size)
        comparisons += compared
        judgements.append(judge(base, [c for c in compared if c.curve.size != base_size], tolerance))
    return Analysis(found, comparisons, judgements)
