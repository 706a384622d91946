"""Where images come from before they are packed: a folder, a tar of one, or a data set that a Python package ships."""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from depthmup.data.errors import UserError
from depthmup.data.files import describe_full_disk, naming
from depthmup.data.find import find_shards, find_tars_of_splits
from depthmup.data.index import INDEX_NAME, NO_LABEL, Index, show_count
from depthmup.data.layout import SourceImage, place_images
from depthmup.data.scan import map_in_processes
from depthmup.data.tar_samples import (
    IMAGE_EXTENSIONS,
    MAKE_ANEW,
    HashingReader,
    check_end,
    describe_other_file,
    detect_archive_kind,
    is_image,
    scan,
)

COMPRESSED: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
UNPACK_INNER = (
    ". Archives inside are not opened. Unpack each into a folder of its class: "
    'for t in *.tar; do mkdir "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
)
UNPACKED_NAME = ".source.tar.tmp"


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
        return [*self.notes, *(f"{show_count(count, 'file')} left out: {reason}" for reason, count in counts)]


def explain_no_image(path: str) -> str:
    """Why a file is left out that is_image does not take."""
    return f"{PurePosixPath(path).suffix.lower() or 'no extension'}, where {', '.join(IMAGE_EXTENSIONS)} are packed"


def escape_path(path: str) -> str:
    """`path` in which bytes that are no UTF-8 stand as \\xe9, so that it can be printed."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_folder_images(root: str, left_out: Counter[str]) -> Iterator[SourceImage]:
    """The images of a tree; links are followed, but not back to a folder above them. Counts what it leaves out."""

    def walk(folder: str, above: tuple[str, ...]) -> Iterator[SourceImage]:
        real = os.path.realpath(folder)
        if real in above:
            left_out[f"{escape_path(folder)}, a link to a folder above it"] += 1
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))
            elif not is_image(entry.name):
                left_out[explain_no_image(entry.name)] += 1
            elif not entry.is_file():
                left_out[f"{escape_path(entry.path)}, a broken link or no plain file"] += 1
            else:
                name = escape_path(os.path.relpath(entry.path, root))
                yield SourceImage(name, "", None, entry.stat().st_size, entry.path)

    return walk(root, ())


def read_tar_images(path: Path, left_out: Counter[str]) -> Iterator[SourceImage]:
    """The images of an uncompressed tar. Counts what it leaves out. Raises tarfile.TarError when it is not whole."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored with holes: {MAKE_ANEW}, without -S (--sparse)")
            if member.isreg() and is_image(member.name):
                yield SourceImage(escape_path(member.name), "", None, member.size, str(path), member.offset_data)
            elif not member.isdir():
                left_out[explain_no_image(member.name) if member.isreg() else "links and the like in the tar"] += 1
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
        start = file.read(32)
    if other := describe_other_file(start):
        raise UserError(f"{path}: {other}")
    if (kind := detect_archive_kind(start)) is None:
        return path
    if kind not in COMPRESSED:
        raise UserError(f"{path}: a {kind} archive: unpack it into a folder, and pack that folder")
    unpacked = folder / UNPACKED_NAME
    with COMPRESSED[kind](path) as packed, naming(unpacked), open(unpacked, "wb") as plain:
        while block := packed.read(1 << 20):
            plain.write(block)
    return unpacked


def read_digits_images() -> Iterator[SourceImage]:
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


PACKAGED = {"sklearn:digits": read_digits_images}


def open_shards_as_source(source: str, train: Sequence[str], val: Sequence[str], processes: int | None) -> Source:
    """The labelled images of a folder of WebDataset shards, which are packed to be shuffled. Their labels stay.

    Raises UserError as data.find.find_shards and data.tar_samples.scan do, and where there are no labels.
    """
    found = find_shards(source, Path(source), train, val)
    indexed = Index.load(source) if (Path(source) / INDEX_NAME).exists() else None
    first_label = [indexed.first_label if indexed else 0] * len(found.names)
    images, left_out, highest = [], Counter[str](), NO_LABEL
    of_shards = map_in_processes(scan, processes, found.locations, first_label)
    for location, split, scanned in zip(found.locations, found.splits, of_shards, strict=True):
        members = scanned.members
        highest = max(highest, int(members.labels.max()))
        rows = zip(members.names.tolist(), members.labels, members.sizes, members.offsets, strict=True)
        for name, label, size, offset in rows:
            path = escape_path(name.decode("utf-8", "surrogateescape"))
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
    is none, or empty."""
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if not text:
        raise UserError(f"{path}: empty: write a line for each name, or leave the option out")
    return text.split("\n")  # splitlines would split at a form feed, too


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
            found = list(read_folder_images(source, left_out))
            if not found and find_tars_of_splits(path, everywhere=bool(train or val))[0]:
                return open_shards_as_source(source, train, val, processes)
        elif path.is_file():
            found = list(read_tar_images(unpack(path, scratch), left_out))
        else:
            raise UserError(f"{source}: no such folder or tar (packaged sources: {', '.join(PACKAGED)})")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{source}: not a whole tar ({error})") from None
    except OSError as error:
        if describe_full_disk(error, source):
            raise  # there is no room for what it unpacks to
        raise UserError(f"{source}: cannot be read ({error})") from None
    validation = {}
    if validation_list:
        listed = read_list(validation_list, "'IMAGE CLASS'")
        validation = {name: rest.split()[0] for name, rest in listed.items()}
    images, notes = place_images(found, validation, left_out, train, val)
    opened = Source(images, left_out, {name: name for name in sorted({image.class_name for image in images})}, notes)
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
