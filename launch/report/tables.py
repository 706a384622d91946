"""A report's table and verdicts as text, and as printed in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthmup.data.index import show_count
from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.report.record import restore_interval
from depthmup.launch.wording import WIDTH, show_drift, show_interval, show_number, show_seeds, show_share, show_shares

COLOURS = {
    "transfers": "green",
    "costs": "yellow",
    "does not transfer": "red",
    "not identified": "yellow",
    "inconclusive": "yellow",
}
HEADINGS = {"parameterization": "", "interval": f"{CONFIDENCE:.0%} interval", "loss at base optimum": "at base"}


def is_base(size: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    return all(size[axis] == value for axis, value in record["base"].items())


def list_notes(size: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    found = ["base"] if is_base(size, record) else []
    if not size["learns"]:
        found.append("nothing is learned")
    if size["seeds"] == 1:
        found.append("one seed")
    if size["censored"]:
        found.append(f"censored ({size['censored']} edge)")
    if size["failed_runs"]:
        early = f", {size['ended_early']} ended early" if size["ended_early"] else ""
        found.append(f"{size['failed_runs']} of {size['runs']} runs failed ({size['diverged_runs']} diverged{early})")
    if size["runs_at_base_optimum"]["failed"]:
        found.append("at the base's optimum {failed} of {runs}".format(**size["runs_at_base_optimum"]))
    return ", ".join(found)


def show_optimum(octaves: float | None, record: Mapping[str, Any]) -> str:
    """'2^-4.5', '1 - 2^-3.0', 'none'"""
    complement = "1 - " if record["octaves_of"].startswith("1 - ") else ""
    return "none" if octaves is None else f"{complement}2^{octaves:.1f}"


def tabulate_sizes(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table as text, one row per parameterization and size."""
    found = []
    for size in record["sizes"]:
        of_base = is_base(size, record)
        drift, interval = size["drift_octaves"], size["drift_interval_octaves"]
        found.append(
            {
                "parameterization": size["parameterization"],
                **{axis: str(size[axis]) for axis in record["base"]},
                "optimum": show_optimum(size["optimum_log2"], record),
                "drift": "" if of_base or drift is None else show_drift(drift),
                "interval": "" if of_base or interval is None else show_interval(restore_interval(interval)),
                "loss": "fails" if size["best_fails"] else show_number(size["best_metric"]),
                "loss at base optimum": "fails"
                if size["fails_at_base_optimum"]
                else show_number(size["metric_at_base_optimum"]),
                "regret": "" if size["regret"] is None else show_share(size["regret"]),
                "regret interval": show_shares(size["regret_interval"] and restore_interval(size["regret_interval"])),
                "notes": list_notes(size, record),
            }
        )
    return found


def forecast_row(forecast: Mapping[str, Any]) -> dict[str, str]:
    interval = forecast["interval"] and "{:.3g} to {:.3g}".format(*forecast["interval"])
    inside = {True: "yes", False: "no", None: ""}[forecast["inside"]]
    return {
        "parameterization": forecast["parameterization"],
        "forecast for": f"width {forecast['target']['width']}, depth {forecast['target']['depth']}",
        "predicted": show_number(forecast["predicted"]),
        "interval": interval or "",
        "seen": "fails" if forecast["diverged"] else show_number(forecast["seen"]),
        "inside": inside,
        "fitted on": show_count(forecast["fitted_sizes"], "size"),
        "law": forecast["law"],
        "remark": forecast["remark"],
    }


def print_table(rows: list[dict[str, str]], left: tuple[str, ...], console: Console) -> None:
    """`rows` with the columns of the first; those in `left` are set to the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in rows[0]:
        table.add_column(HEADINGS.get(column, column), justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table, highlight=False)


def print_sentence(console: Console, text: str | Text, style: str = "") -> None:
    """Prints a sentence wrapped to WIDTH columns, also into a pipe."""
    console.print(text, style=style, width=WIDTH, soft_wrap=False, highlight=False, markup=False)


def fit_to_terminal(row: Mapping[str, str]) -> dict[str, str]:
    """The columns that fit, with a mark for what the others would say."""
    marks = ("*" if "censored" in row["notes"] else "") + ("!" if "nothing is learned" in row["notes"] else "")
    kept = {column: row[column] for column in row if column not in ("regret", "regret interval", "notes")}
    return {**kept, "optimum": row["optimum"] + marks}


def print_report(record: Mapping[str, Any], console: Console) -> None:
    """The table, fitted to 80 columns, the verdicts, forecasts and what is missing. `record`: of `make_told_record`."""
    said, table = record["said"], tabulate_sizes(record)
    print_sentence(
        console,
        f"\n{record['study']}: {record['metric']} against {record['hyperparameter']}, {record['num_runs']} runs",
    )
    if table:
        print_table([fit_to_terminal(row) for row in table], ("parameterization",), console)
    if any("censored" in row["notes"] for row in table):
        print_sentence(console, "* censored: the best value is on the edge of the grid")
    if any("nothing is learned" in row["notes"] for row in table):
        print_sentence(console, "! nothing is learned: no loss is below that of a guess by more than noise")
    for found in record["verdicts"]:
        verdict = Text(found["verdict"], style=f"bold {COLOURS[found['verdict']]}")
        print_sentence(console, Text.assemble(f"{found['parameterization']}: ", verdict, f" ({found['reason']})"))
        if planned := found["at_planned_seeds"]:
            print_sentence(console, f"  {describe_planned(**planned)}")
    if said["rounds"]:
        print_sentence(console, said["rounds"])
    print_sentence(console, f"Rule: {record['rule']}", style="dim")
    for sentence in (*said["scaling"], *said["direct"], *said["expected_drifts"], *said["forecasts"]):
        print_sentence(console, sentence)
    if any(forecast["inside"] is not None for forecast in record["forecasts"]):
        print_sentence(console, said["calibration"])
    if said["target"]:
        print_sentence(console, said["target"])
    if said["missing"]:
        print_sentence(console, said["missing"])
        # can be pasted
        console.print(f"To go on: {said['go_on']}", soft_wrap=True, highlight=False, markup=False)


def describe_planned(seeds: Sequence[int], verdict: str) -> str:
    return f"Seeds were added; with the planned ones ({show_seeds(seeds)}) alone: {verdict}."


def format_growth(record: Mapping[str, Any]) -> dict[str, str]:
    """A table's row of a growth's `record`: exponents with their intervals, and the regime."""

    def show(slope: Mapping[str, float] | None) -> str:
        return "" if slope is None else "{exponent:.2f} ({low:.2f} to {high:.2f})".format(**slope)

    cells = {measure: show(slope) for measure, slope in record["slopes"].items()}
    first = {"rules": record["parameterization"], "tensor": record["tensor"], "of": record["subject"]}
    return {**first, **cells, "regime": record["regime"]}
