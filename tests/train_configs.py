"""Small runs on the packed digits, for the tests of train."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from depthmup.data.pack import pack
from depthmup.train.config import RunConfig
from depthmup.train.interrupt import Interrupt
from depthmup.train.reading import from_plain, set_dotted

VIT = {"family": "vit", "width": 16, "depth": 4, "base_width": 8, "base_depth": 2, "num_heads": 2, "patch_size": 2}
CONV_RESNET = {"family": "conv_resnet", "width": 8, "depth": 6, "base_width": 4, "base_depth": 3}
TIMED = {"images_per_second", "data_wait", "memory", "mfu"}  # what a clock or the process decides
DIGITS = {"num_classes": 10, "image_size": 8, "in_channels": 1}


class After(Interrupt):
    """Asks to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:  # type: ignore[override]  # a flag that sets itself
        self.left -= 1
        return self.left == 0


@cache
def packed_digits(validation_share: float, shard_samples: int) -> tuple[Path, Any]:
    """Where they are, until the second is gone. The fork server packs what tests take, so that what it forks
    leaves no folder."""
    folder = TemporaryDirectory(prefix="depthmup-digits-")
    path = Path(folder.name) / "digits"
    pack("sklearn:digits", path, validation_share=validation_share, shard_samples=shard_samples)
    return path, folder


def pack_digits(root: Path, validation_share: float = 0.05, shard_samples: int = 128) -> Path:
    """A copy of one's own. Few images for validation: a run of 20 steps would need more time for them than for its
    training."""
    shutil.copytree(packed_digits(validation_share, shard_samples)[0], root)
    return root


def run_config(shards: Path | str, *overrides: str, model: dict[str, Any] = CONV_RESNET) -> RunConfig:
    """20 steps of 32 images, every step logged."""
    raw = {
        "model": {**model, **DIGITS},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "data": {"name": "digits", "root": str(shards), "num_streams": 4},
        "train": {"samples": 640, "global_batch_size": 32, "log_every": 1, "device": "cpu", "evaluate": ["val"]},
    }
    for override in overrides:
        set_dotted(raw, override)
    return from_plain(RunConfig, raw, "test")


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def metric(directory: Path, key: str) -> list[Any]:
    """One column of them."""
    return [line[key] for line in metrics(directory)]


def losses(directory: Path) -> list[float]:
    return metric(directory, "loss")


def timeless_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines without what is TIMED."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in metrics(directory)]
