"""The page of a study: its structure for people and screen readers, its record, and its life in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthmup.launch.cli import cli
from depthmup.launch.jobs import status
from depthmup.launch.reading import read_study
from depthmup.launch.report import tracked
from depthmup.launch.report.page import format_inline_json, make_environment, read_script
from depthmup.launch.report.record import CURVE_POINTS, read_record
from depthmup.launch.runs.study import Study
from planned_runs import finish
from wandb_files import records_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Elements(HTMLParser):
    """Every element of a page, in order, with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.mark.parametrize("loss", [math.inf, 2.4])  # diverged, and no better than a guess among ten
def test_a_study_in_which_nothing_trains_has_a_report(study_file: Path, loss: float) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    for run in study.runs:
        finish(run, loss)
    result = CliRunner().invoke(cli, ["report", str(study_file)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "inconclusive" in result.output
    assert (study.file.directory / "report.html").exists()


def write_page(study_file: Path, *overrides: str) -> Path:
    """The folder of a study all of whose runs are done, each with 200 logged losses."""
    study = Study(study_file, read_study(study_file, overrides))
    study.write()
    for run in study.runs:
        loss = 0.5 + 0.1 * run.value + 0.01 * run.seed
        run.directory.write_done({"outcome": "completed", "step": 2000, "minival_loss": loss, "seconds": 36.0})
        lines = [json.dumps({"step": step, "loss": 2000 / step}) for step in range(10, 2010, 10)]
        run.directory.metrics.write_text("\n".join(lines) + "\n")
    address = study.runs[0].directory.wandb_address
    address.parent.mkdir()
    address.write_text("https://wandb.example/run")
    result = CliRunner().invoke(cli, ["report", str(study_file), *overrides], catch_exceptions=False)
    assert result.exit_code == 0
    return study.file.directory


def test_a_screen_reader_finds_headings_labels_and_names(study_file: Path) -> None:
    page = Elements((write_page(study_file) / "report.html").read_text())
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("main")) == len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))  # no level is left out
    assert page.of("th")
    assert all(each.get("scope") == "col" for each in page.of("th"))
    assert all(each.get("data-name") for each in page.of("table"))
    names = [each["data-name"] for each in page.of("table")]
    assert len(set(names)) == len(names)  # each is a file of its own when downloaded
    assert all(each.get("aria-label") for _, each in page.found if each.get("role") in ("img", "region"))
    labelled = {each.get("for") for each in page.of("label")}
    assert {each["id"] for each in page.of("select")} <= labelled
    assert all(each.get("tabindex") in (None, "0") for _, each in page.found)
    scrolling = [each for each in (*page.of("figure"), *page.of("div")) if each.get("class") in ("plain", "scroll")]
    assert len(scrolling) > 3
    assert all(each.get("tabindex") == "0" and each.get("aria-label") for each in (*page.of("figure"), *scrolling))
    identities = Counter(each["id"] for _, each in page.found if "id" in each)
    assert {identities[name] for name in ("record", "run", "said", "training", "interactive")} == {1}


