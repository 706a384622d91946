"""The index of a folder of WebDataset shards: what lies where, so that an order can be planned without reading a tar.

index.json               classes, and per split the shards with their counts, sizes and checksums
train-000000.index.npz   one shard: byte offset of each sample and its label (int64 arrays `offsets`, `labels`)
"""

import io
import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.errors import UserError

INDEX_NAME = "index.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file beside `path`, makes it durable, and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, number of samples, size in bytes and SHA-256."""

    name: str
    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Span:
    """`samples` consecutive samples of a shard, from its sample number `first`."""

    shard: str
    first: int
    samples: int


@dataclass(frozen=True)
class Index:
    """All shards of a data set. `splits` maps a split's name (train, val) to its shards in order."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]

    @classmethod
    def load(cls, root: Path) -> "Index":
        """Reads `root`/index.json. Raises UserError when there is none or it is not an index."""
        path = root / INDEX_NAME
        try:
            raw = json.loads(path.read_text())
            splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in raw["splits"].items()}
            return cls(root, tuple(raw["classes"]), splits)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: no such file. Make shards from a folder of images with 'depthmup pack SOURCE {root}', "
                f"or set data.source in the config"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r}); delete it and pack again") from None

    def save(self) -> None:
        raw = {
            "classes": self.classes,
            "splits": {name: [asdict(shard) for shard in shards] for name, shards in self.splits.items()},
        }
        write_atomically(self.root / INDEX_NAME, (json.dumps(raw, indent=1) + "\n").encode())

    def check_files(self) -> None:
        """Raises UserError when a shard is missing or does not have the size that the index states."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            path = self.root / shard.name
            if not path.exists():
                raise UserError(f"{path}: missing, though {INDEX_NAME} lists it. Restore it or pack again")
            if path.stat().st_size != shard.size:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, but {INDEX_NAME} says {shard.size}. "
                    f"Restore the shard or pack again"
                )

    def spans(self, split: str, minival: float) -> list[Span]:
        """The spans of `train`, `minival` (the last share `minival` of the training samples) or `val`."""
        source = "val" if split == "val" else "train"
        if source not in self.splits:
            raise UserError(f"{self.root / INDEX_NAME}: no split {source!r}, only {', '.join(self.splits)}")
        shards = self.splits[source]
        total = sum(shard.samples for shard in shards)
        held_out = round(total * minival) if source == "train" else 0
        start, stop = {"train": (0, total - held_out), "minival": (total - held_out, total), "val": (0, total)}[split]
        spans, seen = [], 0
        for shard in shards:
            first, last = max(start - seen, 0), min(stop - seen, shard.samples)
            if last > first:
                spans.append(Span(shard.name, first, last - first))
            seen += shard.samples
        if not spans:
            raise UserError(f"split {split!r} of {self.root} is empty (data.minival is {minival})")
        return spans


def save_offsets(tar: Path, offsets: list[int], labels: list[int]) -> None:
    """Writes the sidecar of one shard: byte offset and label of each sample."""
    content = io.BytesIO()
    np.savez(content, offsets=np.array(offsets, np.int64), labels=np.array(labels, np.int64))
    write_atomically(tar.with_suffix(".index.npz"), content.getvalue())


@lru_cache(maxsize=256)
def load_offsets(tar: Path) -> np.ndarray:
    """Byte offset of each sample of one shard, int64. Raises UserError when the sidecar is missing."""
    path = tar.with_suffix(".index.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["offsets"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing. Pack the shards again") from None
