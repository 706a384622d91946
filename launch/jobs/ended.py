"""What a job's end says of its runs: the batch script asks, once the processes are gone."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthmup.launch.jobs import slurm
from depthmup.launch.jobs.attempts import (
    LOST,
    find_last_start,
    is_pending,
    list_attempts_since_failure,
    mark_failed,
    note_attempt,
    read_attempts,
    read_job_name,
    read_restart_count,
)
from depthmup.launch.jobs.hold import strip_error
from depthmup.train.lock import find_holder
from depthmup.train.rundir import EXIT_LOST_PEER, EXIT_REQUEUE, RunDirectory

# srun's line for each process that ends badly: node, process, how
DEATH = re.compile(r"^srun: error: (\S+): tasks? (\S+): (.+)$", re.MULTILINE)
SURVIVED = [f"Exited with exit code {code}" for code in (EXIT_LOST_PEER, EXIT_REQUEUE)]
OUT_OF_MEMORY = re.compile(r"oom.kill|out of memory|exceeded (job|step)? ?memory limit", re.IGNORECASE)


def record_end(directories: Sequence[RunDirectory], code: int, log: Path, details: dict[str, Any]) -> int:
    """Called by the batch script when the step died: marks the runs that this job had begun, with the reason.

    Returns the job's exit code. For EXIT_REQUEUE and EXIT_LOST_PEER nothing is marked, and the job starts again: its
    runs had saved before it died; or one of a run's processes was lost, and not for the second time at the same step.
    """
    number = code - 128 if code > 128 else None
    left = [directory for directory in directories if is_pending(directory) and not is_taken_over(directory)]
    begun = [
        directory
        for directory in left
        if find_last_start(read_attempts(directory)) == (read_job_name(), read_restart_count())
    ]
    if not left:
        return 1 if code == EXIT_LOST_PEER else code  # whoever failed has said why
    if number == signal.SIGKILL and any(read_attempts(directory)[-1]["event"] == "interrupted" for directory in begun):
        return EXIT_REQUEUE
    tail = read_log_since_start(log)[-20000:]
    asked = f"{details['memory_gb']} GB were" if details["memory_gb"] else "the cluster's default was"
    more_memory = f"{asked} asked for; set launch.memory_gb higher and retry"
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        reason = explain_loss_of_process(left[0], code, tail, more_memory)
        if reason is None:
            return EXIT_LOST_PEER
    elif number == signal.SIGKILL or OUT_OF_MEMORY.search(tail):
        reason = f"killed (SIGKILL), most likely out of memory: {more_memory}"
    else:
        reason = f"its process ended with {code}; see {log}"
    for directory in begun or left:  # none had begun: the job cannot even start
        mark_failed(directory, reason, traceback=tail[-2000:], log=str(log))
    return 1 if code == EXIT_LOST_PEER else code


def is_taken_over(directory: RunDirectory) -> bool:
    """Whether another process trains the run now: a later start of this job, while this one was frozen, or another."""
    job, restart = find_last_start(read_attempts(directory))
    is_newer = job == read_job_name() and restart > read_restart_count()
    return is_newer or find_holder(directory.lock) is not None


def read_log_since_start(log: Path) -> str:
    """What the job's log holds of its present start: a requeued job goes on in the same file."""
    try:
        with open(log, "rb") as file:
            file.seek(int(os.environ.get("DEPTHMUP_LOG_START") or 0))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def explain_loss_of_process(directory: RunDirectory, code: int, said: str, more_memory: str) -> str | None:
    """Why a run of several processes, which left no verdict, has failed: it ran out of memory, or was lost for the same
    reason at the same step before. None otherwise: it starts again.

    srun says in `said` how each process ended. Those that only missed another one end with EXIT_LOST_PEER.
    """
    deaths = [found.groups() for found in DEATH.finditer(said)]
    died = next((death for death in deaths if death[2] not in SURVIVED), None)
    missed = directory.lost()
    out_of_memory = OUT_OF_MEMORY.search(said)
    if missed and died and "does not answer" in missed["error"]:
        reason = f"process {died[1]} on {died[0]} hung: {missed['error']}"
    elif died and (out_of_memory or died[2] == "Killed"):
        likely = "" if out_of_memory else "killed (SIGKILL), most likely "
        reason = f"process {died[1]}: {likely}out of memory on {died[0]}: {more_memory}"
    elif died:
        reason = f"process {died[1]} on {died[0]}: {died[2]}"
    elif missed:
        reason = missed["error"]
    else:
        reason = f"its processes ended with {code}"
    if out_of_memory:
        return reason
    began = float(os.environ.get("DEPTHMUP_BEGAN", "inf"))
    if nodes := slurm.list_failed_nodes(os.environ.get("SLURM_JOB_NODELIST", ""), began):
        note_attempt(directory, LOST, step=directory.find_newest_step(), error=f"node {', '.join(nodes)} failed")
        return None
    if died and died[2].startswith("Exited"):  # of itself: it could not start
        return f"{reason}; see the job's log"
    step = directory.find_newest_step()
    before = [line for line in list_attempts_since_failure(directory) if line["event"] == LOST and line["step"] == step]
    note_attempt(directory, LOST, step=step, error=reason)
    print(f"lost at step {step}: {reason}", flush=True)
    if any(strip_error(line["error"]) == strip_error(reason) for line in before):
        return f"twice from step {step}: {reason}"
    return None
