"""One process of one run: `torchrun --nproc-per-node 8 -m depthmup.train CONFIG DIRECTORY`, or srun, a task a GPU.

Exit codes are those of train.rundir. A process that fails says why in failed.json and ends at once, without waiting for
the others: they, or the launcher (srun --kill-on-bad-exit=1), end because of it. One that only misses another, as when
a node dies, has nothing to say of the run: it ends without a verdict, and the run goes on once all are started again.
"""

import argparse
import os
import re
import signal
import socket
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from depthmup.data.errors import UserError
from depthmup.data.files import describe_full_disk
from depthmup.data.lock import NoLocks
from depthmup.data.paths import expand_path
from depthmup.models.errors import ModelError
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.imports import TRAINING, import_uncollected
from depthmup.train.interrupt import Interrupt, Interrupted, prepare_streams
from depthmup.train.lock import find_holder, take_lock
from depthmup.train.owner import check_directory
from depthmup.train.reading import read_yaml, run_in, set_dotted
from depthmup.train.rundir import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST_PEER,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    RunDirectory,
)

if TYPE_CHECKING:
    from depthmup.train.distributed import World


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    raw = read_yaml(path)
    for override in overrides:
        set_dotted(raw, override)
    return run_in(raw, str(path))


def leave(code: int) -> NoReturn:
    """Ends the process without the clean-up of process groups, which can wait for ever for a process that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(config: RunConfig, directory: RunDirectory) -> int:
    """Trains the run while no other process can; returns the exit code."""
    import_uncollected(*TRAINING)
    from depthmup.train.distributed import read_world_from_environment

    world = read_world_from_environment()
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        held = take_lock(directory.lock) if world.is_main else nullcontext()  # the first process holds it for all
    except NoLocks as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        print(f"error: cannot write to {directory.path} ({error.strerror}): name another directory", file=sys.stderr)
        return EXIT_USER_ERROR
    if held is None:
        reason = f"{find_holder(directory.lock) or 'another process'} trains it: wait for it, or end it"
        print(f"error: {directory.path}: {reason}", file=sys.stderr)
        return EXIT_USER_ERROR
    with held:
        return train_locked(config, directory, world)


def train_locked(config: RunConfig, directory: RunDirectory, world: "World") -> int:
    """As `train`, for a caller that holds the run's lock."""
    from depthmup.train.branch import begin_branch
    from depthmup.train.checkpoint import complete
    from depthmup.train.display import summarize_run, watch_terminal
    from depthmup.train.distributed import LostPeer
    from depthmup.train.loop import run

    try:
        check_directory(directory, config)
    except UserError as error:  # nothing is written there: it is another run's
        if world.is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    started = time.time()
    if world.is_main:
        try:
            begin_branch(directory, config)  # before the other processes find this one, and look for checkpoints
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        for marker in ("failed.json", "lost.json"):
            (directory.path / marker).unlink(missing_ok=True)
        if directory.done():
            print(f"done already: {directory.path} (another directory trains it again)", file=sys.stderr)
        elif complete(directory.checkpoints):
            print(f"continuing {directory.path} from its newest checkpoint", file=sys.stderr)
    try:
        with Interrupt.on_signals(signal.SIGINT) as interrupt, watch_terminal(config, world) as watch:
            result = run(config, directory.path, world, interrupt, watch)
    except Interrupted as stopped:
        if world.is_main:
            print(f"{stopped}; the same command continues it ({directory.path})", file=sys.stderr)
        return EXIT_REQUEUE
    except LostPeer as lost:
        return leave_after(lost, directory, world, started)
    except Exception as error:
        reason = {"run": run_hash(config), "rank": world.rank, "error": f"{type(error).__name__}: {error}"}
        reason["traceback"] = traceback.format_exc()
        try:
            is_first = directory.write_first("failed.json", reason, started)
        except OSError as unwritable:  # a full disk: then at least the terminal, or the job's log, has the reason
            is_first = True
            print(f"warning: no failed.json ({unwritable})", file=sys.stderr)
        directory.add_to_log(traceback.format_exc(), world.rank)
        is_mistake = isinstance(error, UserError | ModelError)
        words = str(error) if is_mistake else describe_full_disk(error, str(directory.path))
        if words:
            if is_first:  # torchrun stops the others before they can say it
                print(f"error: {words}", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exc()
        return EXIT_FAILED
    if world.is_main:
        print(summarize_run(config, result, directory.path))
    return EXIT_DIVERGED if result["outcome"] == "diverged" else EXIT_DONE


def leave_after(lost: Exception, directory: RunDirectory, world: "World", started: float) -> int:
    """Notes which process was missed, for use where `lost` is being handled; returns the exit code. One that failed has
    said why before it was gone."""
    directory.add_to_log(traceback.format_exc(), world.rank)
    if directory.failed():
        return EXIT_FAILED
    reason = {"rank": world.rank, "host": socket.gethostname(), "error": str(lost)}
    try:
        is_first = directory.write_first("lost.json", reason, started)
    except OSError:  # a full disk: the line below and the log have the same words
        is_first = True
    if is_first:
        print(f"error: {lost}. The same command continues the run ({directory.path})", file=sys.stderr)
    return EXIT_LOST_PEER


def main() -> NoReturn:
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m depthmup.train", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("directory", nargs="?", help="the run's directory [default: runs/HASH]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.directory and re.match(r"[\w.]+=", arguments.directory):  # KEY=VALUE: the directory was left out
        arguments.overrides.insert(0, arguments.directory)
        arguments.directory = None
    try:
        config = read_config(Path(expand_path(arguments.config)), arguments.overrides)
        directory = Path(expand_path(arguments.directory)) if arguments.directory else Path("runs") / run_hash(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(EXIT_USER_ERROR)
    leave(train(config, RunDirectory(directory)))


if __name__ == "__main__":
    main()
