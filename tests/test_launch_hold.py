"""A sweep whose first runs all fail for one reason is held: the reason is shown once, with what to type to go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from depthmup.launch.cli import cli
from depthmup.launch.jobs import states
from depthmup.launch.jobs.hold import Hold, strip_error
from depthmup.launch.jobs.status import print_status
from depthmup.launch.jobs.submission import Submission
from depthmup.launch.jobs.worker import train_packs
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import select_resubmittable
from depthmup.train.rundir import RunDirectory
from train_processes import ROOT, depthmup


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDirectory]:
    """Five runs, none of which can be read."""
    found = [RunDirectory(tmp_path / "runs" / f"{number}abcdef01234") for number in range(5)]
    for directory in found:
        directory.path.mkdir(parents=True)
        directory.config.write_text("model: 3\n")
    return found


def hold(runs: list[RunDirectory], after: int = 3) -> Hold:
    return Hold(
        Submission.create(runs[0].path.parents[1] / "jobs", "test", [[d.path.name] for d in runs], {}), runs, after
    )


def failed(runs: list[RunDirectory]) -> int:
    return sum(directory.failed() is not None for directory in runs)


def test_after_three_failures_for_one_reason_no_further_run_begins(runs: list[RunDirectory]) -> None:
    held = hold(runs)
    assert train_packs([[directory] for directory in runs], hold=held) == 1
    assert failed(runs) == 3
    assert "3 runs failed for one reason, and none succeeded: UserError" in (held.submission.held() or "")
    assert train_packs([runs], hold=hold(runs, after=0)) == 1  # tried as they are
    assert failed(runs) == 5


def test_a_list_that_one_job_works_through_is_held_in_its_middle(runs: list[RunDirectory]) -> None:
    train_packs([runs], hold=hold(runs, after=2))
    assert failed(runs) == 2


def test_nothing_is_held_where_a_run_succeeded_or_reasons_differ_or_another_run_is_further(
    runs: list[RunDirectory],
) -> None:
    for directory in runs[:3]:
        directory.write_failed({"error": f"ValueError: no class 1{directory.path.name} at step 7"})
    assert hold(runs).reason()
    (runs[4].path / "checkpoints" / "step-8").mkdir(parents=True)
    assert hold(runs).reason() is None  # it trains where they could not begin
    (runs[0].path / "metrics.jsonl").write_text('{"step": 8}\n')
    assert hold(runs).reason()  # one of them came as far
    runs[1].write_failed({"error": "OSError: disk full"})
    assert hold(runs).reason() is None
    runs[1].write_failed({"error": "ValueError: no class 3 at step 4"})
    assert hold(runs).reason()
    runs[3].write_done({"outcome": "completed"})
    assert hold(runs).reason() is None


def test_what_has_saved_a_step_goes_on_though_the_others_are_held(runs: list[RunDirectory]) -> None:
    for directory in runs[:3]:
        directory.write_failed({"error": "ValueError: no"})
    held = hold(runs)
    assert held.select_startable(runs[3:]) == []
    (runs[4].path / "checkpoints" / "step-8").mkdir(parents=True)
    assert held.select_startable(runs[3:]) == [runs[4]]


def test_a_reason_is_the_same_whatever_numbers_and_hashes_are_in_it() -> None:
    one = "its process ended with 1; see /runs/jobs/x-0a1b2c3d/4711_3_0_log.out"
    assert strip_error(one) == strip_error(one.replace("4711_3", "4712_15").replace("0a1b2c3d", "ffff0000"))
    assert strip_error("CUDA out of memory") != strip_error("no such file")


@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_a_study_is_held_shown_once_and_goes_on_when_it_is_mended(
    study_file: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the runs must fail: there is a GPU here")
    place = (f"launch.cluster={cluster}", "launch.slots=1")
    said = depthmup("transfer", study_file, *place, "train.device=cuda")
    assert said.returncode == 2
    assert said.stderr.count("torch sees no GPU") == 1
    assert "12 of 12 runs did not finish, 9 are held: 3 runs failed for one reason" in said.stderr
    folder = study_file.parent / "runs" / "tiny"
    assert f"depthmup launch {folder} launch.hold_after=0" in said.stderr

    study = Study(study_file, read_study(study_file, (*place, "train.device=cuda")))
    snapshot = states.take_snapshot(study)
    assert snapshot.counts() == {"failed": 3, "held": 9}
    assert select_resubmittable(study, snapshot, ("new", "lost", "interrupted")) == []  # nothing goes by itself
    print_status(study, Console(width=200))
    assert capsys.readouterr().out.count("torch sees no GPU") == 2  # once for those that failed, once for the others
    if cluster == "debug":
        again = CliRunner().invoke(cli, ["launch", str(study_file), *place, "study.values=2**-7"])
        assert "3 runs trained" in again.output, again.output
        assert states.take_snapshot(study).counts()["done"] == 3


def test_a_worker_in_a_job_looks_at_its_whole_array(runs: list[RunDirectory], tmp_path: Path) -> None:
    details = {"memory_gb": None, "runs_per_gpu": 1, "hold_after": 3}
    submission = Submission.create(tmp_path / "jobs", "test", [[d.path.name] for d in runs], details)
    for directory in runs[:3]:
        directory.write_failed({"error": "ValueError: no"})

    def worker(index: int, *options: str) -> int:
        job = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": str(index), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-m", "depthmup.launch.jobs.worker", str(submission.file), *options]
        return subprocess.run(command, cwd=ROOT, env=job, check=False).returncode

    assert worker(3, "--held") == 0  # the script ends here
    assert json.loads(submission.held_file.read_text())["reason"].endswith("ValueError: no")
    assert worker(3) == 0
    assert failed(runs) == 3
