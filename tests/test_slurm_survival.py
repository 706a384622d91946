"""What runs survive on a real Slurm. Every fate befalls one run of one wave; then each run is checked."""

import json
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import settings_on
from depthmup.launch.jobs.attempts import read_attempts
from depthmup.launch.jobs.states import list_interruptions
from depthmup.launch.jobs.submission import load_all, stop_causes
from depthmup.train.config import RunConfig
from depthmup.train.loop import run
from depthmup.train.reading import from_plain, read_yaml
from depthmup.train.rundir import RunDirectory
from slurm_cluster import Cluster, wait_for

# The runs last until everything has befallen them, on any machine, at little cost: each of their metrics lines takes
# LINE_SECONDS until then. Slurm looks at time limits every 30 s: with a limit of 120 s its signal comes within 90 s of
# the start, whatever the phase, and the runs that it is for last 150 s.
STEPS, LIMITED_STEPS, BATCH = 60, 120, 4  # few, of few images: what befalls the runs is not in them
LINE_SECONDS = 1.25
PACED = """
import json, os, time
slow, dumps = {file!r}, json.dumps
def slowly(content, **options):
    if isinstance(content, dict) and "grad_norm" in content and os.path.exists(slow):
        time.sleep({seconds})
    return dumps(content, **options)
json.dumps = slowly
"""
SLOW_TO_LEAVE = """
import signal
leave = os._exit
def leave_late(code):
    if os.environ.get("SLURM_PROCID") == "1" and os.path.exists(slow):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    leave(code)
os._exit = leave_late
"""
NODE = 8  # CPUs of a node: with as many per task, every run has a node of its own


