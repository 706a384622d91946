"""`depthmup pack`: a folder of images -> shuffled WebDataset shards with an index."""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically, writing
from depthmup.data.images import BadImage, convert_image
from depthmup.data.index import INDEX_NAME, Index, Shard, locate_sidecar, show_count
from depthmup.data.keys import make_generator
from depthmup.data.lock import NoLocks, flock
from depthmup.data.plan import check_plan, read_plan
from depthmup.data.scan import process_pool
from depthmup.data.sources import UNPACKED_NAME, SourceImage, open_source, read_list
from depthmup.data.tar_samples import scan, webdataset_metadata
from depthmup.data.tars import import_webdataset

webdataset = import_webdataset()
Progress = Callable[[int, int], None]  # (images done, images in all)
IMAGES_PER_PROCESS = 2000  # less is packed before another process has started
LOCK_NAME = ".lock"
CLAIM_NAME = ".claimed"  # in place of the lock, where the file system has no locks


@dataclass(frozen=True)
class PackedShard:
    """One shard that is written (None when no image of it was readable), and a line per unreadable image."""

    shard: Shard | None
    bad: list[str]


def sample_key(image: SourceImage) -> str:
    """A webdataset key that still names the source file: no dots, which webdataset reads as the extension's start, and
    no name that it takes for its own metadata."""
    key = re.sub(r"[^\w/-]", "_", str(Path(image.path).with_suffix("")))
    return re.sub("^__", "-_", key) if webdataset_metadata(key) else key


