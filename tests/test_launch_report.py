"""What a report says and writes, of finished, unfinished and several studies whose results are known."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from depthmup.launch.cli import cli
from depthmup.launch.reading import read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.report.overview import tabulate_studies
from depthmup.launch.report.recompute import recompute_record, restore
from depthmup.launch.report.record import dump, make_record, read_record
from depthmup.launch.report.results import format_document
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import grow

Loss = Callable[[PlannedRun], float]

PUBLISHED = Path(__file__).parents[1] / "docs" / "results"


def loss_of(optimum: Callable[[PlannedRun], float]) -> Loss:
    return lambda run: 0.5 + 0.01 * (math.log2(run.value) - optimum(run)) ** 2 + 0.003 * run.seed


STEADY = loss_of(lambda run: -6.0 - 0.01 * run.seed)
MOVING = loss_of(lambda run: -6.0 - 0.01 * run.seed - (run.size.depth - 3 if run.parameterization == "sp" else 0))


def make_study(study_file: Path, loss: Loss, name: str, share: float = 1.0, **settings: object) -> Path:
    """A study of 2 parameterizations, 2 depths, 9 rates and 2 seeds, the first `share` of whose runs are done."""
    raw = yaml.safe_load(study_file.read_text())
    values = {"first": "2**-11", "last": "2**-3"}
    raw["study"] |= {"name": name, "seeds": [0, 1], "design": "grid", "values": values, **settings}
    path = study_file.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(raw))
    study = Study(path, read_study(path))
    study.write()
    for run in study.runs[: int(share * len(study.runs))]:
        done = {"outcome": "completed", "step": 12, "minival_loss": loss(run), "seconds": 1.0}
        run.directory.write_done(
            done if math.isfinite(loss(run)) else {"outcome": "diverged", "step": 3, "seconds": 1.0}
        )
    return path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_fits_80_columns_and_its_files_say_the_same(study_file: Path) -> None:
    path = make_study(study_file, MOVING, "moving")
    said = invoke("report", path)
    lines = said.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Report: ")) <= 80
    assert any(line.startswith("sp: does not transfer") for line in lines)
    assert any(line.startswith("depth_mup: transfers") for line in lines)
    root = path.parent / "runs" / "moving"
    record = read_record(root / "report.json")
    assert [v["verdict"] for v in record["verdicts"]] == ["does not transfer", "transfers"]
    rows = list(csv.DictReader((root / "report.csv").open()))
    assert [row["drift"] for row in rows] == ["", "-3.0", "", "+0.0"]
    page = (root / "report.html").read_text()
    for row in rows:
        assert all(f">{cell}</td>" in page for cell in row.values())
    assert (record["num_runs"], len(record["points"])) == (54, 72)


def test_predicted_drifts_stand_beside_those_seen_in_every_file(study_file: Path) -> None:
    path = make_study(study_file, MOVING, "predicted")
    assert "in theory the largest stable rate at the start drifts" in invoke("report", path).replace("\n", " ")
    root = path.parent / "runs" / "predicted"
    (drift,) = read_record(root / "report.json")["predicted_drifts"]
    assert (drift["parameterization"], drift["depth"], f"{drift['octaves']:.2f}") == ("depth_mup", 6, "-0.27")
    (row,) = [line for line in (root / "report.md").read_text().splitlines() if "-0.27 |" in line]
    name, depth, theory, seen, interval = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, depth, theory, seen) == ("depth_mup", "6", "-0.27", "+0.0")
    assert " to " in interval
    page = (root / "report.html").read_text()
    assert all(f">{cell}</td>" in page for cell in (theory, seen, interval))
    assert "depth_mup, in theory" in page  # the figure's legend, whose dashed line is the prediction


def test_what_transfer_saved_is_said_beside_tuning_the_target_directly(study_file: Path) -> None:
    report = collect(Study(path := make_study(study_file, MOVING, "direct"), read_study(path)))
    lost, kept = report.direct
    assert lost.regret == pytest.approx(0.01 * 3**2 / 0.5, abs=0.005)  # a share of the lowest loss
    assert kept.regret == pytest.approx(0, abs=1e-4)
    flops = report.flops
    ratio = flops[lost.base] / flops[lost.target]
    assert lost.share_of_sweep == pytest.approx(ratio)  # the same grid at both sizes
    assert lost.cost_share == pytest.approx(9 * 2 * ratio)  # 9 values, 2 seeds
    said = " ".join(invoke("report", path).split())
    assert f"{100 * lost.cost_share:.3g} % of one run at" in said
    assert f"{100 * lost.share_of_sweep:.3g} % of a sweep there" in said


def test_an_unfinished_study_says_how_much_is_missing_and_how_to_go_on(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_study(study_file, STEADY, "half", share=0.6)
    study = Study(path, read_study(path))
    broken = study.pending()[-1]
    broken.directory.write_failed({"error": "RuntimeError: no memory"})
    monkeypatch.chdir(path.parent)  # a name that fits a line, wherever pytest's folder is
    said = " ".join(invoke("report", path.name).split())
    assert "22 of 54 runs are not in this report, 1 of them because they failed" in said
    assert f"To go on: {study.command('transfer')}" in said  # in one piece
    assert "The first: " + broken.directory.path.name in said
    page = (path.parent / "runs" / "half" / "report.html").read_text()
    assert "<summary>22 of 54 runs</summary>" in page
    assert page.count("<details>") == 2  # both long lists are folded


def test_diverged_runs_and_divergence_at_the_transferred_value_are_in_table_and_record(study_file: Path) -> None:
    def loss(run: PlannedRun) -> float:
        return math.inf if run.size.depth == 6 and run.value > 2**-6.5 else STEADY(run)

    path = make_study(study_file, loss, "diverging")
    invoke("report", path)
    record = read_record(path.parent / "runs" / "diverging" / "report.json")
    deep = record["sizes"][1]
    assert (deep["metric_at_base_optimum"], deep["regret"]) == (None, None)
    assert record["num_diverged"] == sum(run["metric"] is None for run in record["points"]) == 2 * 2 * 4
    assert {v["verdict"] for v in record["verdicts"]} == {"does not transfer"}


def test_several_studies_stand_side_by_side_and_are_published(study_file: Path, tmp_path: Path) -> None:
    paths = [make_study(study_file, MOVING, "moving"), make_study(study_file, STEADY, "steady", share=0.9)]
    folder = tmp_path / "docs" / "results"
    said = invoke("report", *paths, "--publish", folder)
    rows = [line for line in said.splitlines() if line.startswith(("moving  ", "steady  "))]
    assert len(rows) == 4
    assert "does not transfer" in rows[0]
    assert max(map(len, rows)) <= 80
    page = (tmp_path / "runs" / "overview.html").read_text()
    assert 'href="moving/report.html"' in page  # wherever the folder is moved to
    assert "6 of 54 runs are not in this report" in page
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{s}{end}" for s in ("moving", "steady") for end in (".json", "-curves.png", "-drift.png")}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000

    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    for record in (*records, read_record(PUBLISHED / "paper_vit.json")):  # of three sizes and more, too
        for row in tabulate_studies([record]):
            others = [size for size in record["sizes"] if size["parameterization"] == row["parameterization"]][1:]
            highest = max(size["regret_bound"] for size in others)
            assert float(row["below (95 %)"].removesuffix(" %")) == pytest.approx(100 * highest, rel=0.05)
            assert highest < record["regret_limit"] or row["verdict"] != "transfers"
    text = format_document(records, folder)
    assert "sp: does not transfer" in text  # a negative result stays in
    assert "**6 runs are not finished.**" in text
    assert "![moving-curves](results/moving-curves.png)" in text
    assert str(tmp_path) not in text
    assert text == format_document(records, folder)


def test_a_study_of_momentum_is_reported_in_octaves_of_one_minus_it(study_file: Path) -> None:
    def loss(run: PlannedRun) -> float:
        return 0.5 + 0.01 * (math.log2(1 - run.value) + 3.0) ** 2 + 0.003 * run.seed

    values = [1 - 2.0**-x for x in range(1, 7)]
    path = make_study(study_file, loss, "momentum", hyperparameter="optimizer.momentum", values=values)
    said = invoke("report", path)
    assert "1 - 2^-3.0" in said
    record = read_record(path.parent / "runs" / "momentum" / "report.json")
    assert record["octaves_of"] == "1 - momentum"
    assert json.dumps(record)
    assert "octaves of 1 - momentum" in (path.parent / "runs" / "momentum" / "report.html").read_text()


def test_seeds_added_for_one_parameterization_count_for_all_that_share_the_runs(study_file: Path) -> None:
    path = make_study(study_file, MOVING, "added", more_seeds=1)
    study = Study(path, read_study(path))
    near = [2.0**x for x in range(-8, -3)]
    assert study.add_seeds({("depth_mup", base): near for base in study.file.study.sizes}) == 2 * len(near)
    study.write()
    for run in study.pending():
        run.directory.write_done({"outcome": "completed", "step": 12, "minival_loss": MOVING(run), "seconds": 1.0})
    report = collect(study)
    seeds = {(c.parameterization, c.size.depth): len(c.metric) for c in report.analysis.curves}
    assert seeds == {("sp", 3): 3, ("depth_mup", 3): 3, ("sp", 6): 2, ("depth_mup", 6): 3}
    base = {c.parameterization: c.optimum.x for c in report.analysis.curves if c.size.depth == 3}
    assert base["sp"] == base["depth_mup"]
    said = " ".join(invoke("report", path).split())
    assert said.count("Seeds were added; with the planned ones (0, 1) alone: ") == 2
    record = read_record(path.parent / "runs" / "added" / "report.json")
    assert [v["at_planned_seeds"]["verdict"] for v in record["verdicts"]] == ["does not transfer", "transfers"]


def test_a_published_record_gives_the_same_report_again_without_its_runs(study_file: Path, tmp_path: Path) -> None:
    def loss(run: PlannedRun) -> float:
        return math.inf if run.size.depth == 6 and run.value > 2**-4.5 else MOVING(run)

    path = make_study(study_file, loss, "again", extend=1, more_seeds=1)
    study = Study(path, read_study(path))
    study.grow({("sp", study.file.study.sizes[1]): "low"})
    study.add_seeds({("depth_mup", study.file.study.sizes[0]): [2.0**-6, 2.0**-5]})
    study.write()
    for run in study.pending():
        done = (
            {"outcome": "completed", "minival_loss": loss(run)} if math.isfinite(loss(run)) else {"outcome": "diverged"}
        )
        run.directory.write_done(done | {"seconds": 1.0})
    record = make_record(collect(study))
    assert make_record(collect(restore(record, path, tmp_path / "again"))) == record

    published = tmp_path / "again.json"
    record["origins"]["code"] = {"0123456789ab": record["num_runs"]}  # which no analysis knows
    published.write_text(dump({**record, "judgements": []}))
    recompute_record(published, path)
    assert read_record(published) == json.loads(dump(record))


def test_a_study_without_a_finished_run_of_its_base_says_what_its_verdicts_wait_for(study_file: Path) -> None:
    path = make_study(study_file, STEADY, "headless", share=0.0)
    for run in Study(path, read_study(path)).runs:
        if run.size.depth == 6:
            run.directory.write_done({"outcome": "completed", "step": 12, "minival_loss": STEADY(run), "seconds": 1.0})
    said = " ".join(invoke("report", path).split())
    assert "sp, depth_mup have no verdict before runs at width 8, depth 3 are finished" in said


def test_a_study_that_was_stopped_between_two_rounds_is_said_to_be_unfinished(study_file: Path) -> None:
    path = make_study(study_file, STEADY, "stopped", design="adaptive")
    study = Study(path, read_study(path))
    grow(study)
    study.write()
    for run in study.pending():
        run.directory.write_done({"outcome": "completed", "minival_loss": STEADY(run), "seconds": 1.0})
    said = " ".join(invoke("report", path).split())
    assert "of the budget; it goes on. " in said
    assert f"The next round is not in this report: {collect(study).next_round.reason}" in said
    assert f"To go on: {study.command('transfer')}" in said


def test_the_rounds_of_an_adaptive_study_can_be_made_anew_from_its_record(study_file: Path, tmp_path: Path) -> None:
    """Two parameterizations, which share the base's runs."""
    path = make_study(study_file, STEADY, "rounds", design="adaptive", parameterizations=["sp", "depth_mup"])
    study = Study(path, read_study(path))
    while grow(study)[0]:
        study.write()
        for run in study.pending():
            run.directory.write_done({"outcome": "completed", "minival_loss": STEADY(run), "seconds": 1.0})
    record = make_record(collect(study))
    assert len(record["rounds"]) > 2
    assert {point["round"] for point in record["points"]} == {each["round"] for each in record["rounds"]}
    assert make_record(collect(restore(record, path, tmp_path / "again"))) == record
