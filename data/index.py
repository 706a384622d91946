"""The index of WebDataset shards: what lies where, so that an order is planned and a sample read without reading a tar.

index.json               classes, and per split the shards with their counts, sizes and checksums
train-000000.index.npz   one shard, an array entry for each sample: `offsets` and `sizes` of the image in bytes,
                         `labels` (-1: none), `names` of the tar member
"""

import io
import itertools
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from depthmup.data import storage
from depthmup.data.class_order import describe_class_order
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.fingerprint import INDEX_NAME
from depthmup.data.minival import choose_held_out, count_held_out, hash_names

AGAIN = f"delete {INDEX_NAME} and pack or index again"  # what mends an index that is wrong
NO_LABEL = -1
READERS = 16  # threads that read sidecars, which may be remote
# numpy parses headers by ast, whose threads disturb each other before Python 3.11.8 (gh-106905)
PARSER = threading.Lock()
SHOWN_CLASSES = 20
TAR_BLOCK = 512  # bytes: contents of a tar's members begin at multiples of it, each after one such header


def check_name(value: Any) -> str:
    """`value`, when it can name a file or a class. A file's name may hold bytes that are no UTF-8, as surrogates."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("no name")
    return value


Name = Annotated[str, PlainValidator(check_name)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


def show_count(number: int, noun: str) -> str:
    """'1 shard', '2 shards', '3 classes'."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name (or URL), number of samples, size in bytes and SHA-256."""

    name: Name
    samples: Count
    size: Count
    sha256: Annotated[str, Field(strict=True)]


@dataclass(frozen=True)
class Contents:
    """What index.json holds."""

    classes: Annotated[tuple[Name, ...], Field(min_length=1)]
    splits: dict[str, tuple[Shard, ...]]
    first_label: Count = 0


CONTENTS = TypeAdapter(Contents)


@dataclass(frozen=True)
class Span:
    """`samples` consecutive samples of a shard, from its sample number `first`."""

    shard: Shard
    first: int
    samples: int


def describe_missing_index(root: str) -> str:
    """What is missing where `root` has no index.json, and how to go on."""
    if storage.is_remote(root):
        return f"{storage.join(root, INDEX_NAME)}: no such file. Make it with 'depthmup index PATTERN --out FOLDER'"
    if any(path.suffix.lower() == ".tar" for level in ("*", "*/*") for path in Path(root).glob(level)):
        return f"{root}: .tar files, but no {INDEX_NAME}. Make it with: depthmup index {quote(root)}"
    found = f"no {INDEX_NAME} and no .tar files in it" if Path(root).is_dir() else "no such folder"
    return f"{root}: {found}. Make shards from images (depthmup pack IMAGES {quote(root)}), or set data.source"