def record_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def write_shard(
    path: Path, images: Sequence[SourceImage], labels: dict[str, int], resize: int | None, quality: int
) -> PackedShard:
    """Writes one tar under a temporary name, then its sidecar, renames it, and records that it is done."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    bad: list[str] = []
    keys: set[str] = set()
    with writing(temporary) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for image in images:
            try:
                content = convert_image(image.read(), resize, quality)
            except (BadImage, OSError) as error:
                bad.append(f"{image.path}: {error}")
                continue
            key = sample_key(image)
            while key in keys:  # 1.jpg beside 1.png
                key += "_"
            keys.add(key)
            extension = "jpg" if resize else Path(image.path).suffix.lower().lstrip(".")
            writer.write({"__key__": key, "cls": str(labels[image.class_name]).encode(), extension: content})
    shard = None
    if keys:
        scanned = scan(str(temporary))
        scanned.members.save(Path(locate_sidecar(str(path.parent), path.name)))
        os.replace(temporary, path)
        shard = Shard(path.name, len(keys), scanned.size, scanned.sha256)
    else:
        temporary.unlink()
    packed = PackedShard(shard, bad)
    write_atomically(record_path(path), json.dumps(asdict(packed)).encode())
    return packed


def read_record(path: Path) -> PackedShard | None:
    """What a killed pack has left of a shard: None when it was not done, or the record is damaged."""
    try:
        raw = json.loads(record_path(path).read_text())
        return PackedShard(Shard(**raw["shard"]) if raw["shard"] else None, [*raw["bad"]])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def count_validation_images(images: int, validation_share: float) -> int:
    """How many of so many images, which have no splits of their own, are held out for val."""
    return round(images * validation_share)


def split_images(images: Sequence[SourceImage], validation_share: float, seed: int) -> dict[str, list[SourceImage]]:
    """Images per split, shuffled once by `seed`. Without splits of its own the source gives its last share to val."""
    if not 0 <= validation_share < 1:  # or it is no number, which click's ranges let pass
        raise UserError(f"validation_share {validation_share}: expected a number from 0 to below 1")
    named = any(image.split for image in images)
    if named and validation_share:
        raise UserError("the source has train and val images of its own: leave validation_share at 0")
    shuffled = [images[i] for i in make_generator("pack", seed).permutation(len(images))]
    if named:
        return {split: chosen for split in ("train", "val") if (chosen := [i for i in shuffled if i.split == split])}
    held_out = count_validation_images(len(shuffled), validation_share)
    if validation_share and not 0 < held_out < len(shuffled):
        raise UserError(
            f"validation_share {validation_share:g} holds out {held_out} of {show_count(len(shuffled), 'image')}: "
            "state a share that leaves some to each split"
        )
    splits = {"train": shuffled[: len(shuffled) - held_out]}
    if held_out:
        splits["val"] = shuffled[len(shuffled) - held_out :]
    return splits


def divide(images: Sequence[SourceImage], shard_samples: int, shard_bytes: int | None) -> list[list[SourceImage]]:
    """Consecutive parts of at most `shard_samples` images and, where given, `shard_bytes` bytes."""
    parts: list[list[SourceImage]] = [[]]
    size = 0
    for image in images:
        if parts[-1] and (len(parts[-1]) == shard_samples or (shard_bytes and size + image.size > shard_bytes)):
            parts.append([])
            size = 0
        parts[-1].append(image)
        size += image.size
    return parts


@contextmanager
def claim_folder(out: Path) -> Iterator[None]:
    """Makes `out`, for this process alone while the block runs, without files half written before. Raises UserError.

    On a file system without locks a file that must not be there yet takes the lock's place; a killed pack leaves it.
    """
    path, claimed = out / LOCK_NAME, out / CLAIM_NAME
    in_use = UserError(f"{out}: another process is packing into it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 - closed with the block
    except OSError as error:
        raise UserError(f"{out}: cannot write shards there ({error.strerror or error})") from None
    with lock:
        try:
            if not flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise in_use
            os.stat(path)  # or who had it has just removed it
        except FileNotFoundError:
            raise in_use from None
        except NoLocks:
            try:
                with open(claimed, "x") as file:
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
            except FileExistsError:
                raise UserError(
                    f"{out}: {claimed.read_text() or 'another process'} is packing into it, or was killed: this file "
                    f"system has no locks that would tell. If it does not run any more, delete {claimed}"
                ) from None
        try:
            for leftover in out.glob(".*.tmp"):
                leftover.unlink()
            yield
        finally:
            for file_of_ours in (out / UNPACKED_NAME, claimed, path):
                file_of_ours.unlink(missing_ok=True)
            if not any(out.iterdir()):  # nothing was packed
                out.rmdir()


def read_archive_stamp(source: str) -> list[int] | None:
    """Bytes and time of change of a source that is one file. While both stay, it need not be unpacked again."""
    if not os.path.isfile(source):
        return None
    status = os.stat(source)
    return [status.st_size, status.st_mtime_ns]


def read_packed(out: Path) -> Index:
    """The index of a pack that is done. Raises UserError when a shard of it is missing."""
    index = Index.load(out)
    index.check_files()
    return index


def write_shards(
    tasks: Mapping[Path, Sequence[SourceImage]],
    finished: dict[Path, PackedShard],
    classes: Iterable[str],
    resize: int | None,
    quality: int,
    max_bad: int,
    processes: int | None,
    progress: Progress,
) -> None:
    """Adds to `finished` what is missing there of `tasks`. Raises UserError when all have more than `max_bad` bad."""
    labels = {name: number for number, name in enumerate(classes)}
    total = sum(map(len, tasks.values()))

    def check_bad() -> None:
        bad = [line for packed in finished.values() for line in packed.bad]
        if len(bad) > max_bad:
            raise UserError(
                f"more than {max_bad} unreadable images, the first: {bad[0]}. Repair them, or raise --max-bad"
            )

    def finish(path: Path, packed: PackedShard) -> None:
        finished[path] = packed
        progress(sum(len(tasks[path]) for path in finished), total)
        check_bad()

    check_bad()  # an earlier call may have ended here
    waiting = [path for path in tasks if path not in finished]
    processes = processes or min(len(os.sched_getaffinity(0)), total // IMAGES_PER_PROCESS)
    if min(processes, len(waiting)) <= 1:
        for path in waiting:
            finish(path, write_shard(path, tasks[path], labels, resize, quality))
        return
    with process_pool(min(processes, len(waiting))) as pool:
        futures = {pool.submit(write_shard, path, tasks[path], labels, resize, quality): path for path in waiting}
        for future in as_completed(futures):
            finish(futures[future], future.result())


def pack(
    source: str,
    out: str | Path,
    *,
    validation_share: float = 0.0,
    validation_list: Path | None = None,
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    class_names: Path | None = None,
    shard_samples: int = 1024,
    shard_bytes: int | None = None,
    resize: int | None = None,
    quality: int = 90,
    seed: int = 0,
    max_bad: int = 100,
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Index, list[str]]:
    """Packs `source` into `out`. Returns the index and a line per unreadable image and per reason to leave files out.

    `train`, `val`: patterns of the folders that are these splits, where their names do not say it.

    The image files' bytes are kept, unless `resize` (pixels of the shorter side) asks for JPEGs of `quality`. A folder
    that holds these images packed with these options is left as it is; after a kill, finished shards are. Raises
    UserError for a missing or empty source, a folder that is unwritable, in use or holds another pack, and for more
    than `max_bad` unreadable images.
    """
    out = Path(out)
    options = {
        "validation-share": validation_share,
        "validation-list": validation_list and str(validation_list),
        "train": list(train) or None,
        "val": list(val) or None,
        "class-names": class_names and str(class_names),
        "shard-samples": shard_samples,
        "shard-megabytes": shard_bytes and shard_bytes / 1e6,
        "resize": resize,
        "quality": resize and quality,
        "seed": seed,
    }
    stamp, done = read_archive_stamp(source), out / INDEX_NAME
    with claim_folder(out):
        recorded = read_plan(out)
        same = recorded and (recorded["archive"], recorded["options"]) == (stamp, options)
        if recorded and same and stamp and not validation_list and done.exists():
            return read_packed(out), recorded["left_out"]
        opened = open_source(source, out, validation_list, train, val, processes)
        images = opened.images
        splits = split_images(images, validation_share, seed)
        classes = opened.classes
        names = read_list(class_names, "'CLASS NAME'") if class_names else {}
        listing = hashlib.sha256("\n".join(f"{i.path} {i.size} {i.class_name} {i.split}" for i in images).encode())
        plan = {
            "source": source,
            "archive": stamp,
            "images": len(images),
            "listing": listing.hexdigest(),
            "left_out": opened.lines(),
            "options": options,
        }
        check_plan(out, plan)
        if done.exists():
            return read_packed(out), opened.lines()

        tasks = {
            out / f"{split}-{number:06d}.tar": part
            for split, chosen in splits.items()
            for number, part in enumerate(divide(chosen, shard_samples, shard_bytes))
        }
        finished = {path: record for path in tasks if (record := read_record(path))}
        write_shards(tasks, finished, classes, resize, quality, max_bad, processes, progress)
        shards = {
            split: tuple(s for path in tasks if path.name.startswith(f"{split}-") and (s := finished[path].shard))
            for split in splits
        }
        index = Index(
            str(out),
            tuple(f"{name} {names[name]}" if name in names else shown for name, shown in classes.items()),
            shards,
        )
        index.save()
        for path in tasks:
            record_path(path).unlink()
    bad = [f"left out, not readable: {line}" for path in tasks for line in finished[path].bad]
    return index, bad + opened.lines()
