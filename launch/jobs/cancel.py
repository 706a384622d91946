"""`depthmup cancel`: stops a whole path, which is a study's runs, the job that goes on after them, and its targets'."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from depthmup.data.errors import UserError
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.submission import lock_launch, note_command
from depthmup.launch.runs.opened import list_studies
from depthmup.launch.runs.study import Study
from depthmup.train.lock import find_holder


@dataclass(frozen=True)
class Stopped:
    """What of one study was stopped: Slurm jobs that had runs, jobs that were to go on after these, and processes here.
    `elsewhere`: hosts with processes that train it, which a signal from here does not reach."""

    study: Study
    job_ids: list[str] = field(default_factory=list)
    going_on: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        jobs = [f"job {job_id}" for job_id in self.job_ids]
        jobs += [f"job {job_id}, which was to go on after the runs" for job_id in self.going_on]
        return ", ".join([*jobs, *(f"process {pid}" for pid in self.pids)])


def cancel_path(study: Study) -> Iterator[Stopped]:
    """Stops the study, and then what follows it, as each target that was scaled from it: nothing submits one any more
    then. Raises UserError."""
    if not study.file.directory.exists():
        return
    first = cancel(study)
    yield first
    for follower in list_studies(study)[1:]:
        # A job that was going on may be about to submit it, and then finds that it was cancelled.
        if first.going_on or follower.file.directory.exists():
            yield cancel(follower)


def cancel(study: Study) -> Stopped:
    """Stops everything of the study, and keeps what waits for its runs from submitting them again. Runs keep what they
    saved. Raises UserError."""
    root = study.file.directory
    with lock_launch(root):
        snapshot = states.take_snapshot(study)
        if snapshot.slurm_error:
            raise UserError(
                f"Slurm does not answer: {snapshot.slurm_error}. Nothing of {root} was cancelled: give the same "
                "command again later"
            )
        active = snapshot.of(*states.ACTIVE)
        holders = {name_of(found): find_holder(found.run.directory.lock) for found in active if found.task is None}
        processes = {process for process in (*(slot.holder for slot in snapshot.slots), *holders.values()) if process}
        elsewhere = {process.host for process in processes if not process.is_here}
        left = {name for slot in snapshot.slots if not slot.holder.is_here for name in slot.names}
        left |= {name for name, holder in holders.items() if holder and not holder.is_here}
        note_command(root, "cancel", {name_of(found) for found in active} - left)
        job_ids = sorted({found.task.job_id for found in active if found.task})
        going_on = sorted({task.job_id for task in snapshot.continuations})
        try:
            slurm.cancel([*going_on, *job_ids])
        except slurm.SlurmError as error:
            raise UserError(
                f"Slurm does not cancel the jobs of {root}: {error}. Give the same command again later"
            ) from None
        here = sorted({process.pid for process in processes if process.is_here and process.pid})
        for pid in here:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for slot in snapshot.slots:
            if slot.holder.is_here:
                slot.note_told()
    return Stopped(study, job_ids, going_on, here, sorted(elsewhere))


def name_of(found: states.RunState) -> str:
    return found.run.directory.path.name
