"""What was submitted: a folder per submission, written before sbatch is called and completed after.

jobs/NAME/submission.json   the run directories of every task: written first, so that no job is ever unaccounted for
jobs/NAME/job.sh            the script that sbatch got
jobs/NAME/job.json          the job's id: written last; if it is missing, the job is found in the queue by its NAME
jobs/NAME/*_log.out         what the tasks printed
jobs/NAME/stopped.jsonl     why a job ended before its runs did, a line each time: its batch script asks Slurm
jobs/NAME/held.json         why its other runs do not begin (launch.jobs.hold)
jobs/NAME/refused.json      why Slurm did not take the job that was to go on after the runs

On this machine: local/NAME/submission.json, slot-N.lock, which slot N holds as long as it lives, and slot-N.told once
`cancel` has told it to stop.
asked.json                  the user's last command, launch or cancel, and the runs that it stopped
"""

import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.lock import flock
from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.train.lock import Holder, find_holder
from depthmup.train.rundir import parse, read_object


@dataclass(frozen=True)
class Submission:
    """One array of jobs. `tasks[i]` names the run directories of its element i; none for a job that goes on with the
    study after its runs (launch.chain)."""

    path: Path
    tasks: list[list[str]]
    details: dict[str, Any]  # launch keys that explain a failure: memory_gb, timeout_min; `throttle`: jobs at once
    created: int = 0  # nanoseconds of the file system's clock
    owner: int = field(default_factory=os.getuid)  # the user id of who submitted it

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def goes_on(self) -> bool:
        return not any(self.tasks)

    @property
    def file(self) -> Path:
        return self.path / "submission.json"

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def job_id(self) -> str | None:
        content = read_object(self.path / "job.json", "job_id")
        return str(content["job_id"]) if content else None

    def write_job_id(self, job_id: str) -> None:
        write_atomically(self.path / "job.json", json.dumps({"job_id": job_id}).encode())

    def log(self, index: int) -> Path:
        """What rank 0 of element `index` printed."""
        return self.path / f"{self.job_id}_{index}_0_log.out"

    @property
    def stopped(self) -> Path:
        return self.path / "stopped.jsonl"

    @property
    def held_file(self) -> Path:
        return self.path / "held.json"

    def held(self) -> str | None:
        """Why those of its runs that have not begun are held; None where they are not."""
        return read_reason(self.held_file)

    def refused(self) -> str | None:
        """Why Slurm did not take it."""
        return read_reason(self.path / "refused.json")

    def write_refused(self, reason: str) -> None:
        write_atomically(self.path / "refused.json", json.dumps({"reason": reason}).encode())

    def slots(self) -> list["Slot"]:
        """The processes on some machine that are still there for it."""
        locks = sorted(self.path.glob("slot-*.lock"))
        return [Slot(self, lock, found) for lock in locks if (found := find_holder(lock))]

    @classmethod
    def create(cls, jobs: Path, name: str, tasks: Sequence[Sequence[str]], details: dict[str, Any]) -> "Submission":
        """Records the intent to submit, under a name that no other submission has."""
        path = jobs / f"{name}-{secrets.token_hex(4)}"
        path.mkdir(parents=True)
        submission = cls(path, [list(task) for task in tasks], details)
        write_atomically(submission.file, json.dumps({"tasks": submission.tasks, "details": details}).encode())
        return submission

    @classmethod
    def load(cls, file: Path) -> "Submission":
        """Raises UserError for a file that cannot be read. One that has not changed is not read again: who waits asks
        often, and a search has one for each of its batches."""
        status = file.stat()
        return cls._read(file, status.st_ino, status.st_mtime_ns, status.st_uid)

    @classmethod
    @cache
    def _read(cls, file: Path, _inode: int, created: int, owner: int) -> "Submission":
        content = read_object(file, "tasks", "details")
        assert content, f"{file} was there"
        return cls(file.parent, content["tasks"], content["details"], created, owner)


@dataclass(frozen=True)
class Slot:
    """A process on some machine that works through a submission without Slurm, while it holds `lock`."""

    submission: Submission
    lock: Path
    holder: Holder

    @property
    def names(self) -> list[str]:
        """Of the run directories on its list."""
        return [*chain.from_iterable(self.submission.tasks)]

    @property
    def is_told(self) -> bool:
        """Whether `cancel` has told it to stop: it begins no run any more."""
        return self.lock.with_suffix(".told").exists()

    def note_told(self) -> None:
        self.lock.with_suffix(".told").touch()


