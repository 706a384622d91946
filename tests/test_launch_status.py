"""What `depthmup status` says of runs that Slurm stopped before their end. squeue's answer is given; files are real."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from depthmup.launch.config import read_study
from depthmup.launch.jobs.attempts import note
from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.launch.jobs.status import print_status
from depthmup.launch.jobs.submission import Submission
from depthmup.launch.runs.study import Study
from depthmup.train.rundir import RunDirectory


def begin(run: RunDirectory, index: int, *ends: str) -> None:
    """Notes an attempt per word of `ends`, as the worker does; 'killed' leaves nothing that says how it ended."""
    for restart, end in enumerate(ends):
        note(run, "started", step=10 * restart, job=f"7_{index}", restart=restart)
        if end != "killed":
            note(run, end)


def test_status_shows_that_runs_were_preempted_or_stopped_otherwise_how_often_and_why(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    runs = [run.directory for run in study.runs[:5]]
    job = Submission.create(study.file.directory / "jobs", "depthmup-tiny", [[run.path.name] for run in runs], {})
    job.write_job_id("7")
    begin(runs[0], 0, "interrupted", "interrupted", "interrupted")
    begin(runs[1], 1, "interrupted")
    begin(runs[2], 2, "killed", "killed")
    begin(runs[3], 3, "failed")  # given `retry` since
    begin(runs[4], 4, "interrupted")
    causes = [("7_0", 0, "time limit"), ("7_0", 1, "preempted"), ("7_0", 2, "preempted"), ("7_1", 0, "time limit")]
    lines = [json.dumps({"job": job, "restart": restart, "cause": cause}) for job, restart, cause in causes]
    job.stopped.write_text("\n".join([*lines, '{"job": "7_4", "rest']))  # being written
    states = ("PENDING BeginTime", "PENDING BeginTime", "RUNNING None", "PENDING Priority")
    queue = [QueuedTask("7", index, *state.split(), job.name) for index, state in enumerate(states)]
    monkeypatch.setattr("depthmup.launch.jobs.slurm.queue", lambda ids, names: queue)

    print_status(study, Console(width=80))
    shown = capsys.readouterr().out
    said = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line)
    assert said[f"preempted, {runs[0].path.name}"] == "requeued (time limit, preempted twice), BeginTime"
    assert said[f"waiting, {runs[1].path.name}"] == "requeued (time limit), BeginTime"
    assert said[f"running, {runs[2].path.name}"] == "began again (node failed or killed)"
    assert said[f"waiting, {runs[3].path.name}"] == "Priority"
    assert said[f"interrupted, {runs[4].path.name}"].startswith("stopped, and saved")
    (row,) = (line for line in shown.splitlines() if line.startswith(runs[0].path.name))
    assert " preempted " in row
    assert shown.splitlines()[-1] == "1 running, 2 waiting, 1 preempted, 1 interrupted, 7 new"
