"""`depthmup index`: one pass over tar shards that exist already, local or remote."""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import numpy as np

from depthmup.data import storage
from depthmup.data.errors import UserError
from depthmup.data.find import FoundShards, find_shards
from depthmup.data.index import INDEX_NAME, NO_LABEL, Index, Members, Shard, counted, load_members, sidecar
from depthmup.data.tars import import_webdataset

webdataset = import_webdataset()

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
ARCHIVES = {  # by their first bytes
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
}
MAX_LABEL_BYTES = 64  # of a member .cls: more is no number
MOST_CLASSES = 1_000_000  # where their number is that of the highest label, which a single bad one makes huge
webdataset_metadata = re.compile(r"__[^/]*__($|/)").match  # names that webdataset's own reader leaves out
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (shards done, shards in all)


def archive_kind(start: bytes) -> str | None:
    """What a file that begins so is packed by; None for a plain tar and all else."""
    return next((kind for magic, kind in ARCHIVES.items() if start.startswith(magic)), None)


class HashingReader:
    """A file that is read once from front to end, with its first bytes, its size, where its
    last byte other than 0 ends, and SHA-256."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.size, self.end, self.start = file, hashlib.sha256(), 0, 0, b""

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if not self.size:
            self.start = content[:8]
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


def describe_no_samples(
    location: str, imageless: Sequence[str], keys: Collection[str], nested: str | None
) -> UserError:
    """What is wrong with a tar that holds `imageless`, keys of samples without an image, and how it is mended."""
    if nested:
        return UserError(
            f"{location}: holds other archives, such as {nested}, and no samples. Unpack these, and 'depthmup pack' "
            "the images, or 'depthmup index' the tars that hold samples"
        )
    if apart := next((key for key in imageless if key in keys), None):
        return UserError(
            f"{location}: members of a sample must be adjacent, but those of {apart} are not (labels after all images, "
            f"or a tar that was not sorted?). Sort it: mkdir unpacked && tar -xf {quote(location)} -C unpacked && "
            "tar --sort=name -cf sorted.tar -C unpacked ."
        )
    return UserError(f"{location}: {imageless[0]} has no image ({', '.join(IMAGE_EXTENSIONS)})")


def scan(location: str, first_label: int = 0) -> tuple[Members, int, str]:
    """(members, size in bytes, SHA-256) of a tar, with labels counted from `first_label`.

    Raises UserError when it is no whole tar of samples.
    """
    rows, keys, imageless, nested = [], set(), [], None
    try:
        with open_stream(location) as stream:
            file = HashingReader(stream)
            for sample in webdataset.tariterators.group_by_keys(members_of(file, location)):
                image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
                if image is None:
                    imageless.append(sample["__key__"])
                    nested = nested or next(
                        (sample[kind][0] for kind in ("tar", "tar.gz", "zip") if kind in sample), None
                    )
                    continue
                keys.add(sample["__key__"])
                label = sample["cls"][3].strip() if "cls" in sample else b""
                number = int(label) if label.isdigit() and len(label) < 10 else NO_LABEL
                if NO_LABEL < number < first_label:
                    raise UserError(f"{location}: {image[0]} has the label {number}, below --first-label {first_label}")
                number = max(number - first_label, NO_LABEL)
                rows.append((image[1], image[2], number, image[0].encode("utf-8", "surrogateescape")))
    except FileNotFoundError:
        raise UserError(f"{location}: no such file") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        if kind := archive_kind(file.start):
            raise UserError(
                f"{location}: compressed or archived by {kind}, but samples are read by their place in a plain tar: "
                "unpack it to a .tar first"
            ) from None
        raise UserError(f"{location}: not a whole tar of samples ({error})") from None
    if imageless:
        raise describe_no_samples(location, imageless, keys, nested)
    if not rows:
        raise UserError(f"{location}: no samples in it")
    numbers = np.array([row[:3] for row in rows], np.int64)
    members = Members(numbers[:, 0], numbers[:, 1], numbers[:, 2], np.array([row[3] for row in rows]))
    return members, file.size, file.sha256.hexdigest()


def scan_and_save(location: str, name: str, out: Path, first_label: int) -> Shard:
    members, size, sha256 = scan(location, first_label)
    members.save(Path(sidecar(str(out), name)))
    return Shard(name, len(members.names), size, sha256)


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


def same_index(index: Index, splits: Mapping[str, str], classes: tuple[str, ...], first_label: int) -> Index:
    """`index`, when it is of these shards in these splits, and classes (or none are given).

    Raises UserError otherwise.
    """
    listed = {shard.name: split for split, shards in index.splits.items() for shard in shards}
    if differing := sorted(listed.keys() ^ splits.keys()):
        difference = f"{'lists' if differing[0] in listed else 'does not list'} {differing[0]}"
    elif moved := next((name for name in splits if splits[name] != listed[name]), None):
        difference = f"lists {moved} in {listed[moved]}, not in {splits[moved]}"
    elif classes and classes != index.classes:
        difference = f"has {counted(len(index.classes), 'class')}, other than those given"
    elif first_label != index.first_label:
        difference = f"counts labels from {index.first_label}"
    else:
        index.check_files()
        return index
    raise UserError(f"{Path(index.root) / INDEX_NAME} exists and {difference}. Delete it to index again")


def check_writable(folder: Path, found: FoundShards) -> None:
    """Raises UserError unless `folder` and those of local shards, beside which their sidecars lie, can be written."""
    for place in dict.fromkeys([folder, *(Path(sidecar(str(folder), name)).parent for name in found.names)]):
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            raise UserError(
                f"{place}: cannot be written, but the index of a shard lies beside it. Make a folder of links and "
                f"index that: cp -rs {quote(str(folder.resolve()))} links && depthmup index links"
            )


def class_names(source: str, classes: Sequence[str], labels: np.ndarray, first_label: int) -> tuple[str, ...]:
    """`classes`, or where none are given the labels' numbers. Raises UserError where they do not fit.

    labels: (samples,), counted from 0. A label beyond the names that is as frequent as others is a class that has no
    name; a rare one is a bad sample, which training counts.
    """
    values, counts = np.unique(labels[labels != NO_LABEL], return_counts=True)
    highest = int(values[-1]) if len(values) else NO_LABEL
    if not classes and highest == NO_LABEL:
        raise UserError(f"{source}: no image has a label, which is a whole number in a member .cls of its name")
    if not classes and highest >= MOST_CLASSES:
        raise UserError(f"{source}: has the label {highest}, too high to be a class. Name the classes with --classes")
    if not classes:
        return tuple(str(number + first_label) for number in range(highest + 1))
    if not first_label and highest == len(classes) and values[0] == 1:
        raise UserError(
            f"{source}: its labels are 1 to {highest}, but those of {counted(highest, 'class')} count from 0. "
            "Index with --first-label 1"
        )
    named, nameless = counts[values < len(classes)], counts[values >= len(classes)]
    if len(nameless) and (not len(named) or 2 * nameless.max() >= np.median(named)):
        raise UserError(
            f"{source}: {counted(int(nameless.sum()), 'sample')} with labels up to {highest + first_label}, but "
            f"{counted(len(classes), 'name')} of classes, for labels {first_label} to "
            f"{len(classes) + first_label - 1}. Name all classes, or correct these labels"
        )
    return tuple(classes)


def index_shards(
    source: str,
    out: str | Path | None = None,
    *,
    classes: Sequence[str] = (),
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    first_label: int = 0,
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Index:
    """Writes index.json and a sidecar for each tar of `source` (a folder, or a pattern of paths or URLs) into `out`.

    The splits are those that data.find.find_shards finds. Labels count from `first_label`; without `classes` they are
    their names. `say` gets a line for what is left out. An index of the same shards, splits and classes is left as it
    is. Raises UserError for one of others, and for what is missing, no whole tar, without labels, or with labels that
    are none of the classes.
    """
    if out is None and (storage.is_remote(source) or not Path(source).is_dir()):
        if source.endswith(".tar") or storage.is_remote(source):
            raise UserError(f"{source}: give --out, the folder for the index")
        raise UserError(f"{source}: no such folder. Name a folder of .tar files, or tars as in 'a-{{000..099}}.tar'")
    if empty := next((number for number, name in enumerate(classes, 1) if not name.strip()), None):
        raise UserError(f"{source}: the name of class {empty} is empty: give each class a line of its own")
    folder = Path(out or source)
    found = find_shards(source, folder, train, val)
    locations, names = found.locations, found.names
    if outside := next((at for at, name in zip(locations, names, strict=True) if Path(name).parts[0] == ".."), None):
        raise UserError(
            f"{outside}: not in {folder}, the folder for the index, as shards must be. Leave out --out, name a folder "
            f"above the shards, or link to them there (ln -s) and index that: depthmup index {quote(str(folder))}"
        )
    if len({sidecar(str(folder), name) for name in names}) < len(names):
        raise UserError(f"{source}: two shards have the same name; index them into folders of their own")
    for line in found.left_out:
        say(line)
    if (folder / INDEX_NAME).exists():
        splits = dict(zip(names, found.splits, strict=True))
        return same_index(Index.load(folder), splits, tuple(classes), first_label)
    check_writable(folder, found)
    load_members.cache_clear()  # of an index that was here before
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    arguments = (locations, names, [folder] * len(names), [first_label] * len(names))
    for shard in parallel_map(scan_and_save, processes, *arguments):
        shards.append(shard)
        progress(len(shards), len(names))
    labels = np.concatenate([load_members(str(folder), shard).labels for shard in shards])
    if not classes and len(known := labels[labels != NO_LABEL]) and known.min() > 0:
        lowest = int(known.min()) + first_label
        say(f"no sample has a label below {lowest}: where labels count from {lowest}, --first-label {lowest} says so")
    index = Index(
        str(folder),
        class_names(source, classes, labels, first_label),
        {
            split: tuple(shard for shard, of in zip(shards, found.splits, strict=True) if of == split)
            for split in dict.fromkeys(found.splits)
        },
        first_label,
    )
    index.save()
    return index
