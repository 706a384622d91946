"""What becomes of a run of several processes when its job ends: it goes on, or has failed with the reason."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from depthmup.launch.jobs import slurm, worker
from depthmup.launch.jobs.attempts import LOST, begin_attempt, note_attempt, read_attempts
from depthmup.launch.jobs.ended import record_end
from depthmup.train.interrupt import Interrupt
from depthmup.train.rundir import EXIT_LOST_PEER, EXIT_REQUEUE, RunDirectory

KILLED = "srun: error: sn2: task 1: Killed\nsrun: error: sn1: task 0: Exited with exit code 76\n"
LEFT = "srun: error: sn1: task 0: Exited with exit code 76\nsrun: error: sn2: task 1: Killed\n"
OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.\nsrun: error: sn2: task 1: Out Of Memory\n"
CRASHED = "srun: error: sn1: task 0: Exited with exit code 76\nsrun: error: sn2: task 1: Segmentation fault\n"
GONE = "process 0 of 2: another process is gone (Connection closed by peer [10.0.0.7]:{})"
HUNG = "process 0 of 2: another process does not answer (Timed out waiting {}ms for recv operation)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run over two nodes whose job's first start has saved step 10; all nodes are well."""
    directory = RunDirectory(tmp_path / "run")
    job = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "sn[1-2]"}
    for key, value in job.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(slurm, "list_failed_nodes", lambda nodes, since: [])
    (directory.checkpoints / "step-10").mkdir(parents=True)
    begin_attempt(directory)
    return directory


def end(directory: RunDirectory, code: int, said: str, missed: str | None = None) -> int:
    log = directory.path / "job.out"
    with open(log, "a") as file:
        os.environ["DEPTHMUP_LOG_START"] = str(log.stat().st_size)
        file.write(said)
    (directory.path / "lost.json").unlink(missing_ok=True)
    if missed:
        (directory.path / "lost.json").write_text(json.dumps({"error": missed}))
    return record_end([directory], code, log, {"memory_gb": 4})


def start_again(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: int = 10) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1))
    (directory.checkpoints / f"step-{step}").mkdir(exist_ok=True)
    begin_attempt(directory)


ENDS = [
    (137, KILLED, GONE, "process 1: killed (SIGKILL), most likely out of memory on sn2: 4 GB were asked for"),
    (137, LEFT, HUNG, "process 1 on sn2 hung: "),
    (139, CRASHED, GONE, "process 1 on sn2: Segmentation fault"),
    (EXIT_LOST_PEER, "", GONE, "another process is gone"),
    (137, "", None, "its processes ended with 137"),
]


@pytest.mark.parametrize(("code", "said", "missed", "words"), ENDS)
def test_a_lost_process_starts_the_run_again_and_for_the_same_reason_at_the_same_step_it_has_failed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, code: int, said: str, missed: str | None, words: str
) -> None:
    assert end(run, code, said, missed and missed.format(1)) == EXIT_LOST_PEER
    assert run.failed() is None
    start_again(run, monkeypatch, step=20)
    assert end(run, code, said, missed and missed.format(2)) == EXIT_LOST_PEER  # it has made steps since
    start_again(run, monkeypatch, step=20)
    assert end(run, code, said, missed and missed.format(3)) not in (EXIT_LOST_PEER, EXIT_REQUEUE)
    failed = run.failed()
    assert failed
    assert failed["error"].startswith("twice from step 20: ")
    assert words in failed["error"]


def test_two_reasons_at_one_step_are_no_failure_and_neither_is_a_node_that_fails_again_and_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end(run, 137, KILLED, GONE.format(1)) == EXIT_LOST_PEER
    start_again(run, monkeypatch)
    assert end(run, 137, LEFT, HUNG.format(1)) == EXIT_LOST_PEER
    monkeypatch.setattr(slurm, "list_failed_nodes", lambda nodes, since: ["sn2"])
    for _ in range(2):
        start_again(run, monkeypatch)
        assert end(run, 137, KILLED, GONE.format(1)) == EXIT_LOST_PEER
    assert [line["error"] for line in read_attempts(run) if line["event"] == LOST][-2:] == ["node sn2 failed"] * 2
    assert run.failed() is None


def test_attempts_that_get_no_further_end_and_say_what_the_last_one_died_of(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "list_failed_nodes", lambda nodes, since: ["sn2"])
    for _ in range(4):
        end(run, 137, KILLED, GONE.format(1))
        start_again(run, monkeypatch)
    end(run, 137, KILLED, GONE.format(1))
    with pytest.raises(RuntimeError, match=r"5 attempts ended at step 10: .*; the last one: node sn2 failed"):
        begin_attempt(run)


def test_out_of_memory_as_slurm_says_it_is_a_failure_at_once_of_the_node_where_it_was(run: RunDirectory) -> None:
    assert end(run, 137, OOM, GONE.format(1)) == 137
    failed = run.failed()
    assert failed
    assert failed["error"].startswith("process 1: out of memory on sn2: 4 GB were asked for; set launch.memory_gb")


