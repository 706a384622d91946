"""Bytes of a file by offset: local, or remote through fsspec, with retries and a cache of blocks on disk."""

import hashlib
import math
import os
import random
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from depthmup.data.ahead import open_ahead
from depthmup.data.environment import environment
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "hf")
PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}  # what fsspec needs for a scheme
BLOCK = 4 << 20  # bytes of one request
TRIES = 5
LONGEST_WAIT = 60.0  # seconds that a server may ask for before the next try
CACHED_NAME = re.compile(r"[0-9a-f]{40}|(?P<unfinished>\.[0-9a-f]{40}\..+\.tmp)")  # all else in the folder is not ours
TOUCH_AFTER = 60  # seconds since a block was last marked as used
STALE_AFTER = 3600  # seconds after which an unfinished block is what a killed process has left
PAUSE = 60  # seconds without caching after a failure to write to the cache

Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Whether `location` is a URL. Raises UserError for one of a scheme that is not supported."""
    scheme, separator, _ = location.partition("://")
    if separator and scheme not in REMOTE_SCHEMES:
        raise UserError(f"{location}: cannot read {scheme}://; known: {', '.join(REMOTE_SCHEMES)} and local paths")
    return bool(separator)


def join(root: str, name: str) -> str:
    """`name` inside `root`; a URL or an absolute path stays what it is."""
    return name if "://" in name else root.rstrip("/") + "/" + name if "://" in root else os.path.join(root, name)


def open_file_system(url: str) -> Any:
    import fsspec

    # aiohttp, unlike all other clients, leaves the proxies of the environment and ~/.netrc aside unless it is told
    settings = {"client_kwargs": {"trust_env": True}} if url.startswith("http") else {}
    try:
        return fsspec.core.url_to_fs(url, **settings)
    except ImportError:
        package = PACKAGES.get(url.partition("://")[0], "'depthmup[remote]'")
        raise UserError(f"{url}: a package for this kind of URL is missing: pip install {package}") from None


def read_http_status(error: BaseException | None) -> int | None:
    """What an HTTP server answered, where that is what went wrong."""
    return getattr(error, "status", None)


def read_asked_wait(error: BaseException) -> float:
    """Seconds that a server asks for before the next try (Retry-After, as a number), at most LONGEST_WAIT."""
    asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else 0.0


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
            reason = " ".join(f"{type(error).__name__} {error}".split())
            status, wait = read_http_status(error), read_asked_wait(error)
        if status in (401, 403):
            raise UserError(f"{url}: no permission (the server answered {status})")
        if number + 1 < TRIES:
            time.sleep(max(0.2 * 2**number * random.uniform(0.5, 1.5), wait))
    raise UserError(f"{url}: {TRIES} tries failed, the last with {reason}")


def build_timeout(system: Any) -> dict[str, float]:
    """The argument that limits one call of a file system: fsspec's own, which those that are not async lack."""
    return {"timeout": environment.timeout} if system.async_impl else {}


def send_request(url: str, **arguments: int) -> bytes:
    """One request for a file, or for the range [start, end) of it."""
    system, path = open_file_system(url)
    return system.cat_file(path, **arguments, **build_timeout(system))


