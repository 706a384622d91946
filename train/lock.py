"""Locks that end with the process that holds them, however it ends, and that say who that is.

Some file systems have locks that no other host sees: BeeGFS, Lustre with -o localflock, NFS with local_lock. So the
holder also touches the file again and again, and a holder on another host counts as long as it does. After a kill its
lock is free to other hosts once it is silent, whose clocks must agree to within that time. So it is when the holder, or
its whole host, is frozen, and keeps the lock all the same: whoever comes then puts a new file in the lock's place. A
holder that thaws finds it there, and ends at once.
"""

import fcntl
import json
import os
import random
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TextIO

from depthmup.data.files import naming
from depthmup.data.lock import flock
from depthmup.train.rundir import EXIT_LOST_PEER

BEAT, SILENCE = 10.0, 60.0  # seconds between two touches; after which a holder on another host is taken for dead


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; empty to one who looks while the lock is being taken."""

    host: str = ""
    pid: int = 0
    silent: float = field(default=0.0, compare=False)  # seconds since it last touched the lock

    @property
    def is_here(self) -> bool:
        return self.host in ("", socket.gethostname())

    @property
    def is_frozen(self) -> bool:
        """Whether it was silent for so long that it must be stopped, or its host is."""
        return self.silent >= SILENCE

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


def write_holder(file: TextIO, pid: int) -> None:
    """Says in a lock's file who holds it."""
    with naming(Path(file.name)):
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": pid}))
        file.flush()


def read_holder(lock: Path) -> Holder:
    """Who the lock's file names. Raises FileNotFoundError."""
    text, silent = lock.read_text(), time.time() - lock.stat().st_mtime
    return Holder(**json.loads(text), silent=silent) if text else Holder()


def find_holder(lock: Path) -> Holder | None:
    """Who holds the lock; None when nobody does. Raises NoLocks."""
    try:
        with open(lock) as file:
            is_free = flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = read_holder(lock)
    except FileNotFoundError:
        return None
    return None if is_free and (found.is_here or found.is_frozen) else found


class Lock:
    """A lock that this process has taken, in `file`, which `path` names, until it is closed."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.ended = file, path, threading.Event()
        write_holder(file, os.getpid())
        threading.Thread(target=self.beat, name="lock", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Whether another process has put a file of its own in the lock's place."""
        try:
            return not is_at(self.file, self.path)
        except OSError:  # the folder is gone, or the server for a while
            return False

    def beat(self) -> None:
        while not self.ended.wait(BEAT):
            if self.is_lost:  # this process was frozen, and another trains the run: two must not write there
                print(f"{self.path}: taken over by {read_holder(self.path)}: this process ends", flush=True)
                os._exit(EXIT_LOST_PEER)
            try:
                os.utime(self.path)
            except OSError:
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


def is_at(file: TextIO, path: Path) -> bool:
    """Whether `path` names the open `file`. Raises OSError."""
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def open_locked(lock: Path) -> TextIO | None:
    """The lock's file with our flock on it; None when another process has that. Raises NoLocks."""
    while True:
        file = open(lock, "a+")  # noqa: SIM115
        try:
            while not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if not flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):  # shared with whoever only looks, as `find_holder`
                    file.close()
                    return None
                flock(file, fcntl.LOCK_UN)
                time.sleep(random.uniform(0, 0.01))
            if is_at(file, lock):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # another file was put in its place meanwhile


def put_in_place(lock: Path, seen: os.stat_result) -> TextIO | None:
    """A new file of ours, with our flock on it, in the place of the lock's; None where that is no longer as `seen`."""
    with open(lock.with_name(f"{lock.name}.replaced"), "w") as guard:
        flock(guard, fcntl.LOCK_EX)
        now = lock.stat()
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return None
        temporary = lock.with_name(f".{lock.name}.{socket.gethostname()}.{os.getpid()}")
        file = open(temporary, "w+")  # noqa: SIM115
        flock(file, fcntl.LOCK_EX)
        os.replace(temporary, lock)
        return file


def take_lock(lock: Path) -> Lock | None:
    """The lock, with this process in it; None when another process holds it. Raises NoLocks.

    Waits where the process that holds it, or has not freed it, is on another host: until it touches the lock, and so
    lives, or has been silent for so long that the lock is taken from it.
    """
    with ExitStack() as closing:
        file = open_locked(lock)
        if file:
            closing.enter_context(file)
        seen = lock.stat()
        while not (found := read_holder(lock)).is_here and not found.is_frozen:
            if lock.stat().st_mtime_ns != seen.st_mtime_ns:
                return None
            time.sleep(BEAT / 10)
        if found.is_here:
            closing.pop_all()
        else:
            file = put_in_place(lock, seen)
        return Lock(file, lock) if file else None
