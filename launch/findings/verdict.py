"""May a value be carried over? A rule about the loss, and what would settle an open question.

The regret at the carried value decides, with its interval; octaves explain. docs/verdict.md has the rule's error rates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import (
    Carry,
    Comparison,
    Curve,
    Result,
    analyse_sizes,
    carry_optimum,
)
from depthmup.launch.findings.curve_model import AS_GOOD, REACH_LOSS, select_fitted_values
from depthmup.launch.findings.failures import ERRORS, NO_RUNS, TOLERATED, Failures, seed_noise
from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.wording import show_bound, show_drift, show_interval, show_share, show_shares

Verdict = Literal["transfers", "costs", "does not transfer", "not identified", "inconclusive"]
CONTROL = "sp"  # the parameterization under which nothing is scaled
CARRIED: tuple[Verdict, ...] = ("transfers", "not identified", "costs")  # it is known what the value costs; best first
SURE = (1 + CONFIDENCE) / 2
RUN_IT = "study.more_seeds of a grid and study.design=adaptive run this very value"


@dataclass(frozen=True)
class Limits:
    """Shares of the loss: up to `transfer` a value transfers, up to `cost` it costs, beyond it does not transfer."""

    transfer: float = 0.005
    cost: float = 0.05


@dataclass(frozen=True)
class Judgement:
    parameterization: str
    verdict: Verdict
    reason: str
    unsure: tuple[Size, ...] = ()  # the sizes at which more seeds could settle an inconclusive verdict


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows, per parameterization in the study's order."""

    curves: list[Curve]
    comparisons: list[Comparison]  # every size, the base itself first
    judgements: list[Judgement]


@dataclass(frozen=True)
class Finding:
    """What one size says of the verdict."""

    verdict: Verdict
    reason: str
    seeds_help: bool = False
    is_bounded: bool = False  # surely no more than Limits.cost
    runs_fail: bool = False  # too many may, at the carried value: more runs of this very value would tell


def describe_rule(limits: Limits) -> str:
    """The verdict's rule in words; `judge_size` and `judge` are its code."""
    transfer, cost = show_share(limits.transfer), show_share(limits.cost)
    return (
        f"what decides is the regret: the loss at the base's optimum over the lowest of that size. transfers: at every "
        f"size it is below {transfer} of the loss with a probability of {SURE:.0%}. costs: at some size it is "
        f"above {transfer} with that probability, and at none above {cost}. does not transfer: at some size it is "
        f"above {cost} with that probability, or more than {TOLERATED:.0%} of the runs at the carried value fail with "
        f"it, or no value trains, or runs fail at the nearest value and it is above {transfer} even if they trained. "
        f"not identified: the value transfers, but so does that of {CONTROL}, or every value within an octave is as "
        f"good. inconclusive: anything else."
    )


def explain_missing_optimum(curve: Curve) -> str:
    if math.isinf(curve.optimum.metric):
        diverged, failed, runs = int(np.isinf(curve.metric).sum()), *count_runs(curve)
        how = f"{diverged} of {runs} runs diverge, the others learn nothing"
        if diverged in (0, runs):
            how = f"all {runs} runs {'diverge' if diverged else 'learn nothing'}"
        if failed < runs:
            how = f"{failed} of {runs} runs fail, too many at each value"
        return f"every value fails at {curve.size}: {how}"
    best = f"the best loss, {curve.optimum.metric:.3g}"
    return f"nothing is learned at {curve.size}: {best}, is within noise of that of a guess"


def count_runs(curve: Curve) -> tuple[int, int]:
    """(those that fail, all)"""
    return int(curve.failed.sum()), int((~np.isnan(curve.metric)).sum())


def name_way_out(curve: Curve) -> str:
    """What would train where no value does."""
    failed, runs = count_runs(curve)
    if 0 < failed < runs and math.isinf(curve.optimum.metric):
        return "what trains with every seed is needed: a longer warm-up, another activation, normalization"
    if np.isinf(curve.metric[~np.isnan(curve.metric)]).all():
        return "smaller values are needed"
    return "more samples, or other values, are needed"


