"""The attempts to train a run: a file in its directory, attempts.jsonl, which jobs write and `status` reads."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from depthmup.data.files import write_atomically
from depthmup.data.paths import PACKAGE
from depthmup.launch.jobs.code_copy import describe_code
from depthmup.train.owner import COPY_DESCRIPTION
from depthmup.train.rundir import RunDirectory, add_line, parse_lines

# Events of attempts.jsonl, beside those that are called what they are
UNPACKED = "unpacked"  # the run was in a pack that failed, and goes on alone
LOST = "lost"  # a process of the run was gone or hung, and the others ended because of it
MAX_ATTEMPTS = 5  # that begin at the same step: more would go on for ever


def is_pending(directory: RunDirectory) -> bool:
    return not directory.done() and not directory.failed()


def note_attempt(directory: RunDirectory, event: str, **details: Any) -> None:
    """Adds a line to attempts.jsonl."""
    add_line(directory.path / "attempts.jsonl", {"event": event, "time": time.time(), **details})


def read_attempts(directory: RunDirectory) -> list[dict[str, Any]]:
    """The attempts to train the run, the oldest first; a half-written line is left out. Raises UserError."""
    return parse_lines(directory.path / "attempts.jsonl", "event")


def find_last_start(lines: Sequence[Mapping[str, Any]]) -> tuple[str | None, int]:
    """The job of the run's last attempt, and how often that had been requeued; `lines` are those of attempts.jsonl."""
    started = [line for line in lines if line["event"] == "started"]
    return (started[-1].get("job"), started[-1].get("restart", 0)) if started else (None, 0)


def mark_failed(directory: RunDirectory, error: str, **details: Any) -> None:
    """Marks the run failed. What comes after this line of attempts.jsonl was asked for by a person."""
    note_attempt(directory, "failed")
    directory.write_failed({"error": error, **details})


def list_attempts_since_failure(directory: RunDirectory) -> list[dict[str, Any]]:
    """The attempts after the last one that failed: those were asked for by a person."""
    lines = read_attempts(directory)
    return lines[max((i for i, line in enumerate(lines) if line["event"] == "failed"), default=-1) + 1 :]


def measure_process_age() -> float:
    """Seconds since this process began."""
    with open("/proc/self/stat") as file:
        began = int(file.read().rpartition(")")[2].split()[19])  # field 22, in ticks since boot; a name may hold spaces
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def begin_attempt(directory: RunDirectory, lacks_gpu: bool = False) -> None:
    """Notes where and from which step the attempt begins. `lacks_gpu`: its job has a GPU that torch does not see.
    Raises RuntimeError when the last ones got no further."""
    step = directory.find_newest_step()
    lines = list_attempts_since_failure(directory)
    begun = [line["step"] for line in lines if line["event"] == "started"]
    if begun[-MAX_ATTEMPTS:] == [step] * MAX_ATTEMPTS:
        why = [f"; the last one: {line['error']}" for line in lines if line["event"] == LOST][-1:]
        raise RuntimeError(
            f"{MAX_ATTEMPTS} attempts ended at step {step}: raise launch.timeout_min or memory_gb{''.join(why)}"
        )
    place = {"job": read_job_name(), "restart": read_restart_count(), "host": socket.gethostname(), "pid": os.getpid()}
    note_attempt(
        directory,
        "started",
        step=step,
        age=measure_process_age(),
        **place,
        **({"lacks_gpu": True} if lacks_gpu else {}),
    )
    write_atomically(directory.path / "code.json", describe_own_code().encode())


@cache
def describe_own_code() -> str:
    """What this process has imported, in JSON: what it would find later may have been edited since."""
    code = PACKAGE.parent / COPY_DESCRIPTION
    return code.read_text() if code.exists() else json.dumps(describe_code(), indent=1)


def read_job_name() -> str | None:
    """'4711_3' inside a Slurm array."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else None


def read_restart_count() -> int:
    """How often the job was requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
