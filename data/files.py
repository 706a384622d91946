"""Local files that are written whole or not at all, and what a full disk means for them."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from depthmup.data.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe_full_disk(error: BaseException, otherwise: str) -> str | None:
    """What to say of an error that means that there is no room for a file, or for `otherwise` where the error names
    none; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in FULL_DISK:
        return None
    place = error.filename2 or error.filename or otherwise  # of a copy, where it was to go
    return f"{place}: {error.strerror}: free some space there"


def refuse_locked(path: Path, cure: str, folder: Path | None = None) -> None:
    """Raises UserError, with the `cure`, where this user can make no file in `folder`, else in that of the file
    `path`. The folder need not be there yet: the nearest that is, or a file in its place, decides."""
    folder = (folder or path.parent).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"{path}: {nearest} is not writable: {cure}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError of the block say which file it is about: that of a write, as on a full disk, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes `content` to a temporary file beside `path`, makes it `durable`, and renames it into place. An OSError
    names `path`."""
    # random: threads have one process id, and so may processes on machines that share the file system
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, nothing lies there
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, durable after the block. Where the block fails, as on a full disk, nothing of it stays."""
    try:
        with naming(path), open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
