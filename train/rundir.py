"""A run's directory is the truth about it. Nothing here needs torch, so the launcher can read a thousand of them.

config.yaml  metrics.jsonl  checkpoints/step-N/  weights.safetensors  weights_ema.safetensors
done.json | failed.json  log-RANK.txt  lost.json (which process was the first to miss another one)
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.files import naming, write_atomically

# Exit codes of `python -m depthmup.train`, which a launcher reads.
EXIT_DONE = 0
EXIT_FAILED = 1  # see failed.json
EXIT_USER_ERROR = 2  # one line on standard error says what to mend
EXIT_DIVERGED = 3  # done.json says so too: a result, but not what was wanted from a single run
EXIT_REQUEUE = 75  # stopped by a signal, checkpoint saved: start it again (EX_TEMPFAIL of sysexits.h)
EXIT_LOST_PEER = 76  # another process of the run is gone or answers no more: start all of them again


def explain_unreadable(path: Path) -> UserError:
    return UserError(
        f"{path}: damaged, or written by another version of depthmup: move this file away, or choose another study.name"
    )


def parse(text: str, path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object `text` of `path`, with `keys` in it. Raises UserError for anything else: a file that was cut
    short, or is another version's."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() >= {*keys}:
        raise explain_unreadable(path)
    return content


def parse_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The lines of `path`, each as `parse`; a half-written one at its end is left out, and without a file there is
    none. Raises UserError."""
    text = read_text(path)
    return [parse(line, path, *keys) for line in text.split("\n")[:-1]] if text else []


def read_text(path: Path) -> str | None:
    """None without a file. Bytes that are no text, of a damaged file, come as such that no reader takes."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def read_object(path: Path, *keys: str) -> dict[str, Any] | None:
    """The JSON object in the file `path`, as `parse`; None without a file. Raises UserError."""
    text = read_text(path)
    return None if text is None else parse(text, path, *keys)


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a JSON object to the lines of `path`. Half a line at its end, which a kill or a full disk has left, goes:
    with the new one it would be a damaged line for ever."""
    with naming(path), open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


PRUNED = "pruned"  # outcome of a run that ended early because of its limits


@dataclass(frozen=True)
class Limits:
    """Where a search, or a study, lets a run end early."""

    steps: Mapping[int, float | None] = field(default_factory=dict)  # above it the run ends there; None: it goes on
    metric: str = "minival_loss"  # evaluated at these steps; or "loss", the training loss since the last metrics line


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def wandb_address(self) -> Path:
        """Holds the run's address on W&B where it was tracked online."""
        return self.path / "wandb" / "address.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def list_checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, in no order."""
        return [int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")]

    def find_newest_step(self) -> int:
        """Of the complete checkpoints, 0 without one."""
        return max(self.list_checkpoint_steps(), default=0)

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def average(self) -> Path:
        return self.path / "weights_ema.safetensors"

    @property
    def log(self) -> Path:
        return self.locate_rank_log(0)

    def locate_rank_log(self, rank: int) -> Path:
        return self.path / f"log-{rank}.txt"

    def add_to_log(self, text: str, rank: int = 0) -> None:
        """A log that cannot be written, as on a full disk, does not end the run: the text goes to standard error."""
        try:
            with open(self.locate_rank_log(rank), "ab", buffering=0) as file:
                file.write(f"{text}\n".encode())
        except OSError as error:
            print(f"{text}\n({error})", file=sys.stderr)

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def write_done(self, result: dict[str, Any]) -> None:
        """Marks the run done: the last thing that a run writes. `result["outcome"]` is completed, diverged,
        PRUNED."""
        write_atomically(self.path / "done.json", json.dumps(result, indent=1).encode())
        (self.path / "failed.json").unlink(missing_ok=True)

    def limits(self) -> Limits:
        """Without steps where nobody has set any."""
        read = self.read_marker("limits.json", "steps", "metric")
        if read is None:
            return Limits()
        return Limits({int(step): limit for step, limit in read["steps"].items()}, read["metric"])

    def write_limits(self, limits: Limits) -> None:
        if limits != self.limits():
            write_atomically(self.path / "limits.json", json.dumps(vars(limits)).encode())

    def write_failed(self, reason: dict[str, Any]) -> None:
        write_atomically(self.path / "failed.json", json.dumps(reason, indent=1).encode())

    def write_first(self, name: str, reason: dict[str, Any], started: float) -> bool:
        """Writes `reason` to the file `name`, unless another process has: it was the first to fail or to miss another
        process, and the others fail because of it.

        started: when this process did, in seconds since the epoch; an older file is one of an earlier start. Returns
        whether this process was the first.
        """
        path, temporary = self.path / name, self.path / f".{name}.{socket.gethostname()}.{os.getpid()}"
        temporary.write_text(json.dumps(reason, indent=1))
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.stat().st_mtime >= started:
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def read_marker(self, name: str, *keys: str) -> dict[str, Any] | None:
        return read_object(self.path / name, *keys)

    def done(self) -> dict[str, Any] | None:
        """The marker's content, None before the run's end. Raises UserError for one that cannot be read."""
        return self.read_marker("done.json", "outcome")

    def failed(self) -> dict[str, Any] | None:
        """As `done`."""
        return self.read_marker("failed.json", "error")

    def lost(self) -> dict[str, Any] | None:
        """Which process was the first to miss another one in the last start, and why; None where none did."""
        return self.read_marker("lost.json", "error")

    def read_last_metrics(self) -> dict[str, Any] | None:
        """The last whole line of metrics.jsonl, read from the file's end: as much as it takes, as a line of many
        experts is long."""
        try:
            with open(self.metrics, "rb") as file:
                size, length = file.seek(0, 2), 4096
                while True:
                    file.seek(max(0, size - length))
                    lines = file.read().split(b"\n")[:-1]
                    if len(lines) > 1 or length >= size:  # of the first line nothing says that it is whole
                        break
                    length *= 2
        except FileNotFoundError:
            return None
        return parse(lines[-1].decode(errors="replace"), self.metrics, "step") if lines and lines[-1] else None
