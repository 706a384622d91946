"""Locks that end with the process that holds them, however it ends, and that say who that is."""

import fcntl
import json
import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


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


def holder(lock: Path) -> Holder | None:
    """Who holds the lock; None when nobody does."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        text = lock.read_text()
        return Holder(**json.loads(text)) if text else Holder()
    return None


def take_lock(lock: Path) -> TextIO | None:
    """The lock with this process in it, held as long as the file is open; None when another process holds it."""
    file = open(lock, "a+")  # noqa: SIM115
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared with whoever only looks, as `holder` does
        except BlockingIOError:
            file.close()
            return None
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(random.uniform(0, 0.01))
    write_holder(file, os.getpid())
    return file
