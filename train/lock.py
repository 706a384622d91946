"""Locks that end with the process that holds them, however it ends, and that say who that is.

Some file systems have locks that no other host sees: BeeGFS, Lustre with -o localflock, NFS with local_lock. So the
holder also touches the file again and again, and a holder on another host counts as long as it does. After a kill its
lock is free to other hosts once it is silent, whose clocks must agree to within that time.
"""

import fcntl
import json
import os
import random
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from depthmup.data.lock import flock

BEAT, SILENCE = 10.0, 60.0  # seconds between two touches; after which a holder on another host is taken for dead


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; empty to one who looks while the lock is being taken."""

    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


def write_holder(file: TextIO, pid: int) -> None:
    """Says in a lock's file who holds it."""
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": pid}))
    file.flush()


def holder_elsewhere(lock: Path) -> Holder | None:
    """The holder on another host that was not silent for long."""
    text = lock.read_text()
    found = Holder(**json.loads(text)) if text else Holder()
    alive = time.time() - lock.stat().st_mtime < SILENCE
    return found if alive and found.host not in ("", socket.gethostname()) else None


def holder(lock: Path) -> Holder | None:
    """Who holds the lock; None when nobody does. Raises NoLocks."""
    try:
        with open(lock) as file:
            if flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):
                return holder_elsewhere(lock)
            text = file.read()
    except FileNotFoundError:
        return None
    return Holder(**json.loads(text)) if text else Holder()


class Lock:
    """A lock that this process has taken, in `file`, until it is closed."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.ended = file, threading.Event()
        write_holder(file, os.getpid())
        threading.Thread(target=self.beat, name="lock", daemon=True).start()

    def beat(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                os.utime(self.file.name)
            except OSError:  # the folder is gone, or the server for a while
                continue

    def close(self) -> None:
        """Frees it, for other hosts too: it names nobody any more."""
        self.ended.set()
        if not self.file.closed:
            self.file.truncate(0)
            self.file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def take_lock(lock: Path) -> Lock | None:
    """The lock, with this process in it; None when another process holds it. Raises NoLocks.

    Waits where another host's process was killed, or may have been, until it has been silent for long enough.
    """
    file = open(lock, "a+")  # noqa: SIM115
    try:
        while not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if not flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):  # shared with whoever only looks, as `holder` does
                file.close()
                return None
            flock(file, fcntl.LOCK_UN)
            time.sleep(random.uniform(0, 0.01))
        touched = lock.stat().st_mtime_ns
        while holder_elsewhere(lock):
            if lock.stat().st_mtime_ns != touched:
                file.close()
                return None
            time.sleep(BEAT / 10)
    except BaseException:
        file.close()
        raise
    return Lock(file)
