"""Several studies side by side: one row per study and parameterization, from their records (launch.report.record)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from depthmup.data.files import write_atomically
from depthmup.launch.report.page import make_environment, read_script
from depthmup.launch.report.record import restore_interval
from depthmup.launch.report.tables import print_sentence, print_table
from depthmup.launch.wording import show_close_bound, show_drift, show_interval, show_share, show_size


def format_cells(record: Mapping[str, Any], verdict: Mapping[str, str]) -> dict[str, str]:
    """One parameterization of one study: its base's optimum, and the size that drifted most."""
    sizes = [size for size in record["sizes"] if size["parameterization"] == verdict["parameterization"]]
    base, *others = sizes  # a record has the base first
    drifted = [size for size in others if size["drift_octaves"] is not None]
    largest = max(drifted, key=lambda size: abs(size["drift_octaves"]), default=None)
    drift = interval = ""
    if largest:
        drift = f"{show_drift(largest['drift_octaves'])} at {show_size(largest)}"
        bounds = largest["drift_interval_octaves"]
        interval = show_interval(restore_interval(bounds)) if bounds else "one seed"
    lost = [size["regret"] for size in others if size["regret"] is not None]
    fails = any(size["fails_at_base_optimum"] for size in others)
    regret = "fails" if fails else show_share(max(lost)) if lost else ""
    highest = [size["regret_bound"] for size in others]
    is_bounded = bool(highest) and not fails and None not in highest
    optimum = "none" if base["optimum_log2"] is None else f"{base['optimum_log2']:.1f}"
    return {
        "study": record["study"],
        "parameterization": verdict["parameterization"],
        "log2 optimum": optimum,
        "largest drift": drift,
        "interval": interval,
        "largest regret": regret,
        "below (95 %)": show_close_bound(max(highest)) if is_bounded else "",
        "censored": str(sum(size["censored"] is not None for size in sizes)),
        "verdict": verdict["verdict"] + (" so far" if record["num_unfinished"] else ""),
    }


def tabulate_studies(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [format_cells(record, verdict) for record in records for verdict in record["verdicts"]]


def print_overview(records: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The rows that a terminal has room for; the page has all."""
    table = tabulate_studies(records)
    shown = ("study", "parameterization", "largest regret", "below (95 %)", "verdict")
    print_sentence(console, "\nAll studies, with what the carried value costs at most (octaves stand in the page):")
    print_table([{column: row[column] for column in shown} for row in table], ("study", "parameterization"), console)


def write_overview(records: Sequence[Mapping[str, Any]], pages: Sequence[Path], path: Path) -> None:
    """One page with a row per study and parameterization, and links to the studies' own `pages`. `records`: of
    `make_told_record`."""
    page = (
        make_environment()
        .get_template("overview.html.j2")
        .render(
            rows=tabulate_studies(records),
            links=[quote(os.path.relpath(page, path.parent)) for page in pages],
            records=records,
            scripts={"tables": read_script("tables.js")},
        )
    )
    write_atomically(path, page.encode())
