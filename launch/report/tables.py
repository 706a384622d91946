"""A report's table and verdicts as text, and as printed in the terminal."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthmup.launch.findings.analysis import Comparison
from depthmup.launch.findings.curve_model import CONFIDENCE
from depthmup.launch.findings.forecast import Forecast, calibration
from depthmup.launch.findings.theory import expected_drifts
from depthmup.launch.report.collect import Report, target_line
from depthmup.launch.wording import show_drift, show_interval, show_number, show_share, show_shares

WIDTH = 80  # columns of the terminal that the text is wrapped to
COLOURS = {
    "transfers": "green",
    "costs": "yellow",
    "does not transfer": "red",
    "not identified": "yellow",
    "inconclusive": "yellow",
}
HEADINGS = {"parameterization": "", "interval": f"{CONFIDENCE:.0%} interval", "loss at base optimum": "at base"}


def notes(comparison: Comparison, is_base: bool) -> str:
    curve = comparison.curve
    found = ["base"] if is_base else []
    if not curve.learns:
        found.append("nothing is learned")
    if curve.num_seeds == 1:
        found.append("one seed")
    if curve.optimum.censored:
        found.append(f"censored ({curve.optimum.censored} edge)")
    if failed := int(curve.failed.sum()):
        diverged = int(np.isinf(curve.metric).sum())
        found.append(f"{failed} of {int((~np.isnan(curve.metric)).sum())} runs failed ({diverged} diverged)")
    if comparison.failures.failed:
        found.append(f"at the base's optimum {comparison.failures.failed} of {comparison.failures.runs}")
    return ", ".join(found)


def rows(report: Report) -> list[dict[str, str]]:
    """The table as text, one row per parameterization and size."""
    study = report.study.file.study
    found = []
    for comparison in report.analysis.comparisons:
        curve = comparison.curve
        is_base = curve.size == study.sizes[0]
        drift, interval = (None, None) if is_base else (comparison.drift, comparison.interval)
        found.append(
            {
                "parameterization": curve.parameterization,
                **{axis: str(value) for axis, value in curve.size.axes.items()},
                "optimum": "none" if curve.optimum.x is None else study.show(curve.optimum.x),
                "drift": "" if drift is None else show_drift(drift),
                "interval": "" if interval is None else show_interval(interval),
                "loss": show_number(curve.optimum.metric),
                "loss at base optimum": show_number(comparison.at_base_optimum),
                "regret": "" if not math.isfinite(comparison.regret) else show_share(comparison.regret),
                "regret interval": show_shares(comparison.regret_interval),
                "notes": notes(comparison, is_base),
            }
        )
    return found


def forecast_row(forecast: Forecast) -> dict[str, str]:
    interval = forecast.interval and f"{forecast.interval[0]:.3g} to {forecast.interval[1]:.3g}"
    inside = {True: "yes", False: "no", None: ""}[forecast.inside]
    return {
        "parameterization": forecast.parameterization,
        "forecast for": str(forecast.target),
        "predicted": show_number(forecast.predicted),
        "interval": interval or "",
        "seen": show_number(forecast.seen),
        "inside": inside,
        "fitted on": f"{forecast.fitted} sizes",
        "law": forecast.law,
        "remark": forecast.remark,
    }


def print_table(rows: list[dict[str, str]], left: tuple[str, ...], console: Console) -> None:
    """`rows` with the columns of the first; those in `left` are set to the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in rows[0]:
        table.add_column(HEADINGS.get(column, column), justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table, highlight=False)


def say(console: Console, text: str | Text, style: str = "") -> None:
    """Prints a sentence wrapped to WIDTH columns, also into a pipe."""
    console.print(text, style=style, width=WIDTH, soft_wrap=False, highlight=False, markup=False)


def fit_to_terminal(row: Mapping[str, str]) -> dict[str, str]:
    """The columns that fit, with a mark for what the others would say."""
    marks = ("*" if "censored" in row["notes"] else "") + ("!" if "nothing is learned" in row["notes"] else "")
    kept = {column: row[column] for column in row if column not in ("regret", "regret interval", "notes")}
    return {**kept, "optimum": row["optimum"] + marks}


def print_report(report: Report, console: Console) -> None:
    """The table, fitted to 80 columns, the verdicts, forecasts and what is missing."""
    study = report.study.file.study
    say(console, f"\n{study.name}: {study.metric} against {study.hyperparameter}, {len(report.finished)} runs")
    table = rows(report)
    if table:
        print_table([fit_to_terminal(row) for row in table], ("parameterization",), console)
    if any("censored" in row["notes"] for row in table):
        say(console, "* censored: the best value is on the edge of the grid")
    if any("nothing is learned" in row["notes"] for row in table):
        say(console, "! nothing is learned: no loss is below that of a guess by more than noise")
    for judgement in report.analysis.judgements:
        verdict = Text(judgement.verdict, style=f"bold {COLOURS[judgement.verdict]}")
        say(console, Text.assemble(f"{judgement.parameterization}: ", verdict, f" ({judgement.reason})"))
        if planned := report.planned.get(judgement.parameterization):
            say(console, f"  {planned_sentence(report.study.file.study.seeds, planned.verdict)}")
    if report.rounds:
        say(console, report.rounds)
    say(console, f"Rule: {report.rule}", style="dim")
    for sentence in report.scaling:
        say(console, sentence)
    for direct in report.direct:
        say(console, f"{direct}.")
    for sentence in expected_drifts(report.study.file):
        say(console, f"{sentence}.")
    for sentence in dict.fromkeys(map(forecast_sentence, report.forecasts)):
        say(console, sentence)
    if any(forecast.inside is not None for forecast in report.forecasts):
        say(console, calibration(report.forecasts))
    if target := target_line(report.study):
        say(console, target)
    if report.unfinished:
        say(console, report.missing)
        console.print(f"To go on: {report.go_on}", soft_wrap=True, highlight=False, markup=False)  # can be pasted


def planned_sentence(seeds: Sequence[int], verdict: str) -> str:
    return f"Seeds were added; with the planned ones ({', '.join(map(str, seeds))}) alone: {verdict}."


def forecast_sentence(forecast: Forecast) -> str:
    """The same for all parameterizations where there is none because of the study's sizes."""
    if forecast.predicted is None or forecast.interval is None:
        return f"No forecast for {forecast.target}: {forecast.remark}."
    found = (
        f"{forecast.predicted:.3g}, {CONFIDENCE:.0%} interval {forecast.interval[0]:.3g} to {forecast.interval[1]:.3g}"
    )
    seen = "" if forecast.seen is None else f", seen {show_number(forecast.seen)}"
    remark = f" ({forecast.remark})" if forecast.remark else ""
    return f"{forecast.parameterization}: forecast for {forecast.target}: {found}{seen}{remark}."
