"""One JSON object a line in metrics.jsonl, and the same to wandb when the config asks for it."""

import json
import math
from pathlib import Path
from typing import Any

from data.errors import UserError
from train.config import RunConfig, TrackConfig, to_plain


def truncate_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, so that no step stands twice after a resume. A half-written line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    path.write_text("".join(kept))


def mean_loss(path: Path, after_step: int) -> float:
    """Mean training loss over the steps after `after_step`, as far as whole lines lie there, else the last line's."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps, losses, before = 0, 0.0, 0
    for line in lines:
        if before >= after_step or line is lines[-1]:
            steps += line["step"] - before
            losses += (line["step"] - before) * line["loss"]
        before = line["step"]
    return losses / steps


class MetricsWriter:
    """Appends to metrics.jsonl from `resumed_step` on."""

    def __init__(self, path: Path, resumed_step: int, tracker: "WandbTracker | None" = None) -> None:
        truncate_after(path, resumed_step)
        self.file = path.open("a", buffering=1)
        self.tracker = tracker

    def write(self, line: dict[str, float]) -> None:
        """`line["step"]` is the number of steps done."""
        strict = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
        self.file.write(json.dumps(strict, allow_nan=False) + "\n")
        if self.tracker:
            self.tracker.log(strict)

    def close(self) -> None:
        self.file.close()
        if self.tracker:
            self.tracker.finish()


class WandbTracker:
    """A wandb run whose id is the run's hash: a run that is requeued goes on as the same wandb run."""

    def __init__(self, track: TrackConfig, config: RunConfig, run_id: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("track.wandb needs wandb: pip install 'depthmup[wandb]', or set track.wandb=off") from None
        self.run = wandb.init(
            project=track.project,
            group=track.group,
            id=run_id,
            name=run_id,
            config=to_plain(config),
            dir=directory,
            mode="offline" if track.wandb == "offline" else "online",
            resume="allow",
            settings=wandb.Settings(silent=True),
        )

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["step"])

    def finish(self) -> None:
        self.run.finish()