def say_unknown(comparison: Comparison) -> str:
    """Why a size has no regret although runs train at the carried value."""
    curve = comparison.curve
    count = len(select_fitted_values(curve.x, np.log(curve.mean)))
    if count < 3:
        train = "one value" if count == 1 else f"{count} values"
        near = f"{curve.values[int(np.where(np.isfinite(curve.mean), curve.mean, math.inf).argmin())]:.3g}"
        return f"{train} about its best can be compared, and three are needed: run more values about {near}"
    return "nothing tells the noise of a run: two seeds are needed"


def say_edge(curve: Curve) -> str:
    return (
        f"is on the {curve.optimum.censored} edge of the grid, and values beyond it are needed (study.extend adds them)"
    )


def say_failures(failures: Failures, where: str = " there") -> str:
    """'1 of 3 runs fails there (1.7 to 86 %)'"""
    fail = "runs fails" if failures.failed == 1 else "runs fail"
    return f"{failures.failed} of {failures.runs} {fail}{where} ({show_shares(failures.share)})"


def say_failing(comparison: Comparison) -> str:
    """'3 of 3 runs fail at the base's optimum (the nearest value run, 0.0625) at width 16, depth 27'"""
    curve = comparison.curve
    nearest = curve.at(comparison.carried or 0.0)
    failures = curve.failures(nearest)
    where = "" if comparison.measured else f" (the nearest value run, {curve.values[nearest]:.3g})"
    return f"{failures.failed} of {failures.runs} runs fail at the base's optimum{where} at {curve.size}"


def ask_for_run(comparison: Comparison, what: str = "") -> Finding:
    """Only runs at the carried value would tell of this size: seeds at other values say nothing of it."""
    curve, x = comparison.curve, comparison.carried or 0.0
    where = f"the cost at {curve.size} is not known"
    above = int(np.searchsorted(curve.x, x))
    if 0 < above < len(curve.x):
        failing = curve.values[above if np.isinf(curve.mean[above]) else above - 1]
        why = f"as runs fail at {failing:.3g} beside the carried value, which was not run there"
    else:
        where, nearest = what or where, curve.values[curve.at(x)]
        away = float(np.abs(curve.x - x).min())
        why = f"and the nearest value run there, {nearest:.3g}, is {away:.1f} octaves from the carried one"
    return Finding("inconclusive", f"{where}, {why}: {RUN_IT}", seeds_help=True)


def leave_open(comparison: Comparison) -> Finding:
    """Runs fail at the carried value, and it is not known how many."""
    fail = f"at the base's optimum at {comparison.curve.size}, {say_failures(comparison.failures)}"
    return Finding("inconclusive", fail, seeds_help=True, runs_fail=True)


def judge_size(comparison: Comparison, limits: Limits) -> Finding:
    """What one size beside the base says. A run that fails must be made again, which its loss does not show: once one
    has, that most do is ruled out before the value is said to be good."""
    found, failures = judge_regret(comparison, limits), comparison.failures
    if found.verdict not in CARRIED or not failures.failed:
        return found
    if failures.leave_open:
        return leave_open(comparison)
    return replace(found, reason=f"{found.reason}, {say_failures(failures)}")


def judge_regret(comparison: Comparison, limits: Limits) -> Finding:
    """What the loss of one size says."""
    curve, size = comparison.curve, comparison.curve.size
    if curve.optimum.x is None:
        missing = explain_missing_optimum(curve)
        return ask_for_run(comparison, missing) if comparison.needs_run else Finding("does not transfer", missing)
    if math.isinf(comparison.at_base_optimum):
        if not curve.surely_fails(curve.at(comparison.carried or 0.0)):
            return leave_open(comparison)
        return Finding("does not transfer", say_failing(comparison))
    if comparison.regret_interval is None:
        return Finding(
            "inconclusive",
            f"the regret at {size} is unknown: {say_unknown(comparison)}",
            seeds_help=curve.num_seeds == 1 or comparison.needs_run,
        )
    low, high = comparison.regret_interval
    drift = f"drift {show_drift(comparison.drift or 0.0)} octaves"
    is_beyond = math.isnan(comparison.regret)  # what the last value run costs is the least
    cost = f"{show_share(comparison.regret)} ({show_shares((low, high))}) at {size}"
    if is_beyond:
        cost = f"at least {show_share(low)} at {size}, of which no run is near the carried value"
    if low > limits.cost:
        return Finding("does not transfer", f"costs {cost}, {drift}")
    if curve.optimum.censored:
        return Finding("inconclusive", f"the optimum at {size} {say_edge(curve)}")
    if comparison.regret_bound <= limits.transfer:
        return Finding("transfers", f"at most {show_bound(comparison.regret_bound)} at {size}, {drift}")
    if low > limits.transfer and high <= limits.cost:
        return Finding("costs", f"costs {cost}, {drift}")
    if comparison.needs_run:
        nearest = curve.at(comparison.carried or 0.0)
        if low > limits.transfer and np.isinf(curve.mean[nearest]) and curve.surely_fails(nearest):
            least = f"where it would cost at least {show_share(low)} if runs trained"
            return Finding("does not transfer", f"{say_failing(comparison)}, {least}")
        return ask_for_run(comparison)
    known = f"the cost is known to {show_shares((low, high))} only at {size}"
    if high <= limits.transfer:  # nine tenths lie below the limit, and what decides is `regret_bound`
        known += f", and below {100 * comparison.regret_bound:.2f} % with a probability of {SURE:.0%}"
    return Finding("inconclusive", known, True, high <= limits.cost)


