"""Bytes of a file by offset: local, or remote through fsspec, with retries and a cache of blocks on disk."""

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from data.errors import UserError

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "hf")
PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}  # what fsspec needs for a scheme
BLOCK = 4 << 20  # bytes of one request
TRIES = 5
TIMEOUT = float(os.environ.get("DEPTHMUP_TIMEOUT", "60"))  # seconds for one request
CACHE = Path(os.environ.get("DEPTHMUP_CACHE", Path(tempfile.gettempdir()) / f"depthmup-cache-{os.getuid()}"))
CACHE_BYTES = int(float(os.environ.get("DEPTHMUP_CACHE_GB", "50")) * 1e9)

Result = TypeVar("Result")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file beside `path`, makes it durable, and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_remote(location: str) -> bool:
    """Whether `location` is a URL. Raises UserError for one of a scheme that is not supported."""
    scheme, separator, _ = location.partition("://")
    if separator and scheme not in REMOTE_SCHEMES:
        raise UserError(f"{location}: cannot read {scheme}://; known: {', '.join(REMOTE_SCHEMES)} and local paths")
    return bool(separator)


def join(root: str, name: str) -> str:
    """`name` inside `root`; a URL or an absolute path stays what it is."""
    return name if "://" in name else root.rstrip("/") + "/" + name if "://" in root else os.path.join(root, name)


def file_system(url: str) -> Any:
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(url.partition("://")[0], "'depthmup[remote]'")
        raise UserError(f"{url}: a package for this kind of URL is missing: pip install {package}") from None


def retry(url: str, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, tried again with growing waits. Raises FileNotFoundError, or UserError at last."""
    for number in range(TRIES):
        try:
            return attempt()
        except (FileNotFoundError, UserError):
            raise
        except PermissionError as error:
            raise UserError(f"{url}: no permission ({error})") from None
        except Exception as error:  # each backend has its own family of network errors
            reason = f"{type(error).__name__} {error}".strip()
        if number + 1 < TRIES:
            time.sleep(min(0.2 * 2**number, 10) * random.uniform(0.5, 1.5))
    raise UserError(f"{url}: {TRIES} tries failed, the last with {reason}")


def request(url: str, **arguments: int) -> bytes:
    """One request for a file, or for the range [start, end) of it."""
    system, path = file_system(url)
    timeout = {"timeout": TIMEOUT} if system.async_impl else {}  # fsspec's own, for all of a call
    return system.cat_file(path, **arguments, **timeout)


def evict() -> None:
    """Removes the blocks that were used longest ago until the cache is under its cap; others may do so meanwhile."""
    blocks = []
    for entry in os.scandir(CACHE):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        blocks.append((status.st_mtime, status.st_size, entry.path))
    excess = sum(size for _, size, _ in blocks) - CACHE_BYTES
    for _, size, path in sorted(blocks):
        if excess <= 0:
            break
        Path(path).unlink(missing_ok=True)
        excess -= size


def read_block(url: str, version: str, number: int, size: int) -> bytes:
    """Block `number` of a remote file of `size` bytes, from the cache or by one request."""
    start, stop = number * BLOCK, min((number + 1) * BLOCK, size)
    cached = CACHE / hashlib.sha256(f"{url} {version} {start} {stop}".encode()).hexdigest()[:40]
    try:
        content = cached.read_bytes()
        os.utime(cached)
        return content
    except FileNotFoundError:
        pass

    def attempt() -> bytes:
        content = request(url, start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came for {stop - start} (does the server know ranges?)")
        return content

    content = retry(url, attempt)
    CACHE.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, content)  # a reader sees a whole block or none; who comes second writes the same bytes
    evict()
    return content


@lru_cache(maxsize=128)
def open_local(path: str, version: str) -> FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_range(location: str, version: str, file_size: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer at the file's end. `version` tells apart the contents a location has had.

    Raises UserError when the file is missing or cannot be read.
    """
    try:
        if not is_remote(location):
            return os.pread(open_local(location, version).fileno(), size, offset)
        stop = min(offset + size, file_size)
        blocks = range(offset // BLOCK, -(-stop // BLOCK))
        content = b"".join(read_block(location, version, number, file_size) for number in blocks)
        return content[offset - blocks.start * BLOCK :][:size]
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from None


def read_whole(location: str) -> bytes:
    """All bytes of a small file. Raises FileNotFoundError, or UserError when it cannot be read."""
    if is_remote(location):
        return retry(location, lambda: request(location))
    return Path(location).read_bytes()


def prefetch(location: str, version: str, offset: int, size: int) -> None:
    """Asks the operating system to read a local range ahead, in one go, for single reads that follow."""
    if not is_remote(location):
        os.posix_fadvise(open_local(location, version).fileno(), offset, size, os.POSIX_FADV_WILLNEED)