@dataclass(frozen=True)
class Index:
    """All shards of a data set. `splits` maps a split's name (train, val) to its shards in order."""

    root: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    first_label: int = 0  # what the shards' .cls say of the first class; the sidecars count from 0
    kept: dict[Shard, "Members"] = field(default_factory=dict, compare=False, repr=False)  # see keep_members

    @classmethod
    def load(cls, root: str | Path, trust: bool = False) -> "Index":
        """Reads index.json of the folder or URL `root`.

        Raises UserError when there is none, it is not an index, or (unless `trust`) it names files outside `root`.
        """
        path = storage.join(str(root), INDEX_NAME)
        try:
            contents = CONTENTS.validate_python(json.loads(storage.read_whole(path)))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(describe_missing_index(str(root))) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
            raise UserError(f"{path}: not an index of shards ({reason}); {AGAIN}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not an index of shards ({error}); {AGAIN}") from None
        index = cls(str(root), contents.classes, contents.splits, contents.first_label)
        names = [shard.name for shard in index.shards]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: lists a shard twice; {AGAIN}")
        local = [Path(name) for name in names if not storage.is_remote(name)]
        outside = next((name for name in local if name.is_absolute() or ".." in name.parts), None)
        if outside and not trust:
            raise UserError(f"{path}: names {outside}, outside of {root}. If you trust this index, set data.trust=true")
        return index

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.splits.values() for shard in shards]

    @cached_property
    def is_remote(self) -> bool:
        """Whether training samples come over the network."""
        return any(storage.is_remote(self.location(shard)) for shard in self.splits.get("train", ()))

    def describe(self, split: str | None = None, noun: str = "sample") -> str:
        """'7 samples in 2 shards' of one split, or of all."""
        shards = self.splits[split] if split else self.shards
        return f"{show_count(sum(shard.samples for shard in shards), noun)} in {show_count(len(shards), 'shard')}"

    def keep_members(self, split: str) -> None:
        """Keeps what all sidecars of a split say, for this process and those that it forks: samples are then read from
        everywhere at once, and `load_members` would forget a shard before its next sample."""
        with ThreadPoolExecutor(READERS) as pool:
            members = pool.map(lambda shard: load_members(self.root, shard), self.splits[split])
            self.kept.update(zip(self.splits[split], members, strict=True))

    def members(self, shard: Shard) -> "Members":
        return self.kept.get(shard) or load_members(self.root, shard)

    def labels(self, split: str) -> np.ndarray:
        """Labels (samples,) of a split in the order of its shards, NO_LABEL where there is none."""
        return np.concatenate([load_members(self.root, shard).labels for shard in self.splits[split]])

    def describe_classes(self, split: str) -> str:
        """'2 classes: cat 7, dog 6' of one split; of many classes the first ones, and between how many all have."""
        labels = self.labels(split)
        counts = np.bincount(labels[(labels >= 0) & (labels < len(self.classes))], minlength=len(self.classes))
        each = [f"{name} {count}" for name, count in zip(self.classes, counts, strict=True)]
        if len(each) <= SHOWN_CLASSES:
            return f"{show_count(len(each), 'class')}: {', '.join(each)}"
        of_all = f"{len(each)} classes of {counts.min()} to {counts.max()}"
        return f"{of_all}: {', '.join(each[: SHOWN_CLASSES // 2])}, ..., {each[-1]}"

    def class_order(self) -> str | None:
        """What is wrong, and how it is mended, where the training samples lie sorted by class; None where they do not,
        or there are none."""
        if "train" not in self.splits or not (found := describe_class_order(self.labels("train"))):
            return None
        source = "FOLDER, once the shards are copied there," if self.is_remote else quote(self.root)
        return f"train: {found}. Shuffle them (depthmup pack {source} OUT), or set data.window=epoch (fast local disks)"

    def location(self, shard: Shard) -> str:
        return storage.join(self.root, shard.name)

    def save(self) -> None:
        raw = {
            "classes": self.classes,
            "first_label": self.first_label,
            "splits": {name: [asdict(shard) for shard in shards] for name, shards in self.splits.items()},
        }
        write_atomically(Path(self.root) / INDEX_NAME, (json.dumps(raw, indent=1) + "\n").encode())

    def check_classes(self, num_classes: int) -> None:
        """Raises UserError where a network of `num_classes` would not have an output for each class, and no more."""
        if (own := len(self.classes)) != num_classes:
            raise UserError(
                f"{self.root} has {own} classes, but model.num_classes is {num_classes}: set model.num_classes={own}"
            )

    def check_files(self) -> None:
        """Raises UserError when a local shard or its sidecar is missing, or a shard is not of the size stated here."""
        for shard in self.shards:
            location = self.location(shard)
            if storage.is_remote(location):
                continue
            path = Path(location)
            for needed in (path, Path(locate_sidecar(self.root, shard.name))):
                if not needed.exists():
                    raise UserError(f"{needed}: missing, though {INDEX_NAME} lists it. Restore it, or {AGAIN}")
            if path.stat().st_size != shard.size:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, but {INDEX_NAME} says {shard.size}. "
                    f"Restore the shard, or {AGAIN}"
                )

    def count_training_samples(self, minival: float) -> int:
        """Those of `train` without the share `minival`. Reads no sidecar."""
        samples = sum(shard.samples for shard in self.splits.get("train", ()))
        return samples - int(count_held_out(samples, minival))

    def spans(self, split: str, minival: float) -> list[Span]:
        """The spans of `val`, of `minival` (the share `minival` of the training samples, see data.minival), or of
        `train` without these; those of a shard stand together."""
        source = "val" if split == "val" else "train"
        if source not in self.splits:
            raise UserError(
                f"{storage.join(self.root, INDEX_NAME)}: no split {source!r}, only {', '.join(self.splits)}"
            )
        shards = self.splits[source]
        if split != "val" and minival:
            spans = find_held_out_spans(self.root, shards, minival)[split]
        else:
            spans = tuple(Span(shard, 0, shard.samples) for shard in shards if shard.samples and split != "minival")
        if not spans:
            raise UserError(f"split {split!r} of {self.root} is empty (data.minival is {minival})")
        return list(spans)


