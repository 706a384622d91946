"""Which tars are the shards of a data set that exists already, and which split each belongs to."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path, PurePosixPath
from shlex import quote

from braceexpand import braceexpand

from depthmup.data import storage
from depthmup.data.errors import UserError
from depthmup.data.index import show_count
from depthmup.data.splits import (
    HOW_TO_SAY,
    assign_splits_by_word,
    assign_stated_splits,
    is_hidden,
    join_names,
    names_split,
    split_word,
    split_words,
)

PACKED = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".tar"}  # .tar before another one: a.tar.part


@dataclass(frozen=True)
class FoundShards:
    """The location, name in the index and split of each shard; a line for each reason to leave others out, and one
    where names that say no split may mean several."""

    locations: list[str]
    names: list[str]
    splits: list[str]
    left_out: list[str]


def is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and not is_hidden(path.name)


def find_tars(folder: Path) -> list[str]:
    """The tars of a folder and those below it, without hidden ones."""
    found = [path for path in folder.rglob("*") if is_tar(path)]
    return sorted(str(path) for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))


def find_other_archives(folder: Path) -> list[str]:
    """The names of files in a folder that were tars if they were unpacked or whole: a.tar.gz, a.zip, a.tar.part."""
    files = [path for path in folder.iterdir() if not is_hidden(path.name) and path.is_file() and not is_tar(path)]
    return sorted(path.name for path in files if PACKED.intersection(suffix.lower() for suffix in path.suffixes))


def find_tars_of_splits(folder: Path, everywhere: bool) -> tuple[list[str], list[str]]:
    """(the tars of a folder and of those folders in it whose names say a split, or `everywhere`; and the names of other
    folders that hold some)."""
    found = sorted(str(path) for path in folder.iterdir() if is_tar(path))
    others = []
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)):
        if everywhere or names_split(inside.name):
            found += find_tars(inside)
        elif any(map(is_tar, chain(inside.iterdir(), inside.glob("*/*")))):
            others.append(inside.name)
    return found, others


def expand_pattern(pattern: str) -> list[str]:
    """What a pattern with {a,b} or {0..9}, and of local paths with * and ?, stands for. Raises UserError."""
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{pattern}: a brace is missing: write it like 'a-{{000..099}}.tar'") from None
    found: list[str] = []
    for one in expanded:
        is_one = storage.is_remote(one) or os.path.exists(one)
        found += [one] if is_one else sorted(glob(one)) or [one]
    return found


def locate(source: str, everywhere: bool) -> tuple[list[str], list[str]]:
    """The tars of a folder, or what a pattern stands for; and what is left out, in words.

    Raises UserError when there are none.
    """
    left_out: list[str] = []
    if not storage.is_remote(source) and Path(source).is_dir():
        shards, others = find_tars_of_splits(Path(source), everywhere)
        if others:
            left_out.append(f"the shards in {join_names(others)}, whose names say no split ({HOW_TO_SAY})")
        if not shards and others:
            raise UserError(
                f"{source}: no .tar files in it, but in {join_names(others)}: index each of these, or {HOW_TO_SAY}"
            )
        packed = find_other_archives(Path(source))
        if not shards:
            unpack = f" ({join_names(packed)}: unpack them to .tar files first)" if packed else ""
            make = f"Make some with: depthmup pack IMAGES {quote(source)}"
            raise UserError(f"{source}: no .tar files in it{unpack}. {make}")
        if packed:
            left_out.append(f"{join_names(packed)}, no plain tars: unpack them to .tar files, or fetch the rest")
    else:
        shards = expand_pattern(source)
    if missing := [shard for shard in shards if not storage.is_remote(shard) and not Path(shard).is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    return shards, left_out


def name_in(folder: Path, location: str) -> str:
    """The name of a shard in the index of `folder`: a URL, or the path from there, whatever links lead to either."""
    if storage.is_remote(location):
        return location
    path = Path(location)
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def strip_host(name: str) -> str:
    """The part of a shard's name that may say its split: of a URL what follows the host or the bucket, without the
    query, which may hold a signature."""
    return name.partition("://")[2].partition("/")[2].partition("?")[0] if storage.is_remote(name) else name


def find_shards(source: str, folder: Path, train: Sequence[str] = (), val: Sequence[str] = ()) -> FoundShards:
    """The shards of `source` (a folder, or a pattern of paths or URLs) for an index in `folder`. `train` and `val` are
    patterns of their names; without them the words in the names decide.

    Raises UserError when there are none, or the names contradict themselves.
    """
    locations, left_out = locate(source, everywhere=bool(train or val))
    told: list[str] = []
    names = [name_in(folder, location) for location in locations]
    paths = {name: strip_host(name) for name in names}
    if train or val:
        by_path = assign_stated_splits([*paths.values()], train, val)
        splits = {name: by_path[path] for name, path in paths.items()}
        if unnamed := [name for name, split in splits.items() if split is None]:
            left_out.append(
                f"{show_count(len(unnamed), 'shard')} that neither --train nor --val names: {join_names(unnamed)}"
            )
    else:
        splits, reasons = assign_splits_by_word({name: split_word(path) for name, path in paths.items()})
        left_out += [f"{show_count(count, 'shard')} {reason}" for reason, count in reasons.items()]
    kinds = {" ".join(split_words(PurePosixPath(path).stem)) for path in paths.values()}
    if not (train or val) and len(kinds) > 1 and not any(map(split_word, paths.values())):
        told.append(f"shards of different names are all train: {join_names(sorted(kinds))} ({HOW_TO_SAY})")
    if not any(splits.values()):
        raise UserError(f"{source}: no shard is in a split; {HOW_TO_SAY}")
    kept = [(at, name, split) for at, name in zip(locations, names, strict=True) if (split := splits[name])]
    return FoundShards(
        [at for at, _, _ in kept],
        [name for _, name, _ in kept],
        [split for _, _, split in kept],
        [*(f"left out: {line}" for line in left_out), *told],
    )
