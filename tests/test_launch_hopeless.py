"""Runs that stand at the loss of a guess where others had learned end early, and a report says so."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthmup.launch.config import Size
from depthmup.launch.reading import read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.report.page import run_rows
from depthmup.launch.report.recompute import restore
from depthmup.launch.report.record import make_page_record, make_record
from depthmup.launch.report.tables import tabulate_sizes
from depthmup.launch.runs.hopeless import LEARNERS, has_learned_early, limit_step
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.rounds import AddedRound, AddedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import launch

METRIC = "minival_loss"
CHANCE = math.log(10)


@pytest.fixture
def study(run_settings: dict[str, Any], tmp_path: Path) -> Study:
    """An adaptive study of two depths, on the digits. Its gradients are clipped, so that no rate makes a loss
    infinite: at large rates the networks are at the loss of a guess, or above it."""
    path = tmp_path / "early.yaml"
    settings = {
        "name": "early",
        "directory": str(tmp_path / "runs"),
        "parameterizations": ["depth_mup"],
        "sizes": [{"width": 8, "depth": 3}, {"width": 8, "depth": 6}],
        "values": {"first": "2**-3", "last": "2**1"},
        "seeds": [0, 1, 2],
    }
    train = {**run_settings["train"], "samples": 40 * 32, "global_batch_size": 32, "clip_norm": 1.0, "log_every": 5}
    train["checkpoint_every"] = 40  # none on the way
    path.write_text(yaml.safe_dump({**run_settings, "train": train, "study": settings, "launch": {"cluster": "debug"}}))
    return Study(path, read_study(path))


def ask(study: Study, *points: tuple[int, float, int]) -> None:
    """A round of (depth, value, seed)."""
    runs = [
        AddedRun(parameterization="depth_mup", width=8, depth=depth, value=value, seed=seed)
        for depth, value, seed in points
    ]
    study.add_round(AddedRound(reason="as asked", runs=runs))


def end(run: PlannedRun, loss: float, on_the_way: dict[int, float]) -> None:
    """What a finished run leaves behind. on_the_way: step -> training loss."""
    run.directory.path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": each}) for step, each in on_the_way.items()]
    run.directory.metrics.write_text("".join(f"{line}\n" for line in lines))
    run.directory.write_done({"outcome": "completed", METRIC: loss})


FAST, SLOW = {10: 1.5, 30: 0.5}, {10: 2.29, 30: 2.2}


def test_a_hopeless_run_ends_early_and_is_shown_as_such(study: Study) -> None:
    """In this process, from the runs to the report and its record."""
    launch(study)
    assert not any(run.directory.limits().steps for run in study.runs)  # nobody has learned before
    ask(study, *((3, value, seed) for value in (0.25, 0.5) for seed in (1, 2)))
    launch(study)
    assert sum(has_learned_early(run, METRIC) for run in study.runs if run.value <= 0.5) >= LEARNERS
    ask(study, *((6, value, seed) for value in (0.5, 2.0**8) for seed in (0, 1)))
    launch(study)
    assert not study.pending()
    last = [run for run in study.runs if run.size.depth == 6]
    assert all(run.directory.limits().metric == "loss" for run in last)
    hopeless = [run for run in last if run.ended_hopeless()]
    assert {run.value for run in hopeless} == {2.0**8}
    for run in hopeless:
        done = run.done() or {}
        assert (done["outcome"], done["step"]) == ("pruned", limit_step(run)) == ("pruned", 30)
        assert run.loss(METRIC) == run.config.model.chance == CHANCE
    report = collect(study)
    assert f"{len(hopeless)} ended early at the loss of a guess" in report.facts
    record = make_page_record(report)
    assert [row[METRIC] for row in run_rows(record) if row["run"] in {h.directory.path.name for h in hopeless}] == [
        "ended early"
    ] * len(hopeless)
    of_depth = next(row for row in tabulate_sizes(record) if row["depth"] == "6")
    assert f"{len(hopeless)} ended early" in of_depth["notes"]
    curve = next(each for each in report.analysis.curves if each.size == Size(width=8, depth=6))
    assert curve.fails[curve.at(8.0)]  # the value is one at which runs fail, and no loss is fitted there

    # a record keeps it
    again = collect(restore(make_record(report), study.path, study.file.directory.with_name("restored")))
    assert again.analysis.judgements == report.analysis.judgements
    assert make_record(again)["sizes"] == make_record(report)["sizes"]


def limited(study: Study) -> list[tuple[int, float]]:
    """(depth, value) of the runs of the last round that may end early."""
    study.write()
    return [(run.size.depth, run.value) for run in study.pending() if run.directory.limits().steps]


def test_a_run_may_end_early_only_where_several_runs_at_no_larger_rate_had_learned_in_time(study: Study) -> None:
    base = sorted(study.runs, key=lambda run: run.value)
    low, high = base[0].value, base[-1].value
    for run in base:
        end(run, 0.3, FAST)
    ask(study, *((depth, value, 1) for depth in (3, 6) for value in (low, high)))
    assert limited(study) == [(3, high), (6, high)]

    for run in base[:1]:
        end(run, 0.3, SLOW)  # it made its progress later
    assert limited(study) == [(3, high), (6, high)]  # what was said of a run stays


@pytest.mark.parametrize("loss", [CHANCE, math.inf])
def test_no_run_ends_early_where_too_few_have_learned(study: Study, loss: float) -> None:
    base = sorted(study.runs, key=lambda run: run.value)
    for run in base[1:]:
        end(run, 0.3, FAST)
    end(base[0], loss, FAST)
    ask(study, (6, base[-1].value, 0))
    assert limited(study) == []


def test_runs_of_the_same_round_tell_nothing_so_that_a_study_that_is_resumed_ends_the_same_runs(study: Study) -> None:
    base = sorted(study.runs, key=lambda run: run.value)
    for run in base[1:]:
        end(run, 0.3, FAST)
    end(base[0], 0.3, SLOW)
    high = base[-1].value
    ask(study, *((3, high, seed) for seed in (1, 2, 3, 4)))
    assert limited(study) == []
    for run in study.pending()[:3]:
        end(run, 0.3, FAST)
    assert limited(study) == []


@pytest.mark.parametrize(
    "change", [("study.hyperparameter=optimizer.momentum", "study.values={first: 0.5, last: 0.99}")]
)
def test_only_a_learning_rate_is_known_to_be_faster_where_it_is_larger(study: Study, change: tuple[str, ...]) -> None:
    swept = Study(study.path, read_study(study.path, change))
    for run in swept.runs:
        end(run, 0.3, FAST)
    run = swept.runs[-1]
    swept.add_round(
        AddedRound(reason="", runs=[AddedRun(parameterization="depth_mup", width=8, depth=6, value=run.value, seed=0)])
    )
    assert limited(swept) == []
