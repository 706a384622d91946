"""Starts `python ARGUMENTS` in several processes that find each other, as torchrun would, or `depthmup ARGUMENTS`.

They are forked from one process that has imported torch and the loop before, which takes seconds of a core each time.
"""

import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        *("depthmup.models.torchvision_ops", "timm"),
        *(f"depthmup.train.{name}" for name in ("checkpoint", "loop", "display", "packs.pack")),
        *(f"depthmup.launch.{name}" for name in ("chain", "jobs.submit", "jobs.status", "report.page")),
        "preloaded",
    ]
)


@cache
def fork_server() -> Any:
    """The running server; its `Process` is multiprocessing's. Before Python 3.13 it does not look for what it preloads
    where this process does, and leaves out silently what it does not find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return FORK_SERVER


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
    }


def become(arguments: list[str], environment: dict[str, str], output: str, errors: str, folder: Path = ROOT) -> None:
    """In a process just forked: what `cd folder; python ARGUMENTS > output 2> errors` does, in a session of its own."""
    os.setsid()
    for descriptor, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.simplefilter("ignore")
    for category in (DeprecationWarning, FutureWarning):  # as pyproject.toml has it for the tests' own process
        warnings.filterwarnings("error", category=category, module=r"depthmup\b")
    called_by_deepspeed = r"`torch\.distributed\.\w+` is deprecated"  # a job's log would have them in every step
    warnings.filterwarnings("error", category=FutureWarning, message=called_by_deepspeed)
    option, what, *sys.argv[1:] = arguments
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


class Process:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.output: IO[str] = tempfile.NamedTemporaryFile("r+", prefix="depthmup-test-")  # noqa: SIM115  (kept open)
        self.process = fork_server().Process(target=become, args=(arguments, environment, *[self.output.name] * 2))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout, self.output.read())
        return self.output.read(), None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(arguments: list[str], world_size: int) -> list[Process]:
    """`python ARGUMENTS` in `world_size` processes."""
    port = free_port()
    return [Process(arguments, environment(rank, world_size, port)) for rank in range(world_size)]


START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from depthmup.launch.cli import main; main()"


def depthmup(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line in a forked process. Where its import, its interpreter or its session is the point: START."""
    command = ["-c", START, *map(str, arguments)]
    with tempfile.NamedTemporaryFile("r+") as output, tempfile.NamedTemporaryFile("r+") as errors:
        given = (command, dict(os.environ if env is None else env), output.name, errors.name, cwd or Path.cwd())
        process = fork_server().Process(target=become, args=given)
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, output.read(), errors.read())


def run_function(module: str, function: str, world_size: int, *arguments: str, timeout: float = 900) -> None:
    """Calls `module.function(*arguments)` in each process; fails with the processes' output when one fails."""
    code = f"import sys, {module}; {module}.{function}(*sys.argv[1:])"
    processes = start(["-c", code, *arguments], world_size)
    outputs = []
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-6000:]
