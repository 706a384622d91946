"""What Slurm is asked and told, with stand-ins for its commands: whose jobs, how many at once, what scripts survive."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.paths import PACKAGE
from depthmup.launch import chain, progress, transfer
from depthmup.launch.chain import advance_study
from depthmup.launch.cli import cli
from depthmup.launch.config import LaunchConfig
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.attempts import note_attempt
from depthmup.launch.jobs.code_copy import copy_code
from depthmup.launch.jobs.follower import Postponed, submit_follower
from depthmup.launch.jobs.reasons import explain
from depthmup.launch.jobs.slurm import QueuedTask, SlurmError
from depthmup.launch.jobs.states import RunState, Snapshot
from depthmup.launch.jobs.status import goes_on, print_status
from depthmup.launch.jobs.submission import Submission, count_taken, load_all, note_command, read_cancelled_runs
from depthmup.launch.jobs.submit import Turns, deal_tasks, submit_continuation, take_turns, write_dry_run_script
from depthmup.launch.reading import read_study
from depthmup.launch.runs.opened import list_studies
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import IDLE, count_unfinished, describe_waiting, launch, wait
from depthmup.train.lock import take_lock
from depthmup.train.owner import COPY_DESCRIPTION, fingerprint_code
from depthmup.train.rundir import EXIT_LOST_PEER
from slurm_stand_ins import in_queue, submitted
from test_launch_scale import finish


def most_at_once(jobs: list[dict[str, Any]]) -> int:
    """The most jobs that can run at one time: arrays run together unless one waits for the other, directly or not."""
    before: dict[str, set[str]] = {}
    for job in jobs:
        before[job["id"]] = {*job["after"], *(each for one in job["after"] for each in before[one])}

    def together(chosen: list[dict[str, Any]]) -> bool:
        ids = {job["id"] for job in chosen}
        return not any(before[job["id"]] & ids for job in chosen)

    subsets = ([job for bit, job in enumerate(jobs) if number >> bit & 1] for number in range(1, 2 ** len(jobs)))
    return max(sum(min(job["throttle"], job["tasks"]) for job in chosen) for chosen in subsets if together(chosen))


# ---------------------------------------------------------------- more runs than Slurm has places for


def end_job(fake: Path, study: Study, job_id: str) -> None:
    """Its runs are done, and it is no longer in the queue."""
    [submission] = [each for each in load_all(study.file.directory / "jobs") if each.job_id == job_id]
    names = {name for task in submission.tasks for name in task}
    for run in study.runs:
        if run.directory.path.name in names:
            run.directory.write_done({"outcome": "completed", "minival_loss": 1.0})
    with open(fake / "ended", "a") as file:
        file.write(f"{job_id}\n")


def test_of_more_runs_than_slurm_has_places_for_a_part_is_submitted_and_the_rest_stays_new(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "places").write_text("5")
    study = study_of()
    launched = launch(study)
    assert (len(launched.runs), launched.left) == (4, 8)
    assert sum(job["tasks"] for job in in_queue(fake)) == 4
    assert "4 runs submitted: jobs" in launched.describe_jobs()
    assert "8 more when Slurm has place" in launched.describe_jobs()
    assert states.take_snapshot(study).counts() == {"waiting": 4, "new": 8}
    assert len(load_all(study.file.directory / "jobs")) == len(in_queue(fake)) == 2  # no trace of what was refused
    (fake / "places").write_text("4")
    again = launch(study)
    assert (again.runs, again.job_ids, again.left) == ([], [], 8)


@pytest.mark.parametrize("places", range(1, 13))
def test_whatever_number_of_places_there_is_at_least_half_of_them_are_taken_and_none_too_many(
    fake: Path, study_of: Callable[..., Study], places: int
) -> None:
    (fake / "places").write_text(str(places))
    launched = launch(study_of())
    taken = sum(job["tasks"] for job in in_queue(fake))
    assert places / 2 <= taken <= places
    assert (len(launched.runs), launched.left) == (taken, 12 - taken)


def test_what_slurm_took_before_it_refused_is_tried_again_as_it_is_and_the_costliest_runs_come_first(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "places").write_text("8")  # two arrays of four are taken, the third is refused
    launched = launch(study_of())
    assert len(launched.runs) == 8
    assert len(submitted(fake)) == 2 + 2
    depths = [run.size.depth for run in launched.runs]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 6


def test_runs_that_have_failed_stay_failed_where_slurm_refuses_them(fake: Path, study_of: Callable[..., Study]) -> None:
    study = study_of()
    study.write()
    study.runs[0].directory.write_failed({"error": "no such file"})
    (fake / "places").write_text("0")
    with pytest.raises(slurm.Full):
        launch(study)
    assert study.runs[0].directory.failed() == {"error": "no such file"}
    assert states.take_snapshot(study).counts() == {"failed": 1, "new": 11}
    (fake / "places").write_text("12")
    assert len(launch(study).runs) == 12
    assert study.runs[0].directory.failed() is None


def test_nothing_is_submitted_while_slurm_does_not_say_what_waits(fake: Path, study_of: Callable[..., Study]) -> None:
    study = study_of()
    launch(study)
    before = submitted(fake)
    (fake / "squeue").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(slurm.Silent, match=r"Unable to contact.*Nothing was submitted"):
        launch(study)
    with pytest.raises(slurm.Silent, match=r"Unable to contact.*Nothing was submitted"), submit_follower(study, []):
        raise AssertionError("it has a place in the queue")
    assert submitted(fake) == before
    snapshot = states.take_snapshot(study)
    assert snapshot.counts() == {"waiting": 12}
    assert goes_on(snapshot)  # who watches goes on


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 1001),
        ({"MaxArraySize": "50"}, 50),
        ({"MaxArraySize": "50", "SchedulerParameters": "bf_interval=1,max_array_tasks=7,defer"}, 7),
        ({"MaxArraySize": "5", "SchedulerParameters": "max_array_tasks=7"}, 5),
    ],
)
def test_arrays_are_as_large_as_both_of_slurms_limits_allow(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], size: int
) -> None:
    monkeypatch.setattr(slurm, "read_configuration", lambda: settings)
    assert slurm.ask_max_array_size() == size


def test_a_cluster_without_arrays_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "read_configuration", lambda: {"MaxArraySize": "0"})
    with pytest.raises(UserError, match="takes no job arrays"):
        slurm.ask_max_array_size()


def test_slurms_commands_are_told_nothing_of_a_users_own_formats_or_of_the_job_that_this_runs_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF", "PATH_OF_MINE"):
        monkeypatch.setenv(name, "x")
    kept = [name for name in slurm.clean_environment() if name.startswith(("SQUEUE_", "SBATCH_", "SLURM_", "PATH_"))]
    assert sorted(kept) == ["PATH_OF_MINE", "SLURM_CONF"]


def test_no_job_of_a_launch_begins_before_slurm_has_taken_all_of_them(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "places").write_text("5")
    launched = launch(study_of())
    assert all("--begin=now+10minutes" in job["all"] for job in submitted(fake) if job["id"] not in ("1",))
    assert f"update JobId={','.join(launched.job_ids)} StartTime=now" in (fake / "told").read_text()


def test_a_queue_without_a_place_for_the_first_job_is_refused_with_the_reason(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "places").write_text("0")
    with pytest.raises(slurm.Full, match=r"AssocMaxSubmitJobLimit.*once jobs of yours.*have ended"):
        launch(study_of())
    assert in_queue(fake) == []
    assert not load_all(study_of().file.directory / "jobs")


def test_a_queue_that_is_full_for_all_users_is_told_from_a_slurm_that_does_not_answer(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "whole_queue_is_full").touch()  # MaxJobCount: sbatch itself tries again for two minutes
    began = time.monotonic()
    with pytest.raises(slurm.Full, match="unable to accept job"):
        launch(study_of())
    assert time.monotonic() - began < slurm.SECONDS


def test_who_waits_for_a_study_refills_the_queue_as_places_become_free(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "places").write_text("5")
    study, seen, pause = study_of(), list[set[str]](), time.sleep

    def end_first(seconds: float) -> None:
        if seconds != transfer.SLURM_POLL_SECONDS:  # subprocess's
            return pause(seconds)
        queued = in_queue(fake)
        seen.append({job["id"] for job in queued})
        assert sum(job["tasks"] for job in queued) <= 5
        end_job(fake, study, queued[0]["id"])

    monkeypatch.setattr(time, "sleep", end_first)
    wait(study, launch(study), Console(quiet=True))
    assert states.take_snapshot(study).counts() == {"done": 12}
    assert any(ids & seen[0] and ids - seen[0] for ids in seen)  # before it was empty


def test_who_waits_for_a_study_waits_on_with_the_reason_while_others_fill_the_places_or_slurm_is_away(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "places").write_text("5")
    study, pause, polls = study_of(), time.sleep, list[int]()

    def go_by(seconds: float) -> None:
        if seconds != transfer.SLURM_POLL_SECONDS:  # subprocess's
            return pause(seconds)
        polls.append(len(in_queue(fake)))
        for job in in_queue(fake):
            end_job(fake, study, job["id"])
        (fake / "places").write_text("0" if len(polls) in (1, 2) else "5")  # another study was quicker
        if len(polls) == 3:
            (fake / "refuse").write_text("Unable to contact slurm controller")
        else:
            (fake / "refuse").unlink(missing_ok=True)

    monkeypatch.setattr(time, "sleep", go_by)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    wait(study, launch(study), Console(width=400))
    assert states.take_snapshot(study).counts() == {"done": 12}
    assert polls[:5] == [2, 0, 0, 0, 2]
    said = capsys.readouterr().out
    assert "Slurm takes no more jobs now: AssocMaxSubmitJobLimit" in said
    assert "Unable to contact slurm controller" in said


def test_who_waits_for_a_study_looks_at_no_run_again_that_has_ended_and_seldom_where_a_look_takes_long(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "places").write_text("5")
    study, pause, look = study_of(), time.sleep, states.find_state
    ended: list[str] = []
    pauses: list[float] = []

    def counted(run: PlannedRun, *given: Any) -> states.RunState:
        found = look(run, *given)
        if found.state in states.ENDED:
            ended.append(run.directory.path.name)
        return found

    def end_first(seconds: float) -> None:
        if seconds < transfer.SLURM_POLL_SECONDS:  # subprocess's
            return pause(seconds)
        pauses.append(seconds)
        end_job(fake, study, in_queue(fake)[0]["id"])

    launched, ticks = launch(study), count()
    monkeypatch.setattr(time, "sleep", end_first)
    monkeypatch.setattr(time, "process_time", lambda: 2.0 * next(ticks))  # a look takes two seconds
    monkeypatch.setattr(states, "find_state", counted)
    monkeypatch.setattr(transfer, "resubmit", resubmit_unseen(ended))
    wait(study, launched, Console(quiet=True))
    assert sorted(ended) == sorted(run.directory.path.name for run in study.runs)
    assert min(pauses) >= 2.0 / transfer.LOOKING_SHARE - 2.0 > transfer.SLURM_POLL_SECONDS


def resubmit_unseen(ended: list[str]) -> Callable[..., Any]:
    """As `resubmit`, but what a launch looks at is not counted in `ended`."""
    resubmit = transfer.resubmit

    def again(*given: Any) -> Any:
        before = len(ended)
        launched = resubmit(*given)
        del ended[before:]
        return launched

    return again


def test_the_path_to_a_target_waits_for_a_place_once_it_has_begun(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "places").write_text("0")
    study, pause = study_of("launch.runs_per_job=12"), time.sleep

    def go_by(seconds: float) -> None:
        if seconds == chain.PAUSE_SECONDS:
            (fake / "places").write_text("5")
        elif seconds == transfer.SLURM_POLL_SECONDS:
            for job in in_queue(fake):
                end_job(fake, study, job["id"])
        else:
            pause(seconds)

    monkeypatch.setattr(time, "sleep", go_by)
    with pytest.raises(slurm.Full):  # the user looks: the first command says so and ends
        chain.finish_study(study, Console(width=400))
    chain.finish_study(study, Console(width=400), begun=True)
    assert "AssocMaxSubmitJobLimit" in capsys.readouterr().out
    assert states.take_snapshot(study).counts() == {"done": 12}


def test_the_job_that_goes_on_leaves_its_successor_to_try_again_where_others_fill_the_places(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of()
    study.write()
    (fake / "places").write_text("1")
    with pytest.raises(Postponed, match=r"AssocMaxSubmitJobLimit.*Job 1 tries again in 10 minutes"):
        advance_study(study, [], Console(quiet=True), by_itself=True)
    (successor,) = in_queue(fake)
    assert load_all(study.file.directory / "jobs")[-1].goes_on
    assert successor["tasks"] == 1
    (fake / "places").write_text("0")
    (fake / "ended").write_text("1")
    with pytest.raises(slurm.Full, match="AssocMaxSubmitJobLimit"):  # no place for it either: this job waits for one
        advance_study(study, [], Console(quiet=True), by_itself=True)


def test_the_job_that_goes_on_ends_well_where_it_tries_again_later_and_badly_where_it_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends_with(error: UserError) -> tuple[int, str]:
        def go_on(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(chain, "continue_path", go_on)
        return chain.main(), capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["chain", "runs/tiny"])
    assert ends_with(Postponed("Job 1 tries again in 10 minutes")) == (0, "Job 1 tries again in 10 minutes\n")
    assert ends_with(UserError("2 runs failed")) == (2, "Stopped: 2 runs failed\n")


def test_while_the_next_job_waits_for_its_time_the_last_one_says_why(
    fake: Path, study_of: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of()
    study.write()
    for number in ("1", "2"):
        (fake / "places").write_text(number)
        with pytest.raises(Postponed) as postponed:
            advance_study(study, [], Console(quiet=True), by_itself=True)
        load_all(study.file.directory / "jobs")[-1].log(0).write_text(f"{postponed.value}\n")
        (fake / "ended").write_text("1")
    (fake / "state").write_text("PENDING|BeginTime")
    print_status(study, Console(width=400))
    shown = capsys.readouterr().out
    assert "then: job 2 goes on (PENDING, BeginTime)" in shown
    assert "the one before it: Slurm takes no more jobs now" in shown
    (fake / "state").write_text("PENDING|Dependency")
    print_status(study, Console(width=400))
    assert "the one before it" not in capsys.readouterr().out


def test_a_path_without_a_place_for_a_run_and_the_job_after_it_leaves_nothing(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of()
    for places in ("0", "1"):
        (fake / "places").write_text(places)
        with pytest.raises(slurm.Full, match=r"AssocMaxSubmitJobLimit.*--detach; or wait for them: depthmup transfer"):
            advance_study(study, [], Console(quiet=True))
        assert in_queue(fake) == []
        assert states.take_snapshot(study).counts() == {"new": 12}


def test_the_job_that_goes_on_begins_when_half_of_what_was_taken_has_ended(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    (fake / "places").write_text("6")
    study = study_of()
    advance_study(study, [], Console(quiet=True))
    follower, first, second = in_queue(fake)
    assert (first["tasks"], second["tasks"]) == (2, 2)
    told = [line for line in (fake / "told").read_text().splitlines() if "Dependency" in line]
    assert told == [f"update JobId={follower['id']} Dependency=afterany:{first['id']} StartTime=now"]


# ---------------------------------------------------------------- whose jobs


def test_jobs_are_found_by_their_ids_whoever_asks_and_are_not_submitted_again(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    assert len(launch(study).runs) == 12
    before = len(submitted(fake))
    for variable in ("USER", "LOGNAME", "USERNAME", "LNAME"):  # su, sudo -E, a container
        monkeypatch.setenv(variable, "somebody-else")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # a colleague, or a user without an entry in the list
    assert states.take_snapshot(study).counts() == {"waiting": 12}
    assert launch(study).runs == []
    assert len(submitted(fake)) == before
    asked = (fake / "asked").read_text()
    assert "--user" not in asked
    assert "somebody-else" not in asked


def test_a_cluster_that_hides_the_jobs_of_others_does_not_make_a_colleague_submit_them_again(
    fake: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    launch(study)
    (fake / "hidden").touch()
    assert states.take_snapshot(study).counts() == {"lost": 12}  # one's own job that is not shown has ended
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    snapshot = states.take_snapshot(study)
    assert snapshot.counts() == {"waiting": 12}
    assert "Slurm does not say" in snapshot.runs[0].remark
    assert launch(study).runs == []


def test_a_job_that_has_left_the_queue_is_no_error_and_one_of_another_name_is_not_ours(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of("launch.runs_per_job=12")
    launch(study)
    (fake / "jobs").write_text("")
    assert states.take_snapshot(study).counts() == {"lost": 12}
    (fake / "jobs").write_text("1 another-study 0 1\n")  # ids come round again
    assert states.take_snapshot(study).counts() == {"lost": 12}


def test_a_job_whose_id_was_never_written_is_found_by_its_name(fake: Path, study_of: Callable[..., Study]) -> None:
    study = study_of("launch.runs_per_job=12")
    launch(study)
    (submission,) = load_all(study.file.directory / "jobs")
    (submission.path / "job.json").unlink()
    assert states.take_snapshot(study).counts() == {"waiting": 12}
    assert submission.job_id == "1"


# ---------------------------------------------------------------- how many at once


@pytest.mark.parametrize("max_running", [1, 2, 3, 5, 64])
def test_one_limit_holds_over_all_arrays_and_launches(
    fake: Path, study_of: Callable[..., Study], max_running: int
) -> None:
    few = study_of(f"launch.max_running={max_running}", "study.parameterizations=[sp]")
    many = study_of(f"launch.max_running={max_running}")
    assert len(launch(few).runs) == 8  # arrays of at most 4
    assert len(launch(many).runs) == 4
    jobs = submitted(fake)
    assert sum(job["tasks"] for job in jobs) == 12
    assert most_at_once(jobs) <= max_running
    if max_running == 64:
        assert all(not job["after"] for job in jobs)
    else:
        assert most_at_once(jobs) == max_running


def test_five_arrays_take_turns_under_a_limit_of_two_and_keep_the_users_own_dependency(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    launch(study_of("launch.max_running=2", "study.seeds=2", "launch.sbatch={dependency: 'after:7'}"))
    jobs = submitted(fake)
    assert [job["tasks"] for job in jobs] == [4] * 6
    assert [job["after"] for job in jobs] == [[], [], ["1"], ["2"], ["3"], ["4"]]
    assert most_at_once(jobs) == 2
    assert "--dependency=after:7,afterany:1" in jobs[2]["all"]


def test_a_small_launch_takes_the_places_that_are_left_and_a_large_one_waits_for_all() -> None:
    assert take_turns(1, 3, max_running=8, places_taken=5, queued=["1"]) == Turns([3], [])
    assert take_turns(1, 100, max_running=8, places_taken=5, queued=["1"]) == Turns([8], ["1"])
    assert take_turns(1, 100, max_running=8, places_taken=4, queued=["1"]) == Turns([4], [])
    assert take_turns(3, 100, max_running=8, places_taken=0, queued=[]) == Turns([3, 3, 2], [])
    assert take_turns(1, 1, max_running=1, places_taken=9, queued=["1", "2"]) == Turns([1], ["1", "2"])


def test_costly_jobs_are_dealt_to_all_arrays() -> None:
    tasks = [[str(number)] for number in range(7)]
    assert deal_tasks(tasks, 3) == [[["0"], ["3"], ["6"]], [["1"], ["4"]], [["2"], ["5"]]]
    assert deal_tasks(tasks, 7) == [tasks]


def test_places_are_counted_as_far_as_elements_are_left(tmp_path: Path) -> None:
    job = Submission.create(tmp_path, "a", [["x"]] * 5, {"throttle": 3})
    queue = [QueuedTask("1", index, "RUNNING", "None", job.name) for index in range(5)]
    assert count_taken([job], queue) == (3, ["1"])
    assert count_taken([job], queue[:2]) == (2, ["1"])
    assert count_taken([job], []) == (0, [])


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("PartitionConfig", "no node of its partition"),
        ("PartitionNodeLimit", "launch.nodes"),
        ("PartitionTimeLimit", "launch.timeout_min"),
        ("ReqNodeNotAvail", "down or reserved"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-3]", "down or reserved"),
        ("JobHeldUser", "scontrol release"),
        ("AssocGrpCpuLimit", "the group as a whole"),
        ("AssocGrpCPUMinutesLimit", "spent its hours"),
        ("QOSMaxJobsPerUserLimit", "when a job of yours ends"),
        ("QOSMaxCpuPerJobLimit", "one job alone"),
        ("QOSMaxGRESPerUser", "when a job of yours ends"),
        ("Dependency", "launch.max_running"),
        ("requeued (preempted twice), BeginTime", "requeued"),
        ("Priority", "no place yet"),
    ],
)
def test_a_reason_to_wait_is_explained_with_what_to_type(reason: str, words: str) -> None:
    assert words in (explain(reason) or "")


def test_transfer_and_status_say_why_runs_wait(
    fake: Path, study_of: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of()
    launch(study)
    (fake / "state").write_text("PENDING|PartitionConfig")
    said = describe_waiting(states.take_snapshot(study))
    assert said.startswith(", 12 waiting (PartitionConfig: no node of its partition")
    (fake / "state").write_text("PENDING|None")
    assert describe_waiting(states.take_snapshot(study)) == ", 12 waiting"  # Slurm has not looked yet
    (fake / "state").write_text("PENDING|PartitionConfig")
    print_status(study, Console(width=200))
    shown = capsys.readouterr().out
    assert shown.count("PartitionConfig: no node of its partition") == 1
    assert "launch.nodes" in shown


def test_of_several_reasons_transfer_says_the_commonest(study_of: Callable[..., Study]) -> None:
    runs = study_of().runs
    reasons = ["Priority", "PartitionConfig", "PartitionConfig"]
    found = [RunState(run, "waiting", reason) for run, reason in zip(runs, reasons, strict=False)]
    assert describe_waiting(Snapshot(found, [], [], [])).startswith(", 3 waiting (PartitionConfig: ")


def test_a_job_that_loads_its_libraries_is_starting_and_what_one_has_cancelled_is_cancelled(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of("launch.runs_per_job=4")
    launch(study)
    root = study.file.directory
    (fake / "state").write_text("RUNNING|None")
    assert states.take_snapshot(study).counts() == {"starting": 12}
    first = load_all(root / "jobs")[0].tasks[0][0]
    begun = next(run.directory for run in study.runs if run.directory.path.name == first)
    note_attempt(begun, "started", step=0, job="1_0", restart=0)
    with take_lock(begun.lock) or pytest.fail("no lock"):
        assert states.take_snapshot(study).counts() == {"running": 1, "starting": 8, "waiting": 3}

    said = CliRunner().invoke(cli, ["cancel", str(root)]).output
    assert said.startswith("Stopped: job 1")
    (fake / "jobs").write_text("")
    assert states.take_snapshot(study).counts() == {"cancelled": 12}
    assert CliRunner().invoke(cli, ["cancel", str(root)]).output.startswith("Nothing waits")
    assert states.take_snapshot(study).counts() == {"cancelled": 12}  # a second cancel changes nothing
    assert "cancelled: 12 of 12" in str(count_unfinished(study))
    assert len(launch(study).runs) == 12
    assert read_cancelled_runs(root) == set()


def test_runs_of_a_job_that_is_ending_are_not_submitted_again_before_it_has_ended(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of("launch.runs_per_job=12")
    launch(study)
    (fake / "state").write_text("COMPLETING|None")  # as after a cancel, until its processes have ended
    snapshot = states.take_snapshot(study)
    assert snapshot.counts() == {"ending": 12}
    assert snapshot.runs[0].remark == "job 1_0 is ending"
    assert launch(study).runs == []  # the lock of one may still be held


def test_only_what_a_cancel_stopped_is_cancelled(tmp_path: Path) -> None:
    note_command(tmp_path, "cancel", ["a"])
    note_command(tmp_path, "cancel", ["b"])
    assert read_cancelled_runs(tmp_path) == {"a", "b"}
    note_command(tmp_path, "launch")
    note_command(tmp_path, "cancel")
    assert read_cancelled_runs(tmp_path) == set()


def test_the_job_after_the_runs_has_its_place_before_them_or_nothing_is_submitted(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of("launch.runs_per_job=12")
    (fake / "refuse").write_text("AssocMaxSubmitJobLimit")
    with pytest.raises(UserError) as error, submit_follower(study, [Path("my target.yaml"), Path("b.yaml")]):
        launch(study)
    again = study.command("transfer", "--target", "my target.yaml", "--target", "b.yaml")
    assert "none of them was submitted" in str(error.value)
    assert f"{again} --detach; or wait for them: {again}" in str(error.value)
    assert submitted(fake) == []
    (fake / "refuse").unlink()

    with submit_follower(study, []) as (job_id, attach):
        assert [job["id"] for job in submitted(fake)] == [job_id]
        assert submitted(fake)[0]["after"] == []
        script = load_all(study.file.directory / "jobs")[-1].script
        assert "#SBATCH --begin=now+10minutes" in script.read_text()  # where we are killed now, it begins by itself
        launch(study)
        attach(["2"])
    assert f"update JobId={job_id} Dependency=afterany:2 StartTime=now" in (fake / "told").read_text()
    with submit_follower(study, []) as (job_id_again, _):
        assert job_id_again == job_id  # which waits already
    with submit_follower(study, [Path("large.yaml")]) as (another, _):
        assert another != job_id  # that one would go to no target
    assert (fake / "cancelled").read_text() == f"{job_id}\n"


def with_target(study: Study) -> Study:
    """The study, done, and the target that was scaled from it."""
    finish(study, best=-4.8)
    content = yaml.safe_load(study.path.read_text())
    content["study"] = {"name": "tiny_target", "directory": str(study.file.directory.parent)}
    content["launch"] = {"cluster": "slurm"}
    study.target_file.write_text(yaml.safe_dump(content))
    _, target = list_studies(study)
    return target


def test_a_cancel_stops_the_whole_path_and_says_what_of_it(fake: Path, study_of: Callable[..., Study]) -> None:
    study = study_of("launch.runs_per_job=12")
    target = with_target(study)
    with submit_follower(study, [Path("large.yaml")]) as (job_id, _):
        (run_by,) = launch(target).job_ids
    said = CliRunner().invoke(cli, ["cancel", str(study.file.directory)]).output
    assert said.splitlines() == [
        f"Stopped: job {job_id}, which was to go on after the runs",
        f"Stopped, of the target {target.file.directory}: job {run_by}",
    ]
    assert (fake / "cancelled").read_text().split() == [job_id, run_by]  # first what could submit more
    (fake / "jobs").write_text("")
    assert states.take_snapshot(target).counts() == {"cancelled": 1}
    assert CliRunner().invoke(cli, ["cancel", str(study.file.directory)]).output == "Nothing waits or runs.\n"


def test_a_job_after_the_runs_that_was_ended_by_another_is_missed_with_what_to_type(
    fake: Path, study_of: Callable[..., Study], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of("launch.runs_per_job=12")
    with submit_follower(study, [Path("large.yaml")]) as (job_id, _):
        launch(study)

    def shown() -> str:
        print_status(study, Console(width=200))
        return capsys.readouterr().out

    assert "then: job 1 goes on" in shown()
    (fake / "ended").write_text(f"{job_id}\n")  # scancel
    again = study.command("transfer", "--target", str(Path("large.yaml").absolute()), "--detach")
    assert f"after the runs: nothing goes on by itself, job {job_id} has gone without a word: {again}\n" in shown()
    with monkeypatch.context() as colleague:
        colleague.setattr(os, "getuid", lambda: 54321)  # to whom it may not be shown
        assert "after the runs" not in shown()
    note_command(study.file.directory, "cancel")
    assert "after the runs" not in shown()


def test_nothing_goes_on_by_itself_after_a_cancel_wherever_on_the_path_that_comes(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    study = study_of("launch.runs_per_job=12")
    target = with_target(study)
    assert not target.file.directory.exists()
    with submit_follower(study, []):
        CliRunner().invoke(cli, ["cancel", str(study.file.directory)])  # the target is about to be submitted
        assert launch(target, IDLE, by_itself=True).runs == []
    with pytest.raises(UserError, match="cancelled"), submit_follower(study, [], by_itself=True):
        raise AssertionError("it has a place in the queue")
    with submit_follower(study, []):
        pass  # the user's word counts
    with submit_follower(study, [], by_itself=True):
        pass


def test_a_transfer_that_waits_begins_no_target_after_a_cancel(
    study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    finish(study, best=-4.8)
    note_command(study.file.directory, "cancel")  # an earlier one: the user's command counts
    begun: list[Any] = []
    monkeypatch.setattr(chain, "make_target_studies", lambda *arguments: begun.append(arguments) or [])
    monkeypatch.setattr(chain, "report_target", lambda *arguments: None)
    monkeypatch.setattr(chain, "show_report", lambda *arguments: None)
    chain.transfer(study, [Path("large.yaml")], Console())
    assert len(begun) == 1
    monkeypatch.setattr(chain, "show_report", lambda *arguments: note_command(study.file.directory, "cancel"))
    with pytest.raises(UserError, match="cancelled before the target began"):
        chain.transfer(study, [Path("large.yaml")], Console())
    assert len(begun) == 1


@pytest.mark.parametrize("silent", [True, False])
def test_the_place_of_the_job_after_the_runs_is_given_back_when_they_are_refused_but_not_when_slurm_is_silent(
    fake: Path, study_of: Callable[..., Study], silent: bool
) -> None:
    study = study_of("launch.runs_per_job=12")
    kind = slurm.Silent if silent else UserError
    with pytest.raises(UserError, match="of the runs"), submit_follower(study, []):
        raise kind("of the runs")
    cancelled = (fake / "cancelled").read_text() if (fake / "cancelled").exists() else ""
    assert cancelled == ("" if silent else "1\n")
    assert len(load_all(study.file.directory / "jobs")) == int(silent)


def test_printed_commands_can_be_pasted(fake: Path, study_of: Callable[..., Study], tmp_path: Path) -> None:
    spaced = tmp_path / "my study's.yaml"
    first = study_of()
    spaced.write_text(first.path.read_text())
    overrides = (f"study.directory={tmp_path}/two words", "launch.cluster=slurm")
    study = Study(spaced, read_study(spaced, overrides), overrides)
    shown = subprocess.check_output(
        ["bash", "-c", f"depthmup() {{ printf '%s\\n' \"$@\"; }}; {study.command('status')}"]
    )
    assert shown.decode().splitlines() == ["status", str(spaced), *overrides]
    study.write()  # now its folder knows all that
    shown = subprocess.check_output(
        ["bash", "-c", f"depthmup() {{ printf '%s\\n' \"$@\"; }}; {study.command('status')}"]
    )
    assert shown.decode().splitlines() == ["status", f"{tmp_path}/two words/tiny"]
    said = CliRunner().invoke(cli, ["report", str(spaced), *overrides])
    assert study.command("transfer") in str(said.exception)


def test_a_line_with_a_command_is_not_broken_in_a_narrow_terminal(
    fake: Path, study_of: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = Console(width=40)
    study = study_of("launch.runs_per_job=12")
    advance_study(study, [], narrow)
    (submission,) = [each for each in load_all(study.file.directory / "jobs") if not each.goes_on]
    submission.held_file.write_text(json.dumps({"reason": "3 runs failed for one reason"}))
    (fake / "ended").write_text("2\n")
    print_status(study, narrow)
    finish(study, best=-4.8)
    chain.write_scaled(study, study.target_file, None, (), narrow, force=True)
    said = capsys.readouterr().out.splitlines()
    launched = study.command("launch")
    for command in (
        study.command("status", "--watch"),
        f"held runs: mend that, then {launched}; to try them as they are: {launched} launch.hold_after=0",
        f"Start it with: depthmup launch {study.target_file}",
    ):
        assert any(line.endswith(command) for line in said), command


# ---------------------------------------------------------------- the script


def run_script(
    script: str, fake: Path, worker: int, slurm_says: str = "RUNNING N/A 0"
) -> subprocess.CompletedProcess[str]:
    """Runs a batch script whose worker ends with `worker`. `slurm_says`: the job's state, when it was preempted, and
    how often it was requeued."""
    (fake / "srun").write_text(f"#!/bin/bash\nexit {worker}\n")
    (fake / "squeue").write_text(f"#!/bin/bash\necho '{slurm_says}'\n")
    (fake / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {fake}/told\n')
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "1"}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **job}, check=False
    )


@pytest.mark.parametrize(
    "setup",
    [
        [],
        ["set -euo pipefail"],
        ["set -euo pipefail", "IFS=$'\\n\\t'"],
        ["set -Eeuo pipefail", "trap 'exit 1' ERR"],
        ["set -e", "trap - TERM", "set -o noclobber"],
    ],
)
@pytest.mark.parametrize("code", [75, 128 + signal.SIGUSR2])
def test_a_signalled_job_asks_for_its_requeue_whatever_the_setup_lines_set(
    fake: Path, study_of: Callable[..., Study], setup: list[str], code: int
) -> None:
    study = study_of(f"launch.setup={json.dumps(setup)}")
    script = write_dry_run_script(study)
    (folder,) = {line.split()[-1] for line in script.splitlines() if ">> " in line and "stopped.jsonl" in line}
    Path(folder).parent.mkdir(parents=True)
    place = next(line for line in script.splitlines() if line.startswith("cd "))
    ended = run_script(script.replace(place, "cd /"), fake, code)
    assert ended.returncode == code, ended.stderr
    assert (fake / "told").read_text() == "requeue 7\n"
    assert json.loads(Path(folder).read_text())["cause"] == "signal"


@pytest.mark.parametrize(
    ("code", "slurm_says", "cause", "requeues"),
    [
        (75, "RUNNING N/A 0", "signal", True),
        (EXIT_LOST_PEER, "RUNNING N/A 0", "a process was lost", True),
        (75, "RUNNING 2026-01-01T00:00:00 0", "preempted", True),
        (75, "RUNNING N/A 1", "requeued", False),  # and its successor runs already: that must go on
        (75, "COMPLETING N/A 1", "requeued", False),
        (75, "CANCELLED N/A 0", "cancelled", False),
    ],
)
def test_a_job_asks_for_its_requeue_once_and_notes_why_it_ended(
    fake: Path, study_of: Callable[..., Study], code: int, slurm_says: str, cause: str, requeues: bool
) -> None:
    (fake / "python").write_text(f"#!/bin/bash\nexit {code}\n")  # asked for what the step's end means
    (fake / "python").chmod(0o755)
    script = write_dry_run_script(study_of(f"launch.python={fake}/python"))
    (folder,) = {line.split()[-1] for line in script.splitlines() if ">> " in line and "stopped.jsonl" in line}
    Path(folder).parent.mkdir(parents=True)
    place = next(line for line in script.splitlines() if line.startswith("cd "))
    ended = run_script(script.replace(place, "cd /"), fake, code, slurm_says)
    assert ended.returncode == code, ended.stderr
    assert json.loads(Path(folder).read_text()) == {"job": "7_0", "restart": 0, "cause": cause}
    assert (fake / "told").exists() == requeues


def test_the_job_after_the_runs_is_a_small_one_whatever_they_ask_for(
    fake: Path, study_of: Callable[..., Study]
) -> None:
    large = ("nodes=4", "gpus_per_node=8", "cpus_per_task=12", "memory_gb=900", "timeout_min=1440", "partition=gpu")
    study = study_of(*(f"launch.{key}" for key in large), "launch.continuation={partition: cpu}")
    asked = submit_continuation(study, [], after=False, lock=0).script.read_text()
    options = dict(line[8:].partition("=")[::2] for line in asked.splitlines() if line.startswith("#SBATCH --"))
    wanted = {"--nodes": "1", "--ntasks-per-node": "1", "--cpus-per-task": "1", "--mem": "4GB", "--time": "60"}
    assert {key: options.get(key) for key in wanted} == wanted
    assert options["--partition"] == "cpu"
    assert not any("gpu" in key for key in options)
    short = study_of("launch.timeout_min=30")
    assert "#SBATCH --time=30\n" in submit_continuation(short, [], after=False, lock=0).script.read_text()


@pytest.mark.parametrize("name", ["100%job", "%j", "a%%t", "%n%x%A%a"])
def test_a_folder_with_what_slurm_takes_for_a_pattern_is_refused(
    study_of: Callable[..., Study], tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match="Slurm reads % in a path as a pattern"):
        write_dry_run_script(study_of(f'study.directory="{tmp_path}/{name}"'))


@pytest.mark.parametrize("name", ["two words", "quote'd"])
def test_the_names_of_folders_are_quoted_in_the_script(
    study_of: Callable[..., Study], tmp_path: Path, name: str
) -> None:
    script = write_dry_run_script(study_of(f'study.directory="{tmp_path}/{name}"'))
    logs = [word for line in script.splitlines() if "_log.out" in line for word in line.split("--output")[1:]]
    assert len(logs) == 2  # sbatch's and srun's
    for log in logs:
        path = log.replace("'\"'\"'", "'").strip(" ='")
        assert path.startswith(f"{tmp_path}/{name}/tiny/jobs/")
        assert path.split("_log.out")[0].endswith(("%A_%a_0", "%A_%a_%t"))


def test_a_job_of_several_processes_asks_first_whether_its_run_is_held(study_of: Callable[..., Study]) -> None:
    assert "--held && exit 0" in write_dry_run_script(study_of("launch.nodes=2"))
    assert "--held" not in write_dry_run_script(study_of())


def test_slurms_refusal_of_a_later_array_takes_back_the_earlier_ones(
    study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, fake: Path
) -> None:
    given: list[str] = []

    def sbatch(script: Path, options: Any = (), pass_fds: Any = ()) -> str:
        if given:
            raise SlurmError("QOSMaxSubmitJobPerUserLimit")
        given.append("1")
        return "1"

    taken_back: list[str] = []
    monkeypatch.setattr(slurm, "call_sbatch", sbatch)
    monkeypatch.setattr(slurm, "cancel", taken_back.extend)
    with pytest.raises(slurm.Full, match="QOSMaxSubmitJobPerUserLimit"):
        launch(study_of())
    assert taken_back == ["1"]


def test_the_job_after_the_runs_is_no_part_of_the_limit(fake: Path, study_of: Callable[..., Study]) -> None:
    study = study_of("launch.runs_per_job=12", "launch.max_running=1")
    launch(study)
    submit_continuation(study, [], after=False, lock=0)
    snapshot = states.take_snapshot(study)
    assert len(snapshot.continuations) == 1
    assert count_taken(snapshot.submissions, snapshot.queue) == (1, ["1"])
    assert LaunchConfig().max_running == 64


def test_a_job_imports_from_a_copy_that_has_every_file_which_the_code_opens(tmp_path: Path) -> None:
    copied = copy_code(tmp_path)
    page = "from depthmup.launch.report.page import make_environment, read_script\n"
    page += "from depthmup.launch.new import NewStudy\nmake_environment().get_template('report.html.j2')\n"
    page += "print(len(read_script('page.js')), len(read_script('tables.js')))"
    done = subprocess.run(
        [sys.executable, "-c", page],
        env={**os.environ, "PYTHONPATH": str(copied), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = {file.name for file in (PACKAGE / "launch" / "report").iterdir() if file.is_file()}
    assert here == {file.name for file in (copied / "depthmup" / "launch" / "report").iterdir() if file.is_file()}

    # and it states the sources' fingerprint, so that no process of a job reads them all
    assert fingerprint_code(copied / "depthmup") == fingerprint_code()
    (copied / "depthmup" / "train" / "step.py").write_text("another = 1")
    fingerprint_code.cache_clear()
    assert fingerprint_code(copied / "depthmup") == fingerprint_code()
    (copied / COPY_DESCRIPTION).unlink()
    fingerprint_code.cache_clear()
    assert fingerprint_code(copied / "depthmup") != fingerprint_code()
