"""What runs inside a job: a slot that works through a list of run directories.

It carries no state: the run directories are the truth, so it may be started again at will. On Slurm every task of every
array element runs `python -m depthmup.launch.jobs.worker SUBMISSION.json`, from the code that was copied at
submission; on this machine every slot runs it with --local.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from depthmup.data.errors import UserError
from depthmup.data.lock import flock
from depthmup.launch.jobs.attempts import (
    UNPACKED,
    begin_attempt,
    is_pending,
    mark_failed,
    note_attempt,
    read_attempts,
    read_job_name,
)
from depthmup.launch.jobs.ended import record_end
from depthmup.launch.jobs.hold import Hold
from depthmup.launch.jobs.submission import Submission
from depthmup.train.__main__ import leave, train_locked
from depthmup.train.config import RunConfig
from depthmup.train.imports import TRAINING, import_uncollected
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.lock import BEAT, find_holder, take_lock
from depthmup.train.packs.packing import list_obstacles, stand_at_one_step
from depthmup.train.reading import from_plain, read_yaml
from depthmup.train.rundir import EXIT_REQUEUE, RunDirectory
from depthmup.train.trunk import waits_for_trunk

if TYPE_CHECKING:
    import torch


def train_packs(
    packs: Sequence[Sequence[RunDirectory]], *stops: signal.Signals, hold: Hold | None = None, waits: bool = False
) -> int:
    """Trains one list of runs after another, those of one list together where they can be; returns the exit code:
    interrupted, 1 when a run failed, 0.

    Several processes may hold the same lists: each takes the next runs that are neither done nor locked by another. The
    lock belongs to the process, so it ends with it however the process ends. `hold` may keep runs from beginning.
    `stops`: signals that interrupt, too. `waits`: also for runs that a process on another host has, until it has ended
    or freezes: a requeued job's own former process may live on, on a node that Slurm has lost.
    """
    with Interrupt.on_signals(*stops) as interrupt:
        try:
            while train_all(packs, interrupt, hold, waits) and any(map(is_pending, chain.from_iterable(packs))):
                pass  # what was trained may be a trunk that others wait for
        except Interrupted:
            return EXIT_REQUEUE
    return 1 if any(directory.failed() for pack in packs for directory in pack) else 0


def train_all(packs: Sequence[Sequence[RunDirectory]], interrupt: Interrupt, hold: Hold | None, waits: bool) -> bool:
    """One time through `packs`; returns whether anything was trained. Raises Interrupted."""
    trained = False
    for pack in packs:
        while True:
            startable = [each for each in (hold.select_startable(pack) if hold else pack) if may_begin(each)]
            if train_some(startable, interrupt):
                trained = True
            elif not (waits and wait_for_other_host(pack)):
                break
    return trained


def may_begin(directory: RunDirectory) -> bool:
    """Whether nothing that it needs is missing, as the checkpoint of its trunk is for a branch of a ladder."""
    return not is_pending(directory) or not waits_for_trunk(directory)


def wait_for_other_host(directories: Sequence[RunDirectory]) -> bool:
    """Waits a moment where a process on another host has one of the runs, and says so. Returns whether one has."""
    for directory in filter(is_pending, directories):
        if (found := find_holder(directory.lock)) and not found.is_here:
            print(f"{directory.path.name}: {found} trains it: waiting until that ends", flush=True)
            time.sleep(BEAT)
            return True
    return False


def train_some(directories: Sequence[RunDirectory], interrupt: Interrupt) -> bool:
    """Trains the first run that is pending and that no other process has, with those that can share a pack with it.

    Returns False when there is none. A failure is recorded, and does not end the slot: when a pack fails, its runs are
    trained one by one, so that each has its own result or reason. Raises Interrupted.
    """
    left = list(filter(is_pending, directories))
    if not left:
        return False
    import_uncollected(*TRAINING)  # torch, which takes seconds
    from depthmup.train.packs.pack import run_pack

    if interrupt.requested:
        raise Interrupted("asked to stop before the next run began")
    with ExitStack() as held:
        claimed = claim_pack(directories, held)
        for directory, config in claimed.items():
            try:
                begin_attempt(directory, lacks_gpu(config))
            except RuntimeError as error:
                mark_failed(directory, str(error))
        begun = {directory: config for directory, config in claimed.items() if is_pending(directory)}
        try:
            run_pack(list(begun.values()), [directory.path for directory in begun], interrupt)
        except Interrupted:
            for directory in filter(is_pending, begun):
                note_attempt(directory, "interrupted")
            raise
        except Exception as error:
            if len(begun) > 1:
                # a user's mistake needs no traceback, and failed.json has it for each run
                reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
                print(f"a pack of {len(begun)} failed, its runs go on one by one: {reason}", flush=True)
            for directory in filter(is_pending, begun):
                if len(begun) > 1:
                    note_attempt(directory, UNPACKED, error=join_to_one_line(error))
                else:
                    record_failure(directory, error)
    return bool(claimed) or any(directory.failed() for directory in left)


def claim_pack(directories: Sequence[RunDirectory], held: ExitStack) -> dict[RunDirectory, RunConfig]:
    """Locks the first pending run that is free, and as many of those after it as can be trained with it now; the locks
    are closed with `held`. Empty when no run is free, or the first could not be read and has failed."""
    from depthmup.train.distributed import World, pick_device

    claimed: dict[RunDirectory, RunConfig] = {}
    size = 1
    with lock_claims(directories):
        for directory in directories:
            if len(claimed) == size:
                break
            file = take_lock(directory.lock)
            if file is None:
                continue
            with ExitStack() as candidate:
                candidate.enter_context(file)
                if not is_pending(directory):
                    continue
                try:
                    config = read_config(directory)
                    device = pick_device(config.train.device, World())
                except Exception as error:
                    record_failure(directory, error)
                    if not claimed:
                        break  # the others may be held now
                    continue
                if not claimed and len(directories) > 1 and not has_failed_in_a_pack(directory):
                    size = measure_pack_size(config, device, len(directories))
                if claimed and not can_join(directory, config, claimed):
                    continue
                held.enter_context(candidate.pop_all())
                claimed[directory] = config
    return claimed


def measure_pack_size(config: RunConfig, device: "torch.device", most: int) -> int:
    """How many of `most` runs like `config` to train together; 1 where that cannot be measured, as for a network that
    does not batch."""
    from depthmup.train.packs.memory import pack_size

    try:
        size = pack_size(config, device)
    except Exception as error:
        print(f"no packs: {join_to_one_line(error)}", flush=True)
        return 1
    if size < min(config.train.pack or 1, most):
        print(f"train.pack is {config.train.pack}, but at most {size} fit into memory", flush=True)
    return size


def can_join(directory: RunDirectory, config: RunConfig, pack: dict[RunDirectory, RunConfig]) -> bool:
    """Whether the run can be trained together with those of `pack`, which are not empty."""
    first = next(iter(pack.values()))
    if list_obstacles(first, config) or has_failed_in_a_pack(directory):
        return False
    return stand_at_one_step([*pack, directory])


def has_failed_in_a_pack(directory: RunDirectory) -> bool:
    return any(line["event"] == UNPACKED for line in read_attempts(directory))


@contextmanager
def lock_claims(directories: Sequence[RunDirectory]) -> Iterator[None]:
    """Only one slot at a time takes runs out of a list, so that two that begin together do not halve each other's
    packs."""
    if len(directories) == 1:
        yield
        return
    with open(directories[0].path.parents[1] / "claim.lock", "w") as file:
        flock(file, fcntl.LOCK_EX)
        yield


def join_to_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def record_failure(directory: RunDirectory, error: Exception) -> None:
    """For use where `error` is being handled."""
    mark_failed(directory, join_to_one_line(error), traceback=traceback.format_exc())


def lacks_gpu(config: RunConfig) -> bool:
    """Whether the run takes the CPU though its job has a GPU: torch sees none, as with a driver that is too old for it.
    It is no failure, since the study may well be trained so; `status` says it."""
    import torch

    return (
        bool(os.environ.get("SLURM_GPUS_ON_NODE")) and config.train.device == "auto" and not torch.cuda.is_available()
    )


def read_config(directory: RunDirectory) -> RunConfig:
    return from_plain(RunConfig, read_yaml(directory.config), str(directory.config))


# ---------------------------------------------------------------- Slurm


def run_distributed(directory: RunDirectory) -> int:
    """This task's process of a run over all tasks of the job; returns its exit code.

    srun ends the others once one ends with another code than 0. So of a run that was interrupted only the first does,
    after it has noted it: what comes of the others then, the batch script need not know (see `record_end`).
    """
    if directory.done() or directory.failed():
        return 0
    import_uncollected(*TRAINING)  # torch, which takes seconds
    from depthmup.train.distributed import read_world_from_environment

    config, first = read_config(directory), os.environ["SLURM_PROCID"] == "0"
    if first:
        held = take_lock(directory.lock)  # as long as this process lives
        if held is None:
            sys.exit(f"{directory.path}: {find_holder(directory.lock) or 'another process'} trains it")
        try:
            begin_attempt(directory, lacks_gpu(config))
        except RuntimeError as error:
            mark_failed(directory, str(error))
            return 1
    code = train_locked(config, directory, read_world_from_environment())
    if code == EXIT_REQUEUE and first:
        note_attempt(directory, "interrupted")
    return 0 if code == EXIT_REQUEUE and not first else code


def run_side_by_side(file: Path, count: int) -> int:
    """`count` processes that share this job's GPU and its list of runs. Signals reach them from Slurm directly."""
    with Interrupt.on_signals():
        processes = [
            subprocess.Popen([sys.executable, "-m", "depthmup.launch.jobs.worker", str(file), "--slot"])
            for _ in range(count)
        ]
        codes = [process.wait() for process in processes]
    return EXIT_REQUEUE if EXIT_REQUEUE in codes else max(128 - code if code < 0 else code for code in codes)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("submission", type=Path)
    parser.add_argument("--local", action="store_true", help="all of the submission, on this machine")
    parser.add_argument("--slot", action="store_true", help="one of several processes that share the list")
    parser.add_argument("--held", action="store_true", help="only tell whether its run is held: then end 0")
    parser.add_argument("--ended", type=int, metavar="CODE", help="only record that the step ended so; end so, too")
    arguments = parser.parse_args()
    submission = Submission.load(arguments.submission)
    details = submission.details
    root = arguments.submission.parent.parent.parent / "runs"
    packs = [[RunDirectory(root / name) for name in names] for names in submission.tasks]
    hold = Hold(submission, list(chain.from_iterable(packs)), details.get("hold_after", 0))
    if arguments.local:
        return train_packs(packs, hold=hold)
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    directories = packs[index]
    if arguments.held:
        return 1 if hold.select_startable(directories) else 0
    if arguments.ended is not None:
        log = submission.path / f"{read_job_name()}_0_log.out"
        return record_end(directories, arguments.ended, log, details)
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        leave(run_distributed(directories[0]))
    if details["runs_per_gpu"] > 1 and not arguments.slot:
        return run_side_by_side(arguments.submission, min(details["runs_per_gpu"], len(directories)))
    if arguments.slot:
        return train_packs([[directory] for directory in directories], hold=hold, waits=True)
    return train_packs([directories], hold=hold, waits=True)


if __name__ == "__main__":
    leave(main())  # an interpreter that ends by itself takes torch apart first, which is a tenth of its start
