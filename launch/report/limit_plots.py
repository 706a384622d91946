"""The figures of `depthmup limit`."""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthmup.launch.findings.grid import GridRate
from depthmup.launch.report.limit_task import Grid, Limit
from depthmup.launch.report.plots import choose_colours, finish_distances, finish_losses, make_panels, mark_log_axis

OTHER_AXIS = {"width": "depth", "depth": "width"}


def draw_lines(axis: Axes, grid: Grid, rate: GridRate) -> None:
    """One colour a line of points, its fit solid; the theory's slope through the last line, dashed."""
    lines = sorted(set(rate.lines))
    colours = dict(zip(lines, choose_colours(len(lines)), strict=True))
    for line in lines:
        own = rate.lines == line
        sizes, distance = rate.sizes[own], rate.distance[own]
        name = f"{OTHER_AXIS[rate.law.axis]} {line:g}"
        if not grid.has_limit:
            axis.plot(sizes, distance, "x", color="0.6", label=f"{grid.parameterization}, {name}")
            continue
        label = f"{grid.parameterization}, {name}"
        axis.errorbar(sizes, distance, rate.error[own], fmt="o", capsize=3, color=colours[line], label=label)
        if line in rate.factors:
            fine = np.geomspace(sizes.min(), sizes.max(), 50)
            axis.plot(fine, rate.fitted(line, fine), color=colours[line], linewidth=1)
    if grid.has_limit and rate.factors:
        fine = np.unique(rate.sizes)
        theory = fine**-rate.law.exponent
        theory *= rate.fitted(max(rate.factors), fine[-1:])[0] / theory[-1]
        axis.plot(fine, theory, "--", color="0.3", zorder=0, label=f"theory: {rate.law.exponent:g}")


def draw_distances(found: Sequence[tuple[Grid, str, GridRate]]) -> Figure:
    """Distance to the limit against size: a row for every task and quantity, a column for every law."""
    laws = list(dict.fromkeys(rate.law for _, _, rate in found))
    kinds = list(dict.fromkeys((grid.task.name, quantity) for grid, quantity, _ in found))
    figure, axes = make_panels(len(kinds), len(laws))
    for (y, kind), (x, law) in product(enumerate(kinds), enumerate(laws)):
        axis = axes[y][x]
        shown = [(g, rate) for g, quantity, rate in found if ((g.task.name, quantity), rate.law) == (kind, law)]
        said = []
        for grid, rate in shown:
            draw_lines(axis, grid, rate)
            if grid.has_limit and rate.exponent is not None:
                said.append(f"{grid.parameterization} {rate.exponent:.2f}")
        axis.set_title(f"{kind[0]}, {kind[1]}, {law.measure}\n{', '.join(said) or 'not resolved'}", fontsize=9)
        if any(np.isfinite(rate.distance).any() for _, rate in shown):
            finish_distances(axis, law.axis, {int(size) for _, rate in shown for size in rate.sizes}, font_size=6)
    for row in axes:
        row[0].set_ylabel("distance to the limit (relative)")
    return figure


def draw_loss_curves(grids: Sequence[Grid], limits: Mapping[str, Limit]) -> Figure:
    """Means over seeds, and the limit's: a row for every grid; over width at the largest depth, and the reverse."""
    figure, axes = make_panels(len(grids), 2)
    for row, grid in zip(axes, grids, strict=True):
        curves, limit = grid.values["loss curve"], limits[grid.task.name]["loss curve"]
        for axis, over in zip(row, ("width", "depth"), strict=True):
            index = ("width", "depth").index(over)
            largest = max((sizes[1 - index] for sizes in curves), default=0)
            own = {sizes[index]: of for sizes, of in sorted(curves.items()) if sizes[1 - index] == largest}
            for colour, (number, losses) in zip(choose_colours(len(own)), own.items(), strict=True):
                axis.plot(range(1, losses.shape[1] + 1), losses.mean(axis=0), color=colour, label=f"{over} {number}")
            known = limit[largest if over == "width" and largest else math.inf].mean(axis=0)
            axis.plot(range(1, len(known) + 1), known, "k--", label="limit")
            title = f"{grid.parameterization}, {grid.task.name}\nover {over} at {OTHER_AXIS[over]} {largest}"
            finish_losses(axis, title, title_size=9, font_size=7)
            mark_log_axis(axis)
        row[0].set_ylabel("training loss")
    return figure
