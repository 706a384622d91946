"""Which class and which split the images of a tree of folders belong to, by the names of the folders."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from depthmup.data.splits import (
    CONTENTS,
    HOW_TO_SAY,
    assign_splits_by_word,
    assign_stated_splits,
    is_hidden,
    join_names,
    split_and_rest,
    split_folder,
    split_words,
)

Folder = tuple[str, ...]  # the parts of its path


@dataclass(frozen=True)
class SourceImage:
    """One image of a source: `size` bytes of `file` from `offset` on, or `content`.

    `split` is train, val, or None where the source has no splits of its own.
    """

    path: str
    class_name: str
    split: str | None
    size: int
    file: str = ""
    offset: int = 0
    content: bytes | None = None

    def read(self) -> bytes:
        if self.content is not None:
            return self.content
        with open(self.file, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def find_root(folders: Collection[Folder]) -> int:
    """How many folders stand above splits and classes: each holds all images, and some of them in folders below it."""
    root = 0
    while True:
        tops = {path[root] for path in folders if len(path) > root}
        if len(tops) != 1 or split_folder(min(tops)) or all(len(path) < root + 2 for path in folders):
            return root
        root += 1


def find_named_splits(names: Collection[str]) -> dict[str, str]:
    """The word for a split in the name of each folder that is one: where its name says nothing else, or where it is
    that of another split but for the word, as seg_train and seg_test."""
    words = {name: word for name in sorted(names) if (word := split_folder(name))}
    if words:
        return words
    alike: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for name in sorted(names):
        if found := split_and_rest(name):
            alike[found[1]][name] = found[0]
    families = [words for words in alike.values() if "train" in words.values() and len({*words.values()}) > 1]
    return families[0] if len(families) == 1 else {}


def find_splits(folders: Collection[Folder], has_list: bool) -> dict[str, str | None]:
    """Of each top folder that is a split, its name (None: not packed); empty where the top folders are classes.

    They are splits where there is a train with class folders in it, or nothing but names of splits. The images that a
    list names are the split val where there is one, else the first of data.splits.VALIDATION.
    """
    tops = {path[0] for path in folders if path}
    words = find_named_splits(tops)
    if words.keys() != tops and not any(words.get(path[0]) == "train" for path in folders if len(path) > 1):
        return {}
    if has_list:
        return {top: "train" if word == "train" else None for top, word in words.items()}
    return assign_splits_by_word(words)[0]


def is_split_by_class(folders: Collection[Folder]) -> bool:
    """Whether every class has folders of splits in it, and nothing else: cat/train, cat/val, dog/train, dog/val."""
    below = {path[1] if len(path) > 1 else "" for path in folders if path}
    words = {split_folder(name) for name in below}
    return None not in words and "train" in words and len(words) > 1


def swap(folder: Folder) -> Folder:
    """cat/train -> train/cat"""
    return (*folder[1:2], *folder[:1], *folder[2:])


def find_class_depth(split: str, folders: Collection[Folder]) -> int:
    """How many folders of a split stand above its classes: 1 where all lies in one called images or the like, or like
    the split itself."""
    inside = {path[0] for path in folders if path}
    if len(inside) != 1:
        return 0
    name = min(inside)
    words = split_words(name)
    if name == split:
        return int(all(len(path) > 1 for path in folders))
    return int(bool(words) and {*words} <= CONTENTS)  # a folder called 1 has no word: it is a class


def describe_alike(folders: Collection[Folder]) -> str | None:
    """What is to be said where the top folders, taken for classes, hold folders of the same names, as splits do."""
    inside: dict[str, set[str]] = defaultdict(set)
    for path in folders:
        if path:
            inside[path[0]] |= {*path[1:2]}
    first = min(inside.values(), key=len, default=set())
    if len(inside) < 2 or len(first) < 2 or any(below != first for below in inside.values()):
        return None
    return (
        f"{join_names(sorted(inside))} are packed as classes, and hold folders of the same names "
        f"({join_names(sorted(first))}): where they are splits, {HOW_TO_SAY}"
    )


def leave_out_hidden(found: Sequence[SourceImage], left_out: Counter[str]) -> list[tuple[SourceImage, PurePosixPath]]:
    """The other images with their paths; counts what is hidden."""
    visible = []
    for image in found:
        path = PurePosixPath(image.path)
        if hidden := next((name for name in path.parts if is_hidden(name)), None):
            left_out["hidden files" if hidden == path.name else f"in the hidden folder {hidden}"] += 1
        else:
            visible.append((image, path))
    return visible


def describe_unused(splits: Mapping[str, str | None], validation: Mapping[str, str]) -> str:
    """Why a folder of splits is not used."""
    if validation:
        return "where the listed images are the validation split"
    named = next((name for name, split in splits.items() if split == "val"), None)
    return f"where {named} is the validation split" if named else "which --train does not name"


def place_images(
    found: Sequence[SourceImage],
    validation: Mapping[str, str],
    left_out: Counter[str],
    train: Sequence[str] = (),
    val: Sequence[str] = (),
) -> tuple[list[SourceImage], list[str]]:
    """The images with class and split, and lines about how the folders were understood. Counts images of no class or
    split.

    `validation`: classes of the images (by name, with or without extension) that a list makes the split val. `train`,
    `val`: patterns of the splits' folders. 'train/dog/puppies/1.jpg' is a dog of the split train, as is
    'dog/train/1.jpg' where all classes have their splits in them; 'dog/1.jpg' is one of no split.
    """
    visible = leave_out_hidden(found, left_out)
    folders = {path.parts[:-1] for _, path in visible}
    root = find_root(folders)
    folders = {folder[root:] for folder in folders}
    by_class = is_split_by_class(folders) and not (train or val or find_splits(folders, bool(validation)))
    if by_class:
        folders = {*map(swap, folders)}
    splits = find_splits(folders, bool(validation))
    if train or val:
        splits = assign_stated_splits({folder[0] for folder in folders if folder}, train, val)
    depth = {top: find_class_depth(top, [f[1:] for f in folders if f[:1] == (top,)]) for top in splits}
    unused = describe_unused(splits, validation)
    placed = []
    for image, path in visible:
        inside = swap(path.parts[root:-1]) if by_class else path.parts[root:-1]
        if listed_class := validation.get(path.name) or validation.get(path.stem):
            placed.append(replace(image, class_name=listed_class, split="val"))
        elif not inside:
            left_out["in no class folder"] += 1
        elif not splits:
            placed.append(replace(image, class_name=inside[0], split="train" if validation else None))
        elif inside[0] not in splits:
            left_out[f"in {inside[0]}, beside the folders of the splits ({', '.join(splits)})"] += 1
        elif not (split := splits[inside[0]]):
            left_out[f"in {inside[0]}, {unused}"] += 1
        elif len(inside) < 2 + depth[inside[0]]:
            left_out[f"in {inside[0]}, but in no class folder (--validation-list names the class of such images)"] += 1
        else:
            placed.append(replace(image, class_name=inside[1 + depth[inside[0]]], split=split))
    alike = None if splits else describe_alike(folders)
    return placed, [alike] if alike else []
