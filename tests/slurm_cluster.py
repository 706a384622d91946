"""A real Slurm on this machine for the tests: started by tests/slurm/up.sh, with ways to break and mend it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import train_processes

SCRIPTS = Path(__file__).parent / "slurm"
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")


def why_not() -> str | None:
    """Why a cluster cannot be brought up here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm runs on Linux"
    if os.geteuid() and not (shutil.which("sudo") and succeeds("sudo", "-n", "true")):
        return "needs root or sudo without a password"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(program, path=path) for program in PROGRAMS) or shutil.which("apt-get"):
        return None
    return f"needs {', '.join(PROGRAMS)}, or apt-get to install them"


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def claim_port(count: int = 20) -> tuple[int, Path]:
    """First of `count` free ports, below those that a run's processes meet at, and a folder made for the cluster on
    them: other test processes, which may look at the same time, take others."""
    for first in range(16800, 19000, count):
        folder = Path(f"/tmp/depthmup-slurm-{first}")
        with suppress(FileExistsError), socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", first)):
                folder.mkdir()
                return first, folder
    raise RuntimeError("no free port")


class Cluster:
    """The running cluster. `environment` is what commands need to reach it; with `hasty` they give up after a second
    where the controller is away, not after nine."""

    def __init__(self, directory: Path, port: int = 16800) -> None:
        self.directory = directory
        self.sudo = ["sudo", "-n"] if os.geteuid() else []
        given = {key: value for key, value in os.environ.items() if key.startswith("SLURM_TEST_")}
        self.settings = {**given, "SLURM_TEST_DIR": str(directory), "SLURM_TEST_PORT": str(port)}
        self.environment = {**os.environ, **self.settings, "SLURM_CONF": str(directory / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.hasty = {"SLURM_CONF": str(directory / "hasty.conf")}

    def script(self, name: str, *arguments: str) -> None:
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        command = [*self.sudo, "env", *settings, "bash", str(SCRIPTS / name), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def call(self, *command: str, root: bool = False) -> str:
        prefix = self.sudo if root else []
        return subprocess.run(
            [*prefix, *command], check=True, text=True, env=self.environment, stdout=subprocess.PIPE
        ).stdout.strip()

    def node(self, action: str, name: str) -> None:
        """kill, crash, stop, start, freeze, thaw: see tests/slurm/node.sh."""
        self.script("node.sh", action, name)

    def stop_controller(self) -> None:
        """It saves its state first: one that is killed forgets what was submitted and cancelled a moment ago."""
        pid = int((self.directory / "run" / "slurmctld.pid").read_text())
        subprocess.run([*self.sudo, "kill", f"-{signal.SIGTERM.value}", str(pid)], check=True)
        wait_for(lambda: not self.controller_is_up())

    def start_controller(self) -> None:
        self.call("slurmctld", root=True)
        wait_for(self.controller_is_up)
        wait_for(
            lambda: not {"unk", "down"} & {state.strip("*") for state in self.call("sinfo", "-h", "-o", "%t").split()}
        )

    @contextmanager
    def nothing_begins(self) -> Iterator[None]:
        """Jobs of the default partition wait while the block runs."""
        update = ("scontrol", "update", "PartitionName=main")
        self.call(*update, "State=DOWN", root=True)
        try:
            yield
        finally:
            self.call(*update, "State=UP", root=True)

    def controller_is_up(self) -> bool:
        ping = subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, check=False)
        return ping.returncode == 0

    def queued(self, name: str = "") -> list[str]:
        """Array elements in the queue, as 'ID_INDEX STATE', of jobs whose name holds `name`."""
        lines = self.call("squeue", "-h", "-r", "-o", "%i %T %j").splitlines()
        return [line.rsplit(" ", 1)[0] for line in lines if name in line.rsplit(" ", 1)[1]]

    def describe(self) -> str:
        """The queue and the nodes, each with Slurm's reason."""
        return self.call("squeue", "-r", "-o", "%i %j %T %R") + "\n" + self.call("sinfo", "-N", "-o", "%N %T %E")

    def empty_the_queue(self) -> None:
        self.call("scancel", "--user", self.call("id", "-un"))
        wait_for(lambda: not self.queued())

    def node_of(self, job: str) -> str:
        return self.call("squeue", "-h", "-j", job, "-o", "%N")

    def depthmup(self, *arguments: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        """The command line, in a forked process."""
        environment = {**self.environment, **settings.pop("env", {})}
        return train_processes.depthmup(*arguments, env=environment, **settings)


def wait_for(condition: Callable[[], Any], seconds: float = 300, explain: Callable[[], str] = str) -> Any:
    """Waits until `condition()` is true and returns it. TimeoutError, with what `explain()` says, after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {seconds} s: {condition}\n{explain()}")
        time.sleep(0.2)
    return found


def start() -> Iterator[Cluster]:
    """Brings the cluster up, or skips and says why; fails instead where DEPTHMUP_REQUIRE_SLURM is set."""
    reason = why_not()
    if reason:
        if os.environ.get("DEPTHMUP_REQUIRE_SLURM"):
            pytest.fail(f"the Slurm tests must run here: {reason}")
        pytest.skip(f"no Slurm here: {reason}")
    port, folder = claim_port()
    cluster = Cluster(folder, port)
    try:
        cluster.script("up.sh")
        yield cluster
    finally:
        cluster.script("down.sh", "--purge")