def read_reason(file: Path) -> str | None:
    content = read_object(file, "reason")
    return str(content["reason"]) if content else None


def load_all(jobs: Path) -> list[Submission]:
    """Every submission, the oldest first."""
    found = map(Submission.load, jobs.glob("*/submission.json"))
    return sorted(found, key=lambda submission: submission.created)


def stop_causes(submissions: Sequence[Submission]) -> dict[tuple[str, int], str]:
    """(array element as '4711_3', how often it had been requeued) -> why that start of it ended before its runs did."""
    lines = [line for submission in submissions for line in read_causes(submission.stopped)]
    return {(line["job"], line["restart"]): line["cause"] for line in lines}


def read_causes(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that batch scripts have added. Half a line, which a full disk has left of one, is no reason to keep the
    study from its user: it is passed over, and its job ended for no known reason."""
    try:
        lines = file.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return
    for line in lines:
        with suppress(UserError):
            yield parse(line, file, "job", "restart", "cause")


def recover_ids(submissions: Sequence[Submission], queue: Sequence[QueuedTask]) -> None:
    """Writes the ids of jobs that were submitted by a launcher that was killed before it could. A colleague who looks
    may not write there, and the next one who may does it."""
    by_name = {task.name: task.job_id for task in queue}
    for submission in submissions:
        if submission.name in by_name and submission.job_id is None and os.access(submission.path, os.W_OK):
            submission.write_job_id(by_name[submission.name])


def match_queued_runs(submissions: Sequence[Submission], queue: Sequence[QueuedTask]) -> dict[str, QueuedTask]:
    """Run -> the array element that will train it or does, for all that have not ended."""
    by_name = {submission.name: submission for submission in submissions}
    found = {}
    for task in queue:
        if (submission := by_name.get(task.name)) and task.index < len(submission.tasks):
            found.update(dict.fromkeys(submission.tasks[task.index], task))
    return found


def count_taken(submissions: Sequence[Submission], queue: Sequence[QueuedTask]) -> tuple[int, list[str]]:
    """How many jobs of the study may run at once as it is now, and the ids of their arrays. Of arrays that wait for
    each other both are counted: then it is more than will run."""
    by_name = {submission.name: submission for submission in submissions if not submission.goes_on}
    elements = Counter(task.name for task in queue if task.name in by_name)
    taken = sum(min(by_name[name].details.get("throttle", count), count) for name, count in elements.items())
    return taken, sorted({task.job_id for task in queue if task.name in by_name})


# ---------------------------------------------------------------- what the user asked for


Command = Literal["launch", "cancel"]


def note_command(folder: Path, command: Command, stopped: Collection[str] = ()) -> None:
    """Notes the user's command: what goes on by itself, as a waiting `transfer` or the job after the runs, obeys it.

    stopped: the names of the runs that a `cancel` stops; those that the one before it stopped are kept.
    """
    runs = sorted({*stopped, *read_cancelled_runs(folder)}) if command == "cancel" else []
    write_atomically(folder / "asked.json", json.dumps({"command": command, "runs": runs}).encode())


def read_cancelled_runs(folder: Path) -> set[str]:
    """The runs that the user's last command stopped, where that was `cancel`."""
    content = read_object(folder / "asked.json", "command") or {}
    return set(content.get("runs", ()))


def read_last_command(folder: Path) -> tuple[Command, int]:
    """The user's last command, and when: in nanoseconds of the file system's clock, as `Submission.created` is."""
    file = folder / "asked.json"
    content = read_object(file, "command")
    return (content["command"], file.stat().st_mtime_ns) if content else ("launch", 0)


@contextmanager
def lock_launch(folder: Path) -> Iterator[int]:
    """Only one process submits for a study at a time. Yields the lock's descriptor.

    sbatch inherits it: when the launcher is killed while sbatch runs, the next launcher waits until sbatch has ended,
    and then finds its job in the queue.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "launch.lock", "w")  # noqa: SIM115 - closed below, after the block
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror}); set study.directory to a folder that is writable"
        ) from None
    with file:
        flock(file, fcntl.LOCK_EX)
        yield file.fileno()
