"""FLOPs until settled verdicts: the sequential design against the grid, on the runs of published studies.

python -m benchmarks.replay docs/results/paper_{conv_resnet,target,vit}.json      # the table of docs/verdict.md

The grid is what was run, its rounds of seeds included. The design asks for runs at values between those of the grid and
with seeds that the grid lacks, so a run is drawn from the grid's: the curve's mean at the value, by a monotone cubic
through the means of the grid's values, times the relative error of a grid's run at the nearest value: that of the same
seed where there is one, else that of one drawn at random. It fails where that run did. Both have the budget of the
grid. Of several replays, which differ in what is drawn at random, the means.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Curve, Result
from depthmup.launch.findings.design import plan_round
from depthmup.launch.findings.points import Design, Point
from depthmup.launch.findings.verdict import Analysis, analyse
from depthmup.launch.reading import read_study
from depthmup.launch.report.page import format_markdown_table
from depthmup.launch.report.recompute import find_configs, rebuild_results
from depthmup.launch.report.record import read_record
from depthmup.launch.runs.design import build_design
from depthmup.launch.runs.study import Study


@dataclass(frozen=True)
class Replay:
    """The runs of a grid, from which others are drawn."""

    curve: Curve
    generator: np.random.Generator

    def run(self, x: float, seed: int) -> float:
        """The metric of a run at x octaves; infinite where it fails."""
        nearest, curve = self.curve.at(x), self.curve
        ran = np.flatnonzero(~np.isnan(curve.metric[:, nearest]))
        same = [row for row in ran if curve.seeds[row] == seed]
        row = same[0] if same else self.generator.choice(ran)
        if curve.failed[row, nearest] or math.isinf(curve.mean[nearest]):
            return math.inf
        known = np.flatnonzero(np.isfinite(curve.mean))
        logs = np.log(curve.mean[known])
        inside = float(np.clip(x, curve.x[known[0]], curve.x[known[-1]]))
        mean = float(PchipInterpolator(curve.x[known], logs)(inside)) if len(known) > 1 else float(logs[0])
        return min(math.exp(mean) * curve.metric[row, nearest] / curve.mean[nearest], curve.chance)


def grid_cost(record: dict[str, Any], design: Design) -> float:
    """FLOPs of the grid's runs, those of several parameterizations once."""
    runs = {
        (design.owner(p["parameterization"], size), size, p["value"], p["seed"])
        for p in record["points"]
        if (size := Size(width=p["width"], depth=p["depth"]))
    }
    return sum(design.flops[size] for _, size, _, _ in runs)


def walk(design: Design, grid: Analysis, number: int) -> tuple[Analysis, float, int]:
    """(analysis, FLOPs, rounds) of one replay."""
    design = replace(design, octaves=math.log2)  # values are 2^octaves here, whatever is swept
    generator = np.random.default_rng(number)
    sources = {(curve.parameterization, curve.size): Replay(curve, generator) for curve in grid.curves}
    results, asked, rounds = list[Result](), list[Point](), 0
    while (batch := plan_round(design, results)).points:
        rounds, asked = rounds + 1, [*asked, *batch.points]
        for point in batch.points:
            metric = sources[point.parameterization, point.size].run(point.x, point.seed)
            for name in design.parameterizations:
                if design.owner(name, point.size) == point.parameterization:
                    results.append(Result(name, point.size, 2.0**point.x, point.seed, metric))
    return design.analyse(results), design.cost(asked), rounds


def row(path: Path, config: Path, replays: int) -> dict[str, str]:
    record = read_record(path)
    study = Study(config, read_study(config, ("study.directory=/nowhere",)))
    design = build_design(study)
    grid = analyse(rebuild_results(record), design.sizes[0], design.limits, design.octaves, design.chance)
    spent = grid_cost(record, design)
    walked = [walk(replace(design, budget=spent), grid, number) for number in range(replays)]
    names = design.parameterizations
    verdicts = {
        name: Counter(
            next(each.verdict for each in analysis.judgements if each.parameterization == name)
            for analysis, _, _ in walked
        )
        for name in names
    }
    of_grid = {each.parameterization: each.verdict for each in grid.judgements}
    costs = np.array([cost for _, cost, _ in walked]) / spent
    open_ones = sum(counts["inconclusive"] for counts in verdicts.values()) / replays
    settled, settled_by_grid = len(names) - open_ones, sum(verdict != "inconclusive" for verdict in of_grid.values())
    return {
        "study": record["study"],
        "FLOPs, of the grid's": f"{costs.mean():.2f} ({costs.min():.2f} to {costs.max():.2f})",
        "FLOPs per settled verdict, of the grid's": f"{costs.mean() * settled_by_grid / settled:.2f}"
        if settled and settled_by_grid
        else "",
        "rounds": f"{np.mean([rounds for _, _, rounds in walked]):.1f}",
        "settled": f"{settled:.1f} of {len(names)}",
        "grid: settled": f"{settled_by_grid} of {len(names)}",
        "verdicts of the grid, and of the replays": "; ".join(
            f"{name}: {of_grid[name]}, {', '.join(f'{count} {verdict}' for verdict, count in verdicts[name].items())}"
            for name in names
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--replays", type=int, default=10)
    asked = parser.parse_args()
    configs = find_configs()
    for number, path in enumerate(asked.records):
        lines = format_markdown_table([row(path, configs[path.stem], asked.replays)])
        print("\n".join(lines if number == 0 else lines[2:]), flush=True)


if __name__ == "__main__":
    main()
