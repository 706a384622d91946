"""A study's results as a table in the terminal, CSV, JSON and one self-contained HTML page."""

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from data.storage import write_atomically
from launch.analysis import CONFIDENCE, Analysis, Comparison, Result, analyse, rule
from launch.study import Study

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "parameterization",
    "width",
    "depth",
    "optimum",
    "drift",
    "interval",
    "loss",
    "loss at base optimum",
    "regret",
    "notes",
)


@dataclass(frozen=True)
class Report:
    """What a report is made from."""

    study: Study
    results: list[Result]
    analysis: Analysis
    unfinished: list[str]  # a line for each run that is not done

    @property
    def rule(self) -> str:
        return rule(self.study.file.study.tolerance)


def collect(study: Study) -> Report:
    """Reads the done markers of all runs and analyses them."""
    results, unfinished = [], []
    for run in study.runs:
        done = run.directory.done()
        if done is None:
            failed = run.directory.failed()
            state = f"failed: {failed['error']}" if failed else "not finished"
            unfinished.append(f"{run.directory.path.name} {run.parameterization}, {run.size}, seed {run.seed}: {state}")
            continue
        metric = done[study.file.study.metric] if done["outcome"] == "completed" else math.inf
        results.append(Result(run.parameterization, run.size, run.value, run.seed, metric))
    analysis = analyse(results, study.file.study.sizes[0], study.file.study.tolerance)
    return Report(study, results, analysis, unfinished)


# ---------------------------------------------------------------- text


def power_of_two(x: float | None) -> str:
    return "none" if x is None else f"2^{x:.1f}"


def number(value: float) -> str:
    return "diverged" if not math.isfinite(value) else f"{value:.3g}"


def notes(comparison: Comparison, is_base: bool) -> str:
    curve = comparison.curve
    found = ["base"] if is_base else []
    if curve.optimum.censored:
        found.append(f"censored ({curve.optimum.censored} edge)")
    diverged = int((~np.isfinite(curve.metric)).sum())
    if diverged:
        found.append(f"{diverged} of {curve.metric.size} runs diverged")
    return ", ".join(found)


