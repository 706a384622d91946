"""How often does a forecast's interval hold the loss of the largest network? Simulated losses, seeds fixed.

python -m benchmarks.forecast                  # the table of docs/verdict.md: minutes on one core
python -m benchmarks.forecast --studies 50     # a look

A study has runs at the transferred value at depths 3, 6, 12 and, of the longer ladder, 24 and 48; the forecast is for
twice the deepest. Losses follow 0.8 (1 + (depth / 3)^-p) / 2, runs of a size differ by the noise. "0": the loss does
not change with depth; "breaks": p = 0.6, but from the second deepest size on the loss grows by 15 % a size.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from depthmup.launch.config import Size
from depthmup.launch.findings.forecast import predict_loss
from depthmup.launch.report.page import format_markdown_table

LAWS = ("0", "0.3", "0.6", "0.9", "1.2", "breaks")


def losses(law: str, depths: Sequence[int]) -> np.ndarray:
    """(sizes,)"""
    relative = np.array(depths) / depths[0]
    exponent = 0.6 if law == "breaks" else float(law)
    found = 0.4 * (1 + relative**-exponent)
    if law == "breaks":
        found = found * 1.15 ** np.maximum(np.arange(len(depths)) - (len(depths) - 3), 0)
    return np.asarray(found)


def row(law: str, number: int, seeds: int, noise: float, studies: int, seed: int) -> dict[str, str]:
    depths = [3 * 2**power for power in range(number + 1)]
    sizes = [Size(width=16, depth=depth) for depth in depths]
    truth = losses(law, depths)
    generator = np.random.default_rng([seed, number, seeds, round(1e4 * noise), LAWS.index(law)])
    held, widths = [], []
    for _ in range(studies):
        runs = truth[:, None] * (1 + noise * generator.standard_normal((number + 1, seeds)))
        known = dict(zip(sizes[:-1], runs[:-1], strict=True))
        _, predicted, interval, _ = predict_loss(known, sizes[-1], seeds)
        if predicted is not None and interval is not None:
            held.append(interval[0] <= runs[-1].mean() <= interval[1])
            widths.append((interval[1] - interval[0]) / 2 / predicted)
    return {
        "true exponent": law,
        "sizes": str(number),
        "seeds": str(seeds),
        "noise": f"{100 * noise:g} %",
        "a number is given": f"{len(held) / studies:.2f}",
        "holds": f"{np.mean(held):.2f}" if held else "",
        "half-width": f"{np.median(widths):.1%}" if widths else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=150)
    parser.add_argument("--seed", type=int, default=300_000)
    asked = parser.parse_args()
    cells = [
        (law, number, seeds, noise)
        for law in LAWS
        for number in (3, 5)
        for seeds, noise in ((3, 0.005), (3, 0.02), (16, 0.02))
    ]
    for index, cell in enumerate(cells):
        lines = format_markdown_table([row(*cell, asked.studies, asked.seed)])
        print("\n".join(lines if index == 0 else lines[2:]), flush=True)


if __name__ == "__main__":
    main()