def is_plateau(base: Curve, comparisons: Sequence[Comparison], limits: Limits) -> bool:
    """Whether at every size, the base included, values an octave to either side of the base's optimum are as good."""
    x, as_good = base.optimum.x, math.log1p(limits.transfer)
    posteriors = [base.posterior, *(comparison.curve.posterior for comparison in comparisons)]
    return x is not None and all(
        posterior is not None and (posterior.regrets(x + shift) <= as_good).mean() >= SURE  # NaN, unknown, is not
        for posterior in posteriors
        for shift in (-1, 1)
    )


def judge(base: Curve, comparisons: Sequence[Comparison], limits: Limits) -> Judgement:
    """The verdict on one parameterization, from all sizes beside the base."""
    name = base.parameterization
    if base.optimum.x is None:
        return Judgement(name, "inconclusive", f"the base: {explain_missing_optimum(base)}; {name_way_out(base)}")
    if not comparisons:
        return Judgement(name, "inconclusive", "no other size than the base has runs: study.sizes names them")
    if len(base.values) == 1:
        return Judgement(name, "inconclusive", "the study has one value only: three or more show where its best lies")
    findings = [(comparison, judge_size(comparison, limits)) for comparison in comparisons]
    if (doubtful_best := base.find_doubtful_best()) is not None and any(
        found.verdict in ("costs", "does not transfer") and comparison.curve.optimum.x is not None
        for comparison, found in findings
    ):
        fails = say_failures(base.failures(doubtful_best), where="")
        value = f"{base.values[doubtful_best]:.3g}"
        reason = f"where the base's optimum lies is not known: it may be at {value}, where {fails}"
        return Judgement(name, "inconclusive", f"{reason}: run more seeds there", (base.size,))

    def reasons(verdict: Verdict) -> list[str]:
        return list(dict.fromkeys(found.reason for _, found in findings if found.verdict == verdict))

    if failed := reasons("does not transfer"):
        return Judgement(name, "does not transfer", "; ".join(failed))
    doubtful = reasons("inconclusive")
    if base.optimum.censored:
        doubtful.insert(0, f"the base's optimum {say_edge(base)}")
    costs = reasons("costs")
    bounded = all(found.is_bounded for _, found in findings if found.verdict == "inconclusive")
    if costs and bounded and not base.optimum.censored:
        return Judgement(name, "costs", "; ".join(costs))
    if doubtful:
        unsure = tuple(comparison.curve.size for comparison, found in findings if found.seeds_help)
        return Judgement(name, "inconclusive", "; ".join(doubtful), unsure)
    if is_plateau(base, comparisons, limits):
        around = show_interval((base.optimum.x - 1, base.optimum.x + 1))
        return Judgement(name, "not identified", f"every value from {around} octaves (log2) is as good at every size")
    worst = max(comparisons, key=lambda comparison: comparison.regret_bound)
    return Judgement(name, "transfers", judge_size(worst, limits).reason)