def rows(report: Report) -> list[dict[str, str]]:
    """The table as text, one row per parameterization and size."""
    base = report.study.file.study.sizes[0]
    found = []
    for comparison in report.analysis.comparisons:
        curve = comparison.curve
        is_base = curve.size == base
        interval = comparison.interval
        cells = (
            curve.parameterization,
            str(curve.size.width),
            str(curve.size.depth),
            power_of_two(curve.optimum.x),
            "" if is_base or comparison.drift is None else f"{comparison.drift:+.1f}",
            "" if is_base or interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}",
            number(curve.optimum.metric),
            number(comparison.at_base_optimum),
            number(comparison.regret),
            notes(comparison, is_base),
        )
        found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def print_report(report: Report, console: Console) -> None:
    """The table, fitted to 80 columns, and the verdicts."""
    study = report.study.file.study
    console.print(f"\n{study.name}: {study.metric} against {study.hyperparameter}, {len(report.results)} runs")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("", "width", "depth", "optimum", "drift", f"{CONFIDENCE:.0%} interval", "loss", "at base"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows(report):
        mark = "*" if "censored" in row["notes"] else ""
        cells = (row[c] for c in ("parameterization", "width", "depth", "optimum", "drift", "interval", "loss"))
        parameterization, width, depth, optimum, drift, interval, loss = cells
        table.add_row(
            parameterization, width, depth, optimum + mark, drift, interval, loss, row["loss at base optimum"]
        )
    console.print(table)
    if any("censored" in row["notes"] for row in rows(report)):
        console.print("* censored: the best value is on the edge of the grid")
    for judgement in report.analysis.judgements:
        colour = {"transfers": "green", "does not transfer": "red", "inconclusive": "yellow"}[judgement.verdict]
        console.print(f"{judgement.parameterization}: [bold {colour}]{judgement.verdict}[/] ({judgement.reason})")
    console.print(f"[dim]Rule: {report.rule}[/]")
    if report.unfinished:
        console.print(f"{len(report.unfinished)} runs are not in this report, the first: {report.unfinished[0]}")


# ---------------------------------------------------------------- files


def as_json(report: Report) -> dict[str, Any]:
    """Everything the page shows, as plain data; infinite numbers become null."""

    def plain(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    study = report.study.file.study
    sizes = [
        {
            "parameterization": c.curve.parameterization,
            "width": c.curve.size.width,
            "depth": c.curve.size.depth,
            "optimum_log2": plain(c.curve.optimum.x),
            "optimum_interval_log2": c.curve.interval,
            "censored": c.curve.optimum.censored,
            "drift_octaves": plain(c.drift),
            "drift_interval_octaves": c.interval,
            "best_metric": plain(c.curve.optimum.metric),
            "metric_at_base_optimum": plain(c.at_base_optimum),
            "regret": plain(c.regret),
        }
        for c in report.analysis.comparisons
    ]
    runs = [
        {**vars(result), "size": None, **vars(result.size), "metric": plain(result.metric)} for result in report.results
    ]
    for run in runs:
        del run["size"]
    return {
        "study": study.name,
        "metric": study.metric,
        "hyperparameter": study.hyperparameter,
        "samples": report.study.file.train.samples,
        "global_batch_size": report.study.file.train.global_batch_size,
        "warmup": report.study.file.schedule.warmup,
        "rule": report.rule,
        "verdicts": [vars(judgement) for judgement in report.analysis.judgements],
        "sizes": sizes,
        "runs": runs,
        "unfinished": report.unfinished,
    }


def plot_svg(report: Report) -> str:
    """Metric against log2 of the hyperparameter: one panel per parameterization, one curve per size."""
    study = report.study.file.study
    names = [judgement.parameterization for judgement in report.analysis.judgements]
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.2), sharey=True, squeeze=False)
    finite = [r.metric for r in report.results if math.isfinite(r.metric)]
    floor, ceiling = (min(finite), max(finite)) if finite else (0.1, 1.0)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(study.sizes)))
    for axis, name in zip(axes[0], names, strict=True):
        for colour, size in zip(colours, study.sizes, strict=True):
            for curve in (c for c in report.analysis.curves if c.parameterization == name and c.size == size):
                shown = np.isfinite(curve.mean)
                axis.plot(curve.x[shown], curve.mean[shown], "-", color=colour, label=str(size), linewidth=1.6)
                for metrics in curve.metric:
                    axis.plot(curve.x, metrics, ".", color=colour, markersize=3, alpha=0.6)
                    lost = ~np.isfinite(metrics)
                    axis.plot(curve.x[lost], np.full(lost.sum(), ceiling * 1.25), "x", color=colour, markersize=5)
                if curve.optimum.x is not None:
                    marker = "<" if curve.optimum.censored == "low" else ">" if curve.optimum.censored else "o"
                    axis.plot(
                        curve.optimum.x, curve.optimum.metric, marker, color=colour, markersize=9, markeredgecolor="k"
                    )
        axis.axhline(ceiling * 1.25, color="0.85", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel=f"log2 {study.hyperparameter}", yscale="log", ylim=(floor * 0.8, ceiling * 1.4))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(study.metric.replace("_", " "))
    axes[0][-1].legend(fontsize=8, loc="best")
    figure.tight_layout()
    image = io.StringIO()
    figure.savefig(image, format="svg")
    plt.close(figure)
    return image.getvalue()[image.getvalue().index("<svg") :]


def write_report(report: Report) -> None:
    """Writes report.html, report.csv and report.json into the study's folder."""
    root = report.study.file.directory
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows(report))
    write_atomically(root / "report.csv", table.getvalue().encode())
    write_atomically(root / "report.json", json.dumps(as_json(report), indent=1, allow_nan=False).encode())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        study=report.study.file.study,
        file=report.study.file,
        columns=COLUMNS,
        rows=rows(report),
        judgements=report.analysis.judgements,
        rule=report.rule,
        unfinished=report.unfinished,
        confidence=f"{CONFIDENCE:.0%}",
        plot=jinja2.utils.markupsafe.Markup(plot_svg(report)),
        num_runs=len(report.results),
        num_diverged=sum(not math.isfinite(result.metric) for result in report.results),
    )
    write_atomically(root / "report.html", page.encode())
