"""How often do a report's intervals hold the truth, and how often is a verdict wrong? Simulated studies, seeds fixed.

python -m benchmarks.verdict                                       # the tables of docs/verdict.md: minutes on one core
python -m benchmarks.verdict --studies 20 --shapes one skewed      # a look
python -m benchmarks.verdict --widths docs/results                 # widths of intervals of the published studies

A study has a base and three sizes, on a grid of whole octaves. Shapes, all of log loss with a curvature of 0.05 per
squared octave (2.5 % of the loss an octave from the optimum) unless said otherwise:
one: a parabola. skewed: curvature grows to the right. changing: another skew at each size. flat: three times flatter
but at the base. edge: every run diverges from 0.5 to 1.2 octaves above the optimum on. dead: one run in twenty at the
optimum's value or above ends at the loss of a guess.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.verdict import Analysis, Limits, analyse, find_wanted_seeds
from depthmup.launch.report.page import format_markdown_table
from depthmup.launch.report.record import read_record

SIZES = tuple(Size(width=16, depth=depth) for depth in (3, 6, 12, 24))
GRID = np.arange(-9.0, 0.0)
CURVATURE, CHANCE, LOWEST = 0.05, math.log(10), 0.8
SKEWS = {"skewed": [(0.3, 0.6)] * 4, "changing": [(0.3, 0.6), (0.2, 0.8), (0.5, 0.3), (0.3, 0.3)]}
SHAPES = ("one", "skewed", "changing", "flat", "edge", "dead")
ROUNDS = 2  # of added seeds, as study.more_seeds


@dataclass(frozen=True)
class Truth:
    """Of one size: log loss over its lowest, (points,) -> (points,), and where that is."""

    optimum: float
    excess: Callable[[np.ndarray], np.ndarray]
    edge: float = math.inf  # runs above diverge


def make_truth(shape: str, number: int, optimum: float, generator: np.random.Generator) -> Truth:
    curvature = CURVATURE / 3 if shape == "flat" and number else CURVATURE
    if shape in SKEWS:
        left, right = SKEWS[shape][number]

        def excess(x: np.ndarray) -> np.ndarray:
            d = x - optimum
            sides = np.expm1(right * d) / right + np.expm1(-left * d) / left
            return np.asarray(curvature * sides / (left + right))
    else:

        def excess(x: np.ndarray) -> np.ndarray:
            return np.asarray(curvature / 2 * (x - optimum) ** 2)

    edge = optimum + generator.uniform(0.5, 1.2) if shape == "edge" else math.inf
    return Truth(optimum, excess, edge)


class Simulated:
    """A study whose runs are drawn: the same seed has the same offset at all values of a size."""

    def __init__(self, shape: str, drifts: Sequence[float], noise: float, generator: np.random.Generator) -> None:
        base = generator.uniform(-4.5, -3.5)
        self.shape, self.noise, self.generator = shape, noise, generator
        self.truths = [make_truth(shape, n, base + drift, generator) for n, drift in enumerate((0.0, *drifts))]
        self.offsets: dict[tuple[int, int], float] = {}
        self.results: list[Result] = []

    def run(self, number: int, x: float, seed: int) -> None:
        truth = self.truths[number]
        offset = self.offsets.setdefault((number, seed), 0.02 * self.generator.standard_normal())
        log_loss = float(truth.excess(np.array([x]))[0]) + offset + self.noise * self.generator.standard_normal()
        loss = min(LOWEST * math.exp(log_loss), CHANCE)
        if x > truth.edge:
            loss = math.inf
        if self.shape == "dead" and x > truth.optimum - 0.5 and self.generator.random() < 0.05:
            loss = CHANCE * (1 + 0.0005 * self.generator.standard_normal())
        self.results.append(Result("p", SIZES[number], 2.0**x, seed, loss))

    def run_grid(self, seeds: int) -> None:
        for number in range(len(self.truths)):
            for x in GRID:
                for seed in range(seeds):
                    self.run(number, float(x), seed)

    def analyse(self) -> Analysis:
        return analyse(self.results, SIZES[0], Limits(), chance=CHANCE)

    def run_rounds(self, seeds: int) -> Analysis:
        """The grid with `seeds` seeds, and the rounds of seeds that a study adds."""
        self.run_grid(seeds)
        analysis = self.analyse()
        for added in range(ROUNDS):
            for (_, size), values in find_wanted_seeds(analysis).items():
                for value in values:
                    self.run(SIZES.index(size), math.log2(value), seeds + added)
            analysis = self.analyse()
        return analysis

    def regrets(self, x: float | None) -> list[float]:
        """The true ones at x octaves, infinite beyond the edge; the base's first."""
        if x is None:
            return [math.nan] * len(self.truths)
        return [math.inf if x > t.edge else math.expm1(float(t.excess(np.array([x]))[0])) for t in self.truths]


