"""What runs inside a job: one slot that works through a list of run directories."""

import fcntl
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from train.config import RunConfig, from_plain, read_yaml
from train.rundir import RunDirectory


class Slot:
    """A job's callable. It carries no state: the run directories are the truth, so it may be started again at will.

    Several slots may hold the same list: each takes the next run that is neither done nor locked by another slot. The
    lock belongs to the process, so it ends with it however the process ends.
    """

    def __init__(self, directories: Sequence[Path], threads: int = 1) -> None:
        self.directories = [str(directory) for directory in directories]
        self.threads = threads

    def __call__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # before torch is imported
        for directory in self.directories:
            run_if_free(RunDirectory(Path(directory)))


def run_if_free(directory: RunDirectory) -> None:
    """Trains the run unless it is done or another process has it. A failure is recorded, and does not end the slot."""
    with open(directory.lock, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if directory.done() or directory.failed():
            return
        from train.loop import run

        try:
            config = from_plain(RunConfig, read_yaml(directory.config), str(directory.config))
            run(config, directory.path)
        except Exception as error:
            directory.write_failed({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
