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
    lies_beside_edge,
)
from depthmup.launch.findings.curve_model import AS_GOOD, REACH_LOSS, select_fitted_values
from depthmup.launch.findings.failures import ERRORS, TOLERATED, Failures, seed_noise
from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.wording import show_bound, show_drift, show_interval, show_share, show_shares

Verdict = Literal["transfers", "costs", "does not transfer", "not identified", "inconclusive"]
CONTROL = "sp"  # the parameterization under which nothing is scaled
CARRIED: tuple[Verdict, ...] = ("transfers", "not identified", "costs")  # it is known what the value costs; best first
SURE = (1 + CONFIDENCE) / 2


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
        f"it, or no value trains. not identified: the value transfers, but so does that of {CONTROL}, or every value "
        f"within an octave is as good. "
        f"inconclusive: anything else."
    )


def explain_missing_optimum(curve: Curve) -> str:
    if math.isinf(curve.optimum.metric):
        diverged, runs = int(np.isinf(curve.metric).sum()), int((~np.isnan(curve.metric)).sum())
        how = f"{diverged} of {runs} runs diverge, the others learn nothing"
        if diverged in (0, runs):
            how = f"all {runs} runs {'diverge' if diverged else 'learn nothing'}"
        return f"every value fails at {curve.size}: {how}"
    best = f"the best loss, {curve.optimum.metric:.3g}"
    return f"nothing is learned at {curve.size}: {best}, is within noise of that of a guess"


def name_way_out(curve: Curve) -> str:
    """What would train where no value does."""
    if np.isinf(curve.metric[~np.isnan(curve.metric)]).all():
        return "smaller values are needed"
    return "more samples, or other values, are needed"


def say_unknown(comparison: Comparison) -> str:
    """Why a size has no regret although runs train at the carried value."""
    curve = comparison.curve
    count = len(select_fitted_values(curve.x, np.log(curve.mean)))
    if count < 3:
        train = "one value" if count == 1 else f"{count} values"
        return f"{train} about its best can be compared, and three are needed"
    if curve.posterior is None:
        return "nothing tells the noise of a run: two seeds are needed"
    return "runs fail beside the carried value"


def say_edge(curve: Curve) -> str:
    return f"is on the {curve.optimum.censored} edge of the grid, and values beyond it are needed"


def say_failures(failures: Failures) -> str:
    """'1 of 3 runs fails there (1.7 to 86 %)'"""
    fail = "runs fails" if failures.failed == 1 else "runs fail"
    return f"{failures.failed} of {failures.runs} {fail} there ({show_shares(failures.share)})"


def say_beside_edge(curve: Curve, x: float) -> str:
    """What to run where a failing value is the neighbour of x: seeds at other values tell nothing of it."""
    index = int(np.searchsorted(curve.x, x))
    failing = curve.values[index if np.isinf(curve.mean[index]) else index - 1]
    return (
        f", as runs fail at {failing:.3g} beside the carried value, which was not run there: "
        "study.design=adaptive runs this very value"
    )


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
    curve, size, failures = comparison.curve, comparison.curve.size, comparison.failures
    if curve.optimum.x is None:
        return Finding("does not transfer", explain_missing_optimum(curve))
    if math.isinf(comparison.at_base_optimum):
        if not curve.surely_fails(curve.at(comparison.carried or 0.0)):
            return leave_open(comparison)
        where = "the base's optimum"
        if not comparison.measured:  # `curve.at` is its neighbour
            where += f" (the nearest value run, {curve.values[curve.at(comparison.carried or 0.0)]:.3g})"
        return Finding("does not transfer", f"{failures.failed} of {failures.runs} runs fail at {where} at {size}")
    if comparison.regret_interval is None:
        return Finding(
            "inconclusive",
            f"the regret at {size} is unknown: {say_unknown(comparison)}",
            seeds_help=curve.num_seeds == 1,
        )
    low, high = comparison.regret_interval
    cost = f"{show_share(comparison.regret)} ({show_shares((low, high))}) at {size}"
    drift = f"drift {show_drift(comparison.drift or 0.0)} octaves"
    if low > limits.cost:
        return Finding("does not transfer", f"costs {cost}, {drift}")
    if curve.optimum.censored:
        return Finding("inconclusive", f"the optimum at {size} {say_edge(curve)}")
    if comparison.regret_bound <= limits.transfer:
        return Finding("transfers", f"at most {show_bound(comparison.regret_bound)} at {size}, {drift}")
    if low > limits.transfer and high <= limits.cost:
        return Finding("costs", f"costs {cost}, {drift}")
    known = f"the cost is known to {show_shares((low, high))} only at {size}"
    if comparison.carried is not None and lies_beside_edge(curve, comparison.carried):
        known += say_beside_edge(curve, comparison.carried)
        return Finding("inconclusive", known, is_bounded=high <= limits.cost)
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
        return Judgement(name, "not identified", f"every value between {around} octaves is as good at every size")
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


def find_wanted_seeds(analysis: Analysis) -> dict[tuple[str, Size], list[float]]:
    """Where one more seed could settle a verdict: values near the optimum, per (parameterization, size).

    The value that is carried is fixed, so that only the sizes in doubt need runs. Curves on the edge of their grid are
    left out: these need values first.
    """
    return {
        (curve.parameterization, curve.size): curve.list_values_near_optimum()
        for judgement in analysis.judgements
        for curve in analysis.curves
        if curve.parameterization == judgement.parameterization
        and curve.size in judgement.unsure
        and not curve.optimum.censored
    }
