"""The samples of one tar, local or remote, read once from front to end."""

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from shlex import quote
from typing import Any

import numpy as np

from depthmup.data import storage
from depthmup.data.errors import UserError
from depthmup.data.index import NO_LABEL, Members
from depthmup.data.splits import is_hidden
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
OTHER_FILES = {  # likewise, in lower case
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml"), "a web page: read what it says, and download the file again"),
}
MAX_LABEL_BYTES = 64  # of a member .cls: more is no number
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAKE_ANEW = "make the tar anew with tar --sort=name"
webdataset_metadata = re.compile(r"__[^/]*__($|/)").match  # names that webdataset's own reader leaves out


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def detect_archive_kind(start: bytes) -> str | None:
    """What a file that begins so is packed by; None for a plain tar and all else."""
    return next((kind for magic, kind in ARCHIVES.items() if start.startswith(magic)), None)


def describe_other_file(start: bytes) -> str | None:
    """What a file that begins so is instead of a tar, and what helps; None for all else."""
    return next((words for magic, words in OTHER_FILES.items() if start.lower().startswith(magic)), None)


class HashingReader:
    """A file that is read once from front to end, with its first bytes, its size, where its
    last byte other than 0 ends, and SHA-256."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.size, self.end, self.start = file, hashlib.sha256(), 0, 0, b""

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if not self.size:
            self.start = content[:32]
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
        self.url, self.position, self.size = url, 0, storage.ask_size(url)

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


def is_stray(name: str) -> bool:
    """Whether a member is none of the user's data: hidden, as macOS's ._dog.jpg, or in a hidden folder."""
    return any(map(is_hidden, PurePosixPath(name).parts))


def read_members(file: HashingReader, location: str) -> Iterator[dict[str, Any]]:
    """webdataset's file samples, with (name, offset, size, content) for data; only labels have their content read.

    Raises tarfile.TarError for what is no whole tar of plain files, each with a name of its own.
    """
    last_key, extensions = None, set[str]()
    with tarfile.open(fileobj=file, mode="r|", bufsize=storage.BLOCK) as archive:  # type: ignore[call-overload]  # it only reads
        for member in archive:
            name = member.name
            if webdataset_metadata(name) or is_stray(name) or member.isdir():
                continue
            if not member.isreg():
                raise tarfile.ReadError(f"{name} is no file but a link or the like: {MAKE_ANEW} -h --hard-dereference")
            if member.issparse():
                raise tarfile.ReadError(f"{name} is stored with holes: {MAKE_ANEW}, without -S (--sparse)")
            key, extension = webdataset.tariterators.base_plus_ext(name)
            if key is None:
                continue
            if key != last_key:
                last_key, extensions = key, set()
            if extension.lower() in extensions:
                raise tarfile.ReadError(f"{name} is there twice: give each sample a name of its own")
            extensions.add(extension.lower())
            extracted = archive.extractfile(member) if name.lower().endswith(".cls") else None
            content = extracted.read(MAX_LABEL_BYTES) if extracted else b""
            yield {"fname": name, "__url__": location, "data": (name, member.offset_data, member.size, content)}
        file.read_all()
        check_end(archive.offset, file.end, file.size)


def describe_no_samples(location: str, imageless: Mapping[str, Sequence[str]], keys: Collection[str]) -> UserError:
    """What is wrong with a tar that holds `imageless`, the names of members by key of samples without an image, and how
    it is mended. keys: of samples with one."""
    names = [name for of_key in imageless.values() for name in of_key]
    if nested := next((name for name in names if name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip"))), None):
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
    kinds = ", ".join(IMAGE_EXTENSIONS)
    if dotted := next((name for name in names if is_image(name)), None):
        return UserError(
            f"{location}: {dotted}: WebDataset takes all that follows the first dot of a file's name for its kind. "
            f"Write the tar anew with names such as {replace_dots(dotted)}, and the label's likewise"
        )
    key = next(iter(imageless))
    return UserError(
        f"{location}: {key} has no image ({kinds}), but {' and '.join(imageless[key])}. Write its image as one of "
        f"these, or take it out: tar --delete -f {quote(location)} {' '.join(map(quote, imageless[key]))}"
    )


def replace_dots(name: str) -> str:
    """a/b.c.jpg -> a/b_c.jpg"""
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "_") + path.suffix))


@dataclass(frozen=True)
class Scanned:
    """A tar of samples: what its sidecar is to hold, its size in bytes, its SHA-256."""

    members: Members
    size: int
    sha256: str


def read_label(content: bytes) -> int:
    """The whole number that a member .cls holds, NO_LABEL for all else."""
    label = content.removeprefix(BYTE_ORDER_MARK).strip()
    return int(label) if label.isdigit() and len(label) < 10 else NO_LABEL


def scan(location: str, first_label: int = 0) -> Scanned:
    """Reads a tar, with labels counted from `first_label`. Raises UserError when it is no whole tar of samples."""
    rows, keys, imageless = [], set(), dict[str, list[str]]()
    try:
        with open_stream(location) as stream:
            file = HashingReader(stream)
            for sample in webdataset.tariterators.group_by_keys(read_members(file, location)):
                image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
                if image is None:
                    imageless[sample["__key__"]] = [data[0] for key, data in sample.items() if key[:2] != "__"]
                    continue
                keys.add(sample["__key__"])
                number = read_label(sample["cls"][3]) if "cls" in sample else NO_LABEL
                if NO_LABEL < number < first_label:
                    raise UserError(f"{location}: {image[0]} has the label {number}, below --first-label {first_label}")
                number = max(number - first_label, NO_LABEL)
                rows.append((image[1], image[2], number, image[0].encode("utf-8", "surrogateescape")))
    except FileNotFoundError:
        raise UserError(f"{location}: no such file") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        if kind := detect_archive_kind(file.start):
            raise UserError(
                f"{location}: compressed or archived by {kind}, but samples are read by their place in a plain tar: "
                "unpack it to a .tar first"
            ) from None
        if other := describe_other_file(file.start):
            raise UserError(f"{location}: {other}") from None
        raise UserError(f"{location}: not a whole tar of samples ({error})") from None
    if imageless:
        raise describe_no_samples(location, imageless, keys)
    if not rows:
        raise UserError(f"{location}: no samples in it")
    numbers = np.array([row[:3] for row in rows], np.int64)
    members = Members(numbers[:, 0], numbers[:, 1], numbers[:, 2], np.array([row[3] for row in rows]))
    return Scanned(members, file.size, file.sha256.hexdigest())


def describe_first_sample(location: str) -> str:
    """'the first sample, 0000, has .png and .json alone', or what its .cls holds."""
    with open_stream(location) as stream:
        sample = next(webdataset.tariterators.group_by_keys(read_members(HashingReader(stream), location)))
    kinds = " and ".join(f".{key}" for key in sample if key[:2] != "__")
    label = repr(sample["cls"][3].decode(errors="backslashreplace")) if "cls" in sample else ""
    return f"the first sample, {sample['__key__']}, has {f'{label} there' if label else f'{kinds} alone'}"