def find_other_valley(curve: Curve) -> int | None:
    """Index of the best value that may be of a second valley: behind a ridge higher than both by more than noise, and
    no worse than what a fit reaches, as it need not lie at the bottom."""
    logs = np.log(curve.mean)
    trained = [int(index) for index in np.flatnonzero(np.isfinite(logs))]
    best = min(trained, key=lambda index: logs[index])
    beyond = ERRORS * seed_noise(np.where(np.isinf(curve.usable), math.nan, np.log(curve.usable)))
    found = [
        index
        for index in trained
        if logs[index] - logs[best] < REACH_LOSS
        and max(logs[i] for i in trained if min(index, best) <= i <= max(index, best)) - logs[index] > beyond + AS_GOOD
    ]
    return min(found, key=lambda index: logs[index], default=None)


def note_oddities(judgement: Judgement, base: Curve, others: Sequence[Curve]) -> Judgement:
    """What the reason must say beside: noise that one seed cannot tell; a second valley, in which no size was run."""
    notes = [judgement.reason]
    if all(curve.num_seeds == 1 for curve in (base, *others)) and base.posterior is not None:
        notes.append(
            "with one seed a value, noise is known from the runs' scatter about parabolas alone: run a second seed"
        )
    at_base = base.failures(base.at(base.optimum.x)) if base.optimum.x is not None else NO_RUNS
    if at_base.failed and judgement.verdict in CARRIED:
        notes.append(f"at the base itself {say_failures(at_base)}")
    other = find_other_valley(base) if base.optimum.x is not None else None
    if other is not None and any(np.abs(curve.x - base.x[other]).min() > 1 for curve in others):
        share = float(base.mean[other]) / base.optimum.metric - 1
        notes.append(
            f"the base has a second valley at {base.values[other]:.3g} ({show_share(share)} above its lowest), in "
            "which a larger size has no run and may be better: study.design=grid runs all values"
        )
    return replace(judgement, reason="; ".join(notes))


def compare_with_control(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Where the unscaled network's own value transfers as well, the study shows nothing about the others."""
    control = next((each for each in judgements if each.parameterization.split()[0] == CONTROL), None)
    if control is None or control.verdict not in ("transfers", "not identified"):
        return list(judgements)
    reason = f"{control.parameterization} transfers as well: at these sizes and this horizon there is nothing to mend"
    return [
        replace(each, verdict="not identified", reason=f"{each.reason}, but {reason}")
        if each.verdict == "transfers" and each is not control
        else each
        for each in judgements
    ]


def analyse(
    results: Sequence[Result],
    base_size: Size,
    limits: Limits = Limits(),
    octaves: Callable[[float], float] = math.log2,
    chance: float = math.inf,
    carry: Carry = carry_optimum,
) -> Analysis:
    """Analyses all results; a parameterization without results at the base size is left out. Arguments as those of
    `analyse_sizes`."""
    curves, comparisons = analyse_sizes(results, base_size, octaves, chance, carry)
    judgements = []
    for base in (comparison.curve for comparison in comparisons if comparison.curve.size == base_size):
        own = [c for c in comparisons if c.curve.parameterization == base.parameterization and c.curve is not base]
        judgements.append(note_oddities(judge(base, own, limits), base, [each.curve for each in own]))
    return Analysis(curves, comparisons, compare_with_control(judgements))


def find_wanted_seeds(
    analysis: Analysis, value_at: Callable[[float], float] = lambda x: 2.0**x
) -> dict[tuple[str, Size], list[float]]:
    """Where one more seed could settle a verdict: values near the optimum, per (parameterization, size), and the
    carried value itself where no other value tells of it. `value_at` takes octaves.

    The value that is carried is fixed, so that only the sizes in doubt need runs. Curves on the edge of their grid are
    left out: these need values first.
    """
    unsure = {(judgement.parameterization, size) for judgement in analysis.judgements for size in judgement.unsure}
    wanted = {}
    for comparison in analysis.comparisons:
        curve = comparison.curve
        if (name := (curve.parameterization, curve.size)) not in unsure or curve.optimum.censored:
            continue
        values = curve.list_values_near_optimum() if curve.optimum.x is not None else []
        if (doubtful := curve.find_doubtful_best()) is not None:
            values.append(float(curve.values[doubtful]))
        if comparison.needs_run and comparison.carried is not None:
            values.append(value_at(comparison.carried))
        wanted[name] = list(dict.fromkeys(values))
    return wanted
