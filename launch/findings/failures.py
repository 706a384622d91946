"""Which runs and which values fail, and the noise between seeds against which that is told.

A run fails that is dead or lost: averaged with the others, one of them would move the optimum.

Arrays are (seeds, values): a metric is infinite where a run diverged, NaN where there is none.
"""

import math
from dataclasses import dataclass

import numpy as np

from depthmup.launch.findings.intervals import CONFIDENCE

LOST = 0.5  # a run fails that made less than this share of the progress of another seed at the same value
ERRORS = 3.0  # standard errors that count as more than noise where runs are compared with chance
LEAST_SEED_NOISE = 0.001  # of a log loss, where seeds agree by accident
ASSUMED_NOISE = 0.02  # of a log loss, where no value was run with two seeds
MOST_GUESS_NOISE = 0.005  # of the log loss of networks that learn nothing
TOLERATED = 0.1  # share of runs that may fail at a value that is carried over
TOO_MANY = 0.5  # and the share that more runs must rule out, once one has failed


@dataclass(frozen=True)
class Failures:
    """How many of some runs failed."""

    failed: int
    runs: int

    @property
    def share(self) -> tuple[float, float]:
        """Interval of the share of runs that fail (Clopper and Pearson 1934), at CONFIDENCE."""
        from scipy.special import betaincinv  # slow to import, and most commands need none of it

        failed, trained, beyond = self.failed, self.runs - self.failed, (1 - CONFIDENCE) / 2
        low = float(betaincinv(failed, trained + 1, beyond)) if failed else 0.0
        high = float(betaincinv(failed + 1, trained, 1 - beyond)) if trained else 1.0
        return low, high

    @property
    def are_many(self) -> bool:
        """Whether surely more runs fail than is tolerated. One run alone never says so."""
        return self.runs > 1 and self.share[0] > TOLERATED

    @property
    def leave_open(self) -> bool:
        """Whether some failed, and that most do is not ruled out."""
        return self.failed > 0 and self.share[1] > TOO_MANY


NO_RUNS = Failures(0, 0)


def measure_deviations(logs: np.ndarray) -> np.ndarray:
    """Standard deviation between seeds of each value with two seeds or more. logs: (seeds, values), NaN: none."""
    values = [column[np.isfinite(column)] for column in logs.T]
    return np.array([value.std(ddof=1) for value in values if len(value) > 1])


def seed_noise(logs: np.ndarray) -> float:
    """Standard deviation between seeds at one value: the median over values."""
    found = measure_deviations(logs)
    return max(float(np.median(found)), LEAST_SEED_NOISE) if len(found) else ASSUMED_NOISE


def find_dead_runs(metric: np.ndarray, chance: float) -> np.ndarray:
    """Which runs diverged, or end at the loss of a guess. (seeds, values)

    The losses of networks that learn nothing scatter less than any others, so that the smallest deviation between seeds
    is the measure of "at the loss of a guess".
    """
    diverged = np.isinf(metric)
    if not math.isfinite(chance):
        return diverged
    logs = np.log(np.where(diverged, math.nan, metric))
    noise = float(np.clip(min(measure_deviations(logs), default=LEAST_SEED_NOISE), LEAST_SEED_NOISE, MOST_GUESS_NOISE))
    return diverged | (logs > math.log(chance) - ERRORS * noise)


def find_lost_runs(metric: np.ndarray, chance: float) -> np.ndarray:
    """Which runs end with less than half of the progress from the loss of a guess, in log loss, of another seed at the
    same value, and by more than the curve's noise, as where units die. (seeds, values)"""
    if not math.isfinite(chance):
        return np.zeros(metric.shape, dtype=bool)
    logs = np.log(np.where(np.isinf(metric), math.nan, metric))
    best = np.min(np.where(np.isnan(logs), math.inf, logs), axis=0)
    return logs - best > np.maximum(LOST * (math.log(chance) - best), 2 * ERRORS * seed_noise(logs))


def find_failing_values(metric: np.ndarray, dead: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Which values fail: those at which no run trains or surely more than TOLERATED fail; and, unless most are known to
    train, those with a lost run, and those at which a run fails beside a value that fails or on the edge of the grid:
    there an edge of stability may begin, and the runs that train are the lucky ones. Elsewhere a dead run is a single
    one, which says nothing of the loss of those that train; so is one of a seed that fails at every value, as an edge
    has another side. Arguments: (seeds, values). (values,)
    """
    failed, ran = (dead | lost).sum(axis=0), (~np.isnan(metric)).sum(axis=0)
    counts = [Failures(int(bad), int(runs)) for bad, runs in zip(failed, ran, strict=True)]
    surely = np.array([each.are_many or each.failed == each.runs for each in counts])
    open_ones = np.array([each.leave_open for each in counts])
    fails = surely | (lost.any(axis=0) & open_ones)
    fails[[0, -1]] |= open_ones[[0, -1]]
    for step, order in ((-1, range(1, len(counts))), (1, range(len(counts) - 2, -1, -1))):
        for index in order:
            fails[index] |= open_ones[index] and fails[index + step]
    return surely if fails.all() else fails


def select_usable_runs(metric: np.ndarray, failed: np.ndarray, fails: np.ndarray) -> np.ndarray:
    """`metric`, infinite at values that fail, NaN for single runs that failed elsewhere. (seeds, values)"""
    return np.where(failed, np.where(fails & ~np.isnan(metric), math.inf, math.nan), metric)
