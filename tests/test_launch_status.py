"""What `depthmup status` says of runs that Slurm stopped before their end. squeue's answer is given; files are real."""

import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from depthmup.launch import transfer
from depthmup.launch.jobs.attempts import begin_attempt, note_attempt
from depthmup.launch.jobs.cancel import cancel
from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.launch.jobs.states import RunState, find_state, take_snapshot
from depthmup.launch.jobs.status import format_duration, print_status, watch_status
from depthmup.launch.jobs.submission import Submission
from depthmup.launch.jobs.worker import lacks_gpu
from depthmup.launch.reading import read_study, read_study_or_run
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.wording import show_duration
from depthmup.train.lock import Lock, take_lock, write_holder
from depthmup.train.rundir import RunDirectory


def begin(run: RunDirectory, index: int, *ends: str) -> None:
    """Notes an attempt per word of `ends`, as the worker does; 'killed' leaves nothing that says how it ended."""
    for restart, end in enumerate(ends):
        note_attempt(run, "started", step=10 * restart, job=f"7_{index}", restart=restart)
        if end != "killed":
            note_attempt(run, end)


def test_status_shows_that_runs_were_preempted_or_stopped_otherwise_how_often_and_why(
    study_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hold: Callable[..., Lock],
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
    queue = [QueuedTask("7", index, *state.split(), job.name, restarts=1) for index, state in enumerate(states)]
    hold(runs[2])
    monkeypatch.setattr("depthmup.launch.jobs.slurm.read_queue", lambda ids, names: queue)

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


@pytest.fixture
def hold() -> Iterator[Callable[..., Lock]]:
    """Takes a run's lock until the test ends, as the process that trains it does; with a silence of so many seconds."""
    with ExitStack() as held:

        def take(run: RunDirectory, silent: float = 0.0) -> Lock:
            lock = held.enter_context(take_lock(run.lock) or pytest.fail("no lock"))
            lock.ended.set()
            os.utime(run.lock, (time.time() - silent,) * 2)
            return lock

        yield take


def written(study_file: Path) -> list[PlannedRun]:
    """The runs of the study, whose folders are there."""
    study = Study(study_file, read_study(study_file))
    study.write()
    return study.runs


def print_jobs(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *queue: str, per_job: int = 1
) -> list[str]:
    """The lines of `status` when Slurm shows element i of one array as `queue[i]`, 'STATE REASON'."""
    study = Study(study_file, read_study(study_file))
    study.write()
    names = [run.directory.path.name for run in study.runs]
    tasks = [names[first : first + per_job] for first in range(0, len(names), per_job)]
    job = Submission.create(study.file.directory / "jobs", "depthmup-tiny", tasks, {})
    job.write_job_id("7")
    tasks_queued = [QueuedTask("7", index, *state.split(), job.name) for index, state in enumerate(queue)]
    monkeypatch.setattr("depthmup.launch.jobs.slurm.read_queue", lambda ids, names: tasks_queued)
    print_status(study, Console(width=80))
    return capsys.readouterr().out.splitlines()


def test_what_differs_in_the_number_of_the_job_only_is_said_once_with_a_count_and_an_example(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = written(study_file)
    study = Study(study_file, read_study(study_file))
    first = runs[0].directory
    shown = print_jobs(study_file, monkeypatch, capsys, *["RUNNING None"] * 12)
    assert [line for line in shown if line.startswith("starting, ")] == [
        f"starting, 12 runs, as {first.path.name}: job 7_0 has begun"
    ]
    assert len([line for line in shown if " starting " in line]) == 1  # and one row
    assert shown[-1] == "12 starting"
    print_status(study, Console(width=80), everything=True)
    assert capsys.readouterr().out.count("has begun") == 12


def test_a_job_whose_nodes_boot_has_not_begun_and_trains_nothing(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(study_file)[0].directory
    begin(run, 0, "killed")  # requeued: its last start has ended without a word
    shown = print_jobs(study_file, monkeypatch, capsys, *["CONFIGURING None"] * 12)
    boots = "job 7_0 waits for its nodes to boot"
    assert f"starting, {run.path.name}: {boots}, requeued (node failed or killed)" in shown
    assert shown[-1] == "12 starting"


def test_of_a_job_with_several_runs_one_starts_and_the_others_wait_in_it(
    study_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hold: Callable[..., Lock],
) -> None:
    runs = [run.directory for run in written(study_file)]
    for number in (0, 4, 8):
        begin(runs[number], number // 4, "killed")
        hold(runs[number])
    shown = print_jobs(study_file, monkeypatch, capsys, *["RUNNING None"] * 3, per_job=4)
    assert f"waiting, 9 runs, as {runs[1].path.name}: in job 7_0" in shown
    assert shown[-1] == "3 running, 9 waiting"


def test_every_stalled_run_has_its_own_command(
    study_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hold: Callable[..., Lock],
) -> None:
    for number, run in enumerate(written(study_file)[:3]):
        begin(run.directory, number, "killed")
        hold(run.directory)
        age(run.directory, 4000)
    shown = " ".join(print_jobs(study_file, monkeypatch, capsys, *["RUNNING None"] * 3))
    for number in range(3):
        assert f"scontrol requeue 7_{number}" in shown


def test_a_run_that_takes_the_cpu_though_its_job_has_a_gpu_says_so(
    study_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hold: Callable[..., Lock],
) -> None:
    runs = written(study_file)
    auto, cpu = (replace(runs[0].config, train=replace(runs[0].config.train, device=name)) for name in ("auto", "cpu"))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for number, config in enumerate((auto, cpu)):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        begin_attempt(runs[number].directory, lacks_gpu(config))
        hold(runs[number].directory)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not lacks_gpu(auto)
    shown = print_jobs(study_file, monkeypatch, capsys, *["RUNNING None"] * 2)
    on_cpu = [line for line in shown if "on the CPU" in line]
    assert on_cpu == [f"running, {runs[0].directory.path.name}: on the CPU: its job has a GPU, and torch sees none"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "4s"), (59.6, "1m00"), (185, "3m05"), (3600, "1h00"), (7800, "2h10"), (360000, "100h00")]
)
def test_the_time_left_says_whether_it_is_seconds_minutes_or_hours(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def age(directory: RunDirectory, seconds: float) -> None:
    """Makes everything that the run wrote so old."""
    for path in [*directory.path.iterdir(), directory.checkpoints]:
        if path.exists():
            os.utime(path, (time.time() - seconds,) * 2)


SECONDS_A_LINE = 3.0


@pytest.fixture
def begun(study_file: Path) -> RunState:
    """The first run of a study, which has begun, and writes a metrics line every 3 s."""
    study = Study(study_file, read_study(study_file))
    study.write()
    run = study.runs[0]
    note_attempt(run.directory, "started", step=0, job="7_0", restart=0)
    train = run.config.train
    rate = train.log_every * train.global_batch_size / SECONDS_A_LINE
    run.directory.metrics.write_text(json.dumps({"step": 2, "loss": 2.0, "images_per_second": rate}) + "\n")
    return RunState(run, "running")


def judged(begun: RunState, task: QueuedTask | None = None) -> RunState:
    return find_state(begun.run, task, None, None, True, {}, False, ())


@pytest.mark.parametrize(
    ("seconds", "state", "words"),
    [
        (5, "running", ""),
        (50, "running", ""),
        (125, "running", "no news for 2 min 05 s, a metrics line takes 3 s"),
        (600, "stalled", "no news for 10 min 00 s, a metrics line takes 3 s. To start it again from its checkpoint"),
    ],
)
def test_a_run_without_news_says_since_when_and_is_stalled_after_a_multiple_of_its_own_pace(
    begun: RunState, hold: Callable[..., Lock], seconds: float, state: str, words: str
) -> None:
    age(begun.run.directory, seconds)
    hold(begun.run.directory)
    found = judged(begun, QueuedTask("7", 0, "RUNNING", "None", "tiny"))
    assert found.state == state
    assert found.remark.startswith(words)
    assert bool(found.remark) == bool(words)
    assert found.remark.endswith("scontrol requeue 7_0" if state == "stalled" else words)


@pytest.mark.parametrize(("seconds", "state"), [(1200, "running"), (2400, "stalled")])
def test_the_first_steps_may_take_longer(
    begun: RunState, hold: Callable[..., Lock], seconds: float, state: str
) -> None:
    begun.run.directory.metrics.unlink()
    age(begun.run.directory, seconds)
    hold(begun.run.directory)
    found = judged(begun, QueuedTask("7", 0, "RUNNING", "None", "tiny"))
    assert found.state == state
    assert f"no news for {show_duration(seconds)}, since it began" in found.remark


@pytest.mark.parametrize(
    ("lines", "state", "said"),
    [(2, "running", False), (4, "running", True), (15, "running", True), (25, "stalled", True)],
)
def test_a_slow_run_has_more_patience(
    begun: RunState, hold: Callable[..., Lock], lines: float, state: str, said: bool
) -> None:
    seconds = 120.0
    train = begun.run.config.train
    line = {"step": 2, "loss": 2.0, "images_per_second": train.log_every * train.global_batch_size / seconds}
    begun.run.directory.metrics.write_text(json.dumps(line) + "\n")
    age(begun.run.directory, lines * seconds)
    hold(begun.run.directory)
    found = judged(begun, QueuedTask("7", 0, "RUNNING", "None", "tiny"))
    assert (found.state, "no news" in found.remark) == (state, said)


def test_a_checkpoint_is_news_of_a_run_whose_metrics_lines_are_far_apart(
    begun: RunState, hold: Callable[..., Lock]
) -> None:
    age(begun.run.directory, 600)
    (begun.run.directory.checkpoints / "step-4").mkdir(parents=True)
    hold(begun.run.directory)
    assert judged(begun, QueuedTask("7", 0, "RUNNING", "None", "tiny")).state == "running"


def test_a_frozen_process_is_seen_by_its_lock_and_is_no_running_one_with_an_empty_queue(
    begun: RunState, hold: Callable[..., Lock]
) -> None:
    lock = begun.run.directory.lock
    hold(begun.run.directory)
    assert judged(begun).state == "running"
    os.utime(lock, (time.time() - 200,) * 2)
    here = judged(begun)
    assert here.state == "stalled"
    assert "has not moved for 3 min 20 s" in here.remark
    assert f"kill -9 {os.getpid()} on {socket.gethostname()}, then launch" in here.remark
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 5}))
    os.utime(lock, (time.time() - 200,) * 2)
    elsewhere = judged(begun)
    assert elsewhere.state == "lost"  # `launch` and a waiting `transfer` submit it again
    assert elsewhere.remark.startswith("process 5 on elsewhere has not moved for 3 min 20 s")


