"""A report's files in the study's folder: one self-contained HTML page, Markdown, CSV, JSON and figures."""

import csv
import io
import json
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from depthmup.data.files import write_atomically
from depthmup.launch.config import Size
from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.findings.theory import predict_drifts
from depthmup.launch.report import plots
from depthmup.launch.report.collect import Report
from depthmup.launch.report.place import copy_results
from depthmup.launch.report.record import dump, make_record, restore_interval
from depthmup.launch.report.tables import describe_planned, forecast_row, tabulate_sizes
from depthmup.launch.wording import show_drift, show_interval, show_number

CONVERGENCE_FILES = ("convergence.json", "convergence.png", "convergence-loss.png")  # of `depthmup converge`
EXPONENTS_FILES = ("exponents.json", "exponents.png")  # of `depthmup exponents`


def run_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every finished run, by the name of its folder."""
    by_folder = {run["folder"]: run for run in reversed(record["runs"])}  # the first of the points that share a run
    return [
        {
            "run": run["folder"],
            "parameterization": run["parameterization"],
            **{axis: str(run[axis]) for axis in record["base"]},
            record["hyperparameter"]: f"{run['value']:.4g}",
            "seed": str(run["seed"]),
            record["metric"]: run["failed"] or show_number(run["metric"]),
        }
        for run in reversed(by_folder.values())
    ]


def format_markdown_table(table: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table with the columns of the first row."""
    if not table:
        return []
    lines = [f"| {' | '.join(table[0])} |", "|" + "---|" * len(table[0])]
    return [*lines, *(f"| {' | '.join(row.values())} |" for row in table)]


def format_markdown(record: Mapping[str, Any]) -> str:
    """The report for a paper's appendix."""
    said = record["said"]
    lines = [f"# {record['study']}", "", said["facts"], ""]
    for found in record["verdicts"]:
        lines.append(f"- **{found['parameterization']}: {found['verdict']}.** {found['reason']}.")
        lines += [f"  {describe_planned(**found['at_planned_seeds'])}"] if found["at_planned_seeds"] else []
    lines += [f"- {sentence}" for sentence in (*said["scaling"], *said["direct"], *said["expected_drifts"])]
    if theory := list_theory_rows(record):
        lines += ["", "Drift with depth, in theory and seen:", "", *format_markdown_table(theory)]
    lines += ["", said["rounds"]] if said["rounds"] else []
    lines += [
        "",
        f"Rule: {record['rule']}",
        "",
        "![curves](curves.png)",
        "",
        *format_markdown_table(tabulate_sizes(record)),
    ]
    if record["forecasts"]:
        lines += ["", *format_markdown_table([forecast_row(f) for f in record["forecasts"]]), "", said["calibration"]]
    lines += ["", *(f"- not in this report: {line}" for line in record["unfinished"])]
    return "\n".join(lines).rstrip() + "\n"


def draw_figures(report: Report) -> dict[str, Figure]:
    """By the name of their PNG; those that there is something to show in."""
    study = report.study.file.study
    found = {
        "curves": plots.draw_curves(report.analysis, study) if report.analysis.judgements else None,
        "drift": plots.draw_against_size(report.analysis, study, "drift", predict_drifts(report.study.file)),
        "loss": plots.draw_against_size(report.analysis, study, "loss"),
    }
    return {name: figure for name, figure in found.items() if figure}


# plotly-basic.min.js is plotly.js-basic-dist-min 4.1.1 of npm (MIT), chosen over lighter libraries because hover,
# clicks, logarithmic axes and upkeep come with it, and 1.2 MB leave room for 500 runs. pip's plotly brings 4.5 MB.
def read_script(name: str) -> jinja2.utils.markupsafe.Markup:
    """A script of this folder, to stand in a page."""
    return jinja2.utils.markupsafe.Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))