def test_a_process_that_cannot_start_is_a_failure_at_once_but_not_where_a_node_failed_before_any_began(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "attempts.jsonl").unlink()
    with monkeypatch.context() as node_fails:
        node_fails.setattr(slurm, "list_failed_nodes", lambda nodes, since: ["sn2"])
        assert end(run, 137, "srun: error: sn[1-2]: tasks 0-1: Killed\n") == EXIT_LOST_PEER
    assert run.failed() is None
    assert end(run, 1, "srun: error: sn2: task 1: Exited with exit code 1\n") == 1
    failed = run.failed()
    assert failed
    assert failed["error"] == "process 1 on sn2: Exited with exit code 1; see the job's log"


def test_the_same_reason_at_the_same_step_is_the_first_again_once_a_person_has_asked_for_another_try(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        end(run, 137, KILLED, GONE.format(1))
        start_again(run, monkeypatch)
    assert run.failed()
    (run.path / "failed.json").unlink()  # retry
    start_again(run, monkeypatch)
    assert end(run, 137, KILLED, GONE.format(1)) == EXIT_LOST_PEER
    assert run.failed() is None


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (137, "", "killed (SIGKILL), most likely out of memory: 4 GB were asked for; set launch.memory_gb"),
        (1, "slurmstepd: error: Exceeded job memory limit\n", "most likely out of memory: 4 GB were asked for"),
        (1, "", "its process ended with 1; see "),
    ],
)
def test_a_run_of_one_process_that_dies_has_failed_with_the_reason(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, code: int, said: str, words: str
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert end(run, code, said) == code
    assert words in (run.failed() or {})["error"]


def test_a_process_that_is_killed_after_it_has_saved_starts_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    note_attempt(run, "interrupted")
    assert end(run, 137, "") == EXIT_REQUEUE
    assert run.failed() is None


def test_of_a_jobs_list_only_what_it_had_begun_has_failed_with_it_and_a_log_need_not_be_there(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    assert record_end([run, other], 1, tmp_path / "no.out", {"memory_gb": None}) == 1
    assert run.failed()
    assert other.failed() is None


def test_words_of_an_earlier_start_in_the_jobs_log_are_not_this_ones(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "job.out").write_text(OOM)
    assert end(run, EXIT_LOST_PEER, "", GONE.format(1)) == EXIT_LOST_PEER
    assert run.failed() is None


def test_a_process_that_failed_has_the_verdict_and_the_others_ask_for_no_other_start(run: RunDirectory) -> None:
    run.write_failed({"error": "ValueError: x"})
    assert end(run, EXIT_LOST_PEER, LEFT, GONE.format(1)) == 1
    failed = run.failed()
    assert failed
    assert failed["error"] == "ValueError: x"


def test_a_job_that_thaws_says_nothing_of_the_run_that_its_own_next_start_has(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        start_again(run, later)
    lines = read_attempts(run)
    assert end(run, 137, KILLED, GONE.format(1)) == 137
    assert run.failed() is None
    assert read_attempts(run) == lines


def test_a_run_that_another_process_holds_is_not_judged(run: RunDirectory) -> None:
    note_attempt(run, "started", step=10, job=None, restart=0)
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert end(run, 1, "elsewhere trains it") == 1
    assert run.failed() is None


def node(name: str, state: str, began: str) -> str:
    return f"NodeName={name} Arch=x86_64 Reason=a b=c State={state} BootTime=None SlurmdStartTime={began}"


def test_a_node_is_not_well_when_it_is_down_or_silent_or_its_slurmd_has_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = {
        "n1": ("ALLOCATED", "2026-11-28T10:00:00"),
        "n2": ("DOWN*+DRAIN", "2026-11-28T10:00:00"),
        "n3": ("ALLOCATED+NOT_RESPONDING", "2026-11-28T10:00:00"),
        "n4": ("MIXED", "2026-11-28T12:00:00"),
        "n5": ("DOWN", "None"),
        "n6": ("IDLE+DRAIN", "2026-11-28T10:00:00"),
    }
    lines = "\n".join(node(name, *state) for name, state in states.items())
    monkeypatch.setattr(slurm, "call_slurm", lambda *command: lines)
    since = datetime.fromisoformat("2026-11-28T11:00:00").timestamp()
    assert slurm.list_failed_nodes("n[1-6]", since) == ["n2", "n3", "n4", "n5"]


def test_where_slurm_cannot_be_asked_no_node_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert slurm.list_failed_nodes("n[1-6]", 0.0) == []


def test_a_requeued_worker_waits_while_a_process_on_another_host_has_its_run_and_then_trains_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Slurm lost a node that works on: else the job would end, and the run look like running for ever."""
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    happened: list[str] = []

    def train_some(directories: list[RunDirectory], interrupt: Interrupt) -> bool:
        happened.append("tried")
        return False

    def sleep(seconds: float) -> None:
        happened.append("waited")
        if happened.count("waited") == 3:
            run.lock.write_text("")

    monkeypatch.setattr(worker, "train_some", train_some)
    monkeypatch.setattr("depthmup.launch.jobs.worker.time.sleep", sleep)
    assert worker.train_packs([[run]]) == 0
    assert happened == ["tried"]
    happened.clear()
    assert worker.train_packs([[run]], waits=True) == 0
    assert happened == ["tried", "waited"] * 3 + ["tried"]
