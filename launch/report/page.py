"""A report's files in the study's folder: one self-contained HTML page, Markdown, CSV, JSON and figures."""

import csv
import io
import shutil
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from depthmup.data.storage import write_atomically
from depthmup.launch.findings.curve_model import CONFIDENCE
from depthmup.launch.findings.forecast import calibration
from depthmup.launch.findings.theory import expected_drifts, predicted_drifts
from depthmup.launch.report import plots
from depthmup.launch.report.collect import Report
from depthmup.launch.report.record import as_record, dump
from depthmup.launch.report.tables import forecast_row, planned_sentence, rows
from depthmup.launch.wording import show_number

CONVERGENCE_FILES = ("convergence.json", "convergence.png", "convergence-loss.png")  # of `depthmup converge`


def run_rows(report: Report) -> list[dict[str, str]]:
    """Every finished run, by the name of its folder."""
    study = report.study.file.study
    return [
        {
            "run": run.directory.path.name,
            "parameterization": run.parameterization,
            "width": str(run.size.width),
            "depth": str(run.size.depth),
            study.hyperparameter: f"{run.value:.4g}",
            "seed": str(run.seed),
            study.metric: show_number(done.get(study.metric, float("inf"))),
        }
        for run, done in report.finished
    ]


def markdown_table(table: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table with the columns of the first row."""
    if not table:
        return []
    lines = [f"| {' | '.join(table[0])} |", "|" + "---|" * len(table[0])]
    return [*lines, *(f"| {' | '.join(row.values())} |" for row in table)]


def markdown(report: Report) -> str:
    """The report for a paper's appendix."""
    seeds = report.study.file.study.seeds
    lines = [f"# {report.study.file.study.name}", "", report.facts, ""]
    for j in report.analysis.judgements:
        planned = report.planned.get(j.parameterization)
        lines.append(f"- **{j.parameterization}: {j.verdict}.** {j.reason}.")
        lines += [f"  {planned_sentence(seeds, planned.verdict)}"] if planned else []
    lines += [f"- {direct}." for direct in report.direct]
    lines += [f"- {sentence}." for sentence in expected_drifts(report.study.file)]
    lines += ["", report.rounds] if report.rounds else []
    lines += ["", f"Rule: {report.rule}", "", "![curves](curves.png)", "", *markdown_table(rows(report))]
    if report.forecasts:
        lines += ["", *markdown_table([forecast_row(f) for f in report.forecasts]), "", calibration(report.forecasts)]
    lines += ["", *(f"- not in this report: {line}" for line in report.unfinished)]
    return "\n".join(lines).rstrip() + "\n"


def figures(report: Report) -> dict[str, Figure]:
    """By the name of their PNG; those that there is something to show in."""
    study = report.study.file.study
    found = {
        "curves": plots.curves(report.analysis, study) if report.analysis.judgements else None,
        "drift": plots.against_size(report.analysis, study, "drift", predicted_drifts(report.study.file)),
        "loss": plots.against_size(report.analysis, study, "loss"),
    }
    return {name: figure for name, figure in found.items() if figure}


def environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("depthmup.launch.report", ".")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_report(report: Report) -> None:
    """Writes report.html, .md, .csv and .json and the figures into the study's folder."""
    root, table, text = report.study.file.directory, rows(report), io.StringIO()
    seeds = report.study.file.study.seeds
    svg = {
        name: jinja2.utils.markupsafe.Markup(plots.save(figure, root / f"{name}.png"))
        for name, figure in figures(report).items()
    }
    if table:
        writer = csv.DictWriter(text, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            study=report.study.file.study,
            rows=table,
            rounds=report.study.rounds() if report.study.file.study.adaptive else [],
            forecasts=[forecast_row(forecast) for forecast in report.forecasts],
            calibration=calibration(report.forecasts),
            runs=run_rows(report),
            confidence=f"{CONFIDENCE:.0%}",
            planned={name: planned_sentence(seeds, found.verdict) for name, found in report.planned.items()},
            svg=svg,
        )
    )
    write_atomically(root / "report.csv", text.getvalue().encode())
    write_atomically(root / "report.json", dump(as_record(report)).encode())
    write_atomically(root / "report.md", markdown(report).encode())
    write_atomically(root / "report.html", page.encode())


def publish(report: Report, folder: Path) -> list[Path]:
    """Copies what a repository keeps to `folder`: the record as NAME.json, figures and rates as NAME-*."""
    root, name = report.study.file.directory, report.study.file.study.name
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"report.json": f"{name}.json"}
    swept = ("curves.png", "drift.png") if len(report.study.file.study.grid) > 1 else ()  # one value has no optimum
    kept |= {file: f"{name}-{file}" for file in (*swept, *CONVERGENCE_FILES)}
    return [Path(shutil.copyfile(root / old, folder / new)) for old, new in kept.items() if (root / old).exists()]
