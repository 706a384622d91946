"""`depthmup index`: one pass over tar shards that exist already, local or remote."""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import webdataset
from braceexpand import braceexpand

from data import storage
from data.errors import UserError
from data.index import INDEX_NAME, NO_LABEL, Index, Members, Shard, counted, load_members, sidecar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_LABEL_BYTES = 64  # of a member .cls: more is no number
MOST_CLASSES = 1_000_000  # where their number is that of the highest label, which a single bad one makes huge
webdataset_metadata = re.compile(r"__[^/]*__($|/)").match  # names that webdataset's own reader leaves out
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (shards done, shards in all)


class HashingReader:
    """A file that is read once from front to end, with its size, where its last byte other than 0 ends, and SHA-256."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.size, self.end = file, hashlib.sha256(), 0, 0

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        self.sha256.update(content)
        if used := len(content.rstrip(b"\0")):
            self.end = self.size + used
        self.size += len(content)
        return content

    def read_all(self) -> None:
        while self.read(storage.BLOCK):
            pass


class RemoteFile:
    """A remote file that is read once from front to end. A range that fails is tried again by itself."""

    def __init__(self, url: str) -> None:
        self.url, self.position, self.size = url, 0, storage.remote_size(url)

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        start, self.position = self.position, min(self.position + size, self.size)
        return storage.fetch(self.url, start, self.position) if self.position > start else b""


def open_stream(location: str) -> Any:
    return RemoteFile(location) if storage.is_remote(location) else open(location, "rb")


def check_end(last_header: int, end: int, size: int) -> None:
    """Raises tarfile.ReadError unless a tar of `size` bytes is whole: its end mark at `last_header`, then only zeros.

    tarfile itself takes a header that it cannot read, or none, for the end, and drops all samples that follow.
    """
    if size < last_header + tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off: no end mark at byte {last_header}")
    if end > last_header:
        raise tarfile.ReadError(f"no member's header at byte {last_header}, but more bytes after it")


def members_of(file: HashingReader, location: str) -> Iterator[dict[str, Any]]:
    """webdataset's file samples, with (offset, size, content) for data; only labels have their content read."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=storage.BLOCK) as archive:  # type: ignore[call-overload]  # it only reads
        for member in archive:
            name = member.name
            if webdataset_metadata(name) or member.isdir():
                continue
            if not member.isreg():
                raise tarfile.ReadError(f"{name} is no file but a link or the like")
            extracted = archive.extractfile(member) if name.endswith(".cls") else None
            content = extracted.read(MAX_LABEL_BYTES) if extracted else b""
            yield {"fname": name, "__url__": location, "data": (name, member.offset_data, member.size, content)}
        file.read_all()
        check_end(archive.offset, file.end, file.size)


def scan(location: str) -> tuple[Members, int, str]:
    """(members, size in bytes, SHA-256) of a tar. Raises UserError when it is no whole tar of samples."""

    rows = []
    try:
        with open_stream(location) as stream:
            file = HashingReader(stream)
            for sample in webdataset.tariterators.group_by_keys(members_of(file, location)):
                image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
                if image is None:
                    raise UserError(f"{location}: {sample['__key__']} has no image ({', '.join(IMAGE_EXTENSIONS)})")
                label = sample["cls"][3].strip() if "cls" in sample else b""
                number = int(label) if label.isdigit() and len(label) < 10 else NO_LABEL
                rows.append((image[1], image[2], number, image[0].encode("utf-8", "surrogateescape")))
    except FileNotFoundError:
        raise UserError(f"{location}: no such file") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{location}: not a whole tar of samples ({error})") from None
    if not rows:
        raise UserError(f"{location}: no samples in it")
    numbers = np.array([row[:3] for row in rows], np.int64)
    members = Members(numbers[:, 0], numbers[:, 1], numbers[:, 2], np.array([row[3] for row in rows]))
    return members, file.size, file.sha256.hexdigest()


def scan_and_save(location: str, name: str, out: Path) -> Shard:
    members, size, sha256 = scan(location)
    members.save(Path(sidecar(str(out), name)))
    return Shard(name, len(members.names), size, sha256)


