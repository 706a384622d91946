"""Work that is done ahead of its use, by a few threads of this process: requests to a server, of which each waits."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from queue import SimpleQueue

THREADS = 8  # requests in flight: at 80 ms each, 8 fill a link that one leaves idle for five sixths of the time


class Ahead:
    """Threads that end with the process, whatever is left to do: those of concurrent.futures would do it all first."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[str, Future[bytes], Callable[[], bytes]]] = SimpleQueue()
        self.begun: dict[str, Future[bytes]] = {}  # asked for and not done, by name
        self.lock = threading.Lock()
        for _ in range(THREADS):
            threading.Thread(target=self.work, name="read ahead", daemon=True).start()

    def ask(self, name: str, job: Callable[[], bytes]) -> None:
        """Has `job` done once, however often it is asked for meanwhile."""
        with self.lock:
            if name not in self.begun:
                self.begun[name] = Future()
                self.jobs.put((name, self.begun[name], job))

    def result(self, name: str) -> bytes | None:
        """What a job gave that is not done yet, which is waited for; None for any other. Raises what the job raised."""
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
        """Before its result is there, so that who has met a failure and asks again has it tried again."""
        with self.lock:
            del self.begun[name]


@lru_cache(maxsize=1)
def of_process(pid: int) -> Ahead:
    return Ahead()


def ahead() -> Ahead:
    """This process's own: a fork inherits no threads."""
    return of_process(os.getpid())
