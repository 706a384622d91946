"""Where images come from before they are packed: a folder, a tar of one, or a data set that a Python package ships."""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from depthmup.data.errors import UserError
from depthmup.data.find import find_shards, tars_of_folder
from depthmup.data.index import INDEX_NAME, NO_LABEL, Index, counted
from depthmup.data.scan import IMAGE_EXTENSIONS, HashingReader, archive_kind, check_end, parallel_map, scan
from depthmup.data.splits import CONTENTS, is_hidden, split_folder, split_words, splits_by_word, stated_splits

COMPRESSED: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
UNPACK_INNER = (
    ". Archives inside are not opened. Unpack each into a folder of its class: "
    'for t in *.tar; do mkdir "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
)
UNPACKED_NAME = ".source.tar.tmp"


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


@dataclass(frozen=True)
class Source:
    """The images to be packed, how many files are not, by reason, and lines about what else is not.

    classes: of each `class_name` in order what the index calls it.
    """

    images: list[SourceImage]
    left_out: Counter[str]
    classes: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """'2 files left out: .gif, where jpg, ... are packed'."""
        counts = self.left_out.most_common()
        return [*self.notes, *(f"{counted(count, 'file')} left out: {reason}" for reason, count in counts)]


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def not_an_image(path: str) -> str:
    """Why a file is left out that is_image does not take."""
    return f"{PurePosixPath(path).suffix.lower() or 'no extension'}, where {', '.join(IMAGE_EXTENSIONS)} are packed"


def printable(path: str) -> str:
    """`path` in which bytes that are no UTF-8 stand as \\xe9, so that it can be printed."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder_images(root: str, left_out: Counter[str]) -> Iterator[SourceImage]:
    """The images of a tree; links are followed, but not back to a folder above them. Counts what it leaves out."""

    def walk(folder: str, above: tuple[str, ...]) -> Iterator[SourceImage]:
        real = os.path.realpath(folder)
        if real in above:
            left_out[f"{printable(folder)}, a link to a folder above it"] += 1
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))
            elif not is_image(entry.name):
                left_out[not_an_image(entry.name)] += 1
            elif not entry.is_file():
                left_out[f"{printable(entry.path)}, a broken link or no plain file"] += 1
            else:
                name = printable(os.path.relpath(entry.path, root))
                yield SourceImage(name, "", None, entry.stat().st_size, entry.path)

    return walk(root, ())


def tar_images(path: Path, left_out: Counter[str]) -> Iterator[SourceImage]:
    """The images of an uncompressed tar. Counts what it leaves out. Raises tarfile.TarError when it is not whole."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg() and is_image(member.name):
                yield SourceImage(printable(member.name), "", None, member.size, str(path), member.offset_data)
            elif not member.isdir():
                left_out[not_an_image(member.name) if member.isreg() else "links and the like in the tar"] += 1
        end = archive.offset
    with open(path, "rb") as file:
        file.seek(end)
        rest = HashingReader(file)
        rest.read_all()
        check_end(end, end + rest.end, end + rest.size)


