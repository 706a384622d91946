"""FLOPs until a verdict is settled: the sequential design against the grid, on simulated studies, seeds fixed.

python -m benchmarks.design                    # the table of docs/verdict.md: about an hour on one core
python -m benchmarks.design --studies 5        # a look

Studies and shapes are those of benchmarks.verdict; a run costs as much as its network is deep. The grid has whole
octaves and three seeds, and adds two rounds of seeds where a verdict is open.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
from benchmarks.verdict import CHANCE, GRID, ROUNDS, SHAPES, SIZES, Simulated, holds

from depthmup.launch.findings.design import next_round
from depthmup.launch.findings.points import Design
from depthmup.launch.findings.verdict import Analysis, Limits
from depthmup.launch.report.page import markdown_table

FLOPS = {size: float(size.depth) for size in SIZES}
SEEDS = 3
GRID_COST = len(GRID) * SEEDS * sum(FLOPS.values())
DRIFTS = {"depth_mup": (-0.1, -0.15, -0.2), "0.3": (0.1, 0.2, 0.3), "0.65": (0.2, 0.4, 0.65), "sp": (-1.0, -2.0, -3.0)}


@dataclass(frozen=True)
class Ended:
    cost: float
    verdict: str
    rounds: int
    regrets: list[float]  # the true ones at the carried value
    covered: list[tuple[bool, bool]]  # drift's interval, regret's bound
    widths: list[float]  # half, of drifts


def end(study: Simulated, analysis: Analysis, rounds: int) -> Ended:
    regrets = study.regrets(analysis.comparisons[0].carried)
    covered, widths = [], []
    for found in analysis.comparisons[1:]:
        number = SIZES.index(found.curve.size)
        drift = study.truths[number].optimum - study.truths[0].optimum
        if found.regret_interval is not None and found.interval is not None:
            covered.append((holds(found.interval, drift), regrets[number] <= found.regret_bound))
            widths.append((found.interval[1] - found.interval[0]) / 2)
    cost = sum(FLOPS[result.size] for result in study.results)
    return Ended(cost, analysis.judgements[0].verdict, rounds, regrets, covered, widths)


def run_grid(study: Simulated) -> Ended:
    analysis = study.run_rounds(SEEDS)
    return end(study, analysis, 1 + ROUNDS)


def run_adaptive(study: Simulated, talk: bool = False) -> Ended:
    design = Design(("p",), SIZES, FLOPS, GRID[0], GRID[-1], (0, 1, 2), GRID_COST, Limits(), CHANCE)
    rounds = 0
    while (batch := next_round(design, study.results)).points:
        rounds += 1
        if talk:
            print(rounds, batch.reason, [(p.size.depth, p.x, p.seed) for p in batch.points])
        for point in batch.points:
            study.run(SIZES.index(point.size), point.x, point.seed)
    if talk:
        print(batch.reason)
    return end(study, design.analyse(study.results), rounds)


def row(shape: str, name: str, noise: float, studies: int) -> dict[str, str]:
    ended: dict[str, list[Ended]] = {"adaptive": [], "grid": []}
    for number in range(studies):
        for how, run in (("adaptive", run_adaptive), ("grid", run_grid)):
            ended[how].append(run(Simulated(shape, DRIFTS[name], noise, np.random.default_rng(number))))
    adaptive, grid = ended["adaptive"], ended["grid"]
    limit = Limits().transfer
    worst = [(each.verdict, max(each.regrets[1:])) for each in adaptive]
    wrong = [verdict for verdict, regret in worst if regret >= 2 * limit]
    small = [verdict for verdict, regret in worst if regret <= limit / 2]
    covered = np.array([pair for each in adaptive for pair in each.covered])

    def settled(of: list[Ended]) -> str:
        return f"{np.mean([each.verdict != 'inconclusive' for each in of]):.2f}"

    return {
        "shape": shape,
        "drift": name,
        "noise": f"{100 * noise:g} %",
        "FLOPs, of the grid's": f"{sum(e.cost for e in adaptive) / sum(e.cost for e in grid):.2f}",
        "largest": f"{max(e.cost for e in adaptive) / GRID_COST:.2f}",
        "rounds": f"{np.mean([each.rounds for each in adaptive]):.1f}",
        "settled": settled(adaptive),
        "grid: settled": settled(grid),
        "wrong `transfers`": f"{wrong.count('transfers')} of {len(wrong)}",
        "wrong `does not transfer`": f"{small.count('does not transfer')} of {len(small)}",
        "drift's coverage": f"{covered[:, 0].mean():.2f}" if len(covered) else "",
        "regret's bound": f"{covered[:, 1].mean():.2f}" if len(covered) else "",
        "drift's half-width": f"{np.median([w for each in adaptive for w in each.widths] or [math.nan]):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES)
    parser.add_argument("--drifts", nargs="*", default=tuple(DRIFTS), choices=DRIFTS)
    parser.add_argument("--noises", nargs="*", type=float, default=(0.005, 0.02))
    asked = parser.parse_args()
    cells = [(shape, name, noise) for shape in asked.shapes for name in asked.drifts for noise in asked.noises]
    for number, cell in enumerate(cells):
        lines = markdown_table([row(*cell, asked.studies)])
        print("\n".join(lines if number == 0 else lines[2:]), flush=True)


if __name__ == "__main__":
    main()
