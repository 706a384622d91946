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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from data.errors import UserError
from data.index import counted
from data.scan import IMAGE_EXTENSIONS, HashingReader, check_end

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}  # of top folders
COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
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
    """The images to be packed, and how many files are not, by reason."""

    images: list[SourceImage]
    left_out: Counter[str]

    def lines(self) -> list[str]:
        """'2 files left out: .gif, where jpg, ... are packed'."""
        return [f"{counted(count, 'file')} left out: {reason}" for reason, count in self.left_out.most_common()]


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
    """`path` itself; of a compressed tar an uncompressed copy in `folder`, where images are read by offset."""
    with open(path, "rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    with opener(path) as packed, open(folder / UNPACKED_NAME, "wb") as plain:
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
        if len(tops) != 1 or tops & SPLITS.keys() or all(len(path) < root + 2 for path in folders):
            return root
        root += 1


def find_splits(folders: Collection[tuple[str, ...]], has_list: bool) -> dict[str, str | None]:
    """Of each top folder that is a split, its name (None: not packed); empty where the top folders are classes.

    They are splits where there is a train with class folders in it, or nothing but names of splits. The images that a
    list names are the split val where there is one, else the first of val, valid, validation and test.
    """
    tops = {path[0] for path in folders if path}
    named = [name for name in SPLITS if name in tops]
    if set(named) != tops and not any(path[0] == "train" for path in folders if len(path) > 1):
        return {}
    validation = None if has_list else next((name for name in named if SPLITS[name] == "val"), None)
    return {name: SPLITS[name] if name in ("train", validation) else None for name in named}


def place(found: Sequence[SourceImage], validation: Mapping[str, str], left_out: Counter[str]) -> list[SourceImage]:
    """The images with class and split. Counts those that belong to none.

    `validation`: classes of the images (by name, with or without extension) that a list makes the split val.
    'train/dog/puppies/1.jpg' is a dog of the split train, 'dog/1.jpg' one of no split.
    """
    paths = [PurePosixPath(image.path) for image in found]
    folders = {path.parts[:-1] for path in paths}
    root = find_root(folders)
    splits = find_splits({path[root:] for path in folders}, bool(validation))
    placed = []
    for image, path in zip(found, paths, strict=True):
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
        elif len(inside) < 2:
            left_out[f"in {inside[0]}, but in no class folder (--validation-list names the class of such images)"] += 1
        else:
            placed.append(replace(image, class_name=inside[1], split=split))
    return placed


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises UserError when it is none."""
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: no text file in UTF-8") from None


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


def open_source(source: str, scratch: Path, validation_list: Path | None = None) -> Source:
    """All images of `source`, each in a class. `validation_list`: lines 'IMAGE CLASS' that name the split val.

    A compressed tar is unpacked to a file in the folder `scratch`, which the images are read from. Raises UserError
    when the source does not exist, is no whole tar, or holds no image in a class folder, or lacks a listed one.
    """
    path, left_out = Path(source), Counter[str]()
    try:
        if source in PACKAGED:
            found = list(PACKAGED[source]())
        elif path.is_dir():
            found = list(folder_images(source, left_out))
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
    opened = Source(place(found, validation, left_out), left_out)
    if not opened.images:
        raise UserError(
            f"{source}: no images. Expected class folders ({source}/CLASS/IMAGE.jpg or {source}/train/CLASS/IMAGE.jpg)"
            + "".join(f"; {line}" for line in opened.lines())
        )
    names = {
        name for image in opened.images for name in (PurePosixPath(image.path).name, PurePosixPath(image.path).stem)
    }
    if missing := [name for name in validation if name not in names]:
        raise UserError(f"{validation_list}: {len(missing)} listed images are not in {source}, the first: {missing[0]}")
    return opened
