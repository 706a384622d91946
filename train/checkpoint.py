"""Checkpoints: checkpoints/step-N/, written in the background under a temporary name, made durable, then renamed.

A directory named step-N is therefore complete; a kill leaves at most a temporary one, which the next save removes.
It holds tensors by qualified name (torch.distributed.checkpoint), so that it loads into any engine and any number of
processes, and state.json: the step, the data's position, losses that are not logged yet, the run's identity and a
checksum of every file.
"""

import io
import json
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from depthmup.data.errors import UserError
from depthmup.data.files import describe_full_disk, naming
from depthmup.data.order import State
from depthmup.train.config import RunConfig
from depthmup.train.contents import CONTENTS, Reader, Writer
from depthmup.train.owner import check_owner, describe_owner

# torch says so whenever `no_dist` is set, which is how one process alone has to be set.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

STEP = re.compile(r"step-(\d+)")


class TensorPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, except that it loads tensors alone: of anything else it would run the pickle."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor, and has no place in a checkpoint")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its tensors."""

    step: int
    data: State
    losses: list[float]  # of the steps since the last metrics line
    seconds: float = 0.0  # that it took so far, summed over its processes and starts
    code: str = ""  # fingerprints of the sources that brought it here, joined by +


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def compute_checksum(path: Path) -> list[int]:
    """[size in bytes, CRC-32]."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_progress(content: dict[str, Any]) -> Progress:
    """Of a state.json. Raises KeyError or TypeError where it is none."""
    return Progress(
        content["step"], State(**content["data"]), content["losses"], content["seconds"], content.get("code", "unknown")
    )


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint cannot be used: it is damaged, or whole and nothing that this version or user can read."""

    reason: str
    damaged: bool


def find_fault(path: Path, rank: int, world_size: int) -> Fault | None:
    """What is wrong with the checkpoint, or None. Each process reads its share of the files."""
    try:
        content = json.loads((path / "state.json").read_text())
        read_progress(content)  # raises, like the next line, where the file does not hold what load_newest reads
        content["identity"].items()
        for number, (name, expected) in enumerate(sorted(content["files"].items())):
            if number % world_size == rank and compute_checksum(path / name) != expected:
                return Fault(f"{name} is not what was written", damaged=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = isinstance(error, OSError | ValueError) and not isinstance(error, PermissionError)
        return Fault(f"{type(error).__name__}: {error}", damaged)  # JSON that was cut off is none: ValueError
    return None


def list_reasons(error: CheckpointException) -> list[str]:
    """What went wrong in each process that failed, in one line each; torch's own text begins with ranks."""
    return [describe(inner) for inner, _ in error.failures.values()]


def describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def copy_to_cpu(state: Any) -> Any:
    """A copy that later steps do not change: of this process's shards where tensors are sharded."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    return {key: copy_to_cpu(value) for key, value in state.items()}


class Checkpoints:
    """Saves and loads one run's checkpoints. Every process of the run holds one and calls the same methods."""

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        log: Callable[[str], None],
    ) -> None:
        self.directory, self.config, self.log, self.owner = directory, config, log, describe_owner(config)
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group else 0
        self.world_size = dist.get_world_size() if self.group else 1
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.saved_step: int | None = None  # of the last save that succeeded, the same in every process

    def gather_all(self, mine: Any) -> list[Any]:
        """What every process has to say, in the order of ranks."""
        if not self.group:
            return [mine]
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, mine, group=self.group)
        return everybody

    def save(self, progress: Progress, tensors: Any, problem: OSError | None = None) -> None:
        """Copies the tensors and returns; a thread writes them. A save that is still under way is waited for.

        Nothing is written when the step is saved already, or when any process has a `problem`: then it could not make
        durable what goes with this step, and a resume has to begin before it.
        """
        self.wait()
        if progress.step != self.saved_step:
            self.pending = self.writer.submit(self.write, progress, copy_to_cpu(tensors), problem)

    def wait(self) -> None:
        """Returns when the last save is durable, or has failed and said so in the log."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def write(self, progress: Progress, tensors: Any, problem: OSError | None) -> None:
        temporary = self.directory / f"tmp-step-{progress.step}"
        if self.rank == 0:
            for stale in self.directory.glob("tmp-step-*"):
                self.remove(stale)
        error = next((str(error) for error in self.gather_all(problem) if error), None)
        if not error:
            mine = self.write_shards(temporary, tensors)
            answers = self.gather_all(mine)
            error = next((error for error, _ in answers if error), None)
            if self.rank == 0 and not error:
                error = self.publish(progress, temporary, {k: v for _, files in answers for k, v in files.items()})
            error = self.gather_all(error)[0]
        if not error:
            self.saved_step = progress.step
        elif self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            self.log(f"warning: no checkpoint of step {progress.step}, the older ones stay ({error})")

    def write_shards(self, temporary: Path, tensors: Any) -> tuple[str | None, dict[str, list[int]]]:
        """Every process writes what it holds. Returns what went wrong here, or the checksums of its files."""
        try:
            writer = Writer(temporary)
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            mine = [*temporary.glob(f"__{self.rank}_*"), *([temporary / CONTENTS] if self.rank == 0 else [])]
            return None, {path.name: compute_checksum(path) for path in mine}
        except CheckpointException as raised:
            return list_reasons(raised)[0], {}
        except (OSError, RuntimeError) as raised:  # torch's writer raises RuntimeError on a full disk
            return str(raised).strip().splitlines()[0], {}

    def publish(self, progress: Progress, temporary: Path, files: dict[str, list[int]]) -> str | None:
        """Durable under its final name, then the older ones go. Returns what went wrong."""
        final, aside = self.directory / f"step-{progress.step}", self.directory / f"tmp-step-{progress.step}-old"
        content = {**asdict(progress), **self.owner, "files": files}
        try:
            with naming(temporary):
                (temporary / "state.json").write_text(json.dumps(content))
            for path in (*temporary.iterdir(), temporary):
                flush_to_disk(path)
            if final.exists():  # a corrupt one that was passed over, or that of a replica which was ahead of its pack
                os.rename(final, aside)
            os.rename(temporary, final)
            flush_to_disk(self.directory)
        except OSError as error:
            return describe_full_disk(error, str(temporary)) or str(error)
        steps = [(int(path.name.removeprefix("step-")), path) for path in complete(self.directory)]
        upto = [(step, path) for step, path in steps if step <= progress.step]  # later ones are corrupt, passed over
        for step, path in upto[self.config.train.keep_last :]:
            if not self.config.train.keeps(step):
                self.remove(path)
        if aside.exists():
            self.remove(aside)
        return None

    def remove(self, path: Path) -> None:
        """Says so where the file system keeps something of it, as NFS does of an open file."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            self.log(f"warning: {path.name} could not be removed ({error})")

    def load_newest(self, template: Callable[[], Any]) -> tuple[Progress, Any] | None:
        """The newest checkpoint that is whole, or None when there is none to load.

        template: gives tensors of the right names, shapes and shards, which are overwritten. Raises UserError when the
        checkpoint belongs to another run or cannot be read though it is whole, or when all are damaged. What is whole
        is not passed over: the run would go on from before it, and write over it.
        """
        corrupt = []
        for path in complete(self.directory):
            problems = [problem for problem in self.gather_all(find_fault(path, self.rank, self.world_size)) if problem]
            if not problems:
                content = json.loads((path / "state.json").read_text())
                check_owner(path, content, self.config, self.owner["shards"])
                tensors, reader = template(), Reader(path)
                try:
                    dcp.load(
                        tensors,
                        storage_reader=reader,
                        planner=TensorPlanner(),
                        process_group=self.group,
                        no_dist=self.group is None,
                    )
                except CheckpointException as error:  # the same for every process
                    said = [describe(reader.fault)] if reader.fault else list_reasons(error)
                    problems = [Fault(reason, damaged=False) for reason in said]
                else:
                    self.log(f"resumed from {path.name}")
                    return read_progress(content), tensors
            damage = next((problem for problem in problems if problem.damaged), None)
            if not damage:
                raise UserError(
                    f"{path} is as it was written, but this version of torch or depthmup, or this user, cannot read it "
                    f"({problems[0].reason}). Continue with the version that wrote it, or train into another "
                    "directory; nothing was changed here"
                )
            corrupt.append(f"{path.name} is corrupt ({damage.reason})")
            self.log(f"warning: {corrupt[-1]}: it is passed over")
        if corrupt:
            raise UserError(
                f"{self.directory}: no checkpoint can be used: {'; '.join(corrupt)}. Go on from a copy, or train into "
                "another directory; nothing was changed here"
            )
        return None

    def close(self) -> None:
        self.wait()
        self.writer.shutdown()