@dataclass(frozen=True)
class Members:
    """What a shard's sidecar says of its samples: arrays of equal length."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: np.ndarray

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        np.savez_compressed(content, offsets=self.offsets, sizes=self.sizes, labels=self.labels, names=self.names)
        write_atomically(path, content.getvalue())


def locate_sidecar(root: str, shard_name: str) -> str:
    """Where a shard's sidecar lies: beside index.json for a remote shard, named after its URL, else beside the tar."""
    name = re.sub(r"[^\w.-]+", "_", shard_name.partition("://")[2]) if "://" in shard_name else shard_name
    return storage.join(root, name.removesuffix(".tar") + ".index.npz")


@lru_cache(maxsize=256)
def load_members(root: str, shard: Shard) -> Members:
    """The sidecar of one shard. Raises UserError when it is missing, broken, or does not fit the shard."""
    location = locate_sidecar(root, shard.name)
    try:
        content = storage.read_whole(location)
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or 'no such file'}. Restore it, or {AGAIN}") from None
    try:
        with PARSER, np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            offsets, sizes, labels = (
                arrays[key].astype(np.int64, casting="safe") for key in ("offsets", "sizes", "labels")
            )
            names = arrays["names"].astype(bytes, casting="safe")
        if any(array.shape != (len(names),) for array in (offsets, sizes, labels, names)):
            raise ValueError("arrays of different shapes")
        if (offsets < TAR_BLOCK).any() or (offsets % TAR_BLOCK).any() or (offsets > shard.size).any():
            raise ValueError("an offset at which no member of a tar of this size begins")
        if (sizes < 0).any() or (sizes > shard.size - offsets).any():
            raise ValueError("a sample that ends outside of the shard")
        if (labels < NO_LABEL).any():
            raise ValueError("a negative label")
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged bytes
        raise UserError(f"{location}: not the index of {shard.name} ({error}); {AGAIN}") from None
    if len(names) != shard.samples:
        raise UserError(
            f"{location}: {show_count(len(names), 'sample')}, but {INDEX_NAME} says {shard.samples}; {AGAIN}"
        )
    return Members(offsets, sizes, labels, names)


@lru_cache(maxsize=8)
def find_held_out_spans(root: str, shards: tuple[Shard, ...], share: float) -> dict[str, tuple[Span, ...]]:
    """The spans of train and minival. Reads the sidecars of all shards, once in a process."""

    def read(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        members = load_members(root, shard)
        return members.labels, hash_names(members.names.tolist())

    with ThreadPoolExecutor(READERS) as pool:
        labels, hashes = zip(*pool.map(read, shards), strict=True)
    held_out = choose_held_out(np.concatenate(labels), np.concatenate(hashes), share)
    spans: dict[str, list[Span]] = {"train": [], "minival": []}
    for shard, of_shard in zip(shards, np.split(held_out, np.cumsum([s.samples for s in shards])[:-1]), strict=True):
        starts = [0, *(np.flatnonzero(np.diff(of_shard)) + 1).tolist(), shard.samples]
        for first, last in itertools.pairwise(starts):
            if last > first:
                spans["minival" if of_shard[first] else "train"].append(Span(shard, first, last - first))
    return {split: tuple(of_split) for split, of_split in spans.items()}
