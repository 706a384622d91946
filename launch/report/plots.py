"""A report's figures, as SVG for the page and PNG beside it."""

import io
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from depthmup.data.files import write_atomically
from depthmup.launch.config import StudyConfig
from depthmup.launch.findings.convergence import Line, Rate, select_along_axis
from depthmup.launch.findings.verdict import Analysis

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

PANEL = (4.4, 3.8)  # inches of one panel
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def make_panels(rows: int, columns: int, share_y: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, (rows, columns)."""
    size = (PANEL[0] * columns, PANEL[1] * rows)
    return plt.subplots(rows, columns, figsize=size, sharey=share_y, squeeze=False, layout="constrained")


def make_row(count: int) -> tuple[Figure, list[Axes]]:
    """Panels beside each other with one y axis."""
    figure, axes = make_panels(1, count, share_y=True)
    return figure, list(axes[0])


def choose_colours(count: int) -> np.ndarray:
    """A colour for each of an ordered series of lines."""
    return plt.get_cmap("viridis")(np.linspace(0, 0.85, count))


def mark_log_axis(axis: Axes) -> None:
    """Gives a logarithmic y axis ticks like 0.2 and 0.5, however few decades it spans."""
    low, high = axis.get_ylim()
    marks = (1.0, 2.0, 5.0) if high / low > 4 else tuple(1.0 + i / 2 for i in range(18))
    axis.yaxis.set_major_locator(LogLocator(subs=marks))
    axis.yaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_minor_locator(NullLocator())


def mark_size_axis(axis: Axes, name: str, sizes: list[int]) -> None:
    """Gives the panel a logarithmic x axis of widths, say, labelled with the sizes themselves."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(name)
    axis.grid(alpha=0.25)


def finish_distances(axis: Axes, name: str, sizes: set[int], font_size: int) -> None:
    """Axes and legend of a panel that shows distances to a limit against the size."""
    mark_size_axis(axis, name, sorted(sizes))
    axis.set_yscale("log")
    mark_log_axis(axis)
    axis.legend(fontsize=font_size)


def finish_losses(axis: Axes, title: str, title_size: int | None = None, font_size: int = 8) -> None:
    """Title, axes and legend of a panel that shows losses against the step."""
    axis.set_title(title, fontsize=title_size)
    axis.set(xlabel="step", yscale="log")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=font_size)


def draw_curves(analysis: Analysis, study: StudyConfig) -> Figure:
    """Metric against the hyperparameter in octaves: one panel per parameterization, one curve per size."""
    names = [judgement.parameterization for judgement in analysis.judgements]
    figure, axes = make_row(len(names))
    finite = [float(m) for curve in analysis.curves for m in curve.metric.flat if math.isfinite(m)]
    floor, ceiling = (min(finite), max(finite)) if finite else (0.1, 1.0)
    margin = max(ceiling / floor, 1.01) ** 0.08
    top = ceiling * margin  # where diverged runs are shown
    diverged = any(np.isinf(curve.metric).any() for curve in analysis.curves)
    colours = choose_colours(len(study.sizes))
    for axis, name in zip(axes, names, strict=True):
        for colour, size in zip(colours, study.sizes, strict=True):
            for curve in (c for c in analysis.curves if c.parameterization == name and c.size == size):
                mean, optimum = curve.mean, curve.optimum
                shown = np.isfinite(mean)
                axis.plot(curve.x[shown], mean[shown], "-", color=colour, label=str(size), linewidth=1.6)
                for metrics in curve.metric:
                    axis.plot(curve.x, metrics, ".", color=colour, markersize=3, alpha=0.6)
                    lost = np.isinf(metrics)
                    axis.plot(curve.x[lost], np.full(lost.sum(), top), "x", color=colour, markersize=5)
                if optimum.x is not None:
                    marker = "<" if optimum.censored == "low" else ">" if optimum.censored else "o"
                    axis.plot(optimum.x, optimum.metric, marker, color=colour, markersize=9, markeredgecolor="k")
        if diverged:
            axis.axhline(top, color="0.85", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel=f"log2 of {study.axis}", yscale="log", ylim=(floor / margin, top * margin))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    mark_log_axis(axes[0])
    axes[0].set_ylabel(study.metric.replace("_", " "))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=min(len(labels), 2 * len(names)))
    return figure


def list_varied_axes(analysis: Analysis, study: StudyConfig) -> list[str]:
    """The axes along which some parameterization has a size beside the base."""
    base, judged = study.sizes[0], len(analysis.judgements)
    return [name for name in base.axes if len(select_along_axis(analysis.comparisons, base, name)) > judged]


