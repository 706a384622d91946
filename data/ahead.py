"""Work that a few threads of this process do ahead of its use: requests to a server, which mostly wait."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from queue import SimpleQueue

THREADS = 8  # requests in flight: at 80 ms each, 8 fill a link that one leaves idle for five sixths of the time


class Ahead:
    """Daemon threads: the process ends whatever is left to do. Those of concurrent.futures would finish it first."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[str, Future[bytes | None], Callable[[], bytes | None]]] = SimpleQueue()
        self.begun: dict[str, Future[bytes | None]] = {}  # asked for and not done, by name
        self.lock = threading.Lock()
        for _ in range(THREADS):
            threading.Thread(target=self.work, name="read ahead", daemon=True).start()

    def ask(self, name: str, job: Callable[[], bytes | None]) -> None:
        """Begins `job`, unless one of that name has begun and is not done."""
        with self.lock:
            if name not in self.begun:
                self.begun[name] = Future()
                self.jobs.put((name, self.begun[name], job))

    def result(self, name: str) -> bytes | None:
        """Waits for a job that is not done yet, and returns its result; None where there is none. Raises its error."""
        with self.lock:
            future = self.begun.get(name)
        return future.result() if future else None

    def work(self) -> None:
        while True:
            name, future, job = self.jobs.get()
            try:
                result = job()
            except BaseException as error:
                self.forget(name)
                future.set_exception(error)
            else:
                self.forget(name)
                future.set_result(result)

    def forget(self, name: str) -> None:
        """Called before the result is set, so that whoever meets a failure and asks again has the job tried again."""
        with self.lock:
            del self.begun[name]


@lru_cache(maxsize=1)
def open_ahead_of(pid: int) -> Ahead:
    return Ahead()


def open_ahead() -> Ahead:
    """This process's own: a fork inherits no threads."""
    return open_ahead_of(os.getpid())
