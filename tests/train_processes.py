"""Starts `python ARGUMENTS` in several processes that find each other, as torchrun would, or `depthmup ARGUMENTS`.

They are forked from one process that has imported torch and the loop before, which takes seconds of a core each time.
"""

import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from fork_server import ROOT as ROOT
from fork_server import Forked


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


class Process:
    """A forked process, with what the tests use of subprocess.Popen. Errors are part of its output, unless there is a
    file for them."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        folder: Path = ROOT,
        errors: IO[str] | None = None,
    ) -> None:
        self.output: IO[str] = tempfile.NamedTemporaryFile("a+", prefix="depthmup-test-")  # noqa: SIM115  (kept open)
        output = self.output.fileno()
        with open(os.devnull) as nothing:
            files = (nothing.fileno(), output, errors.fileno() if errors else output)
            self.process = Forked(arguments, environment, files, folder)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.wait(0)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        ended = self.process.wait(timeout) is not None
        self.output.seek(0)
        if not ended:
            raise subprocess.TimeoutExpired("python", timeout or 0, self.output.read())
        return self.output.read(), None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            self.process.wait()


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
    with tempfile.TemporaryFile("a+") as errors:
        process = Process(command, dict(os.environ if env is None else env), cwd or Path.cwd(), errors)
        output, _ = process.communicate()
        errors.seek(0)
        assert process.returncode is not None
        return subprocess.CompletedProcess(command, process.returncode, output, errors.read())


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