# Attempts as (event, job, how often it had been requeued)
BEGUN = ("started", "7_0", 0)
SAVED = ("interrupted", "7_0", 0)
BEGUN_AGAIN = ("started", "7_0", 1)
BEGUN_IN_ANOTHER_JOB = ("started", "6_3", 0)
KILLED = "requeued (node failed or killed)"
STOPPED = "requeued (stopped)"
WAITS = f"job 7_0 has begun, {KILLED}, waits for process 5 on sn3 to end"
# Slurm's words for job 7_0, how often it was requeued, what the run's files say, who has the lock -> what is said
MOMENTS = [
    ("PENDING Priority", 0, [], "free", "waiting", "Priority"),
    ("CONFIGURING None", 0, [], "free", "starting", "job 7_0 waits for its nodes to boot"),
    ("RUNNING None", 0, [], "free", "starting", "job 7_0 has begun"),
    ("RUNNING None", 0, [BEGUN], "held", "running", ""),
    ("SIGNALING None", 0, [BEGUN], "held", "running", ""),
    # frozen, at first and once it is known; killed, or its node has failed and Slurm does not know
    ("RUNNING None", 0, [BEGUN], "silent for 30 s", "running", ""),
    ("RUNNING None", 0, [BEGUN], "silent for 90 s", "stalled", "has not moved for 1 min 30 s"),
    ("RUNNING None", 0, [BEGUN], "free", "stalled", "no process has it: it was killed, or its node has failed"),
    ("SUSPENDED None", 0, [BEGUN], "silent for 90 s", "waiting", "job 7_0 is suspended"),
    # told to stop, and requeued or cancelled
    ("RUNNING None", 0, [BEGUN, SAVED], "free", "ending", "job 7_0 is ending"),
    ("COMPLETING None", 0, [], "free", "ending", "job 7_0 is ending"),
    ("COMPLETING None", 0, [BEGUN], "held", "ending", "job 7_0 is ending"),
    ("COMPLETING None", 1, [BEGUN], "on a node that is gone", "ending", "job 7_0 is ending"),
    ("REQUEUED None", 1, [BEGUN, SAVED], "free", "waiting", f"{STOPPED}, None"),
    ("PENDING BeginTime", 1, [BEGUN, SAVED], "free", "waiting", f"{STOPPED}, BeginTime"),
    ("PENDING BeginTime", 1, [BEGUN], "on a node that is gone", "waiting", f"{KILLED}, BeginTime"),
    ("REQUEUE_HOLD JobHoldMaxRequeue", 5, [BEGUN], "free", "waiting", f"{KILLED}, JobHoldMaxRequeue"),
    ("SPECIAL_EXIT JobHeldUser", 1, [BEGUN], "free", "waiting", f"{KILLED}, JobHeldUser"),
    # its job has begun again, and its process has not
    ("CONFIGURING None", 1, [BEGUN], "free", "starting", f"job 7_0 waits for its nodes to boot, {KILLED}"),
    ("RUNNING None", 1, [BEGUN], "free", "starting", f"job 7_0 has begun, {KILLED}"),
    ("RUNNING None", 1, [BEGUN, SAVED], "free", "starting", f"job 7_0 has begun, {STOPPED}"),
    ("RUNNING None", 1, [BEGUN], "on a node that is gone", "starting", WAITS),
    ("RUNNING None", 0, [BEGUN_IN_ANOTHER_JOB], "free", "starting", f"job 7_0 has begun, {KILLED}"),
    ("RUNNING None", 1, [BEGUN, BEGUN_AGAIN], "held", "running", "began again (node failed or killed)"),
    ("PENDING BeginTime", 2, [BEGUN, BEGUN_AGAIN], "free", "waiting", "requeued (node failed or killed twice)"),
    # no longer in the queue
    ("", 0, [], "free", "lost", "its job ended without a word"),
    ("", 0, [BEGUN], "free", "lost", "its job ended without a word"),
    ("", 0, [BEGUN, SAVED], "free", "interrupted", "stopped, and saved"),
    ("", 0, [BEGUN], "on a node that is gone", "running", ""),  # as its lock says, for a minute
]


