"""Starts a function of a test file in several processes that find each other, as torchrun would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
    }


def start(arguments: list[str], world_size: int) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `world_size` processes."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(rank, world_size, port),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]


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
