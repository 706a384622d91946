"""A study's results as a table in the terminal, CSV, JSON and one self-contained HTML page."""

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table

from data.errors import UserError
from data.storage import write_atomically
from launch import plots
from launch.analysis import Analysis, Comparison, Result, analyse, rule, show_interval
from launch.cost import count_flops
from launch.optimum import CONFIDENCE
from launch.plan import quantity
from launch.study import Study

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
    for run in study.points:
        done = run.directory.done()
        if done is None:
            failed = run.directory.failed()
            state = f"failed: {failed['error']}" if failed else "not finished"
            unfinished.append(f"{run.directory.path.name} {run.parameterization}, {run.size}, seed {run.seed}: {state}")
            continue
        metric = done.get(study.file.study.metric) if done["outcome"] == "completed" else math.inf
        if metric is None:
            raise UserError(
                f"{run.directory.path}: done.json has no {study.file.study.metric}; add minival to train.evaluate, or, "
                "if another version wrote it, delete the folder to train it again"
            )
        results.append(Result(run.parameterization, run.size, run.value, run.seed, metric))
    settings = study.file.study
    chance = math.log(study.file.model.num_classes)
    analysis = analyse(results, settings.sizes[0], settings.tolerance, settings.octaves, chance)
    return Report(study, results, analysis, unfinished)


# ---------------------------------------------------------------- text


def number(value: float) -> str:
    return "diverged" if not math.isfinite(value) else f"{value:.3g}"


def notes(comparison: Comparison, is_base: bool) -> str:
    curve = comparison.curve
    found = ["base"] if is_base else []
    if not curve.trains:
        found.append("does not train")
    if len(curve.metric) == 1:
        found.append("one seed")
    if curve.optimum.censored:
        found.append(f"censored ({curve.optimum.censored} edge)")
    if diverged := int(np.isinf(curve.metric).sum()):
        found.append(f"{diverged} of {int((~np.isnan(curve.metric)).sum())} runs diverged")
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
            "none" if curve.optimum.x is None else report.study.file.study.show(curve.optimum.x),
            "" if is_base or comparison.drift is None else f"{comparison.drift:+.1f}",
            "" if is_base or interval is None else show_interval(interval),
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


# ---------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """What the finished runs took."""

    flops: float
    hours: float  # of processes that trained, as the done markers say
    target_flops: float  # of one run of the largest size, all samples

    @property
    def share(self) -> str:
        return f"{self.flops / self.target_flops:.3g} times one run of the largest size"


def cost(report: Report) -> Cost:
    """Counts FLOPs of the finished runs at their full length."""
    flops = count_flops(report.study.runs)
    finished = [(run, done) for run in report.study.runs if (done := run.directory.done())]
    seconds = sum(done.get("seconds", 0.0) for _, done in finished)
    total = sum(flops[run.size][1] for run, _ in finished)
    return Cost(total, seconds / 3600, max(each for _, each in flops.values()))


# ---------------------------------------------------------------- files


def as_json(report: Report, spent: Cost) -> dict[str, Any]:
    """Everything the page shows, as plain data; infinite numbers become null."""

    def plain(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def bounds(interval: tuple[float, float] | None) -> list[float | None] | None:
        return [plain(bound) for bound in interval] if interval else None

    study = report.study.file.study
    sizes = [
        {
            "parameterization": c.curve.parameterization,
            "width": c.curve.size.width,
            "depth": c.curve.size.depth,
            "optimum_log2": plain(c.curve.optimum.x),
            "optimum_interval_log2": bounds(c.curve.interval),
            "trains": c.curve.trains,
            "seeds": len(c.curve.metric),
            "censored": c.curve.optimum.censored,
            "drift_octaves": plain(c.drift),
            "drift_interval_octaves": bounds(c.interval),
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
        "verdicts": [
            {"parameterization": j.parameterization, "verdict": j.verdict, "reason": j.reason}
            for j in report.analysis.judgements
        ],
        "sizes": sizes,
        "runs": runs,
        "unfinished": report.unfinished,
        "cost": vars(spent),
    }


def run_rows(report: Report) -> list[dict[str, str]]:
    """Every finished run with a link to its folder, relative to the report's."""
    found = []
    for run in report.study.runs:
        if done := run.directory.done():
            value = done.get(report.study.file.study.metric, math.inf)
            name = run.directory.path.name
            link = f"runs/{name}/"
            cells = (run.parameterization, str(run.size.width), str(run.size.depth), f"{run.value:.4g}", str(run.seed))
            keys = ("parameterization", "width", "depth", "value", "seed")
            found.append({"run": name, "link": link, **dict(zip(keys, cells, strict=True)), "metric": number(value)})
    return found


def markdown(report: Report, spent: Cost) -> str:
    """The report for a paper's appendix."""
    study = report.study.file.study
    lines = [f"# {study.name}", "", facts(report, spent), ""]
    lines += [f"- **{j.parameterization}: {j.verdict}.** {j.reason}." for j in report.analysis.judgements]
    lines += ["", f"Rule: {report.rule}", "", "![curves](curves.png)", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row[column] for column in COLUMNS)} |" for row in rows(report)]
    lines += ["", *(f"- not in this report: {line}" for line in report.unfinished)]
    return "\n".join(lines).rstrip() + "\n"


def facts(report: Report, spent: Cost) -> str:
    """What was run, in two sentences."""
    file, study = report.study.file, report.study.file.study
    diverged = sum(not math.isfinite(result.metric) for result in report.results)
    return (
        f"{file.model.family}, {file.optimizer.name}, {file.schedule.name} schedule with "
        f"{100 * file.schedule.warmup:.0f} % warm-up, {file.train.samples} samples in batches of "
        f"{file.train.global_batch_size} ({file.train.num_steps} steps), data set {file.data.name}, "
        f"{100 * file.data.minival:g} % of the training set held out as minival, seeds "
        f"{', '.join(map(str, study.seeds))}. {len(report.results)} runs, {diverged} of them diverged; "
        f"{quantity(spent.flops)}FLOPs ({spent.share}), {spent.hours:.2f} hours of training processes."
    )


def write_report(report: Report) -> None:
    """Writes report.html, .md, .csv and .json and the figures into the study's folder."""
    root, study = report.study.file.directory, report.study.file.study
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows(report))
    spent = cost(report)
    figures = {
        "curves": plots.curves(report.analysis, study) if report.analysis.judgements else None,
        "drift": plots.against_size(report.analysis, study, "drift"),
        "loss": plots.against_size(report.analysis, study, "loss"),
    }
    svg = {
        name: jinja2.utils.markupsafe.Markup(plots.save(figure, root / f"{name}.png"))
        for name, figure in figures.items()
        if figure
    }
    write_atomically(root / "report.csv", table.getvalue().encode())
    write_atomically(root / "report.json", json.dumps(as_json(report, spent), indent=1, allow_nan=False).encode())
    write_atomically(root / "report.md", markdown(report, spent).encode())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        study=study,
        facts=facts(report, spent),
        columns=COLUMNS,
        rows=rows(report),
        runs=run_rows(report),
        judgements=report.analysis.judgements,
        rule=report.rule,
        unfinished=report.unfinished,
        confidence=f"{CONFIDENCE:.0%}",
        svg=svg,
    )
    write_atomically(root / "report.html", page.encode())