def unpack(path: Path, folder: Path) -> Path:
    """`path` itself; of a compressed tar an uncompressed copy in `folder`, where images are read by offset.

    Raises UserError for another kind of archive.
    """
    with open(path, "rb") as file:
        kind = archive_kind(file.read(8))
    if kind is None:
        return path
    if kind not in COMPRESSED:
        raise UserError(f"{path}: a {kind} archive: unpack it into a folder, and pack that folder")
    with COMPRESSED[kind](path) as packed, open(folder / UNPACKED_NAME, "wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return folder / UNPACKED_NAME


def digits_images() -> Iterator[SourceImage]:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 grey levels, as PNG files (UCI optical digits, test part)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("source sklearn:digits needs scikit-learn: pip install 'depthmup[demo]'") from None
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        content = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(content, "png")
        png = content.getvalue()
        yield SourceImage(f"{label}/{number:04d}.png", "", None, len(png), content=png)


PACKAGED = {"sklearn:digits": digits_images}


def find_root(folders: Collection[tuple[str, ...]]) -> int:
    """How many folders stand above splits and classes: each holds all images, and some of them in folders below it."""
    root = 0
    while True:
        tops = {path[root] for path in folders if len(path) > root}
        if len(tops) != 1 or split_folder(min(tops)) or all(len(path) < root + 2 for path in folders):
            return root
        root += 1


def find_splits(folders: Collection[tuple[str, ...]], has_list: bool) -> dict[str, str | None]:
    """Of each top folder that is a split, its name (None: not packed); empty where the top folders are classes.

    They are splits where there is a train with class folders in it, or nothing but names of splits. The images that a
    list names are the split val where there is one, else the first of data.splits.VALIDATION.
    """
    tops = {path[0] for path in folders if path}
    words = {top: word for top in sorted(tops) if (word := split_folder(top))}
    if words.keys() != tops and not any(words.get(path[0]) == "train" for path in folders if len(path) > 1):
        return {}
    if has_list:
        return {top: "train" if word == "train" else None for top, word in words.items()}
    return splits_by_word(words)[0]


def class_depth(folders: Collection[tuple[str, ...]]) -> int:
    """How many folders of a split stand above its classes: 1 where all lies in one called images or the like."""
    inside = {path[0] for path in folders if path}
    words = split_words(min(inside)) if len(inside) == 1 else []
    return int(bool(words) and {*words} <= CONTENTS)  # a folder called 1 has no word: it is a class


def place(
    found: Sequence[SourceImage],
    validation: Mapping[str, str],
    left_out: Counter[str],
    train: Sequence[str] = (),
    val: Sequence[str] = (),
) -> list[SourceImage]:
    """The images with class and split. Counts those that belong to none.

    `validation`: classes of the images (by name, with or without extension) that a list makes the split val. `train`,
    `val`: patterns of the splits' folders. 'train/dog/puppies/1.jpg' is a dog of the split train, 'dog/1.jpg' one of no
    split.
    """
    visible = []
    for image in found:
        path = PurePosixPath(image.path)
        if hidden := next((name for name in path.parts if is_hidden(name)), None):
            left_out["hidden files" if hidden == path.name else f"in the hidden folder {hidden}"] += 1
        else:
            visible.append((image, path))
    folders = {path.parts[:-1] for _, path in visible}
    root = find_root(folders)
    folders = {folder[root:] for folder in folders}
    splits = find_splits(folders, bool(validation))
    if train or val:
        splits = stated_splits({folder[0] for folder in folders if folder}, train, val)
    depth = {top: class_depth([f[1:] for f in folders if f[:1] == (top,)]) for top in splits}
    placed = []
    for image, path in visible:
        inside = path.parts[root:-1]
        if listed := validation.get(path.name) or validation.get(path.stem):
            placed.append(replace(image, class_name=listed, split="val"))
        elif not inside:
            left_out["in no class folder"] += 1
        elif not splits:
            placed.append(replace(image, class_name=inside[0], split="train" if validation else None))
        elif inside[0] not in splits:
            left_out[f"in {inside[0]}, beside the folders of the splits ({', '.join(splits)})"] += 1
        elif not (split := splits[inside[0]]):
            chosen = "the listed images are" if validation else f"{next(n for n, s in splits.items() if s == 'val')} is"
            left_out[f"in {inside[0]}, where {chosen} the validation split"] += 1
        elif len(inside) < 2 + depth[inside[0]]:
            left_out[f"in {inside[0]}, but in no class folder (--validation-list names the class of such images)"] += 1
        else:
            placed.append(replace(image, class_name=inside[1 + depth[inside[0]]], split=split))
    return placed


def shards_as_source(source: str, train: Sequence[str], val: Sequence[str], processes: int | None) -> Source:
    """The labelled images of a folder of WebDataset shards, which are packed to be shuffled. Their labels stay.

    Raises UserError as data.find.find_shards and data.scan.scan do, and where there are no labels.
    """
    found = find_shards(source, Path(source), train, val)
    indexed = Index.load(source) if (Path(source) / INDEX_NAME).exists() else None
    first_label = [indexed.first_label if indexed else 0] * len(found.names)
    images, left_out, highest = [], Counter[str](), NO_LABEL
    of_shards = parallel_map(scan, processes, found.locations, first_label)
    for location, split, (members, _, _) in zip(found.locations, found.splits, of_shards, strict=True):
        highest = max(highest, int(members.labels.max()))
        rows = zip(members.names.tolist(), members.labels, members.sizes, members.offsets, strict=True)
        for name, label, size, offset in rows:
            path = printable(name.decode("utf-8", "surrogateescape"))
            if label == NO_LABEL:
                left_out["with no whole number in a member .cls"] += 1
                continue
            of_split = split if "val" in found.splits else None
            images.append(SourceImage(path, str(label), of_split, int(size), location, int(offset)))
    if not images:
        raise UserError(f"{source}: its tars hold no images with labels{UNPACK_INNER}, where each tar is a class")
    names = indexed.classes if indexed and highest < len(indexed.classes) else map(str, range(highest + 1))
    return Source(images, left_out, {str(label): name for label, name in enumerate(names)}, found.left_out)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without a byte order mark and empty lines at its end. Raises UserError when it
    is none."""
    try:
        return path.read_text("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None


def read_list(path: Path, what: str) -> dict[str, str]:
    """The lines 'NAME REST' or 'NAME,REST' of a text file. Raises UserError for a line without REST."""
    entries = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip() or line == "ImageId,PredictionString":  # the heading of ImageNet's list
            continue
        parts = re.split(r"[\s,]+", line.strip(), maxsplit=1)
        if len(parts) < 2:
            raise UserError(f"{path}, line {number}: expected {what}, found {line!r}")
        entries[parts[0]] = parts[1]
    return entries


def open_source(
    source: str,
    scratch: Path,
    validation_list: Path | None = None,
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    processes: int | None = None,
) -> Source:
    """All images of `source`, each in a class. `validation_list`: lines 'IMAGE CLASS' that name the split val; `train`,
    `val`: patterns of the splits' folders.

    A compressed tar is unpacked to a file in the folder `scratch`, which the images are read from. Raises UserError
    when the source does not exist, is no whole tar, or holds no image in a class folder, or lacks a listed one.
    """
    path, left_out = Path(source), Counter[str]()
    try:
        if source in PACKAGED:
            found = list(PACKAGED[source]())
        elif path.is_dir():
            found = list(folder_images(source, left_out))
            if not found and tars_of_folder(path, everywhere=bool(train or val))[0]:
                return shards_as_source(source, train, val, processes)
        elif path.is_file():
            found = list(tar_images(unpack(path, scratch), left_out))
        else:
            raise UserError(f"{source}: no such folder or tar (packaged sources: {', '.join(PACKAGED)})")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{source}: not a whole tar ({error})") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    validation = {}
    if validation_list:
        listed = read_list(validation_list, "'IMAGE CLASS'")
        validation = {name: rest.split()[0] for name, rest in listed.items()}
    images = place(found, validation, left_out, train, val)
    opened = Source(images, left_out, {name: name for name in sorted({image.class_name for image in images})})
    if not opened.images:
        raise UserError(
            f"{source}: no images. Expected class folders ({source}/CLASS/IMAGE.jpg or {source}/train/CLASS/IMAGE.jpg)"
            + "".join(f"; {line}" for line in opened.lines())
            + (
                UNPACK_INNER
                if any(reason.startswith((".tar,", ".zip,", ".tgz,", ".gz,")) for reason in left_out)
                else ""
            )
        )
    names = {
        name for image in opened.images for name in (PurePosixPath(image.path).name, PurePosixPath(image.path).stem)
    }
    if missing := [name for name in validation if name not in names]:
        raise UserError(f"{validation_list}: {len(missing)} listed images are not in {source}, the first: {missing[0]}")
    return opened