def fetch(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a remote file. Raises as `retry` does."""

    def attempt() -> bytes:
        content = send_request(url, start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came for {stop - start} (does the server know ranges?)")
        return content

    return retry(url, attempt)


def ask_size(url: str) -> int:
    """Bytes of a remote file. Raises as `retry` does."""

    def attempt() -> int:
        system, path = open_file_system(url)
        try:
            size = system.info(path, **build_timeout(system))["size"]
        except FileNotFoundError as error:  # fsspec's HTTP raises it from whatever went wrong
            if url.startswith("http") and read_http_status(error.__cause__) not in (404, 410):
                raise error.__cause__ or OSError(f"{error}") from None
            raise
        if size is None:
            raise UserError(f"{url}: the server does not tell its size")
        return size

    return retry(url, attempt)


@dataclass
class CacheUse:
    """This process's use of the cache: bytes fetched since it last looked at the cap (infinite: it has not yet), and
    the time, as of time.monotonic, up to which it caches nothing, and a counter of the failures that paused it."""

    fetched: float = math.inf
    paused_until: float = 0.0
    failures: Iterator[int] = field(default_factory=count)  # one step for each of several threads


cache_use = CacheUse()


def evict() -> None:
    """Where the cache is over its cap, removes the blocks used longest ago down to 90 %; others may do so meanwhile."""
    blocks, now = [], time.time()
    for entry in os.scandir(environment.cache):
        name = CACHED_NAME.fullmatch(entry.name)
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        if status.st_uid != os.getuid():
            continue  # another user's, who keeps to a cap of their own
        if name and name["unfinished"]:
            if now - status.st_mtime > STALE_AFTER:
                Path(entry.path).unlink(missing_ok=True)
        elif name:
            blocks.append((status.st_mtime, status.st_size, entry.path))
    size = sum(size for _, size, _ in blocks)
    excess = size - environment.cache_bytes * 0.9 if size > environment.cache_bytes else 0
    for _, size, path in sorted(blocks):
        if excess <= 0:
            break
        Path(path).unlink(missing_ok=True)
        excess -= size


def is_ours(status: os.stat_result) -> bool:
    """Whether a file or a folder belongs to this user, or to root, who could change anything anyway."""
    return status.st_uid in (os.getuid(), 0)


@lru_cache
def cache_is_safe(folder: Path) -> bool:
    """Whether nobody else decides what lies in the cache's folder, which is made here; if not, warns once a process."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(folder)
    except OSError:
        return True  # nothing can be read there, and `keep` says why
    if not is_ours(status):
        reason = f"belongs to user {status.st_uid}"
    elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        reason = "can be changed by everybody"
    else:
        return True
    warnings.warn(
        f"{folder}: {reason}, who could put other data there: remote data is not cached, so slower. Set DEPTHMUP_CACHE "
        "to a folder of your own",
        stacklevel=2,
    )
    return False


def keep(cached: Path, content: bytes) -> None:
    """Puts a block into the cache, and has it evict after each 0.1 % of its cap. Where that fails, as on a full disk,
    warns once a process and caches nothing for a while: reading goes on, only slower."""
    try:
        environment.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A reader sees a whole block or none; who comes second writes the same bytes. A lost one is fetched again.
        write_atomically(cached, content, durable=False)
        cache_use.fetched += len(content)
        if cache_use.fetched >= environment.cache_bytes / 1000:
            cache_use.fetched = 0
            evict()
    except OSError as error:
        cache_use.paused_until = time.monotonic() + PAUSE
        if next(cache_use.failures) == 0:
            reason = f"cannot cache remote data ({error.strerror or error}): slower"
            warnings.warn(f"{environment.cache}: {reason}", stacklevel=2)


def read_cached(cached: Path, block_size: int, start: int, stop: int) -> bytes | None:
    """Bytes [start, stop) of a cached block; None when it is not there, damaged, another user's or cannot be read."""
    try:
        with open(cached, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not is_ours(status):
                return None
            content = os.pread(file.fileno(), stop - start, start)
            if time.time() - status.st_mtime > TOUCH_AFTER:
                with suppress(OSError):  # root's
                    os.utime(file.fileno())
    except OSError:
        return None
    return content if status.st_size == block_size and len(content) == stop - start else None


def is_caching() -> bool:
    return cache_is_safe(environment.cache) and time.monotonic() >= cache_use.paused_until


def find_block_bounds(number: int, file_size: int) -> tuple[int, int]:
    """First and last (exclusive) byte of a block."""
    return number * BLOCK, min((number + 1) * BLOCK, file_size)


def locate_cached_file(url: str, version: str, first: int, end: int) -> Path:
    """With the user in the name, since users who share a folder may not replace each other's files."""
    return environment.cache / hashlib.sha256(f"{url} {version} {first} {end} {os.getuid()}".encode()).hexdigest()[:40]


def fetch_block(url: str, first: int, end: int, cached: Path) -> bytes:
    block = fetch(url, first, end)
    keep(cached, block)
    return block


def fetch_ahead(url: str, first: int, end: int, cached: Path) -> bytes | None:
    """The block, unless it has come into the cache since it was asked for, or nothing is cached meanwhile."""
    return fetch_block(url, first, end, cached) if is_caching() and not cached.exists() else None


def read_block(url: str, version: str, number: int, file_size: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop), counted from the block's first, of block `number` of a remote file of `file_size` bytes."""
    first, end = find_block_bounds(number, file_size)
    if not cache_is_safe(environment.cache):
        return fetch(url, first + start, first + stop)
    cached = locate_cached_file(url, version, first, end)
    if (block := open_ahead().result(cached.name)) is not None:  # asked first: what is done lies in the cache
        return block[start:stop]
    content = read_cached(cached, end - first, start, stop)
    if content is not None:
        return content
    if not is_caching():
        return fetch(url, first + start, first + stop)
    return fetch_block(url, first, end, cached)[start:stop]


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
        if stop <= offset:
            return b""
        return b"".join(
            read_block(location, version, n, file_size, max(offset - n * BLOCK, 0), min(stop - n * BLOCK, BLOCK))
            for n in range(offset // BLOCK, -(-stop // BLOCK))
        )
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from None


def read_whole(location: str) -> bytes:
    """All bytes of a small file. Raises FileNotFoundError, or UserError when it cannot be read."""
    if is_remote(location):
        return retry(location, lambda: send_request(location))
    return Path(location).read_bytes()


def prefetch(location: str, version: str, file_size: int, offset: int, size: int) -> None:
    """Has a range read ahead for single reads that follow: by the operating system where it is local, and where it is
    remote by several requests at once, into the cache. Waits for nothing."""
    if not is_remote(location):
        os.posix_fadvise(open_local(location, version).fileno(), offset, size, os.POSIX_FADV_WILLNEED)
    elif is_caching():
        for number in range(offset // BLOCK, -(-min(offset + size, file_size) // BLOCK)):
            first, end = find_block_bounds(number, file_size)
            cached = locate_cached_file(location, version, first, end)
            if not cached.exists():
                open_ahead().ask(cached.name, partial(fetch_ahead, location, first, end, cached))
