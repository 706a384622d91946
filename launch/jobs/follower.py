"""The Slurm job that goes on with a study once its runs' jobs have ended."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.submission import lock_launch, note_command, read_last_command
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.study import Study


class Postponed(UserError):
    """Slurm has place for no run now; the job that goes on after the runs tries again."""


def format_path_command(study: Study, targets: Sequence[str], after: bool) -> str:
    """What a user gives to walk the path on from here, without --detach; `after`: from a search to its study."""
    to = [word for target in targets for word in ("--target", target)]
    verb = study.verb if isinstance(study, JointStudy) and not after else "transfer"
    return study.command(verb, *(["--tune"] if after else []), *to)


@contextmanager
def submit_follower(
    study: Study, targets: Sequence[Path], after: bool = False, by_itself: bool = False
) -> Iterator[tuple[str, Callable[[Sequence[str]], None]]]:
    """A job that goes on with the study, for a block that submits what it goes on after: (its id, a function that gives
    it the ids of those jobs). It has its place in the queue before they have theirs: where Slurm takes no more jobs,
    nothing is submitted. Where the block fails it is taken back, unless Slurm stopped answering: then, as where this
    process is killed, it begins by itself after some minutes (submit.PATIENCE_MINUTES). So it does where this goes on
    `by_itself` and Slurm has place for no run: that is Postponed.

    One that waits already is taken, or taken back where it goes to other targets. One that runs may have looked
    already, or be this one. After a cancel nothing goes on `by_itself`. Raises UserError.
    """
    from depthmup.launch.jobs.submit import PATIENCE_MINUTES, submit_continuation

    with lock_launch(study.file.directory) as lock:  # of two that look at once, the second finds the first's
        snapshot = states.take_snapshot(study)
        if snapshot.slurm_error:
            raise slurm.Silent(f"Slurm does not answer: {snapshot.slurm_error}. Nothing was submitted")
        if by_itself and read_last_command(study.file.directory)[0] == "cancel":
            raise UserError("cancelled; the same command continues")
        again = format_path_command(study, [str(target) for target in targets], after)
        wanted = [[str(target.absolute()) for target in targets], after]
        goes_to = {s.name: [s.details.get("targets"), s.details.get("after", False)] for s in snapshot.submissions}
        queued = {task.job_id: goes_to[task.name] for task in snapshot.continuations if task.waits}
        waiting = [job_id for job_id, to in queued.items() if to == wanted]
        try:
            placed = None if waiting else submit_continuation(study, targets, after, lock)
            slurm.cancel([job_id for job_id in queued if job_id not in waiting])  # of a command that this one replaces
        except slurm.Silent:
            raise
        except UserError as error:
            raise type(error)(
                f"{error}. That is the job that goes on after the runs, so none of them was submitted. Once there is "
                f"place for one job more: {again} --detach; or wait for them: {again}"
            ) from None
        if not by_itself:
            note_command(study.file.directory, "launch")
    job_id = placed.job_id if placed else waiting[0]
    assert job_id

    def attach(job_ids: Sequence[str]) -> None:
        try:
            slurm.start_after(job_id, job_ids)
        except slurm.SlurmError as error:
            raise slurm.describe_silence(str(error), job_ids) from None

    try:
        yield job_id, attach
    except slurm.Silent as error:
        raise slurm.Silent(
            f"{error}. Job {job_id} waits, and goes on by itself in a few minutes if you do not"
        ) from None
    except UserError as error:
        if isinstance(error, slurm.Full) and by_itself:
            raise Postponed(f"{error}. Job {job_id} tries again in {PATIENCE_MINUTES} minutes") from None
        if placed:
            slurm.cancel([job_id])
            shutil.rmtree(placed.path)
        if not isinstance(error, slurm.Full):
            raise
        raise slurm.Full(
            f"{error}. With --detach the job that goes on takes a place, too; it is taken back, and nothing "
            f"was submitted. Once there is place for three jobs: {again} --detach; or wait for them: {again}"
        ) from None
