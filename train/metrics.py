"""One JSON object a line in metrics.jsonl, and the same to wandb or TensorBoard when the config asks for it."""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.train.config import RunConfig, TrackConfig, run_hash
from depthmup.train.reading import to_plain
from depthmup.train.rundir import RunDirectory, parse_lines

Log = Callable[[str], None]
Result = TypeVar("Result")
WANDB_SECONDS = 10  # for wandb's server to answer at the start
silent_servers: set[str | None] = set()  # of wandb, that did not answer this process: the runs of a pack wait once


def truncate_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, so that no step stands twice after a resume. A half-written line goes too. Raises
    UserError for a damaged one before the last."""
    lines = parse_lines(path, "step")
    if path.exists():
        kept = takewhile(lambda line: line["step"] <= step, lines)
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def average_loss(path: Path, after_step: int) -> float:
    """Mean training loss over the steps after `after_step`, as far as whole lines lie there, else the last line's."""
    lines = parse_lines(path, "step", "loss")
    steps, losses, before = 0, 0.0, 0
    for line in lines:
        if before >= after_step or line is lines[-1]:
            steps += line["step"] - before
            losses += (line["step"] - before) * line["loss"]
        before = line["step"]
    return losses / steps


class Tracker(Protocol):
    """A place beside the file that gets every line, too."""

    def log(self, line: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class Recorder:
    """The tracker called `name`, which only records: once anything in it fails, `of`, what it is to record, goes on
    without it, warned."""

    def __init__(self, name: str, start: Callable[[], Tracker], warn: Log, of: str = "the run") -> None:
        """Raises UserError, of `start`, when it is not installed."""
        self.name, self.warn, self.of = name, warn, of
        self.tracker: Tracker | None = None
        self.tracker = self.attempt(start)

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # whatever wandb, its server, the network or a disk may raise
            self.tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.warn(f"warning: {self.name} failed, and {self.of} goes on without it: {reason}")
            return None

    def log(self, line: dict[str, Any]) -> None:
        if tracker := self.tracker:
            self.attempt(lambda: tracker.log(line))

    def finish(self) -> None:
        if tracker := self.tracker:
            self.attempt(tracker.finish)


class MetricsWriter:
    """Appends to metrics.jsonl from `resumed_step` on. On a full disk the lines wait until there is room again."""

    def __init__(self, path: Path, resumed_step: int, warn: Log, trackers: Sequence[Tracker] = ()) -> None:
        truncate_after(path, resumed_step)
        self.file = path.open("ab", buffering=0)  # a buffer of Python's would fail once more when it is closed
        self.warn, self.trackers = warn, trackers
        self.unwritten = b""

    def write(self, line: dict[str, float]) -> None:
        """`line["step"]` is the number of steps done."""
        strict = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
        waiting = bool(self.unwritten)
        self.unwritten += json.dumps(strict, allow_nan=False).encode() + b"\n"
        if (error := self.write_out()) and not waiting:
            self.warn(f"warning: {error}; lines from step {line['step']} on wait until they can be written")
        for tracker in self.trackers:
            tracker.log(strict)

    def write_out(self) -> OSError | None:
        """Writes what waits, as far as the disk takes it; returns why not all of it."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            error.filename = self.file.name
            return error
        return None

    def flush(self) -> OSError | None:
        """Makes the lines durable, before a checkpoint that goes on from them; returns why they cannot be."""
        if error := self.write_out():
            return error
        os.fsync(self.file.fileno())
        return None

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def start_wandb(track: TrackConfig, directory: Path, warn: Log, **settings: Any) -> Any:
    """A wandb run with `settings` of wandb.init. Without a key, or where the server does not answer, it is kept in
    `directory`, for `wandb sync`. Raises UserError where wandb is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("track.wandb needs wandb: pip install 'depthmup[wandb]', or set track.wandb=off") from None
    start = partial(
        wandb.init,
        project=track.project,
        dir=directory,
        resume="allow",
        reinit="create_new",  # each run of a pack is a run of wandb's
        settings=wandb.Settings(silent=True, init_timeout=WANDB_SECONDS, login_timeout=WANDB_SECONDS),
        **settings,
    )
    later = f"wandb sync {directory}/wandb/offline-run-*"
    server = os.environ.get("WANDB_BASE_URL")
    if track.wandb == "online" and server not in silent_servers:
        try:
            if wandb.login(prompt=False):
                return start(mode="online")
            warn(f"warning: no wandb key, so track.wandb is offline: run `wandb login`, and later `{later}`")
        except Exception as error:  # of the network, the server, a wrong key
            silent_servers.add(server)
            reason = " ".join(str(error).split())
            warn(f"warning: wandb did not start online, so track.wandb is offline: later run `{later}` ({reason})")
    return start(mode="offline")


class WandbTracker:
    """A wandb run whose id is the run's hash: a run that is requeued goes on as the same wandb run."""

    def __init__(self, track: TrackConfig, config: RunConfig, run_id: str, directory: Path, warn: Log) -> None:
        settings = {"group": track.group, "id": run_id, "name": run_id, "config": to_plain(config)}
        self.run = start_wandb(track, directory, warn, **settings)
        self._keep_address(directory)

    def _keep_address(self, directory: Path) -> None:
        """For the report, which links to it."""
        if self.run.url:
            file = RunDirectory(directory).wandb_address
            file.parent.mkdir(exist_ok=True)
            file.write_text(self.run.url)

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["step"])

    def finish(self) -> None:
        self.run.finish()


def open_board(directory: Path, purge_step: int) -> Any:
    """A SummaryWriter; what earlier ones wrote from `purge_step` on is hidden. Raises UserError where there is none."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "track.tensorboard needs tensorboard: pip install 'depthmup[tensorboard]', or set it to false"
        ) from None
    return SummaryWriter(str(directory), purge_step=purge_step)


class TensorBoardTracker:
    """Event files in the run's directory; on a resume, what lies after the resumed step is hidden."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        self.writer = open_board(directory / "tensorboard", purge_step=resumed_step + 1)

    def log(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(key, value, line["step"])

    def finish(self) -> None:
        self.writer.close()


def open_trackers(config: RunConfig, directory: Path, resumed_step: int, warn: Log) -> list[Tracker]:
    """The trackers that `config.track` asks for. Raises UserError when one is not installed."""
    trackers: list[Tracker] = []
    if config.track.wandb != "off":
        start = partial(WandbTracker, config.track, config, run_hash(config), directory, warn)
        trackers.append(Recorder("wandb", start, warn))
    if config.track.tensorboard:
        trackers.append(Recorder("tensorboard", partial(TensorBoardTracker, directory, resumed_step), warn))
    return trackers