@pytest.mark.parametrize(("word", "restarts", "attempts", "lock", "state", "said"), MOMENTS)
def test_whatever_slurm_and_the_files_say_at_a_moment_status_says_where_the_run_stands(
    study_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[..., Lock],
    word: str,
    restarts: int,
    attempts: Sequence[tuple[str, str, int]],
    lock: str,
    state: str,
    said: str,
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    run = study.runs[0].directory
    job = Submission.create(study.file.directory / "jobs", "depthmup-tiny", [[run.path.name]], {})
    job.write_job_id("7")
    for event, of, restart in attempts:
        note_attempt(run, event, step=0, **({"job": of, "restart": restart} if event == "started" else {}))
    if lock == "on a node that is gone":
        run.lock.write_text(json.dumps({"host": "sn3", "pid": 5}))
    elif lock != "free":
        hold(run, float(lock.split()[2]) if "silent" in lock else 0.0)
    queue = [QueuedTask("7", 0, *word.split(), job.name, restarts)] if word else []
    monkeypatch.setattr("depthmup.launch.jobs.slurm.read_queue", lambda ids, names: queue)
    found = take_snapshot(study).runs[0]
    assert (found.state, said in found.remark) == (state, True), found.remark
    if not said:
        assert found.remark == ""


def test_a_run_that_ends_while_status_looks_is_done_and_not_lost(
    begun: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(lock: Path) -> None:
        begun.run.directory.write_done({"outcome": "completed", "step": 12})

    monkeypatch.setattr("depthmup.launch.jobs.states.find_holder", end)
    assert judged(begun).state == "done"
    assert begun.run.done()


def test_what_cancel_has_told_to_stop_here_trains_nothing_more_though_its_process_is_there_yet(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, hold: Callable[..., Lock]
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    names = [run.directory.path.name for run in study.runs]
    slow_to_end = ["sh", "-c", "trap '' TERM; exec sleep 300"]
    submission = Submission.create(study.file.directory / "local", "local", [names], {})
    with open(submission.path / "slot-0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        slot = subprocess.Popen(slow_to_end, pass_fds=[lock.fileno()])
        write_holder(lock, slot.pid)
    try:
        assert take_snapshot(study).counts() == {"starting": 1, "waiting": 11}
        assert cancel(study).pids == [slot.pid]
        assert slot.poll() is None
        assert take_snapshot(study).counts() == {"cancelled": 12}
        begun = study.runs[0].directory
        note_attempt(begun, "started", step=0)
        write_holder(hold(begun).file, slot.pid)  # it had just taken a run
        assert take_snapshot(study).counts() == {"ending": 1, "cancelled": 11}
        started: list[list[str]] = []
        monkeypatch.setattr(
            "depthmup.launch.jobs.submit.submit_local",
            lambda packs, *rest: started.append([run.directory.path.name for pack in packs for run in pack]) or [],
        )
        transfer.launch(study)
        assert sorted(*started) == sorted(names[1:])
        assert take_snapshot(study).counts() == {"ending": 1, "new": 11}  # as that one is not told to go on
    finally:
        slot.kill()
        slot.wait()


def test_a_cancel_here_does_not_call_cancelled_what_a_process_elsewhere_trains(
    study_file: Path, hold: Callable[..., Lock]
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    names = [run.directory.path.name for run in study.runs]
    submission = Submission.create(study.file.directory / "local", "local", [names[:3]], {})
    (submission.path / "slot-0.lock").write_text(json.dumps({"host": "elsewhere", "pid": 5}))
    note_attempt(study.runs[0].directory, "started", step=0)
    study.runs[0].directory.lock.write_text(json.dumps({"host": "elsewhere", "pid": 5}))
    assert cancel(study).elsewhere == ["elsewhere"]
    assert take_snapshot(study).counts() == {"running": 1, "waiting": 2, "new": 9}


def test_one_command_shows_the_whole_path_and_watches_it_to_its_end(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    job = Submission.create(study.file.directory / "jobs", "depthmup-tiny-then", [[]], {"targets": ["/a/large.yaml"]})
    job.write_job_id("8")
    for run in study.runs:
        run.directory.write_done({"outcome": "completed", "step": 12, "minival_loss": 2.0})
    waiting = QueuedTask("8", 0, "PENDING", "Dependency", job.name)
    queue = [waiting]
    monkeypatch.setattr("depthmup.launch.jobs.slurm.read_queue", lambda ids, names: list(queue))

    def target(name: str) -> Study:
        content = yaml.safe_load(study_file.read_text())
        content["study"] = {"name": name, "directory": content["study"]["directory"]}
        file = study.file.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        made = Study(file, read_study_or_run(file))
        made.write()
        return made

    locks: list[Lock] = []

    def targets_begin() -> None:
        for name in ("tiny_target", "tiny_target_small"):
            run = target(name).runs[0].directory
            note_attempt(run, "started", step=0)
            locks.append(take_lock(run.lock) or pytest.fail("no lock"))

    def only_a_target_is_left() -> None:
        queue.clear()
        locks.pop().close()

    def all_ends() -> None:
        locks.pop().close()
        for name in ("tiny_target", "tiny_target_small"):
            target(name).runs[0].directory.write_done({"outcome": "completed", "step": 12})

    print_status(study, Console(width=200))
    assert "then: job 8 goes on (PENDING, Dependency), to /a/large.yaml" in capsys.readouterr().out
    happens = iter([targets_begin, only_a_target_is_left, all_ends])
    monkeypatch.setattr("depthmup.launch.jobs.status.time.sleep", lambda seconds: next(happens)())
    watch_status(study, Console(width=200))
    assert next(happens, None) is None  # it has seen all of it
    shown = capsys.readouterr().out
    for name in ("tiny_target", "tiny_target_small"):
        assert f"Target: {study.file.directory.parent / name}\n" in shown
    assert shown.splitlines()[-1] == "1 done"


@pytest.mark.parametrize("length", [10, 4000, 5000, 9000])
def test_the_last_line_of_a_runs_metrics_may_be_long(tmp_path: Path, length: int) -> None:
    """As of many experts, whose loads are in it."""
    directory, load = RunDirectory(tmp_path), "0" * length
    assert directory.read_last_metrics() is None
    lines = [json.dumps({"step": step, "load": load}) + "\n" for step in (1, 2, 3)]
    for whole in (1, 2, 3):
        directory.metrics.write_text("".join(lines[:whole]) + lines[0][: length // 2])
        last = directory.read_last_metrics()
        assert last
        assert last["step"] == whole
