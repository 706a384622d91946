"""A report's figures, as SVG for the page and PNG beside it."""

import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from data.storage import write_atomically
from launch.analysis import Analysis, Comparison
from launch.config import Size, StudyConfig

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

PANEL = (4.4, 3.8)  # inches of one panel


def curves(analysis: Analysis, study: StudyConfig) -> Figure:
    """Metric against log2 of the hyperparameter: one panel per parameterization, one curve per size."""
    names = [judgement.parameterization for judgement in analysis.judgements]
    figure, axes = plt.subplots(1, len(names), figsize=(PANEL[0] * len(names), PANEL[1]), sharey=True, squeeze=False)
    finite = [float(m) for curve in analysis.curves for m in curve.metric.flat if math.isfinite(m)]
    floor, ceiling = (min(finite), max(finite)) if finite else (0.1, 1.0)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(study.sizes)))
    for axis, name in zip(axes[0], names, strict=True):
        for colour, size in zip(colours, study.sizes, strict=True):
            for curve in (c for c in analysis.curves if c.parameterization == name and c.size == size):
                shown = np.isfinite(curve.mean)
                axis.plot(curve.x[shown], curve.mean[shown], "-", color=colour, label=str(size), linewidth=1.6)
                for metrics in curve.metric:
                    axis.plot(curve.x, metrics, ".", color=colour, markersize=3, alpha=0.6)
                    lost = np.isinf(metrics)
                    axis.plot(curve.x[lost], np.full(lost.sum(), ceiling * 1.25), "x", color=colour, markersize=5)
                if curve.optimum.x is not None:
                    marker = "<" if curve.optimum.censored == "low" else ">" if curve.optimum.censored else "o"
                    axis.plot(
                        curve.optimum.x, curve.optimum.metric, marker, color=colour, markersize=9, markeredgecolor="k"
                    )
        axis.axhline(ceiling * 1.25, color="0.85", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel=f"log2 of {study.axis}", yscale="log", ylim=(floor * 0.8, ceiling * 1.4))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(study.metric.replace("_", " "))
    axes[0][-1].legend(fontsize=8, loc="best")
    figure.tight_layout()
    return figure


def along(comparisons: list[Comparison], base: Size, axis: str) -> list[Comparison]:
    """The sizes that differ from the base in `axis` (width or depth) alone, and the base, in order."""
    other = "depth" if axis == "width" else "width"
    same = [c for c in comparisons if getattr(c.curve.size, other) == getattr(base, other)]
    return sorted(same, key=lambda c: getattr(c.curve.size, axis))


def against_size(analysis: Analysis, study: StudyConfig, what: str) -> Figure | None:
    """`drift` in octaves, or `loss` at the base's optimum (solid) and at the size's own (dotted).

    Against log2 width and log2 depth; None where neither is varied alone."""
    base = study.sizes[0]
    axes_shown = [name for name in ("width", "depth") if len({*(getattr(s, name) for s in study.sizes)}) > 1]
    axes_shown = [
        name for name in axes_shown if len(along(analysis.comparisons, base, name)) > len(analysis.judgements)
    ]
    if not axes_shown:
        return None
    size = (PANEL[0] * len(axes_shown), PANEL[1])
    figure, axes = plt.subplots(1, len(axes_shown), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], axes_shown, strict=True):
        for number, judgement in enumerate(analysis.judgements):
            own = [c for c in analysis.comparisons if c.curve.parameterization == judgement.parameterization]
            shown = along(own, base, name)
            x = np.log2([getattr(c.curve.size, name) for c in shown])
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "label": judgement.parameterization}
            if what == "drift":
                drift = np.array([math.nan if c.drift is None else c.drift for c in shown])
                bounds = np.array([c.interval or (math.nan, math.nan) for c in shown])
                errors = np.nan_to_num(np.clip([drift - bounds[:, 0], bounds[:, 1] - drift], 0, None), posinf=0.0)
                axis.errorbar(x, drift, yerr=errors, capsize=3, **style)
            else:
                finite = [c.at_base_optimum if math.isfinite(c.at_base_optimum) else math.nan for c in shown]
                axis.plot(x, finite, **style)
                axis.plot(x, [c.curve.optimum.metric for c in shown], ":", color=f"C{number}")
        if what == "drift":
            axis.axhspan(-study.tolerance, study.tolerance, color="0.93", zorder=0)
        axis.set(xlabel=f"log2 {name}", xticks=sorted({*np.log2([getattr(s, name) for s in study.sizes])}))
        axis.grid(alpha=0.25)
    label = "drift of the optimum (octaves)" if what == "drift" else study.metric.replace("_", " ")
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def save(figure: Figure, png: Path) -> str:
    """Writes `png` and returns the figure as SVG text to stand in a page."""
    image, text = io.BytesIO(), io.StringIO()
    figure.savefig(image, format="png", dpi=160)
    write_atomically(png, image.getvalue())
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