@dataclass(frozen=True)
class Job:
    """One configuration file that was launched, and its run directories in the array's order."""

    cluster: Cluster
    file: Path
    job_id: str
    runs: list[Path]

    def depthmup(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        wide = {"COLUMNS": "200"}
        return self.cluster.depthmup(verb, self.file, *arguments, cwd=self.file.parent, env=wide)

    def describe(self) -> str:
        return f"{self.depthmup('status').stdout}\n{self.cluster.describe()}"

    def element(self, index: int) -> str:
        return f"{self.job_id}_{index}"

    def worker(self, index: int) -> int:
        """Process id of the element's worker."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            except OSError:
                continue
            mark = f"SLURM_ARRAY_JOB_ID={self.job_id}\0".encode(), f"SLURM_ARRAY_TASK_ID={index}\0".encode()
            if (
                b"launch.jobs.worker" in command
                and b"srun" not in command
                and all(part in environment for part in mark)
            ):
                return int(process.name)
        raise LookupError(f"no worker of {self.element(index)}")


def launch(cluster: Cluster, file: Path, content: dict[str, Any]) -> Job:
    file.write_text(yaml.safe_dump(content))
    launched = cluster.depthmup("launch", file, cwd=file.parent)
    assert launched.returncode == 0, launched.stderr
    submission = next((file.parent / "runs" / file.stem / "jobs").glob("*/submission.json"))
    tasks = json.loads(submission.read_text())["tasks"]
    job_id = json.loads((submission.parent / "job.json").read_text())["job_id"]
    return Job(cluster, file, job_id, [submission.parents[2] / "runs" / names[0] for names in tasks])


def slow_down(folder: Path, seconds: float, more: str = "") -> Path:
    """Makes a metrics line take so long in the runs that have `folder` on PYTHONPATH, until the file that it returns is
    deleted. `more`: what else their processes do when they start; it finds that file as `slow`."""
    file = folder / "slow"
    file.touch()
    (folder / "sitecustomize.py").write_text(PACED.format(file=str(file), seconds=seconds) + more)
    return file


def steps(run_directory: Path) -> list[int]:
    metrics = run_directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def events(run_directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of attempts.jsonl by event."""
    file = run_directory / "attempts.jsonl"
    found: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        found.setdefault(line["event"], []).append(line)
    return found


def done(run_directory: Path) -> bool:
    return (run_directory / "done.json").exists()


REQUEUED, PREEMPTED, KILLED, CRASHED = range(4)


@dataclass(frozen=True)
class Wave:
    study: Job  # four runs, one per fate
    cancelled: Job  # preempted where preemption cancels
    limited: Job  # its time limit comes before its end
    two_tasks: Job  # so does that of this one, over two nodes, whose last task is killed while it leaves
    hung: Job  # its process was stopped
    of_hung: str  # status then
    hungry: Job  # takes more memory than it asked for
    after_kill: list[subprocess.CompletedProcess[str]]  # status and retry once a run was killed
    sacct_calls: Path  # exists if anything called sacct

    @property
    def others(self) -> list[Job]:
        return [self.cancelled, self.limited, self.two_tasks, self.hung]


def lift_time_limit(cluster: Cluster, job: str) -> None:
    """Gives a job an hour, unless it has finished by now, on an idle machine."""
    try:
        cluster.call("scontrol", "update", f"jobid={job}", "timelimit=60", root=True)
    except subprocess.CalledProcessError:
        if cluster.call("squeue", "--noheader", f"--job={job}", "--states=PENDING,RUNNING", "--format=%T"):
            raise


@pytest.fixture(scope="module")
def wave(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Wave:
    """All runs, after everything befell them. What needs the longest time begins first."""
    folder = tmp_path_factory.mktemp("wave")
    sacct = folder / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(f"#!/bin/sh\ntouch {folder}/sacct-was-called\nexit 1\n")
    sacct.chmod(0o755)
    cluster.environment["PATH"] = f"{sacct.parent}:{cluster.environment['PATH']}"
    content = settings_on(digits)
    content["optimizer"]["lr"], content["data"]["num_streams"] = 2**-6, BATCH
    content["train"] |= {
        "samples": STEPS * BATCH,
        "global_batch_size": BATCH,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    slow = slow_down(folder, LINE_SECONDS, SLOW_TO_LEAVE)
    launching = {"cluster": "slurm", "cpus_per_task": NODE, "timeout_min": 60, "setup": [f"export PYTHONPATH={folder}"]}
    small = {**launching, "cpus_per_task": 1}
    sizes = [{"width": 8, "depth": 3}]
    grid = {"parameterizations": ["mup"], "sizes": sizes, "values": [2**-9, 2**-8, 2**-7, 2**-6], "extend": 0}

    hung = launch(cluster, folder / "hung.yaml", {**content, "launch": small})
    low = {**launching, "partition": "lowcancel"}
    longer = {**content["train"], "samples": 2 * STEPS * BATCH}  # it begins first, and must last until the others train
    cancelled = launch(cluster, folder / "cancelled.yaml", {**content, "train": longer, "seed": 1, "launch": low})
    low = {**launching, "partition": "low"}
    study = launch(cluster, folder / "study.yaml", {**content, "study": {"name": "study", **grid}, "launch": low})

    wait_for(lambda: list(hung.runs[0].glob("checkpoints/step-*")))
    os.kill(hung.worker(0), signal.SIGSTOP)
    for path in (*study.runs, *cancelled.runs):
        wait_for(lambda path=path: list(path.glob("checkpoints/step-*")))
    cluster.stop_controller()  # running jobs go on without it
    cluster.start_controller()

    # Only now: a job that is requeued while slurmctld restarts is held by it ("launch failed requeued held").
    limits = {"timeout_min": 2, "signal_delay_s": 60}
    long = {**content, "train": {**content["train"], "samples": LIMITED_STEPS * BATCH, "checkpoint_every": 4}}
    two_nodes = {**small, **limits, "nodes": 2, "tasks_per_node": 1}
    two_tasks = launch(cluster, folder / "two_tasks.yaml", {**long, "launch": two_nodes})
    limited = launch(cluster, folder / "limited.yaml", {**long, "launch": {**small, **limits}})

    for job in (study.element(PREEMPTED), cancelled.element(0)):
        node = cluster.node_of(job)
        cluster.call("sbatch", "-p", "high", "-w", node, "-n", str(NODE), "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.call("scontrol", "requeue", study.element(REQUEUED))
    os.kill(study.worker(KILLED), signal.SIGKILL)
    node = cluster.node_of(study.element(CRASHED))
    cluster.node("crash", node)
    cluster.node("start", node)

    wide = {**content, "model": {**content["model"], "width": 2048}}  # 450 MB of weights, and as much of gradients
    asking = {**small, "memory_gb": 1, "sbatch": {"acctg-freq": "task=1"}}
    hungry = launch(cluster, folder / "hungry.yaml", {**wide, "launch": asking})

    wait_for(lambda: (study.runs[KILLED] / "failed.json").exists())
    after_kill = [study.depthmup("status"), study.depthmup("retry")]
    wait_for(lambda: len(events(cancelled.runs[0])["started"]) > 1 or not cluster.queued("cancelled"))
    cancelled.depthmup("launch")  # submits nothing where the job had itself requeued
    for job in (limited, two_tasks):
        wait_for(lambda job=job: "interrupted" in events(job.runs[0]), 600)
        lift_time_limit(cluster, job.element(0))  # once is enough
    known = steps(two_tasks.runs[0])
    wait_for(lambda: steps(two_tasks.runs[0]) > known)
    cluster.call("scontrol", "requeue", two_tasks.element(0))
    of_hung = wait_for(lambda: "stalled" in (shown := hung.depthmup("status").stdout) and shown)
    (requeue,) = re.findall(r"scontrol requeue \S+", of_hung)
    cluster.call(*requeue.split())
    wait_for(lambda: len(events(two_tasks.runs[0])["started"]) > 2)
    slow.unlink()
    found = Wave(study, cancelled, limited, two_tasks, hung, of_hung, hungry, after_kill, folder / "sacct-was-called")
    for job in (study, *found.others):
        for path in job.runs:
            wait_for(lambda path=path: done(path), 900, job.describe)
    return found


def all_runs(wave: Wave) -> list[Path]:
    return [*wave.study.runs, *(run for job in wave.others for run in job.runs)]


def test_a_run_of_two_tasks_goes_on_from_where_it_saved_though_one_task_is_killed_while_it_leaves(wave: Wave) -> None:
    (run,) = wave.two_tasks.runs
    assert set(events(run)) == {"started", "interrupted"}
    first, second, third = (line["step"] for line in events(run)["started"])
    assert 0 == first < second < third
    assert not (run / "failed.json").exists()
    assert "ddp on 2 x cpu" in (run / "log-0.txt").read_text()
    assert (run / "log-1.txt").exists()


def test_a_run_that_takes_more_memory_than_asked_for_is_killed_by_slurm_and_says_so(wave: Wave) -> None:
    failed = wave.hungry.runs[0] / "failed.json"
    wait_for(failed.exists)
    reason = json.loads(failed.read_text())
    assert "out of memory: 1 GB were asked for; set launch.memory_gb higher" in reason["error"]
    assert "exceeded memory limit" in reason["traceback"]  # Slurm's own words
    wait_for(lambda: not wave.hungry.cluster.queued("hungry"))  # not requeued: it would die again


def test_no_run_is_lost_and_no_step_is_missing_or_done_twice(wave: Wave) -> None:
    for path in all_runs(wave):
        last = read_yaml(path / "config.yaml")["train"]["samples"] // BATCH
        assert steps(path) == list(range(1, last + 1)), path
        assert json.loads((path / "done.json").read_text())["step"] == last


def test_what_was_interrupted_goes_on_from_its_checkpoint(wave: Wave) -> None:
    for path in all_runs(wave):
        starts = [line["step"] for line in events(path)["started"]]
        assert len(starts) >= 2, path
        assert starts == sorted(starts), path
        assert starts[-1] > 0, path


def test_why_each_run_was_stopped_is_known_afterwards(wave: Wave) -> None:
    def causes(job: Job, index: int = 0) -> list[str]:
        known = stop_causes(load_all(job.runs[index].parents[1] / "jobs"))
        return list_interruptions(read_attempts(RunDirectory(job.runs[index]))[:-1], known)  # but for the last attempt

    assert "preempted" in causes(wave.study, PREEMPTED)
    assert "preempted" in causes(wave.cancelled)
    assert {"requeued", "stopped"} & {*causes(wave.study, REQUEUED)}  # a slow script is killed before it has noted it
    assert "node failed or killed" in causes(wave.study, CRASHED)
    assert "time limit" in causes(wave.limited)
    assert "time limit" in causes(wave.two_tasks)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(wave: Wave, tmp_path: Path) -> None:
    path = wave.study.runs[REQUEUED]
    undisturbed = run(from_plain(RunConfig, read_yaml(path / "config.yaml"), "reference"), tmp_path)
    result = json.loads((path / "done.json").read_text())
    assert result["minival_loss"] == pytest.approx(undisturbed["minival_loss"], rel=1e-4)


def test_a_killed_run_is_failed_with_the_reason_and_retry_says_what_to_change(wave: Wave) -> None:
    status, retried = wave.after_kill
    assert "1 failed" in status.stdout
    assert "out of memory" in status.stdout
    assert "launch.memory_gb" in retried.stdout
    assert "1 run submitted" in retried.stdout
    assert all(len(line) <= 80 for line in status.stdout.splitlines() if line.startswith(("run ", "0", "1")))


def test_a_hung_run_is_stalled_and_goes_on_after_the_command_that_status_prints(wave: Wave) -> None:
    assert "1 stalled" in wave.of_hung
    assert "has not moved for" in wave.of_hung
    (cause, *_) = read_attempts(RunDirectory(wave.hung.runs[0]))[1:]
    assert cause["event"] in ("interrupted", "started")  # slurmd wakes it before it ends it: it may save, or not
    assert done(wave.hung.runs[0])


def test_every_job_ran_the_code_of_its_submission_and_says_which(wave: Wave) -> None:
    code = json.loads((wave.study.runs[0] / "code.json").read_text())
    assert (
        wave.study.runs[0].parents[1] / "code" / code["digest"] / "depthmup" / "launch" / "jobs" / "worker.py"
    ).exists()


def test_nothing_asks_sacct(wave: Wave) -> None:
    assert not wave.sacct_calls.exists()
