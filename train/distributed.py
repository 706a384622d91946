"""The processes of one run: who they are (torchrun or srun), how they meet, and how they agree to stop."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from depthmup.data.errors import UserError
from depthmup.train.config import ParallelConfig
from depthmup.train.interrupt import Interrupt, Interrupted

FIRST_STEP_TIMEOUT = timedelta(minutes=30)  # compilation and a cold file system happen in the first step
# What gloo and NCCL throw, as plain RuntimeErrors, when a process is gone or does not answer in time. A connection to
# somewhere else that is lost, as to a store of images, has no such words.
GONE = re.compile(r"\bgloo\b")
NETWORK = re.compile(r"remote|network|connection|socket|system error|time|abort", re.IGNORECASE)  # of what NCCL throws
LATE = re.compile(r"timed? ?out", re.IGNORECASE)


class LostPeer(Exception):
    """Another process of the run is gone, or does not answer. It says nothing about the run: all of its processes start
    again, from the newest checkpoint."""


def describe_lost_peer(error: BaseException, world: "World") -> LostPeer | None:
    """`error`, or what it came from, as the loss of another process; None where it is anything else."""
    seen: list[BaseException] = [error]
    for one in seen:
        words = " ".join(str(one).split())
        if isinstance(one, dist.DistBackendError):
            is_lost = bool(NETWORK.search(words))
        else:
            is_lost = isinstance(one, dist.DistError) or (isinstance(one, RuntimeError) and bool(GONE.search(words)))
        if is_lost:
            what = "does not answer" if LATE.search(words) else "is gone"
            reason = words.split(". ")[0][:200]  # gloo goes on with advice
            return LostPeer(f"process {world.rank} of {world.size}: another process {what} ({reason})")
        inner = [pair[0] for pair in one.failures.values()] if isinstance(one, CheckpointException) else []
        seen += [cause for cause in (one.__cause__, one.__context__, *inner) if cause and cause not in seen]
    return None


@dataclass(frozen=True)
class World:
    """This process among those of its run. The default is a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "localhost"
    port: int = 29500

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_first_host(nodes: str) -> str:
    """First host of Slurm's short form: 'gpu[03-07,12],cpu1' -> 'gpu03'."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    assert match, nodes
    return match[1] + (match[2] or "") + match[3]


def read_world_from_environment(environment: "os._Environ[str] | dict[str, str]" = os.environ) -> World:
    """Reads torchrun's variables, else those of an srun with several tasks; else a run of one process.

    The tasks are the step's: in `salloc -n 2` the job has two, and a command that is typed there is one process, which
    may stand in a step of its own (the shell's).
    """
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:
        host, port = e.get("MASTER_ADDR", "localhost"), int(e.get("MASTER_PORT", "29500"))
        return World(int(e["RANK"]), int(e["WORLD_SIZE"]), int(e.get("LOCAL_RANK", "0")), host, port)
    tasks = int(e.get("SLURM_STEP_NUM_TASKS", e.get("SLURM_NTASKS", "1"))) if "SLURM_STEP_ID" in e else 1
    if tasks > 1:
        nodes = e.get("SLURM_STEP_NODELIST") or e.get("SLURM_JOB_NODELIST", "localhost")
        restarts = int(e.get("SLURM_RESTART_COUNT", "0"))  # a process of the last start may still have its port
        # below 32768, where the ports begin that Linux gives to any program's connections
        port = 20000 + int(e["SLURM_JOB_ID"]) * 16 % 12768 + (int(e["SLURM_STEP_ID"]) + restarts) % 16
        host, port = e.get("MASTER_ADDR", read_first_host(nodes)), int(e.get("MASTER_PORT", port))
        return World(int(e["SLURM_PROCID"]), tasks, int(e["SLURM_LOCALID"]), host, port)
    return World()


def pick_device(name: str, world: World) -> torch.device:
    """This process's device, made the current one. Raises UserError when a GPU is asked for and there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU: use train.device=cpu or auto")
    visible = torch.cuda.device_count()
    if world.local_rank >= visible > 1:
        raise UserError(f"process {world.rank} has local rank {world.local_rank}, but its node has {visible} GPUs")
    device = torch.device("cuda", world.local_rank % visible)  # srun --gpus-per-task shows each task just its own
    torch.cuda.set_device(device)
    return device


def set_timeout(timeout: timedelta, except_for: dist.ProcessGroup | None = None) -> None:
    """Sets how long a collective may wait for the other processes, in every group that there is: DeepSpeed reduces
    gradients in one of its own. `except_for` keeps the time that it has."""
    if dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:  # torch has no public list
            if group is not except_for:
                group.set_timeout(timeout)


@contextmanager
def process_group(world: World, device: torch.device, config: ParallelConfig, engine: str) -> Iterator[None]:
    """The default process group while the block runs; none for engine `none`, and one that exists already is used.

    Raises LostPeer that names host and port when the processes do not find each other in `init_timeout`, and when this
    one loses another while the block runs; UserError for a port in use, and for what keeps a backend from starting.
    """
    if engine == "none" or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.init_timeout)
    try:
        if world.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            os.environ |= {"MASTER_ADDR": world.host, "MASTER_PORT": str(world.port)}
            dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
        dist.all_reduce(torch.zeros(1, device=device))  # everybody is here, or it fails now
    except RuntimeError as error:  # torch's DistError and what gloo and nccl throw are RuntimeErrors
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in reason:
            raise UserError(
                f"{world.host}:{world.port} is used by another program: set MASTER_PORT to a free port"
            ) from None
        kind = LostPeer if describe_lost_peer(error, world) else UserError
        raise kind(
            f"process {world.rank} of {world.size} found no others at {world.host}:{world.port} within "
            f"{config.init_timeout} s: set MASTER_ADDR and MASTER_PORT to a reachable host and a free port ({reason})"
        ) from None
    set_timeout(FIRST_STEP_TIMEOUT)
    try:
        yield
    except Exception as error:
        if world.size == 1 or isinstance(error, Interrupted):
            dist.destroy_process_group()  # otherwise the others may be gone, and the process is about to end
        elif lost := describe_lost_peer(error, world):
            raise lost from error
        raise
    dist.destroy_process_group()


def average_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean over the processes, the same tensor everywhere."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in their order, by way of the CPU: no GPU is waited for."""
    gathered = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


class StopVote:
    """All processes stop after the same step when any of them was asked to.

    The votes of one step are counted while the next one computes, on the CPU, so that nobody waits for them.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.votes: torch.Tensor | None = None
        self.counting: dist.Work | None = None

    def stop(self) -> bool:
        """Called by every process after every step."""
        if self.group is None:
            return self.interrupt.requested
        if self.counting:
            self.counting.wait()
        decided = self.votes is not None and bool(self.votes)
        self.votes = torch.tensor(int(self.interrupt.requested))
        self.counting = dist.all_reduce(self.votes, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return decided