def contrast(one: str, other: str) -> float:
    """Of two colours as #rrggbb, by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("number", "scheme"), [(0, "light"), (1, "dark")])
def test_text_and_curves_stand_out_from_the_page(number: int, scheme: str) -> None:
    style = re.findall(r":root \{(.*?)\}", read_script("style.html.j2"), re.DOTALL)[number]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", style))
    for text in ("text", "quiet", "link"):
        assert contrast(colours[text], colours["page"]) >= 4.5
    assert contrast(colours["text"], colours["panel"]) >= 4.5
    drawn = re.search(rf"{scheme}: \[(.*?)\]", read_script("page.js"))
    assert drawn
    assert all(contrast(colour, colours["page"]) >= 3 for colour in re.findall(r"#\w{6}", drawn[1]))


def test_the_record_holds_every_run_with_its_curve_address_and_cost(study_file: Path) -> None:
    root = write_page(study_file, "launch.price_per_gpu_hour=2.5")
    record = read_record(root / "report.json")
    assert {run["folder"] for run in record["runs"]} == {path.name for path in (root / "runs").iterdir()}
    assert len(record["runs"]) == len(record["points"])
    curves = record["training_curves"].values()
    assert all(len(curve["steps"]) == len(curve["loss"]) == CURVE_POINTS for curve in curves)
    assert all((curve["steps"][0], curve["steps"][-1], curve["loss"][-1]) == (10, 2000, 1.0) for curve in curves)
    assert {run["wandb"] for run in record["runs"]} == {None, "https://wandb.example/run"}
    assert record["cost"]["money"] == pytest.approx(2.5 * 36 * record["num_runs"] / 3600)
    base = [run for run in record["runs"] if run["depth"] == record["base"]["depth"]]
    assert all(run["effective_value"] == run["value"] for run in base)  # every factor is 1 at the base


def test_a_page_of_500_runs_stays_under_two_megabytes(study_file: Path) -> None:
    root = write_page(study_file)
    record, page = read_record(root / "report.json"), (root / "report.html").read_text()
    curve = {"steps": [100_000 + step for step in range(CURVE_POINTS)], "loss": [1.234] * CURVE_POINTS}
    runs = [{**record["runs"][0], "folder": f"{number:012x}"} for number in range(500)]
    record |= {
        "runs": runs,
        "points": record["points"][:1] * 500,
        "training_curves": {r["folder"]: curve for r in runs},
    }
    row = re.search(r"<tr>\s*<td[^>]*><a href.*?</tr>", page, re.DOTALL)
    assert row
    assert len(page) + len(format_inline_json(record)) + 500 * len(row[0]) < 2_000_000


def test_where_no_loss_is_foretold_the_page_says_why_and_has_no_table_of_empty_cells(study_file: Path) -> None:
    root = write_page(study_file)
    record, page = read_record(root / "report.json"), (root / "report.html").read_text()
    assert [each["predicted"] for each in record["forecasts"]] == [None] * len(record["forecasts"])
    said = page.partition("<h2>Forecast</h2>")[2].partition("<h2>")[0]
    assert all(f"<li>{html.escape(sentence)}</li>" in said for sentence in record["said"]["forecasts"])
    assert record["said"]["forecasts"]
    assert "<table" not in said


def test_text_in_a_record_cannot_end_its_script() -> None:
    text = format_inline_json({"remark": "</script><b>"})
    assert "<" not in text
    assert json.loads(text) == {"remark": "</script><b>"}


def test_watching_writes_a_page_that_loads_itself_again_until_nothing_runs(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_page(study_file) / "report.html"
    assert "location.reload" not in page.read_text()
    page.unlink()
    answers, watched = [True, False], []
    monkeypatch.setattr(status, "goes_on", lambda snapshot: answers.pop(0))
    monkeypatch.setattr(status.time, "sleep", lambda seconds: watched.append(page.read_text()))
    result = CliRunner().invoke(cli, ["report", str(study_file), "--watch"], catch_exceptions=False)
    assert result.exit_code == 0
    assert not answers
    assert len(watched) == 1
    (milliseconds,) = re.findall(r"setTimeout\(\(\) => location\.reload\(\), (\d+)\)", watched[0])
    assert int(milliseconds) == 1000 * status.WATCH_SECONDS
    assert "location.reload" not in page.read_text()


def test_a_study_whose_every_run_failed_has_a_page_with_a_verdict(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file, ()))
    study.write()
    for run in study.runs:
        run.directory.write_done({"outcome": "diverged", "step": 3, "seconds": 1.0})
    result = CliRunner().invoke(cli, ["report", str(study_file)], catch_exceptions=False)
    assert result.exit_code == 0
    page = (study.file.directory / "report.html").read_text()
    verdicts = read_record(study.file.directory / "report.json")["verdicts"]
    assert len(verdicts) == len(study.file.study.parameterizations)
    assert all(f"{each['parameterization']}: {each['verdict']}</strong>: {each['reason']}" in page for each in verdicts)


def test_only_the_rows_of_bases_begin_a_group() -> None:
    row = {"parameterization": "sp", "notes": "censored (low edge), at the base's optimum 1 of 2"}
    template = make_environment().from_string(
        '{% from "style.html.j2" import table %}{{ table(rows, "name", mark="base") }}'
    )
    page = template.render(rows=[{**row, "notes": "base, one seed"}, row])
    assert [each.get("class") for each in Elements(page).of("tr")] == [None, "first", None]


def as_in_a_browser(page: Path) -> str:
    """The page after its scripts."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom")
    command = [str(BROWSER), *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome: the page's scripts are not run")
def test_a_mean_over_many_seeds_names_no_more_runs_than_fit_beside_its_point(study_file: Path) -> None:
    page = write_page(study_file) / "report.html"
    runs = "Array.from({length: 34}, (_, seed) => ({...record.runs[0], seed, folder: `folder${seed}`}))"
    script = f"<script>document.body.dataset.said = meanText({runs}, 0.5);</script>"
    page.write_text(page.read_text() + script)
    (body,) = Elements(as_in_a_browser(page)).of("body")
    lines = (body["data-said"] or "").split("<br>")
    assert "mean of 34 seeds: minival_loss 0.5000" in lines
    assert [line.split(", run ")[1] for line in lines if line.startswith("seed ")] == [f"folder{n}" for n in range(6)]
    assert lines[-1] == "and 28 more: show every seed"


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome: the page's scripts are not run")
def test_in_a_browser_curves_are_drawn_and_tables_get_their_buttons(study_file: Path) -> None:
    root = write_page(study_file)
    page = Elements(as_in_a_browser(root / "report.html"))
    drawn = [each for each in page.of("div") if "js-plotly-plot" in (each.get("class") or "")]
    record = read_record(root / "report.json")
    assert [each.get("id") for each in drawn[len(record["verdicts"]) :]] == ["training", "drift", "regret", "loss"]
    assert len([each for each in page.of("option") if "value" in each]) == len(record["runs"])
    assert len([each for each in page.of("button") if each.get("class") == "download"]) == len(page.of("table"))


def test_a_study_is_a_run_of_its_own_on_wandb_and_tensorboard_with_verdict_regret_and_page(study_file: Path) -> None:
    root = write_page(study_file, "track.wandb=offline", "track.tensorboard=true")
    record = read_record(root / "report.json")
    (file,) = (root / "wandb").glob("offline-run-*/*.wandb")
    written = records_of(file)
    (run,) = (each.run for each in written if each.HasField("run"))
    assert (run.run_group, run.display_name, run.job_type, run.run_id) == ("tiny", "tiny", "report", "study-tiny")
    items = [item for each in written if each.HasField("summary") for item in each.summary.update]
    items += [item for each in written if each.HasField("history") for item in each.history.item]
    said = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    for verdict in record["verdicts"]:
        name = verdict["parameterization"]
        assert said[f"verdict/{name}"] == verdict["verdict"]
        own = [size["regret"] for size in record["sizes"] if size["parameterization"] == name]
        assert said.get(f"largest_regret/{name}") == max((each for each in own if each is not None), default=None)
    assert said["page/_type"] == "html-file"
    (page,) = file.parent.rglob("*.html")
    assert page.read_text() == (root / "report.html").read_text()
    assert not (root / "wandb" / "address.txt").exists()  # it has none
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    text = events.Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"{each['parameterization']}: {each['verdict']}" in text for each in record["verdicts"])


def test_a_report_goes_on_without_a_tracker_that_fails(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **settings: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(tracked, "start_wandb", fail)
    root = write_page(study_file)
    result = CliRunner().invoke(cli, ["report", str(study_file), "track.wandb=offline"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "warning: wandb failed, and the report goes on without it: PermissionError: read-only" in result.output
    assert (root / "report.html").exists()
