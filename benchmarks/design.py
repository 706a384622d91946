"""FLOPs until a verdict is settled: the sequential design against the grid, on simulated studies, seeds fixed.

python -m benchmarks.design                    # the table of docs/verdict.md: minutes on one core
python -m benchmarks.design --studies 5        # a look

Studies and shapes are those of benchmarks.verdict; a run costs as much as its network is deep. The grid has whole
octaves and three seeds, and adds two rounds of seeds where a verdict is open.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
from benchmarks.verdict import CHANCE, GRID, ROUNDS, SHAPES, SIZES, Simulated, holds

from depthmup.launch.findings.design import plan_round
from depthmup.launch.findings.points import Design
from depthmup.launch.findings.verdict import Analysis, Limits
from depthmup.launch.report.page import format_markdown_table

FLOPS = {size: float(size.depth) for size in SIZES}
SEEDS = 3
GRID_COST = len(GRID) * SEEDS * sum(FLOPS.values())
DRIFTS = {
    **{"depth_mup": (-0.1, -0.15, -0.2), "0.3": (0.1, 0.2, 0.3), "0.65": (0.2, 0.4, 0.65), "sp": (-1.0, -2.0, -3.0)},
    "0.3 each": (0.3, 0.3, 0.3),  # three sizes that may each err
}


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
    while (batch := plan_round(design, study.results)).points:
        rounds += 1
        if talk:
            print(rounds, batch.reason, [(p.size.depth, p.x, p.seed) for p in batch.points])
        for point in batch.points:
            study.run(SIZES.index(point.size), point.x, point.seed)
    if talk:
        print(batch.reason)
    return end(study, design.analyse(study.results), rounds)


def share_settled(of: list[Ended]) -> float:
    return float(np.mean([each.verdict != "inconclusive" for each in of]))


def wrong(of: list[Ended], verdict: str) -> str:
    """How often `transfers` is said where the true regret is twice the limit or more, or `does not transfer` or `costs`
    where it is half of it or less."""
    limit, worst = Limits().transfer, [(each.verdict, max(each.regrets[1:])) for each in of]
    said = [v for v, regret in worst if (regret >= 2 * limit if verdict == "transfers" else regret <= limit / 2)]
    return f"{said.count(verdict)} of {len(said)}"


def row(shape: str, name: str, noise: float, studies: int, first: int) -> dict[str, str]:
    ended: dict[str, list[Ended]] = {"adaptive": [], "grid": []}
    for number in range(first, first + studies):
        for how, run in (("adaptive", run_adaptive), ("grid", run_grid)):
            ended[how].append(run(Simulated(shape, DRIFTS[name], noise, np.random.default_rng(number))))
    adaptive, grid = ended["adaptive"], ended["grid"]
    covered = np.array([pair for each in adaptive for pair in each.covered])

    shares = [share_settled(of) for of in (adaptive, grid)]
    costs = [sum(each.cost for each in of) for of in (adaptive, grid)]
    return {
        "shape": shape,
        "drift": name,
        "noise": f"{100 * noise:g} %",
        "FLOPs, of the grid's": f"{costs[0] / costs[1]:.2f}",
        "FLOPs per settled verdict, of the grid's": f"{costs[0] * shares[1] / (costs[1] * shares[0]):.2f}"
        if all(shares)
        else "",
        "largest": f"{max(e.cost for e in adaptive) / GRID_COST:.2f}",
        "rounds": f"{np.mean([each.rounds for each in adaptive]):.1f}",
        "settled": f"{shares[0]:.2f}",
        "grid: settled": f"{shares[1]:.2f}",
        **{
            f"{name}wrong `{verdict}`": wrong(of, verdict)
            for name, of in (("", adaptive), ("grid: ", grid))
            for verdict in ("transfers", "does not transfer", "costs")
        },
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
    parser.add_argument("--first", type=int, default=100_000, help="seed of the first study; others count on from it")
    asked = parser.parse_args()
    cells = [(shape, name, noise) for shape in asked.shapes for name in asked.drifts for noise in asked.noises]
    for number, cell in enumerate(cells):
        lines = format_markdown_table([row(*cell, asked.studies, asked.first)])
        print("\n".join(lines if number == 0 else lines[2:]), flush=True)


if __name__ == "__main__":
    main()
