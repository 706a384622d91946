"""Which split a shard or a folder of images belongs to, by the words in its name: one home for `pack` and `index`."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from depthmup.data.errors import UserError

TRAINING = ("train", "training", "trainset", "trn")
VALIDATION = (  # the first that is there
    *("val", "vals", "valset", "valid", "validate", "validation", "validations", "holdout", "heldout", "minival"),
    *("dev", "devset", "eval", "evaluation", "test", "tests", "testset", "testing", "tst"),
)
CONTENTS = {  # words for what any folder holds
    *(
        "image",
        "images",
        "img",
        "imgs",
        "jpeg",
        "jpegs",
        "jpg",
        "png",
        "pictures",
        "pics",
        "photos",
        "files",
        "samples",
    ),
    *("data", "dataset", "set", "split", "folder", "dir"),
}
SYSTEM_NAMES = {  # of folders and files, in small letters, since not all systems tell them apart
    *("__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "found.000"),
    *("@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "~snapshot", "lost+found"),
    *("network trash folder", "temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
HOW_TO_SAY = "say it with --train PATTERN and --val PATTERN"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data, such as .ipynb_checkpoints or ._dog.jpg."""
    return (name.startswith(".") and name != "..") or name.lower() in SYSTEM_NAMES


def split_words(name: str) -> list[str]:
    """'ImageNet1k-val_0001.tar' -> image, net, k, val, tar."""
    return [word.lower() for word in re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)) if word]


def names_split(name: str) -> bool:
    return any(word in TRAINING + VALIDATION for word in split_words(name))


def split_word(path: str) -> str | None:
    """The word for a split in `path`, in its last part that has one: 'train' (for training too), or one of VALIDATION;
    never a part of a word, as in valley or testbed. Raises UserError for two in one part."""
    for part in reversed(PurePosixPath(path).parts):
        found = {"train" if word in TRAINING else word for word in split_words(part) if word in TRAINING + VALIDATION}
        if len(found) > 1:
            raise UserError(f"{path}: which split is it, {' or '.join(sorted(found))}? S{HOW_TO_SAY[1:]}")
        if found:
            return found.pop()
    return None


def split_and_rest(name: str) -> tuple[str, tuple[str, ...]] | None:
    """'seg_train' -> ('train', ('seg',)): the one word for a split in `name`, and all others; None without one."""
    words = split_words(name)
    chosen = [word for word in words if word in TRAINING + VALIDATION]
    if len(chosen) != 1:
        return None
    return "train" if chosen[0] in TRAINING else chosen[0], tuple(word for word in words if word != chosen[0])


def split_folder(name: str) -> str | None:
    """The word for a split where `name` says nothing else, as a folder of one does: Train, val2017, training_images;
    but not bullet_train, which may be a class."""
    found = split_and_rest(name)
    return found[0] if found and {*found[1]} <= CONTENTS else None


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern (as in a shell) is that of the whole path or of a part of it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (path, *PurePosixPath(path).parts))


def assign_stated_splits(paths: Collection[str], train: Sequence[str], val: Sequence[str]) -> dict[str, str | None]:
    """The split of each path by patterns; with those of val alone, all others are train. None: in no split.

    Raises UserError for a pattern that no path matches, and for a path that those of both splits match.
    """
    for option, patterns in (("--train", train), ("--val", val)):
        for pattern in patterns:
            if not any(matches(path, [pattern]) for path in paths):
                raise UserError(f"{option} {pattern}: no name matches it, only {join_names(sorted(paths))}")
    splits: dict[str, str | None] = {}
    for path in paths:
        in_train, in_val = matches(path, train) if train else not matches(path, val), matches(path, val)
        if in_train and in_val:
            raise UserError(f"{path}: both --train and --val name it")
        splits[path] = "train" if in_train else "val" if in_val else None
    return splits


def join_names(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names if len(names) <= most else [*names[: most - 1], f"and {len(names) - most + 1} more"])


def choose_validation_word(words: Collection[str | None]) -> str | None:
    """The word that names the split val: test where there is no better, and never two of them together."""
    return next((word for word in VALIDATION if word in words), None)


def assign_splits_by_word(words: Mapping[str, str | None]) -> tuple[dict[str, str | None], Counter[str]]:
    """The split (None: in none) of each path whose word is given; and how many are in none, by reason.

    Without a word for training anywhere, all that have no word are train.
    """
    validation = choose_validation_word(words.values())
    meaning: dict[str | None, str] = {"train": "train"}
    if validation:
        meaning[validation] = "val"
    if "train" not in words.values():
        meaning[None] = "train"
    splits = {path: meaning.get(word) for path, word in words.items()}
    left_out = Counter[str]()
    nameless = [path for path, word in words.items() if word is None and splits[path] is None]
    if nameless:
        left_out[f"with no word for a split in the name: {join_names(nameless)} ({HOW_TO_SAY})"] += len(nameless)
    for path, word in words.items():
        if word and splits[path] is None:
            left_out[f"of {word}, where {validation} is the validation split ({HOW_TO_SAY})"] += 1
    return splits, left_out
