"""The sequential design: from a study's runs so far, the next round of runs, or why there is none.

1. A coarse pass at the base: every second octave of the range with one seed. Then octaves about its best with two,
   until the base's optimum is known to a quarter octave.
2. The value that is carried over, on a lattice of eighth octaves, and an octave to either side of it, at every size:
   the very value that `scale` writes is run everywhere. A size is widened only where its best is on an edge.
3. Where a verdict is open, the seeds and values that lessen the variance of the curve's slope at the carried value
   most per run: the regret there is slope^2 / (2 curvature). A round adds at most half as many runs to a
   curve as it has.

It ends where the verdicts are settled, where the budget is spent, and where what is left of it would hardly settle
them. A pure function of the finished runs: resumed at any round, a study asks for the same runs. docs/verdict.md has
what simulation says of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.points import Design, Point, Round, place
from depthmup.launch.findings.proposal import Proposal


def next_round(design: Design, results: Sequence[Result]) -> Round:
    """The next runs of all parameterizations, each once and none that is there, within the budget."""
    found = {
        Point(design.owner(each.parameterization, each.size), each.size, place(design.octaves(each.value)), each.seed)
        for each in results
    }
    left = design.budget - design.cost(list(found))
    analysis = design.analyse(results)
    points: dict[Point, None] = {}
    wanted, ended = [], []
    for name in design.parameterizations:
        proposal = Proposal(design, analysis, name, left)
        if end := proposal.propose():
            ended.append(f"{name}: {end}")
        new = [point for point in proposal.points if point not in points and point not in found]
        for point in new:
            if design.flops[point.size] <= left:
                left -= design.flops[point.size]
                points[point] = None
        if proposal.points:
            wanted.append(f"{name}: {', '.join(dict.fromkeys(proposal.reasons))}")
    if points:
        return Round(tuple(points), "; ".join(wanted))
    return Round((), "; ".join([*ended, *(f"{each}, but the budget is spent" for each in wanted)]))


def expected_cost(design: Design) -> tuple[float, int]:
    """(FLOPs, rounds) of a study whose curves are parabolas that do not drift: 2.5 % of the loss an octave from the
    optimum, noise of 1 % between runs."""
    middle, lowest = (design.low + design.high) / 2, min(design.chance, 1.0) / 2
    nominal = replace(design, octaves=float)  # values that are octaves
    generator = np.random.default_rng(0)
    results: list[Result] = []
    rounds, cost = 0, 0.0
    while (wanted := next_round(nominal, results)).points:
        rounds, cost = rounds + 1, cost + design.cost(wanted.points)
        for point in wanted.points:
            loss = lowest * math.exp(0.025 * (point.x - middle) ** 2 + 0.01 * generator.standard_normal())
            sharing = (
                name for name in design.parameterizations if design.owner(name, point.size) == point.parameterization
            )
            results += [Result(name, point.size, point.x, point.seed, loss) for name in sharing]
    return cost, rounds
