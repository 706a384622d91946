"""`depthmup check`: the coordinate check of a configuration as a table, a plot and a verdict."""

from collections import defaultdict
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from data.errors import UserError
from launch.config import read_run
from launch.progress import display
from models.coordinate_check import Line, Settings, check

matplotlib.use("agg")
import matplotlib.pyplot as plt


def parse_factors(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4). Raises UserError unless they are rising whole numbers from 1."""
    try:
        factors = tuple(int(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if len(factors) < 2 or factors[0] != 1 or list(factors) != sorted(set(factors)):
        raise UserError(f"--factors {text!r}: give at least two rising multiples of the base, as in 1,2,4,8")
    return factors


def demanded(line: Line) -> str:
    low, high = line.allowed
    return f"{low:+.1f}" if low == high else f"{low:+.1f} to {high:+.1f}"


def what(line: Line) -> str:
    return f"update, step {line.step}" if line.step else "step 0"


def print_table(lines: list[Line], console: Console) -> None:
    """One row per judged slope, with the RMS at every size."""
    for axis in ("width", "depth"):
        shown = [line for line in lines if line.axis == axis]
        table = Table(title=f"log-log slope of the RMS over {axis}", title_justify="left", box=None, pad_edge=False)
        for heading in ("quantity", "", "slope", "demanded", "", *(f"x{f}" for f in shown[0].factors)):
            table.add_column(heading, justify="left" if heading in ("quantity", "") else "right", no_wrap=True)
        for line in shown:
            verdict = "ok" if line.passed else "OFF"
            numbers = (f"{value:.2g}" for value in line.rms)
            table.add_row(line.quantity, what(line), f"{line.slope:+.2f}", demanded(line), verdict, *numbers)
        console.print(table, "", highlight=False)


def write_plot(lines: list[Line], title: str, path: Path) -> None:
    """RMS over size, a column per axis and a row per step; quantities that are off are dashed."""
    panels: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        panels[line.step, line.axis].append(line)
    steps = sorted({line.step for line in lines})
    figure, axes = plt.subplots(len(steps), 2, figsize=(13, 4 * len(steps)), squeeze=False, layout="constrained")
    for row, step in enumerate(steps):
        for column, axis in enumerate(("width", "depth")):
            panel = axes[row][column]
            for line in panels[step, axis]:
                style = "o-" if line.passed else "x--"
                panel.loglog(line.factors, line.rms, style, base=2, label=f"{line.quantity} {line.slope:+.2f}")
            panel.set_title(what(panels[step, axis][0]) if panels[step, axis] else "")
            panel.set_xlabel(f"{axis} / base {axis}")
            panel.set_ylabel("RMS")
            panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_check(
    config: Path,
    overrides: tuple[str, ...],
    factors: str,
    steps: int,
    seeds: int,
    batch_size: int,
    plot: Path,
    console: Console,
) -> bool:
    """Prints the table, writes the plot, and says whether every slope is inside its band. Raises UserError."""
    if min(steps, seeds, batch_size) < 1:
        raise UserError("--steps, --seeds and --batch-size must be at least 1")
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {plot}: the name must end in .png, .pdf or .svg")
    settings = Settings(parse_factors(factors), steps=steps, batch_size=batch_size, num_seeds=seeds)
    run = read_run(config, overrides)
    total, started = 2 * len(settings.factors), 0
    with display(console, "coordinate check") as shown:

        def progress(size: str) -> None:
            nonlocal started
            shown.update(started / total, size)
            started += 1

        lines = check(run.model, run.parameterization, run.optimizer, settings, progress)
        shown.update(1, f"{total} sizes", final=True)
    print_table(lines, console)
    p = run.parameterization.resolve()
    failed = [line for line in lines if not line.passed]
    title = f"{run.model.family}, {p.name} (alpha {p.alpha:g}), {run.optimizer.name}, lr {run.optimizer.lr:g}"
    write_plot(lines, title, plot)
    verdict = "passed" if not failed else f"{len(failed)} of {len(lines)} slopes are off by more than {settings.band}"
    console.print(f"{title}: {verdict} (plot: {plot})", highlight=False)
    return not failed