def holds(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


def coverage(shape: str, seeds: int, noise: float, studies: int) -> dict[str, str]:
    """One row: shares of intervals that hold the truth, over all sizes beside the base that have one."""
    generator = np.random.default_rng(seeds)
    held, widths = [], []
    for _ in range(studies):
        study = Simulated(shape, generator.uniform(-0.8, 0.8, 3), noise, generator)
        study.run_grid(seeds)
        analysis = study.analyse()
        regrets = study.regrets(analysis.comparisons[0].curve.optimum.x)
        for truth, regret, found in zip(study.truths, regrets, analysis.comparisons, strict=True):
            if found.curve.size == SIZES[0] or found.regret_interval is None:
                continue
            assert found.curve.optimum.interval is not None
            drift = truth.optimum - study.truths[0].optimum
            held.append(
                (
                    holds(found.curve.optimum.interval, truth.optimum),
                    holds(found.interval, drift),
                    holds(found.regret_interval, regret),
                    regret <= found.regret_bound,
                )
            )
            low, high = found.curve.optimum.interval
            widths.append((high - low) / 2)
    shares = np.mean(held, axis=0)
    names = ("optimum", "drift", "regret", "regret's bound")
    return {
        "shape": shape,
        "seeds": str(seeds),
        "noise": f"{100 * noise:g} %",
        **{name: f"{share:.2f}" for name, share in zip(names, shares, strict=True)},
        "half-width, octaves": f"{np.median(widths):.2f}",
        "intervals": str(len(held)),
    }


def condense(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Of rows that differ in their seeds one: the range of each number."""
    grouped: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        grouped.setdefault((row["shape"], row["noise"]), []).append(row)

    def span(of: list[dict[str, str]], key: str) -> str:
        found = sorted({row[key] for row in of}, key=float)
        return " to ".join(dict.fromkeys((found[0], found[-1])))

    return [
        {"shape": shape, "noise": noise}
        | {key: span(of, key) for key in of[0] if key not in ("shape", "noise", "seeds")}
        for (shape, noise), of in grouped.items()
    ]


def verdicts(drift: float, seeds: int, noise: float, studies: int) -> dict[str, str]:
    """One row: verdicts on studies whose deepest size drifts, with the rounds of seeds that a study adds."""
    generator, counted = np.random.default_rng(seeds), []
    for _ in range(studies):
        study = Simulated("one", (0.0, 0.0, drift), noise, generator)
        analysis = study.run_rounds(seeds)
        carried = analysis.comparisons[0].curve.optimum.x
        counted.append((analysis.judgements[0].verdict, max(study.regrets(carried)[1:])))
    limit = Limits().transfer
    large = [verdict for verdict, regret in counted if regret >= 2 * limit]
    small = [verdict for verdict, regret in counted if regret <= limit / 2]

    def share(of: Sequence[str], *names: str) -> str:
        return f"{np.mean([verdict in names for verdict in of]):.3f} of {len(of)}" if of else ""

    return {
        "true drift": f"{drift:g}",
        "seeds": str(seeds),
        "noise": f"{100 * noise:g} %",
        "wrong `transfers` (regret twice the limit or more)": share(large, "transfers"),
        "wrong `does not transfer` (half the limit or less)": share(small, "does not transfer"),
        "wrong `costs` (the same)": share(small, "costs"),
        "settled": share([verdict for verdict, _ in counted], "transfers", "costs", "does not transfer"),
    }


def published_widths(folder: Path) -> dict[str, str]:
    """Half-widths of the optima's intervals in the records of published studies."""
    found = [
        (bounds[1] - bounds[0]) / 2
        for path in sorted(folder.glob("*.json"))
        for size in read_record(path).get("sizes", ())
        if (bounds := size["optimum_interval_log2"]) and None not in bounds
    ]
    return {"curves": str(len(found)), "median half-width, octaves": f"{np.median(found):.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=(2, 3, 5, 16))
    parser.add_argument("--noises", nargs="*", type=float, default=(0.005, 0.02, 0.04))
    parser.add_argument("--drifts", nargs="*", type=float, default=(0.0, 0.3, 0.65, 1.2))
    parser.add_argument("--widths", type=Path, help="folder of records: their widths alone")
    parser.add_argument("--condense", action="store_true", help="one row for all numbers of seeds")
    asked = parser.parse_args()
    if asked.widths:
        print("\n".join(format_markdown_table([published_widths(asked.widths)])))
        return
    cells = [(shape, seeds, noise) for shape in asked.shapes for seeds in asked.seeds for noise in asked.noises]
    rows = [coverage(*cell, asked.studies) for cell in cells]
    shown = condense(rows) if asked.condense else rows
    print("\n".join(format_markdown_table(shown)), "\n", flush=True)
    settings = [(drift, seeds, noise) for drift in asked.drifts for seeds in asked.seeds for noise in asked.noises]
    print("\n".join(format_markdown_table([verdicts(*each, asked.studies) for each in settings])))


if __name__ == "__main__":
    main()
