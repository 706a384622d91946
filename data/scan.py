"""`depthmup index`: one pass over tar shards that exist already, local or remote."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import numpy as np

from depthmup.data import storage
from depthmup.data.errors import UserError
from depthmup.data.files import refuse_locked
from depthmup.data.find import FoundShards, find_shards
from depthmup.data.index import INDEX_NAME, NO_LABEL, Index, Shard, load_members, locate_sidecar, show_count
from depthmup.data.tar_samples import describe_first_sample, scan

MOST_CLASSES = 1_000_000  # where their number is that of the highest label, which a single bad one makes huge
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (shards done, shards in all)


def scan_and_save(location: str, name: str, out: Path, first_label: int) -> Shard:
    scanned = scan(location, first_label)
    scanned.members.save(Path(locate_sidecar(str(out), name)))
    return Shard(name, len(scanned.members.names), scanned.size, scanned.sha256)


@contextmanager
def process_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes: no threads or locks of this one are copied. Ctrl-C ends them without a word of theirs.

    Raises UserError where one of them is killed.
    """
    start = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(processes, get_context("forkserver"), signal.signal, start) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                f"one of {processes} processes was killed, most likely for lack of memory: --processes says how many "
                "work at once"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def map_in_processes(
    function: Callable[..., Result], processes: int | None, *arguments: Sequence[Any]
) -> Iterator[Result]:
    """`map` in order, over `processes` processes (as many as cores are free to use), or here when one is enough."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(arguments[0]))
    if processes <= 1:
        yield from map(function, *arguments)
        return
    with process_pool(processes) as pool:
        yield from pool.map(function, *arguments)


def reuse_index(index: Index, splits: Mapping[str, str], classes: tuple[str, ...], first_label: int) -> Index:
    """`index`, when it is of these shards in these splits, and classes (or none are given).

    Raises UserError otherwise.
    """
    listed = {shard.name: split for split, shards in index.splits.items() for shard in shards}
    if differing := sorted(listed.keys() ^ splits.keys()):
        difference = f"{'lists' if differing[0] in listed else 'does not list'} {differing[0]}"
    elif moved := next((name for name in splits if splits[name] != listed[name]), None):
        difference = f"lists {moved} in {listed[moved]}, not in {splits[moved]}"
    elif classes and classes != index.classes:
        difference = f"has {show_count(len(index.classes), 'class')}, other than those given"
    elif first_label != index.first_label:
        difference = f"counts labels from {index.first_label}"
    else:
        index.check_files()
        return index
    raise UserError(f"{Path(index.root) / INDEX_NAME} exists and {difference}. Delete it to index again")


def check_writable(folder: Path, found: FoundShards) -> None:
    """Raises UserError unless `folder` and those of local shards, beside which their sidecars lie, can be written."""
    for place in dict.fromkeys([folder, *(Path(locate_sidecar(str(folder), name)).parent for name in found.names)]):
        links = f"cp -rs {quote(str(folder.resolve()))} links && depthmup index links"
        refuse_locked(
            folder, f"the index of a shard lies beside it. Make a folder of links and index that: {links}", place
        )


def find_first_unlabelled(root: str, shards: Sequence[Shard]) -> str:
    """'0000.png of train-0.tar', the first sample without a label; there must be one."""
    for shard in shards:
        members = load_members(root, shard)
        for name in members.names[members.labels == NO_LABEL]:
            return f"{name.decode('utf-8', 'backslashreplace')} of {shard.name}"
    raise ValueError("every sample has a label")


def name_classes(source: str, classes: Sequence[str], labels: np.ndarray, first_label: int) -> tuple[str, ...]:
    """`classes`, or where none are given the labels' numbers. Raises UserError where they do not fit.

    labels: (samples,), counted from 0. A label beyond the names that is as frequent as others is a class that has no
    name; a rare one is a bad sample, which training counts.
    """
    values, counts = np.unique(labels[labels != NO_LABEL], return_counts=True)
    highest = int(values[-1]) if len(values) else NO_LABEL
    if not classes and highest >= MOST_CLASSES:
        raise UserError(f"{source}: has the label {highest}, too high to be a class. Name the classes with --classes")
    if not classes:
        return tuple(str(number + first_label) for number in range(highest + 1))
    if not first_label and highest == len(classes) and values[0] == 1:
        raise UserError(
            f"{source}: its labels are 1 to {highest}, but those of {show_count(highest, 'class')} count from 0. "
            "Index with --first-label 1"
        )
    named, nameless = counts[values < len(classes)], counts[values >= len(classes)]
    if len(nameless) and (not len(named) or 2 * nameless.max() >= np.median(named)):
        raise UserError(
            f"{source}: {show_count(int(nameless.sum()), 'sample')} with labels up to {highest + first_label}, but "
            f"{show_count(len(classes), 'name')} of classes, for labels {first_label} to "
            f"{len(classes) + first_label - 1}. Name all classes, or correct these labels"
        )
    return tuple(classes)


def choose_index_folder(source: str, out: str | Path | None) -> Path:
    """Raises UserError where none is named and `source` is no folder of this machine."""
    if out is not None or (not storage.is_remote(source) and Path(source).is_dir()):
        return Path(out or source)
    if source.endswith(".tar") or storage.is_remote(source):
        raise UserError(f"{source}: give --out, the folder for the index")
    raise UserError(f"{source}: no such folder. Name a folder of .tar files, or tars as in 'a-{{000..099}}.tar'")


def check_places(source: str, folder: Path, found: FoundShards) -> None:
    """Raises UserError unless each shard lies below `folder`, with a sidecar of its own."""
    outside = (at for at, name in zip(found.locations, found.names, strict=True) if Path(name).parts[0] == "..")
    if first := next(outside, None):
        raise UserError(
            f"{first}: not in {folder}, the folder for the index, as shards must be. Leave out --out, name a folder "
            f"above the shards, or link to them there (ln -s) and index that: depthmup index {quote(str(folder))}"
        )
    if len({locate_sidecar(str(folder), name) for name in found.names}) < len(found.names):
        raise UserError(f"{source}: two shards have the same name; index them into folders of their own")


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
    if empty := next((number for number, name in enumerate(classes, 1) if not name.strip()), None):
        raise UserError(f"{source}: the name of class {empty} is empty: give each class a line of its own")
    folder = choose_index_folder(source, out)
    found = find_shards(source, folder, train, val)
    check_places(source, folder, found)
    for line in found.left_out:
        say(line)
    if (folder / INDEX_NAME).exists():
        splits = dict(zip(found.names, found.splits, strict=True))
        return reuse_index(Index.load(folder), splits, tuple(classes), first_label)
    check_writable(folder, found)
    load_members.cache_clear()  # of an index that was here before
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    num_shards = len(found.names)
    arguments = (found.locations, found.names, [folder] * num_shards, [first_label] * num_shards)
    for shard in map_in_processes(scan_and_save, processes, *arguments):
        shards.append(shard)
        progress(len(shards), num_shards)
    labels = np.concatenate([load_members(str(folder), shard).labels for shard in shards])
    if not classes and (labels == NO_LABEL).all():
        raise UserError(
            f"{source}: no image has a label, which is a whole number in a member .cls of its name; "
            f"{describe_first_sample(found.locations[0])}. Write shards with 'cls': NUMBER in webdataset's TarWriter"
        )
    if unlabelled := int((labels == NO_LABEL).sum()):
        say(
            f"{unlabelled} of {show_count(len(labels), 'sample')} without a label (a whole number in a member .cls), "
            f"the first {find_first_unlabelled(str(folder), shards)}: training counts them as bad "
            "(data.max_bad_fraction)"
        )
    if not classes and len(known := labels[labels != NO_LABEL]) and known.min() > 0:
        lowest = int(known.min()) + first_label
        say(f"no sample has a label below {lowest}: where labels count from {lowest}, --first-label {lowest} says so")
    index = Index(
        str(folder),
        name_classes(source, classes, labels, first_label),
        {
            split: tuple(shard for shard, of in zip(shards, found.splits, strict=True) if of == split)
            for split in dict.fromkeys(found.splits)
        },
        first_label,
    )
    index.save()
    return index
