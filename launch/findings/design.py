"""The sequential design: from a study's runs so far, the next round of runs, or why there is none.

1. A coarse pass at the base: every second octave of the range with one seed. Then octaves about its best with two,
   until the base's optimum is known to a quarter octave.
2. The value that is carried over, on a lattice of eighth octaves, and an octave to either side of it, at every size:
   the very value that `scale` writes is run everywhere. A size is widened only where its best is on an edge.
3. Where a verdict is open, further seeds at four values about the carried one, as the regret there is
   slope^2 / (2 curvature); beside failing values, what lessens the variance of the slope most per run. A round adds at
   most half as many runs to a curve as it has.

Of several parameterizations each has its first runs at every size before the budget is spent on seeds of another, and
an equal share of what is left.

It ends where the verdicts are settled, where the budget is spent, and where to settle them would probably cost more
than they may. A pure function of the finished runs: resumed at any round, a study asks for the same runs.
docs/verdict.md has what simulation says of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.points import Design, Point, Round, round_octaves
from depthmup.launch.findings.proposal import FIRST_RUNS, Proposal, Want
from depthmup.launch.findings.verdict import Analysis


class Basket:
    """The points of a round, each once and none that is there, as far as the budget goes."""

    def __init__(self, design: Design, results: Sequence[Result]) -> None:
        self.design = design
        self.found = {
            Point(
                design.owner(each.parameterization, each.size),
                each.size,
                round_octaves(design.octaves(each.value)),
                each.seed,
            )
            for each in results
        }
        self.left = design.budget - design.cost(list(self.found))
        self.points: dict[Point, None] = {}
        self.reasons: dict[str, dict[str, None]] = {}  # by parameterization

    def new(self, want: Want) -> list[Point]:
        return [point for point in want.points if point not in self.points and point not in self.found]

    def add(self, name: str, want: Want, points: Sequence[Point]) -> None:
        self.left -= self.design.cost(points)
        self.points |= dict.fromkeys(points)
        self.reasons.setdefault(name, {})[want.reason] = None

    def begin(self, proposals: Sequence[Proposal]) -> None:
        """Whole first windows, one size of all parameterizations after the other."""
        for size in self.design.sizes:
            for proposal in proposals:
                for want in proposal.wants:
                    if want.begins and want.size == size and self.design.cost(new := self.new(want)) <= self.left:
                        self.add(proposal.name, want, new)

    def refine(self, proposals: Sequence[Proposal], budget: float) -> None:
        """Other runs for at most `budget` FLOPs: an equal share for each parameterization, and what one does not need
        for those that need more."""
        wanted = {each.name: [want for want in each.wants if not want.begins] for each in proposals}
        costs = {
            name: sum(self.design.cost(self.new(want)) for want in wants) for name, wants in wanted.items() if wants
        }
        for index, name in enumerate(sorted(costs, key=lambda name: costs[name])):  # sorted keeps the order of equals
            share = budget / (len(costs) - index)
            for want in wanted[name]:
                new = self.new(want)
                count = min(len(new), int(share / self.design.flops[want.size]))
                if count or not new:
                    spent = self.design.cost(new[:count])
                    share, budget = share - spent, budget - spent
                    self.add(name, want, new[:count])


def reserve(design: Design, analysis: Analysis) -> float:
    """FLOPs of the first runs at sizes that have none, of parameterizations that may still begin there."""
    curves = {(curve.parameterization, curve.size): curve for curve in analysis.curves}
    waiting = set()
    for name in design.parameterizations:
        base = curves.get((name, design.sizes[0]))
        if base is None or base.optimum.x is not None:
            waiting |= {(design.owner(name, size), size) for size in design.sizes if (name, size) not in curves}
    return FIRST_RUNS * sum(design.flops[size] for _, size in waiting)


def plan_round(design: Design, results: Sequence[Result]) -> Round:
    """The next runs of all parameterizations, each once and none that is there, within the budget. Before seeds are
    added to one, the others have their first runs at every size: these are reserved."""
    basket, analysis = Basket(design, results), design.analyse(results)
    left, reserved = basket.left, reserve(design, analysis)
    proposals = [Proposal(design, analysis, name, left, reserved) for name in design.parameterizations]
    basket.begin(proposals)
    # what has begun in this round was reserved for
    basket.refine(proposals, max(min(left - reserved, basket.left), 0.0))
    if not basket.points:  # nobody can begin anything with what is reserved
        basket.refine(proposals, basket.left)
    if basket.points:
        return Round(tuple(basket.points), say_reasons({name: ", ".join(why) for name, why in basket.reasons.items()}))
    ended = {each.name: each.ended for each in proposals if each.ended}
    for each in proposals:
        if each.wants:
            reasons = ", ".join(dict.fromkeys(want.reason for want in each.wants))
            ended[each.name] = f"{reasons}, but the budget is spent"
    return Round((), say_reasons(ended))


def say_reasons(reasons: Mapping[str, str]) -> str:
    """By parameterization; what holds for several is said once: 'sp, depth_mup: settled'."""
    names = dict[str, list[str]]()
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)}: {reason}" for reason, those in names.items())


def estimate_cost(design: Design) -> tuple[float, int]:
    """(FLOPs, rounds) of a study whose curves are parabolas that do not drift: 2.5 % of the loss an octave from the
    optimum, noise of 1 % between runs."""
    middle, lowest = (design.low + design.high) / 2, min(design.chance, 1.0) / 2
    nominal = replace(design, octaves=float)  # values that are octaves
    generator = np.random.default_rng(0)
    results: list[Result] = []
    rounds, cost = 0, 0.0
    while (wanted := plan_round(nominal, results)).points:
        rounds, cost = rounds + 1, cost + design.cost(wanted.points)
        for point in wanted.points:
            loss = lowest * math.exp(0.025 * (point.x - middle) ** 2 + 0.01 * generator.standard_normal())
            sharing = (
                name for name in design.parameterizations if design.owner(name, point.size) == point.parameterization
            )
            results += [Result(name, point.size, point.x, point.seed, loss) for name in sharing]
    return cost, rounds
