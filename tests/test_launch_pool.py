"""A study compares results of one code and of one set of images, unless it is told otherwise and says so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from depthmup.data.errors import UserError
from depthmup.launch.commands.group import open_console
from depthmup.launch.jobs import states
from depthmup.launch.reading import read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.report.record import make_record
from depthmup.launch.runs.plan import print_plan
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.pool import refuse_mixture
from depthmup.launch.runs.study import Study
from depthmup.train.config import run_hash
from depthmup.train.owner import describe_owner, fingerprint_code


def open_study(file: Path, *overrides: str) -> Study:
    return Study(file, read_study(file, overrides))


def finish(runs: Sequence[PlannedRun], **changes: Any) -> None:
    """Marks the runs done, as they themselves do."""
    for number, run in enumerate(runs):
        run.directory.path.mkdir(parents=True, exist_ok=True)
        done = {"outcome": "completed", "step": 12, "minival_loss": 1.0 + 0.01 * number, "seconds": 1.0}
        run.directory.write_done(done | describe_owner(run.config) | {"code": fingerprint_code()} | changes)


def test_results_of_several_versions_of_the_code_are_refused_or_pooled_when_asked_for_and_then_shown(
    study_file: Path,
) -> None:
    study = open_study(study_file)
    finish(study.runs)
    assert "versions of the code" not in collect(study).facts
    finish(study.runs[:3], code="0123456789ab")
    with pytest.raises(UserError, match=r"2 versions of the code: 9 runs of \w+, 3 runs of 0123456789ab\. .*=\[code\]"):
        collect(study)
    pooled = open_study(study_file, "study.pool_different=[code]")
    report = collect(pooled)
    assert "Results of 2 versions of the code: 9 runs of" in report.facts
    assert make_record(report)["origins"]["code"] == {fingerprint_code(): 9, "0123456789ab": 3}
    assert [run.directory.path for run in pooled.runs] == [run.directory.path for run in study.runs]  # no identity
    json.dumps(make_record(report))


def test_runs_that_would_begin_with_other_code_are_refused_before_they_do(study_file: Path) -> None:
    study = open_study(study_file)
    finish(study.runs[:3], code="0123456789ab")
    refuse_mixture(study)
    with pytest.raises(UserError, match=r"2 versions of the code: 9 runs of .*, 3 runs of 0123456789ab"):
        refuse_mixture(study, starting=True)
    refuse_mixture(open_study(study_file, "study.pool_different=[code]"), starting=True)


def test_runs_on_other_shards_under_the_same_name_do_not_count(study_file: Path) -> None:
    study = open_study(study_file)
    finish(study.runs[:3], shards="0123456789ab")
    for ask in (
        lambda: study.pending(),
        lambda: states.take_snapshot(study),
        lambda: print_plan(study, open_console()),
        lambda: collect(study),
    ):
        with pytest.raises(UserError, match=r"trained on other images \(shards 0123456789ab\) than .*digits holds"):
            ask()
    pooled = open_study(study_file, "study.pool_different=[shards]")
    finish(pooled.runs[3:])
    assert "2 sets of shards: 9 runs of" in collect(pooled).facts


def test_a_marker_of_another_run_in_a_studys_folder_is_refused(study_file: Path) -> None:
    study = open_study(study_file)
    finish(study.runs)
    first, second = (run.directory.path / "done.json" for run in study.runs[:2])
    first.write_text(second.read_text())
    with pytest.raises(UserError, match=r"done.json belongs to another run \(optimizer.lr: "):
        study.pending()


def test_a_failure_of_another_run_is_no_failure_of_this_one(study_file: Path) -> None:
    study = open_study(study_file)
    first, second = study.runs[:2]
    for run, name in ((first, run_hash(first.config)), (second, "0123456789ab")):
        run.directory.path.mkdir(parents=True)
        run.directory.write_failed({"run": name, "error": "out of memory"})
    assert [found.state for found in states.take_snapshot(study).runs[:2]] == ["failed", "new"]
    study.write()
    assert first.directory.failed()
    assert not second.directory.failed()
