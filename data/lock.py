"""Locks on files by flock(2), in one place because not every file system has them."""

import errno
import fcntl
from typing import IO, Any

from depthmup.data.errors import UserError

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without lockd, others


class NoLocks(UserError):
    """The file system of a file has no locks. The message names the file and the ways to mend it."""


def flock(file: IO[Any], operation: int) -> bool:
    """fcntl.flock; whether the lock was taken: False when another process holds it and LOCK_NB was asked for.

    Raises NoLocks where the file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        raise NoLocks(
            f"{file.name}: this file system has no file locks ({error.strerror}): use a folder on another one, "
            "or have it mounted with locks (Lustre: -o flock; NFS: with lockd)"
        ) from None
    return True