def format_inline_json(record: Mapping[str, Any]) -> jinja2.utils.markupsafe.Markup:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(record, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return jinja2.utils.markupsafe.Markup(text)


def list_theory_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The predicted drifts with depth beside those seen, with their intervals."""
    seen = {
        (size["parameterization"], size["depth"]): size
        for size in record["sizes"]
        if Size.of(size).is_beside(Size.of(record["base"]), "depth")
    }

    def row(drift: Mapping[str, Any]) -> dict[str, str]:
        size = seen.get((drift["parameterization"], drift["depth"]), {})
        found, interval = size.get("drift_octaves"), size.get("drift_interval_octaves")
        return {
            "parameterization": drift["parameterization"],
            "depth": str(drift["depth"]),
            "in theory": f"{drift['octaves']:+.2f}",
            "seen": "" if found is None else show_drift(found),
            "interval": show_interval(restore_interval(interval)) if interval else "",
        }

    return [row(drift) for drift in record["predicted_drifts"]]


def list_cost_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    cost = record["cost"]
    row = {
        "runs": str(record["num_runs"]),
        "FLOPs": f"{cost['flops']:.3g}",
        "seconds of training": f"{cost['hours'] * 3600:.0f}",
        "hours of GPUs or processes": f"{cost['gpu_hours']:.3g}",
    }
    return [row if cost["money"] is None else row | {"money": f"{cost['money']:.2f}"}]


def list_origin_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Which code and which shards the runs come from."""
    return [
        {"of": what, "fingerprint": fingerprint, "runs": str(count)}
        for what, counts in record["origins"].items()
        for fingerprint, count in counts.items()
    ]


def make_environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("depthmup.launch.report", ".")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def format_csv(table: list[dict[str, str]]) -> str:
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def render(record: Mapping[str, Any], svg: Mapping[str, str], reload_seconds: int | None = None) -> str:
    """The page. All that it says is of `record` (record.make_page_record); `svg`: figures of a page without scripts;
    `reload_seconds`: how often a browser loads it again, None for never."""
    scripts = {"tables": "tables.js", "plotly": "plotly-basic.min.js", "page": "page.js", "sizes": "sizes.js"}
    return (
        make_environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            said=record["said"],
            rows=tabulate_sizes(record),
            theory=list_theory_rows(record),
            costs=list_cost_rows(record),
            origins=list_origin_rows(record),
            has_effective=record["hyperparameter"] == "optimizer.lr",
            has_others=len(record["sizes"]) > len(record["verdicts"]),
            scripts={"record": format_inline_json(record)}
            | {name: read_script(file) for name, file in scripts.items()},
            forecasts=[forecast_row(forecast) for forecast in record["forecasts"]],
            runs=run_rows(record),
            confidence=f"{CONFIDENCE:.0%}",
            planned_sentence=describe_planned,
            reload_seconds=reload_seconds,
            written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            version=version("depthmup"),
            svg={name: jinja2.utils.markupsafe.Markup(text) for name, text in svg.items()},
        )
    )


def write_report(report: Report, record: Mapping[str, Any], root: Path, reload_seconds: int | None = None) -> None:
    """Writes report.html, .md, .csv and .json and the figures into the folder `root`. `record`: that of the report, of
    `make_page_record`; `reload_seconds`: how often an open page loads itself again."""
    svg = {name: plots.save_figure(figure, root / f"{name}.png") for name, figure in draw_figures(report).items()}
    write_atomically(root / "report.csv", format_csv(tabulate_sizes(record)).encode())
    write_atomically(root / "report.json", dump(record).encode())
    write_atomically(root / "report.md", format_markdown(record).encode())
    write_atomically(root / "report.html", render(record, svg, reload_seconds).encode())


def publish(report: Report, root: Path, folder: Path) -> list[Path]:
    """Copies what a repository keeps from `root`, where the report was written, to `folder`: the record without single
    runs as NAME.json, figures and rates as NAME-*."""
    name = report.study.file.study.name
    swept = ("curves.png", "drift.png") if len(report.study.file.study.grid) > 1 else ()  # one value has no optimum
    files = (*swept, *CONVERGENCE_FILES, *EXPONENTS_FILES)
    copies = copy_results(root, folder, {file: f"{name}-{file}" for file in files})
    write_atomically(folder / f"{name}.json", dump(make_record(report)).encode())
    return [folder / f"{name}.json", *copies]
