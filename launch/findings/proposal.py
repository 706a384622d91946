"""What the next round of a sequential design wants of one parameterization."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np

from depthmup.launch.config import COARSE, Size
from depthmup.launch.findings.analysis import Comparison, Curve
from depthmup.launch.findings.failures import Failures
from depthmup.launch.findings.intervals import compute_quantile
from depthmup.launch.findings.points import (
    OCTAVE,
    Design,
    Point,
    bracket_best,
    list_failing_values,
    list_runs,
    list_values_about_best,
    round_octaves,
)
from depthmup.launch.findings.precision import (
    SURENESS,
    Aim,
    Run,
    choose_best_move,
    list_moves,
)
from depthmup.launch.findings.price import Outlook, show_price
from depthmup.launch.findings.verdict import SURE, Analysis, judge_size

SPARED = 0.9  # share of a wanted half-width at which runs are foreseen to be enough: the rest is for chance
KNOWN = 0.25  # octaves: half-width of the interval of the base's optimum at which the search there ends
ENOUGH = 0.7  # a round is filled until it settles a size with this probability
LEAST = 4  # runs of one size that a round may add to it
MOST_AT_BASE = 30  # runs, before the other sizes begin
FIRST_SEEDS = 2
TINY = 1e-6  # octaves: values of a lattice that differ by less are one
FIRST_RUNS = 3 * FIRST_SEEDS  # of a size, at least


def is_known(half: float, aim: Aim, deviation: float) -> bool:
    """Whether an optimum is, to `half` octaves."""
    return SURENESS * deviation <= half


def find_half_width(interval: tuple[float, float] | None) -> float:
    """Octaves, infinite where an end is open or nothing is known."""
    return (interval[1] - interval[0]) / 2 if interval else math.inf


@dataclass(frozen=True)
class Want:
    """Runs of one curve that are wanted together. `begins`: without them the curve says nothing of the verdict."""

    size: Size
    points: tuple[Point, ...]
    reason: str
    begins: bool


class Proposal:
    """What the next round wants of one parameterization, and why."""

    def __init__(self, design: Design, analysis: Analysis, name: str, left: float, reserved: float) -> None:
        """left: FLOPs of the budget. reserved: those of them that first runs will take, which no seeds may."""
        self.outlook = Outlook(design, analysis, name, left)
        self.design, self.analysis, self.name, self.left, self.reserved = design, analysis, name, left, reserved
        self.wants: list[Want] = []
        self.ended = self.propose()

    def want(self, size: Size, runs: Sequence[Run], reason: str, begins: bool = False) -> None:
        owner = self.design.owner(self.name, size)
        if runs:
            self.wants.append(
                Want(size, tuple(Point(owner, size, round_octaves(x), seed) for x, seed in runs), reason, begins)
            )

    def grid(self, curve: Curve | None, values: Sequence[float], seeds: int = FIRST_SEEDS) -> list[Run]:
        """Runs of `values` with the first `seeds` seeds that are not there, but where runs fail."""
        done = list_runs(curve) if curve else set()
        bad = {round_octaves(x) for x in list_failing_values(curve)} if curve else set()
        good = [round_octaves(x) for x in values if round_octaves(x) not in bad]
        return [(x, seed) for x in good for seed in map(self.design.seed, range(seeds)) if (x, seed) not in done]

    def sharpen(self, curve: Curve, x: float, most: int, is_enough: Callable[[Aim, float], bool]) -> list[Run]:
        """From LEAST to `most` runs that tell the curve's slope at x."""
        aim = self.outlook.aim_at(curve, x)
        values, seeds = self.outlook.list_values(curve, x), [self.design.seed(index) for index in range(FIRST_SEEDS)]
        runs, added, row = list(aim.runs), list[Run](), self.outlook.list_row(curve, x)
        while len(added) < most and (len(added) < LEAST or not is_enough(aim, aim.after(runs))):
            fresh = next(self.outlook.find_fresh_seeds(curve, runs))
            if row and len(row) + len(added) <= most:
                move = [(value, fresh) for value in row]
            else:
                options = list_moves(runs, x, values, seeds, fresh)
                options = [move for move in options if len(move) + len(added) <= most]
                if (row and added) or not options:
                    break
                move = choose_best_move(aim, runs, options)
            runs, added = runs + move, added + move
        return added

    def affordable(self, size: Size) -> int:
        return int(self.left / self.design.flops[size])

    # ------------------------------------------------------------ the stages

    def propose(self) -> str | None:
        """Fills `wants`; where that leaves none, why the parameterization has ended."""
        ended = self.settle_verdict()
        if not ended or not self.sharpen_drifts() or self.wants:
            return None if self.wants else ended
        return f"{ended}, but no run that is left makes its drifts known to {self.design.drift_precision:g} octaves"

    def sharpen_drifts(self) -> bool:
        """Whether drifts of a value that is carried over, or may be, are known too roughly: then runs at the size, at
        the base, or at both, wherever more than half of the variance comes from that a drift may have."""
        most = self.design.drift_precision
        verdict = next((j.verdict for j in self.analysis.judgements if j.parameterization == self.name), None)
        base = self.outlook.find_curve(self.design.sizes[0])
        if math.isinf(most) or verdict in (None, "does not transfer") or base is None:
            return False
        curves: dict[Size, tuple[Curve, float]] = {}  # with the half-width of the other end of the drift
        rough = False
        for each in self.analysis.comparisons:
            if each.curve.parameterization != self.name or each.curve is base or find_half_width(each.interval) <= most:
                continue
            rough = True
            own, of_base = find_half_width(each.curve.optimum.interval), find_half_width(base.optimum.interval)
            least = min(most / math.sqrt(2), max(own, of_base))  # the wider one at least
            for curve, half, other in ((each.curve, own, of_base), (base, of_base, own)):
                if half >= least and curve.posterior is not None:
                    curves.setdefault(curve.size, (curve, other))
        for size, (curve, other) in curves.items():
            assert curve.optimum.x is not None
            x = self.design.on_lattice(curve.optimum.x)
            spared = (SPARED * most) ** 2
            enough = math.sqrt(max(spared - other**2, spared / 2))
            most_runs = self.count_most_to_add(curve)
            runs = self.sharpen(curve, x, most_runs, partial(is_known, enough))
            self.want(size, runs, "a drift is known too roughly")
            self.want(size, self.grid(curve, self.list_values_beyond(curve, runs)), "a drift is known too roughly")
        return rough

    def count_most_to_add(self, curve: Curve) -> int:
        """Runs of a round to a size that has some."""
        return min(max(len(list_runs(curve)) // 2, LEAST), self.affordable(curve.size))

    def settle_verdict(self) -> str | None:
        """Fills `wants` with what the verdict needs; where that leaves none, why it needs none."""
        base_size = self.design.sizes[0]
        base = self.outlook.find_curve(base_size)
        if base is None:
            count = math.floor((self.design.high - self.design.low) / COARSE + 1e-9) + 1
            values = [x for i in range(count) if self.design.is_valid(x := self.design.low + i * COARSE)]
            self.want(base_size, self.grid(None, values, seeds=1), "a coarse pass at the base", begins=True)
            return None
        if self.search_base(base):
            return None
        if base.optimum.x is None:
            return "nothing is learned at the base: more samples, or another range of values, would be needed"
        if base.optimum.censored:
            side = base.optimum.censored
            return f"the base's optimum lies beyond the {side} end of what may be searched: move study.values"
        comparisons = [each for each in self.analysis.comparisons if each.curve.parameterization == self.name]
        carried = comparisons[0].carried
        assert carried is not None
        if self.settled(comparisons):
            return "settled"
        window = self.valid(carried - OCTAVE, carried, carried + OCTAVE)
        self.want(base_size, self.grid(base, [carried]), "the base at the carried value")
        wanted = []
        found = {each.curve.size: each for each in comparisons}
        for size in self.design.sizes[1:]:
            if size not in found:
                self.want(size, self.grid(None, window), "each size about the carried value", begins=True)
            elif not self.search(found[size], carried):
                finding = judge_size(found[size], self.design.limits)
                if finding.verdict == "inconclusive" and found[size].curve.posterior is not None:
                    wanted.append(found[size])
        if self.wants:
            return None
        if not wanted:
            return "no run that the design knows would settle it"
        wanted = self.outlook.choose_deciding(wanted, carried)
        if (price := self.outlook.find_price(wanted, carried)) > self.outlook.dearest:
            return f"to settle it would cost {show_price(price)} its share of the budget"
        for comparison in wanted:
            curve = comparison.curve
            runs = self.sharpen(curve, carried, self.count_most_to_add(curve), self.settles)
            self.want(curve.size, runs, "the cost is known too roughly")
            beyond = self.grid(curve, self.list_values_beyond(curve, runs))
            self.want(curve.size, beyond, "the optimum may lie beyond the values")
        return None if self.wants else "the budget is spent"

    def list_values_beyond(self, curve: Curve, wanted: Sequence[Run]) -> list[float]:
        """A value an octave beyond those of the curve, on each side on which nothing bounds its optimum and none is
        `wanted` beyond them."""
        low, high = curve.optimum.interval or (0.0, 0.0)
        first, last = curve.x[0], curve.x[-1]
        ends = [first - OCTAVE] * (math.isinf(low) and all(x >= first - TINY for x, _ in wanted))
        ends += [last + OCTAVE] * (math.isinf(high) and all(x <= last + TINY for x, _ in wanted))
        return [round_octaves(x) for x in ends if self.design.may_search(x)]

    def settled(self, comparisons: Sequence[Comparison]) -> bool:
        """Whether no run can change the answer, the carried value having been run at every size."""
        verdict = next(each.verdict for each in self.analysis.judgements if each.parameterization == self.name)
        if verdict == "does not transfer":
            return True
        everywhere = {each.curve.size for each in comparisons} == set(self.design.sizes)
        return verdict != "inconclusive" and everywhere and all(each.measured for each in comparisons)

    def valid(self, *values: float) -> list[float]:
        return [x for x in values if self.design.is_valid(x)]

    def search_base(self, base: Curve) -> bool:
        """Whether the base's optimum still has to be found."""
        size = self.design.sizes[0]
        if values := bracket_best(base, self.design):
            seeds = FIRST_SEEDS if np.isfinite(base.mean).any() else 1
            self.want(size, self.grid(base, values, seeds), "where the base's optimum lies", begins=True)
        if (doubtful := base.find_doubtful_best()) is not None:
            repeated = self.repeat_runs(base, base.x[doubtful], base.failures(doubtful))
            self.want(size, repeated, "whether runs at the base fail by bad luck", begins=True)
        if base.learns:
            self.want(size, self.grid(base, list_values_about_best(base)), "where the base's optimum lies", begins=True)
        if self.wants or base.posterior is None or base.optimum.x is None or base.optimum.censored:
            return bool(self.wants)
        x = self.design.on_lattice(base.optimum.x)
        low, high = base.optimum.interval or (-math.inf, math.inf)
        bound = compute_quantile(base.posterior.regrets(x), SURE)
        # once another size has begun, the search does not begin anew
        begun = any(self.outlook.find_curve(other) for other in self.design.sizes[1:])
        if (high - low) / 2 <= (2 * KNOWN if begun else KNOWN) or bound <= self.design.limits.transfer / 2:
            return False
        affordable = int((self.left - self.reserved) / self.design.flops[size])
        most = min(len(list_runs(base)), affordable, MOST_AT_BASE - len(list_runs(base)))
        if most < 2:
            return False
        runs = self.sharpen(base, x, most, partial(is_known, SPARED * KNOWN))
        self.want(size, runs, "the base's optimum to a quarter octave")
        return bool(self.wants)

    def search(self, comparison: Comparison, carried: float) -> bool:
        """Whether a size still has to be searched: for the carried value itself, or for its best."""
        before, curve = len(self.wants), comparison.curve
        if not comparison.measured:
            self.want(curve.size, self.grid(curve, [carried]), "each size at the carried value")
        finding = judge_size(comparison, self.design.limits)
        if finding.verdict == "inconclusive" and (curve.optimum.censored or curve.posterior is None):
            values = bracket_best(curve, self.design)
            self.want(curve.size, self.grid(curve, values), f"the best at {curve.size} is on an edge")
        if finding.runs_fail:
            runs = self.repeat_runs(curve, carried, comparison.failures)
            self.want(curve.size, runs, f"whether runs at {curve.size} fail by bad luck")
        return len(self.wants) > before

    def repeat_runs(self, curve: Curve, x: float, failures: Failures) -> list[Run]:
        """Up to FIRST_SEEDS runs more at x, no more than rule out that most runs fail there if no other one fails."""
        enough = next(runs for runs in count(failures.runs) if not Failures(failures.failed, runs).leave_open)
        done = {seed for value, seed in list_runs(curve) if value == round_octaves(x)}
        seeds = (seed for index in count() if (seed := self.design.seed(index)) not in done)
        return [(round_octaves(x), seed) for seed in islice(seeds, min(FIRST_SEEDS, enough - failures.runs))]

    def settles(self, aim: Aim, deviation: float) -> bool:
        return aim.settles(deviation, self.design.limits) >= ENOUGH
