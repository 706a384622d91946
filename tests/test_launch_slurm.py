"""What becomes of a command where Slurm is slow, refuses or says something odd; stand-ins for its commands."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.launch import chain, transfer
from depthmup.launch.chain import advance_study, repeat_while_silent, take_after_submission
from depthmup.launch.jobs import slurm, states, worker
from depthmup.launch.jobs.attempts import note_attempt
from depthmup.launch.jobs.cancel import cancel
from depthmup.launch.jobs.states import RunState, Snapshot
from depthmup.launch.jobs.status import MAX_ROWS, format_progress, list_remarks, print_status, print_troubles
from depthmup.launch.jobs.submission import Submission, load_all, note_command, read_last_command
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import Unfinished, launch
from depthmup.train.lock import take_lock
from depthmup.train.rundir import EXIT_REQUEUE
from slurm_stand_ins import in_queue

STUDY = Callable[..., Study]


def stand_in(fake: Path, name: str, text: str) -> None:
    (fake / name).write_text(f"#!/bin/bash\n{text}\n")


def silence(fake: Path, name: str) -> None:
    stand_in(fake, name, "echo 'Unable to contact slurm controller' >&2; exit 1")


# ---------------------------------------------------------------- Slurm's commands


@pytest.mark.parametrize("name", ["sbatch", "squeue"])
def test_a_command_that_does_not_answer_is_given_up(fake: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(slurm, "SECONDS", 0.3)
    stand_in(fake, name, "exec sleep 60")
    began = time.monotonic()
    with pytest.raises(slurm.SlurmError, match=rf"{name} gave no answer in 0\.3 s"):
        slurm.call_sbatch(fake / "x.sh") if name == "sbatch" else slurm.read_queue(["1"])
    assert time.monotonic() - began < 30


def test_of_a_federation_the_job_is_taken_without_its_clusters_name(fake: Path) -> None:
    stand_in(fake, "sbatch", "echo '4711;north'")
    assert slurm.call_sbatch(fake / "x.sh") == "4711"


def test_nothing_is_cancelled_where_there_is_nothing_to_cancel(fake: Path) -> None:
    slurm.cancel([])
    assert not (fake / "cancelled").exists()
    slurm.cancel(["1", "2"])
    assert (fake / "cancelled").read_text() == "1 2\n"


def test_a_line_of_the_queue_is_read_whatever_blanks_fill_it_up(fake: Path) -> None:
    stand_in(fake, "squeue", "echo '7   |N/A |PENDING  |launch failed requeued held  |12 |depthmup-a|b   '")
    (task,) = slurm.read_queue(["7"])
    assert task == slurm.QueuedTask("7", 0, "PENDING", "launch failed requeued held", "depthmup-a|b", 12)


# ---------------------------------------------------------------- cancel


def test_a_cancel_while_slurm_is_silent_says_so_and_notes_nothing(fake: Path, study_of: STUDY) -> None:
    study = study_of()
    launch(study)
    silence(fake, "squeue")
    with pytest.raises(UserError, match=r"Slurm does not answer: .*Nothing of .* was cancelled"):
        cancel(study)
    assert read_last_command(study.file.directory)[0] == "launch"


def test_a_cancel_that_slurm_does_not_take_is_one_line(fake: Path, study_of: STUDY) -> None:
    study = study_of()
    launch(study)
    silence(fake, "scancel")
    with pytest.raises(UserError, match=r"Slurm does not cancel the jobs of .*: Unable to contact"):
        cancel(study)
    assert states.take_snapshot(study).counts() == {"waiting": 12}


def test_a_process_that_ends_just_before_it_is_told_to_is_no_error(
    study_of: STUDY, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of("launch.cluster=local")
    study.write()
    run = study.runs[0].directory
    note_attempt(run, "started", step=0)

    told: list[tuple[int, int]] = []

    def gone(pid: int, number: int) -> None:
        told.append((pid, number))
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    with take_lock(run.lock) or pytest.fail("no lock"):
        assert cancel(study).pids == [os.getpid()]
    assert told == [(os.getpid(), signal.SIGTERM)]


# ---------------------------------------------------------------- status


def trained(study: Study, state: states.State) -> RunState:
    """The first run, with a metrics line."""
    study.write()
    run = study.runs[0]
    run.directory.metrics.write_text('{"step": 6, "loss": 2.0, "images_per_second": 32.0}\n')
    return RunState(run, state)


def test_only_what_trains_has_a_time_that_is_left(study_of: STUDY) -> None:
    study = study_of()
    assert format_progress(trained(study, "running")) == ("50%", "2", "32", "6s")
    assert format_progress(trained(study, "ending")) == ("50%", "2", "32", "")


def test_all_runs_are_listed_where_all_are_asked_for_and_otherwise_what_needs_a_look(
    study_of: STUDY, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of("launch.cluster=local")
    study.write()
    names = [run.directory.path.name for run in study.runs]
    print_status(study, Console(width=200))
    assert not any(name in capsys.readouterr().out for name in names)  # new ones are counted
    print_status(study, Console(width=200), everything=True)
    shown = capsys.readouterr().out
    assert all(shown.count(name) == 1 for name in names)


def test_of_many_different_remarks_the_first_are_said(study_of: STUDY, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of("launch.cluster=local", "study.seeds=6")
    study.write()
    words = [first + second for first in "abcdefgh" for second in "pqrstuvw"]
    for run, word in zip(study.runs[: len(words)], words, strict=True):
        run.directory.write_failed({"error": f"error {word}"})
    print_status(study, Console(width=200))
    assert capsys.readouterr().out.count(": error ") == MAX_ROWS < len(words)
    print_status(study, Console(width=200), everything=True)
    assert capsys.readouterr().out.count(": error ") == len(words)


def test_what_retry_says_is_of_runs_that_no_job_has_with_the_key_that_may_help(
    study_of: STUDY, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = study_of().runs
    found = [RunState(runs[0], "failed", "process 1: out of memory on sn2"), RunState(runs[1], "waiting", "Priority")]
    print_troubles(Snapshot(found, [], [], []), Console(width=200))
    said = capsys.readouterr().out
    assert "out of memory on sn2" in said
    assert "may help: launch.memory_gb" in said
    assert "Priority" not in said


def test_a_reason_that_needs_no_word_has_none(fake: Path, study_of: STUDY, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of()
    launch(study)
    print_status(study, Console(width=200))
    assert "no place yet" not in capsys.readouterr().out


def test_status_says_that_slurm_does_not_answer_and_that_the_job_after_the_runs_was_refused(
    fake: Path, study_of: STUDY, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of()
    launch(study)
    then = Submission.create(study.file.directory / "jobs", "depthmup-tiny-then", [[]], {})
    then.write_refused("AssocMaxSubmitJobLimit")
    print_status(study, Console(width=200))
    said = capsys.readouterr().out
    assert "after the runs: nothing goes on by itself, that job was refused (AssocMaxSubmitJobLimit)\n" in said
    assert "Slurm does not answer" not in said
    silence(fake, "squeue")
    print_status(study, Console(width=200))
    assert "Slurm does not answer: Unable to contact slurm controller\n" in capsys.readouterr().out


def test_the_last_words_of_the_job_after_the_runs_are_said(
    fake: Path, study_of: STUDY, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of("launch.runs_per_job=12")
    advance_study(study, [], Console(quiet=True))
    (then,) = [each for each in load_all(study.file.directory / "jobs") if each.goes_on]
    then.log(0).write_text("Report: /a\nStopped: 2 runs failed\nsrun: error: x\n")
    (fake / "ended").write_text(f"{then.job_id}\n")
    print_status(study, Console(width=200))
    assert "after the runs: Stopped: 2 runs failed\n" in capsys.readouterr().out


def test_slurms_own_word_for_the_end_of_a_job_is_said_without_its_ornaments(fake: Path, study_of: STUDY) -> None:
    study = study_of("launch.runs_per_job=12")
    launch(study)
    (job,) = load_all(study.file.directory / "jobs")
    job.log(0).write_text("step 3\nslurmstepd: error: *** JOB 1 CANCELLED DUE TO TIME LIMIT ***\nsrun: error: sn1\n")
    (fake / "ended").write_text("1\n")
    snapshot = states.take_snapshot(study)
    assert snapshot.counts() == {"lost": 12}
    assert {found.remark for found in snapshot.runs} == {"JOB 1 CANCELLED DUE TO TIME LIMIT"}
    assert len(list_remarks(snapshot)) == 1


def test_a_cancelled_run_says_what_it_has_saved(study_of: STUDY) -> None:
    study = study_of("launch.cluster=local")
    study.write()
    run = study.runs[0].directory
    (run.checkpoints / "step-8").mkdir(parents=True)
    note_attempt(run, "started", step=0)
    with take_lock(run.lock) or pytest.fail("no lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: None)
        cancel(study)
        assert states.take_snapshot(study).counts() == {"ending": 1, "new": 11}
    found = states.take_snapshot(study).runs[0]
    assert (found.state, found.remark) == ("cancelled", "saved at step 8")


# ---------------------------------------------------------------- the path


def test_the_path_stops_where_runs_failed_and_does_not_try_them_again_by_itself(fake: Path, study_of: STUDY) -> None:
    study = study_of()
    study.write()
    for run in study.runs:
        run.directory.write_failed({"error": "no such file"})
    with pytest.raises(Unfinished, match=r"12 of 12 runs did not finish .*no such file"):
        advance_study(study, [], Console(quiet=True), by_itself=True)
    assert in_queue(fake) == []
    advance_study(study, [], Console(quiet=True))  # the user's word counts
    assert sum(job["tasks"] for job in in_queue(fake)) == 12 + 1


def test_a_launch_by_the_user_is_the_last_command_after_a_cancel(fake: Path, study_of: STUDY) -> None:
    study = study_of("launch.runs_per_job=12")
    launch(study)
    note_command(study.file.directory, "cancel")
    launch(study, by_itself=True)
    assert read_last_command(study.file.directory)[0] == "cancel"
    launch(study)
    assert read_last_command(study.file.directory)[0] == "launch"


def test_a_round_that_comes_after_a_cancel_begins_nothing(
    fake: Path, study_of: STUDY, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, begun = study_of("launch.runs_per_job=12"), list[int]()

    def cancelled_meanwhile(study: Study, launched: transfer.Launched, *_: Any) -> None:
        begun.append(len(launched.runs))
        note_command(study.file.directory, "cancel")
        (fake / "ended").write_text("1\n")
        if len(begun) == 2:
            for run in study.runs:
                run.directory.write_done({"outcome": "completed", "minival_loss": 1.0})

    monkeypatch.setattr(chain, "wait", cancelled_meanwhile)
    chain.finish_study(study, Console(quiet=True))
    assert begun == [12, 0]
    assert read_last_command(study.file.directory)[0] == "cancel"


def test_where_slurm_falls_silent_after_it_took_the_runs_their_jobs_are_named(fake: Path, study_of: STUDY) -> None:
    study = study_of("launch.runs_per_job=12")
    ids = launch(study).job_ids
    silence(fake, "squeue")
    with pytest.raises(
        slurm.Silent, match=r"Unable to contact.*The runs wait or run as jobs 1\. Give the same command"
    ):
        take_after_submission(study, ids)


def test_between_two_tries_the_pause_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def answer() -> str:
        if len(pauses) < 8:
            raise slurm.Silent("Slurm does not answer")
        return "here"

    assert repeat_while_silent(answer, Console(quiet=True)) == "here"
    assert pauses == [5, 10, 20, 40, 80, 120, 120, 120]


def test_ctrl_c_leaves_jobs_of_slurm_alone_and_says_how_to_stop_them(
    fake: Path, study_of: STUDY, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    study = study_of("launch.runs_per_job=12")
    monkeypatch.setattr(chain, "wait", stopped)
    with pytest.raises(KeyboardInterrupt) as ended:
        chain.finish_study(study, Console(width=400))
    assert str(ended.value).endswith(f"Its jobs go on; to stop them: {study.command('cancel')}")
    assert len(in_queue(fake)) == 1


# ---------------------------------------------------------------- inside a job


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 1], 1),
        ([1, EXIT_REQUEUE], EXIT_REQUEUE),
        ([0, -9], 137),
        ([1, -15], 143),
        ([-9, EXIT_REQUEUE], EXIT_REQUEUE),
    ],
)
def test_a_job_whose_processes_share_a_gpu_ends_as_the_worst_of_them_or_asks_for_its_requeue(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], code: int
) -> None:
    left = iter(codes)

    class Process:
        def __init__(self, command: list[str]) -> None:
            assert command[-1] == "--slot"
            self.code = next(left)

        def wait(self) -> int:
            return self.code

    monkeypatch.setattr("depthmup.launch.jobs.worker.subprocess.Popen", Process)
    assert worker.run_side_by_side(Path("submission.json"), len(codes)) == code


@pytest.mark.parametrize(
    ("rank", "trained_to", "code", "noted"),
    [
        ("0", EXIT_REQUEUE, EXIT_REQUEUE, ["started", "interrupted"]),
        ("1", EXIT_REQUEUE, 0, []),  # srun would end the others
        ("1", 1, 1, []),
        ("0", 0, 0, ["started"]),
    ],
)
def test_of_a_run_of_several_processes_the_first_alone_notes_and_ends_with_what_became_of_it(
    study_of: STUDY, monkeypatch: pytest.MonkeyPatch, rank: str, trained_to: int, code: int, noted: list[str]
) -> None:
    study = study_of()
    study.write()
    run = study.runs[0].directory
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setattr("depthmup.train.distributed.read_world_from_environment", lambda: None)
    monkeypatch.setattr(worker, "train_locked", lambda *given: trained_to)
    assert worker.run_distributed(run) == code
    file = run.path / "attempts.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    assert [event for event in ("started", "interrupted") for line in lines if f'"{event}"' in line] == noted


def test_a_job_that_begins_again_after_its_run_has_ended_does_nothing(
    study_of: STUDY, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    study.write()
    monkeypatch.setattr(worker, "train_locked", lambda *given: pytest.fail("it trains"))
    for number, rank in enumerate(("0", "1")):
        monkeypatch.setenv("SLURM_PROCID", rank)
        run = study.runs[number].directory
        run.write_done({"outcome": "completed"})
        assert worker.run_distributed(run) == 0
    run = study.runs[2].directory
    run.write_failed({"error": "x"})
    assert worker.run_distributed(run) == 0


def test_a_process_that_finds_another_in_its_runs_place_says_which_and_trains_nothing(
    study_of: STUDY, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    study.write()
    run = study.runs[0].directory
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(worker, "train_locked", lambda *given: pytest.fail("it trains"))
    with take_lock(run.lock) or pytest.fail("no lock"), pytest.raises(SystemExit) as ended:
        worker.run_distributed(run)
    assert f"process {os.getpid()} on " in str(ended.value.code)
    assert not (run.path / "attempts.jsonl").exists()


def test_runs_that_never_get_further_end_with_the_reason(study_of: STUDY) -> None:
    study = study_of()
    study.write()
    run = study.runs[0].directory
    for _ in range(5):
        note_attempt(run, "started", step=0)
    assert worker.train_packs([[run]]) == 1
    assert "5 attempts ended at step 0" in (run.failed() or {})["error"]


def test_transfer_shows_what_is_ending(
    fake: Path, study_of: STUDY, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, pause = study_of("launch.runs_per_job=12"), time.sleep
    launched = launch(study)
    (fake / "state").write_text("COMPLETING|None")

    def end(seconds: float) -> None:
        if seconds < transfer.SLURM_POLL_SECONDS:  # subprocess's
            return pause(seconds)
        for run in study.runs:
            run.directory.write_done({"outcome": "completed", "minival_loss": 1.0})
        (fake / "ended").write_text("1\n")

    monkeypatch.setattr(time, "sleep", end)
    transfer.wait(study, launched, Console(width=200))
    assert "0 of 12 done, 0 running, 12 ending" in capsys.readouterr().out
