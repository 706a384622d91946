"""A process that has imported what the tests import, and forks: a Python that is ready in a hundredth of a second.

One serves all test processes, and pytest-xdist's are forked from it: `python tests/fork_server.py -c CODE` does what
`python -c CODE` does, in a fork. multiprocessing's own fork server is each process's alone, and passes over what it
cannot import.
"""

import gc
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The environment's variable with the socket's name, as Linux knows it without a file.
NAME = "DEPTHMUP_TEST_FORK_SERVER"
PRELOADED = [
    *("depthmup.models.torchvision_ops", "timm"),
    *(f"depthmup.train.{name}" for name in ("checkpoint", "loop", "display", "packs.pack")),
    *(f"depthmup.launch.{name}" for name in ("chain", "cli", "jobs.submit", "jobs.status", "report.page")),
]
OPTIONAL = [  # DeepSpeed's first run imports the second
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("scipy.stats", "sklearn.datasets", "hypothesis", "optuna"),
    "tensorboard.backend.event_processing.event_accumulator",
]


def preload() -> None:
    """Each process would else import DeepSpeed, which takes longer than most of the tests' runs, read the sources of
    the code again, and walk through all of it when it collects garbage."""
    refuse_deprecated()
    gc.disable()  # while there are modules to import: what they hold stays
    for name in PRELOADED:
        import_module(name)
    for name in OPTIONAL:
        with suppress(ImportError):
            import_module(name)
    from depthmup.data.errors import UserError
    from depthmup.train.owner import fingerprint_code

    fingerprint_code()
    from train_configs import packed_digits

    for validation_share, shard_samples in ((0.05, 128), (0.2, 128), (0.2, 300)):
        with suppress(UserError):  # without scikit-learn
            packed_digits(validation_share, shard_samples)
    gc.collect()
    gc.freeze()
    gc.enable()


def refuse_deprecated() -> None:
    for category in (DeprecationWarning, FutureWarning):  # as pyproject.toml has it for the tests' own process
        warnings.filterwarnings("error", category=category, module=r"depthmup\b")
    called_by_deepspeed = r"`torch\.distributed\.\w+` is deprecated"  # a job's log would have them in every step
    warnings.filterwarnings("error", category=FutureWarning, message=called_by_deepspeed)


def serve(listener: socket.socket) -> None:
    """Forks a process for each that connects, and tells it the process id and then the exit code, a line each. Ends
    when standard input does, with the process that started this one."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                if (pid := os.fork()) == 0:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    listener.close()
                    connection.close()
                    run_child(files, *pickle.loads(message))
                for file in files:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                say(connection, pid)
            else:
                pid, connection = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                say(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                connection.close()


def say(connection: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        connection.sendall(f"{number}\n".encode())


def run_child(files: list[int], *given: Any) -> None:
    """Ends the process."""
    code: Any = 1
    try:
        become(files, *given)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter that ends does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become(files: list[int], arguments: list[str], environment: dict[str, str], folder: str, own_session: bool) -> None:
    """In a process just forked: what `cd folder; python ARGUMENTS` does."""
    if own_session:  # a test's, not pytest's
        os.setsid()
        warnings.simplefilter("ignore")
        refuse_deprecated()
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (the process's own)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = ""  # of the server: the tests' folder, which is there a second time
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    option, what, *sys.argv[1:] = arguments
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, main.__dict__)


# ---------------------------------------------------------------- who asks it


class Forked:
    """`python ARGUMENTS` in a process forked from the server. files: its input, output and errors."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        files: tuple[int, int, int],
        folder: str | Path = ROOT,
        own_session: bool = True,
    ) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + address())
        message = pickle.dumps((arguments, environment, str(folder), own_session))
        socket.send_fds(self.connection, [message], files)
        self.answers = self.connection.makefile()
        self.pid = int(self.answers.readline())
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code, minus the signal's number where one ended it; None if it has not ended within so many
        seconds."""
        if self.code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.connection, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.code = int(self.answers.readline())
                    self.connection.close()
        return self.code


@cache
def address() -> str:
    """Starts the server, unless one of the processes above this one has."""
    if NAME in os.environ:
        return os.environ[NAME]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.environ[NAME] = name = f"depthmup-tests-{os.getpid()}"
    listener.bind("\0" + name)
    listener.listen(64)
    path = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": ":".join(path), "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno())],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    listener.close()
    KEPT.append(server)
    return name


KEPT: list[Any] = []  # its input is open as long as this process lives


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        preload()
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        code = sys.argv[sys.argv.index("-c") + 1 :]
        sys.exit(Forked(["-c", *code], dict(os.environ), (0, 1, 2), os.getcwd(), own_session=False).wait())