def draw_against_size(
    analysis: Analysis, study: StudyConfig, what: str, predicted: Mapping[str, Mapping[int, float]] | None = None
) -> Figure | None:
    """`drift` in octaves (a size that does not train is a cross below; dashed over depth: `predicted`), or `loss` at
    the base's optimum (solid) and at the size's own (dotted).

    Against each axis of scale; None where none is varied alone, or where every run failed."""
    names = list_varied_axes(analysis, study)
    if not names or not any(math.isfinite(c.curve.optimum.metric) for c in analysis.comparisons):
        return None
    figure, axes = make_row(len(names))
    count = len(analysis.judgements)
    drifts = [abs(c.drift) for c in analysis.comparisons if c.drift is not None]
    limit = max([*drifts, 2.0]) + 1
    for axis, name in zip(axes, names, strict=True):
        for number, judgement in enumerate(analysis.judgements):
            own = [c for c in analysis.comparisons if c.curve.parameterization == judgement.parameterization]
            shown = select_along_axis(own, study.sizes[0], name)
            x = np.array([float(getattr(c.curve.size, name)) for c in shown])
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "label": judgement.parameterization}
            if what == "drift":
                drift = np.array([math.nan if c.drift is None else c.drift for c in shown])
                bounds = np.array([c.interval or (math.nan, math.nan) for c in shown])
                bounds[x == getattr(study.sizes[0], name)] = math.nan  # the base's own drift is 0
                errors = np.clip([drift - bounds[:, 0], bounds[:, 1] - drift], 0, 99)
                apart = x * 2.0 ** (0.06 * (number - (count - 1) / 2))  # intervals of two that agree stay readable
                axis.errorbar(apart, drift, yerr=errors, capsize=3, **style)
                untrained = np.array([c.curve.optimum.x is None for c in shown], bool)
                if name == "depth" and (expected := (predicted or {}).get(judgement.parameterization)):
                    theory = {study.sizes[0].depth: 0.0, **expected}
                    at, name_of_it = sorted(theory), f"{judgement.parameterization}, in theory"
                    axis.plot(at, [theory[depth] for depth in at], "--", color=f"C{number}", label=name_of_it)
                edge = np.full(untrained.sum(), -0.94 * limit)
                axis.plot(apart[untrained], edge, "x", color=f"C{number}", label="_", markersize=7)
            else:
                metric = np.array([c.at_base_optimum for c in shown])
                axis.plot(x, np.where(np.isfinite(metric), metric, math.nan), **style)
                axis.plot(x, [c.curve.optimum.metric for c in shown], ":", color=f"C{number}")
        mark_size_axis(axis, name, sorted({getattr(c.curve.size, name) for c in analysis.comparisons}))
    if what == "drift":
        axes[0].set(ylabel=f"drift of the optimum (octaves of {study.axis})", ylim=(-limit, limit))
        for axis in axes:
            axis.axhspan(-1, 1, color="0.93", zorder=0, label="one octave")
        if any(c.curve.optimum.x is None for c in analysis.comparisons):
            axes[-1].plot([], [], "kx", label="does not train")
    else:
        axes[0].set(ylabel=study.metric.replace("_", " "), yscale="log")
        mark_log_axis(axes[0])
    axes[-1].legend(fontsize=8)
    return figure


def draw_distances(found: list[tuple[Line, str, Rate]]) -> Figure:
    """Distance to the largest size, which stands for the limit: one row per quantity, one column per law; fits solid,
    the theory's slope dashed, bars: intervals over seeds."""
    laws = list(dict.fromkeys(rate.law for _, _, rate in found))
    quantities = list(dict.fromkeys(quantity for _, quantity, _ in found))
    names = list(dict.fromkeys(line.parameterization for line, _, _ in found))
    figure, axes = make_panels(len(quantities), len(laws))
    for (y, quantity), (x, law) in product(enumerate(quantities), enumerate(laws)):
        axis = axes[y][x]
        shown = [(line, rate) for line, kind, rate in found if (kind, rate.law) == (quantity, law)]
        for line, rate in shown:
            colour = f"C{names.index(line.parameterization)}"
            label = line.parameterization if rate.exponent is None else f"{line.parameterization}: {rate.exponent:.2f}"
            axis.errorbar(rate.sizes, rate.distance, rate.error, fmt="o", capsize=3, color=colour, label=label)
            lost = np.isnan(rate.distance)
            axis.plot(rate.sizes[lost], rate.noise[lost], "v", color=colour, fillstyle="none")  # at most about this
            if rate.exponent is not None and rate.factor is not None:
                axis.plot(rate.sizes, rate.factor * law.shape(rate.exponent, rate.sizes, rate.largest), color=colour)
        axis.set_title(f"{quantity}, {law.measure}")
        resolved = [rate for _, rate in shown if np.isfinite(rate.distance).any()]
        if not resolved:
            axis.text(0.5, 0.5, "no distance is resolved", ha="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
            continue
        last = resolved[-1]
        theory = law.shape(law.exponent, last.sizes, last.largest)
        theory *= math.exp(float(np.nanmean(np.log(last.distance / theory))))
        axis.plot(last.sizes, theory, "--", color="0.5", label=f"theory: {law.exponent:g}", zorder=0)
        finish_distances(axis, law.axis, {int(size) for rate in resolved for size in rate.sizes}, font_size=8)
    for row in axes:
        row[0].set_ylabel("distance to the largest (relative)")
    return figure


def draw_loss_curves(lines: list[Line]) -> Figure:
    """Training loss against the step, means over seeds, one curve per size: one panel per parameterization and axis."""
    figure, axes = make_row(len(lines))
    for axis, line in zip(axes, lines, strict=True):
        curves = line.values["loss curve"]
        colours = choose_colours(len(curves))
        for colour, (size, losses) in zip(colours, sorted(curves.items()), strict=True):
            axis.plot(line.steps, losses.mean(axis=0), color=colour, label=f"{line.axis} {size}", linewidth=1.4)
        finish_losses(axis, f"{line.parameterization} over {line.axis}")
    mark_log_axis(axes[0])
    axes[0].set_ylabel("training loss")
    return figure


def save_figure(figure: Figure, png: Path) -> str:
    """Writes `png` and returns the figure as SVG text to stand in a page."""
    image, text = io.BytesIO(), io.StringIO()
    figure.savefig(image, format="png", dpi=110)
    figure.set_layout_engine("none")  # it stays as it is: to lay it out takes as long as to draw it
    write_atomically(png, image.getvalue())
    figure.savefig(text, format="svg")
    plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    legible = f"min-width: {0.6 * 96 * figure.get_figwidth():.0f}px"  # of 96 pixels an inch: a phone shrinks it to 60 %
    return svg.replace("<svg ", f'<svg style="{legible}" ', 1)
