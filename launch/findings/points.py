"""What a sequential design fixes beforehand, and what it asks for: runs in rounds, on a lattice of values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from depthmup.launch.config import LATTICE, Size
from depthmup.launch.findings.analysis import Carry, Curve, Result
from depthmup.launch.findings.precision import Run
from depthmup.launch.findings.verdict import Analysis, Limits, analyse

OCTAVE, CLOSEST = 1.0, 0.25  # octaves between values about the best, and to one at which runs fail
MOST_BEYOND = 6.0  # octaves that the search may leave the range
SAME = 0.3  # octaves: a value that was run at every size, and as good, is carried if the base's optimum is so near


@dataclass(frozen=True)
class Point:
    """A run that is wanted. `x`: octaves."""

    parameterization: str
    size: Size
    x: float
    seed: int


@dataclass(frozen=True)
class Round:
    """The next runs. Without points: the study has ended, and `reason` says why."""

    points: tuple[Point, ...]
    reason: str


@dataclass(frozen=True)
class Design:
    """What a study fixes beforehand."""

    parameterizations: tuple[str, ...]
    sizes: tuple[Size, ...]  # the base first
    flops: Mapping[Size, float]  # of one run
    low: float  # octaves: the range of values that the search begins with
    high: float
    seeds: tuple[int, ...]  # used in this order; then further ones, counting on from the largest
    budget: float  # FLOPs of all runs at most
    limits: Limits
    chance: float  # the loss of a guess
    octaves: Callable[[float], float] = math.log2
    alike: Mapping[tuple[str, Size], str] | None = None  # whose runs those of (parameterization, size) are
    drift_precision: float = math.inf  # octaves: half-width of the drifts' intervals at which the design may end
    is_valid: Callable[[float], bool] = lambda x: True  # whether a run may have the value at x octaves

    def owner(self, name: str, size: Size) -> str:
        return self.alike[name, size] if self.alike else name

    def may_search(self, x: float) -> bool:
        """Whether the search may leave the range so far."""
        return self.low - MOST_BEYOND <= x <= self.high + MOST_BEYOND and self.is_valid(x)

    def on_lattice(self, x: float) -> float:
        return round_to_lattice(x, self.low)

    def seed(self, index: int) -> int:
        extra = index - len(self.seeds)
        return self.seeds[index] if extra < 0 else max(self.seeds) + 1 + extra

    def analyse(self, results: Sequence[Result]) -> Analysis:
        return analyse(results, self.sizes[0], self.limits, self.octaves, self.chance, carry_run(self.low, self.limits))

    def cost(self, points: Sequence[Point]) -> float:
        return sum(self.flops[point.size] for point in points)


def round_to_lattice(x: float, origin: float) -> float:
    return origin + round((x - origin) * LATTICE) / LATTICE


def carry_run(origin: float, limits: Limits) -> Carry:
    """Which value is carried over: one that was run at every size and lies near the base's optimum, so that further
    runs move it only where they must; else the nearest of the lattice."""

    def is_as_good(base: Curve, x: float) -> bool:
        """Whether the base loses no more there than half of what a value that transfers may cost."""
        if base.posterior is None:
            return False
        return bool(np.median(base.posterior.regrets(x)) <= math.log1p(limits.transfer) / 2)

    def carry(base: Curve, curves: Sequence[Curve]) -> float | None:
        best = base.optimum.x
        if best is None:
            return None
        reach = SAME if len(curves) > 1 else 1 / LATTICE  # before other sizes run, another value costs little
        everywhere = [
            float(x) for x in base.x if abs(x - best) <= reach and all(has_value(curve, x) for curve in curves)
        ]
        good = [x for x in everywhere if is_as_good(base, x)]
        return min(good, key=lambda x: abs(x - best), default=round_to_lattice(best, origin))

    return carry


def round_octaves(x: float) -> float:
    """Octaves, so that the same value is the same number."""
    return round(float(x), 6)


def has_value(curve: Curve, x: float) -> bool:
    return bool((np.abs(curve.x - x) < 1e-6).any())


def list_runs(curve: Curve) -> set[Run]:
    """All runs, failed ones included."""
    return {(round_octaves(curve.x[value]), curve.seeds[seed]) for seed, value in np.argwhere(~np.isnan(curve.metric))}


def list_failing_values(curve: Curve) -> np.ndarray:
    """Octaves of the values at which runs fail."""
    return np.asarray(curve.x[np.isinf(curve.mean)])


def bracket_best(curve: Curve, design: Design) -> list[float]:
    """Values that show the curve's best to lie between others: two beyond an edge, the middle of a wide gap, and of a
    gap to a value at which runs fail. Empty where there is nothing to add."""
    mean = curve.mean
    finite = np.isfinite(mean)
    if not finite.any():
        return [x for step in (1, 2) if (x := curve.x[0] - step * OCTAVE) >= design.low - MOST_BEYOND]
    best = int(np.where(finite, mean, math.inf).argmin())
    found = []
    for side in (-1, 1):
        index, x = best + side, float(curve.x[best])
        if not 0 <= index < len(curve.x):
            found.append(x + side * OCTAVE)
            continue
        gap = abs(float(curve.x[index]) - x)
        if gap > (OCTAVE if finite[index] else CLOSEST):
            found.append(design.on_lattice(x + side * gap / 2))
        elif not finite[index] and not 1 < best < len(curve.x) - 2:  # three in a row, to fit a curve to
            beyond = best - 2 * side
            if not 0 <= beyond < len(curve.x):
                found.append(x - 2 * side * OCTAVE)
    return [x for x in found if design.may_search(x) and not has_value(curve, x)]


def list_values_about_best(curve: Curve) -> list[float]:
    """The best value that trains, and those within an octave of it that do."""
    mean = np.where(np.isfinite(curve.mean), curve.mean, math.inf)
    best = float(curve.x[int(mean.argmin())])
    return [float(x) for x in curve.x[np.isfinite(mean)] if abs(x - best) <= OCTAVE]