def find_shards(source: str) -> list[str]:
    """The tars of a folder, or what a brace pattern stands for. Raises UserError when there are none."""
    if not storage.is_remote(source) and Path(source).is_dir():
        shards = sorted(str(path) for path in Path(source).glob("*.tar") if not path.name.startswith("."))
        if not shards:
            raise UserError(f"{source}: no .tar files in it. Make some with 'depthmup pack IMAGES {source}'")
    else:
        shards = list(braceexpand(source))
    if missing := [shard for shard in shards if not storage.is_remote(shard) and not Path(shard).is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    return shards


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes: no threads or locks of this one are copied."""
    return ProcessPoolExecutor(processes, mp_context=get_context("forkserver"))


def parallel_map(function: Callable[..., Result], processes: int | None, *arguments: Sequence[Any]) -> Iterator[Result]:
    """`map` in order, over `processes` processes (as many as cores are free to use), or here when one is enough."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(arguments[0]))
    if processes <= 1:
        yield from map(function, *arguments)
        return
    with process_pool(processes) as pool:
        yield from pool.map(function, *arguments)


def name_in(folder: Path, location: str) -> str:
    """The name of a shard in the index of `folder`: a URL, or the path from there, whatever links lead to either."""
    if storage.is_remote(location):
        return location
    path = Path(location)
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def same_index(index: Index, names: Sequence[str], classes: tuple[str, ...]) -> Index:
    """`index`, when it is of these shards and classes (or none are given). Raises UserError otherwise."""
    listed = {shard.name for shard in index.shards}
    if differing := sorted(listed.symmetric_difference(names)):
        difference = f"{'lists' if differing[0] in listed else 'does not list'} {differing[0]}"
    elif classes and classes != index.classes:
        difference = f"has {counted(len(index.classes), 'class')}, other than those given"
    else:
        index.check_files()
        return index
    raise UserError(f"{Path(index.root) / INDEX_NAME} exists and {difference}. Delete it to index again")


def index_shards(
    source: str,
    out: str | Path | None = None,
    *,
    classes: Sequence[str] = (),
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Index:
    """Writes index.json and a sidecar for each tar of `source` (a folder, or a pattern of paths or URLs) into `out`.

    Shards whose name starts with val or test are the split val. Without `classes` the labels are numbers 0 ... highest.
    An index of the same shards and classes is left as it is. Raises UserError for one of others, and for what is
    missing, no whole tar, or without classes and labels.
    """
    if out is None and (storage.is_remote(source) or not Path(source).is_dir()):
        if source.endswith(".tar") or storage.is_remote(source):
            raise UserError(f"{source}: say with --out in which folder its index shall be written")
        raise UserError(f"{source}: no such folder. Name a folder of .tar files, or tars as in 'a-{{000..099}}.tar'")
    folder = Path(out or source)
    locations = find_shards(source)
    names = [name_in(folder, location) for location in locations]
    short = [name.rpartition("/")[2] for name in names]
    if len(set(short)) < len(short):
        raise UserError(f"{source}: two shards have the same file name; index them into folders of their own")
    if outside := next((at for at, name in zip(locations, names, strict=True) if Path(name).parts[0] == ".."), None):
        raise UserError(
            f"{outside}: not in {folder}, the folder for the index, as shards must be. Leave out --out, name a folder "
            f"above the shards, or link to them there (ln -s) and index that: depthmup index {folder}"
        )
    if (folder / INDEX_NAME).exists():
        return same_index(Index.load(folder), names, tuple(classes))
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for shard in parallel_map(scan_and_save, processes, locations, names, [folder] * len(names)):
        shards.append(shard)
        progress(len(shards), len(names))
    splits: dict[str, list[Shard]] = {}
    for shard, name in zip(shards, short, strict=True):
        splits.setdefault("val" if name.startswith(("val", "test")) else "train", []).append(shard)
    if not classes:
        highest = max(int(load_members(str(folder), shard).labels.max()) for shard in shards)
        if highest == NO_LABEL:
            raise UserError(f"{source}: no image has a label, which is a whole number in a member .cls of its name")
        if highest >= MOST_CLASSES:
            raise UserError(
                f"{source}: has the label {highest}, too high to be a class. Name the classes with --classes"
            )
        classes = [str(number) for number in range(highest + 1)]
    index = Index(str(folder), tuple(classes), {split: tuple(chosen) for split, chosen in splits.items()})
    index.save()
    return index
