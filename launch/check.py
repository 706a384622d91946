"""`depthmup check`: the coordinate check of a configuration as a table, a plot and a verdict."""

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.files import refuse_locked, write_atomically
from depthmup.data.paths import expand_path
from depthmup.launch.findings.theory import describe_drift, explain_not_covered, find_activation
from depthmup.launch.progress import display
from depthmup.launch.reading import read_raw
from depthmup.models.build import count_blocks
from depthmup.models.config import MixtureVitConfig
from depthmup.models.coordinate_check import AXES, BAND, EXPERT_AXES, Axis, Line, Settings, check
from depthmup.models.parameterization import PRESETS
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.reading import run_in

matplotlib.use("agg")
import matplotlib.pyplot as plt

MARKS = {"ok": " ", "off": "!", "unclear": "?"}


def parse_factors(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4). Raises UserError unless they are rising whole numbers from 1."""
    try:
        factors = tuple(int(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if len(factors) < 2 or factors[0] != 1 or list(factors) != sorted(set(factors)):
        raise UserError(f"--factors {text!r}: give at least two rising multiples of the base, as in 1,2,4,8")
    return factors


def format_table(axis: Axis, lines: list[Line]) -> list[str]:
    """Text of at most 80 columns: a row per quantity; each slope with its standard error, beside what is demanded."""
    cells: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        cells[line.quantity][line.step] = line
    first, *later = sorted({line.step for line in lines} | {0})

    def slope(line: Line | None) -> str:
        if line is None:
            return ""
        error, digits = f"{line.error:.2f}".lstrip("0"), 2 if abs(line.slope) < 10 else 0
        return f"{line.slope:+.{digits}f}±{error}{MARKS[line.verdict]}"

    def demanded(line: Line | None) -> str:
        if line is None:
            return ""
        low, high = (limit + 0.0 for limit in line.allowed)  # -0.0 is shown as 0
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    rows = [(f"slope over {axis}", "step 0", "demanded", *(f"step {step}" for step in later), "demanded")]
    for quantity, at in cells.items():
        updates = [at.get(step) for step in later]
        rows.append(
            (quantity, slope(at.get(first)), demanded(at.get(first)), *map(slope, updates), demanded(updates[-1]))
        )
    width = max(19, *(len(row[0]) + 1 for row in rows))
    columns = (80 - width) // 5
    return [f"{row[0]:<{width}}" + "".join(f"{cell:>{columns}}" for cell in row[1:]) for row in rows]


def write_plot(lines: list[Line], title: str, path: Path) -> None:
    """RMS over size, a column per axis and a row per step; quantities that are off are dashed."""
    panels: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        panels[line.step, line.axis].append(line)
    steps = sorted({line.step for line in lines})
    axes = list(dict.fromkeys(line.axis for line in lines))
    size = (6.5 * len(axes), 4 * len(steps))
    figure, grid = plt.subplots(len(steps), len(axes), figsize=size, squeeze=False, layout="constrained")
    for row, step in enumerate(steps):
        for column, axis in enumerate(axes):
            panel = grid[row][column]
            for line in panels[step, axis]:
                style = "x--" if line.verdict == "off" else "o-"
                panel.loglog(line.factors, line.rms, style, base=2, label=f"{line.quantity} {line.slope:+.2f}")
            panel.set_title(f"change since step 0, step {step}" if step else "step 0")
            panel.set_xlabel(f"{axis} / base {axis}")
            panel.set_ylabel("RMS")
            panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lstrip("."), dpi=120)
    plt.close(figure)
    write_atomically(path, drawn.getvalue())


def locate_plot(config: Path, raw: dict[str, Any], parameterization: str) -> Path:
    """The plot's file in the study's directory; a run's configuration has a study's name by its own. `raw`: what is in
    the file `config`."""
    study: Any = raw.get("study")
    given = study if isinstance(study, dict) else {}
    directory = Path(expand_path(str(given.get("directory", "runs")))) / given.get("name", config.stem)
    return directory / f"check_{parameterization}.png"


def describe_verdict(lines: list[Line], num_seeds: int) -> str:
    off = [line for line in lines if line.verdict == "off"]
    unclear = [line for line in lines if line.verdict == "unclear"]
    if not off and not unclear:
        return f"passed: all {len(lines)} slopes are within {BAND} of what the limit demands"
    parts = []
    if off:
        parts.append(f"{len(off)} of {len(lines)} slopes are off by more than {BAND} (!)")
    if unclear:
        parts.append(f"{len(unclear)} of {len(lines)} too noisy to judge (?): try --seeds {4 * num_seeds}")
    return "failed: " + ", ".join(parts)


def suggest_remedy(
    lines: list[Line], count_base_blocks: Callable[[], int], parameterization: ParameterizationConfig
) -> str | None:
    """What to try when it is depth that fails, with branches of unit strength in a base of many blocks."""
    alpha = parameterization.resolve().alpha
    if alpha <= 0 or all(line.axis != "depth" or line.verdict == "ok" for line in lines):
        return None
    base_blocks = count_base_blocks()  # of a network that has to be built
    beta = base_blocks**-alpha
    if parameterization.beta <= beta:
        return None
    return (
        f"hint: with beta {parameterization.beta:g} a base of {base_blocks} blocks may be far from the limit; "
        f"try parameterization.beta={beta:.3g} (docs/models.md, 'Finite depth')"
    )


def explain_freezing(lines: list[Line], alpha: float) -> str | None:
    """What it means when the inner layers of branches are off over depth, and alpha says why."""
    off = [each for each in lines if each.axis == "depth" and each.quantity.startswith("inner layer, own")]
    if alpha == 1 or not any(each.verdict == "off" for each in off):
        return None
    return (
        f"hint: features inside branches of several layers move by their own weights as depth^{alpha - 1:g} and freeze "
        "in the limit; alpha 1 keeps them moving (parameterization.name=completep)"
    )


def add_parameterization(raw: dict[str, Any]) -> dict[str, Any]:
    """Plain data; where a study's names no parameterization of its own, with the one that the study is about: the first
    with rules of depth, else of width."""
    study, stated = raw.get("study"), raw.get("parameterization", {})
    listed = study.get("parameterizations") if isinstance(study, dict) else None
    if not isinstance(listed, list) or not isinstance(stated, dict) or "name" in stated:
        return raw
    rows = [{"name": each} if isinstance(each, str) else each for each in listed]
    named = [row for row in rows if isinstance(row, dict) and row.get("name") in PRESETS]
    named.sort(key=lambda row: (not PRESETS[row["name"]].depth_rules, not PRESETS[row["name"]].width_rules))
    return {**raw, "parameterization": {**named[0], **stated}} if named else raw


def run_check(
    config: Path,
    overrides: tuple[str, ...],
    factors: str,
    steps: int,
    seeds: int,
    batch_size: int,
    axis: Axis | None,
    inside: bool,
    plot: Path | None,
    console: Console,
) -> bool:
    """Prints the table, writes the plot, and says whether every slope is inside its band. Raises UserError."""
    if min(steps, batch_size) < 1 or seeds < 2:
        raise UserError("--steps and --batch-size must be at least 1, --seeds at least 2")
    raw = add_parameterization(read_raw(config, overrides))
    run = run_in(raw, str(config))
    p = run.parameterization
    plot = plot or locate_plot(config, raw, p.name)
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {plot}: the name must end in .png, .pdf or .svg")
    settings = Settings(parse_factors(factors), steps=steps, batch_size=batch_size, num_seeds=seeds, inside=inside)
    mixture = isinstance(run.model, MixtureVitConfig)
    axes = (axis,) if axis else AXES + (EXPERT_AXES if mixture else ())
    if not mixture and axis in EXPERT_AXES:
        raise UserError(f"--axis {axis} is for a mixture of experts: model.family is {run.model.family}, not moe_vit")
    refuse_locked(plot, "--plot FILE names another file")  # before the training
    total, started = len(axes) * len(settings.factors), 0
    with display(console, "coordinate check") as shown:

        def progress(size: str) -> None:
            nonlocal started
            shown.update(started / total, size)
            started += 1

        lines = check(run.model, p, run.resolved_optimizer, settings, axes, progress)
        shown.update(1, f"{total} sizes", final=True)
    alpha = p.resolve().alpha
    title = f"{run.model.title}, {p.name} (alpha {alpha:g}, beta {p.beta:g}), {run.optimizer.name}, "
    title += f"lr {run.optimizer.lr:g}"
    for one in axes:
        console.print("\n".join(format_table(one, [line for line in lines if line.axis == one])), "", highlight=False)
    console.print(title, describe_verdict(lines, seeds), sep="\n", highlight=False)
    if not explain_not_covered(run):
        depths = [factor * run.model.base_depth for factor in settings.factors]
        if sentence := describe_drift(p, run.model.base_size, depths, find_activation(run)):
            console.print(sentence, highlight=False)
    base = replace(run.model, width=run.model.base_width, depth=run.model.base_depth)
    if advice := suggest_remedy(lines, lambda: count_blocks(base, p), p):
        console.print(advice, highlight=False)
    if advice := explain_freezing(lines, alpha):
        console.print(advice, highlight=False)
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_plot(lines, title, plot)
    console.print(f"plot: {plot}", highlight=False)
    return all(line.verdict == "ok" for line in lines)
