"""`depthmup pack`: a folder of images -> shuffled WebDataset shards with an index."""

import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import webdataset
from PIL import Image

from data.errors import UserError
from data.index import INDEX_NAME, Index, Shard, save_offsets
from data.order import random_generator
from data.sources import SourceImage, open_source

Progress = Callable[[int, int], None]  # (images done, images in all)


def unreadable(content: bytes) -> str | None:
    """Why PIL cannot read this image file, or None when it can."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
    return None


def sample_key(image: SourceImage) -> str:
    """A webdataset key that still names the source file: no dots, which webdataset reads as the extension's start."""
    return re.sub(r"[^\w/-]", "_", str(Path(image.path).with_suffix("")))


def write_shard(path: Path, images: Sequence[SourceImage], labels: dict[str, int], bad: list[str]) -> Shard | None:
    """Writes one tar under a temporary name, then its offsets, and renames it; unreadable images go to `bad`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    offsets, sample_labels = [], []
    with open(temporary, "wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for image in images:
                content = image.read()
                if reason := unreadable(content):
                    bad.append(f"{image.path}: {reason}")
                    continue
                offsets.append(writer.tarstream.offset)
                sample_labels.append(labels[image.class_name])
                extension = Path(image.path).suffix.lower().lstrip(".")
                writer.write({"__key__": sample_key(image), "cls": str(sample_labels[-1]).encode(), extension: content})
        file.flush()
        os.fsync(file.fileno())
    if not offsets:
        temporary.unlink()
        return None
    save_offsets(path, offsets, sample_labels)
    os.replace(temporary, path)
    with open(path, "rb") as file:
        checksum = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )
    return Shard(path.name, len(offsets), path.stat().st_size, checksum)


def split_images(images: Sequence[SourceImage], validation_share: float, seed: int) -> dict[str, list[SourceImage]]:
    """Images per split, shuffled once by `seed`. Without splits of its own the source gives its last share to val."""
    named = any(image.split for image in images)
    if named and validation_share:
        raise UserError("the source has train and val folders of its own: leave validation_share at 0")
    shuffled = [images[i] for i in random_generator(seed).permutation(len(images))]
    if named:
        return {split: chosen for split in ("train", "val") if (chosen := [i for i in shuffled if i.split == split])}
    held_out = round(len(shuffled) * validation_share)
    splits = {"train": shuffled[: len(shuffled) - held_out]}
    if held_out:
        splits["val"] = shuffled[len(shuffled) - held_out :]
    return splits


def pack(
    source: str,
    out: str | Path,
    *,
    validation_share: float = 0.0,
    shard_samples: int = 1024,
    seed: int = 0,
    max_bad: int = 100,
    progress: Progress = lambda done, total: None,
) -> tuple[Index, list[str]]:
    """Packs `source` into `out`, keeping the image files' bytes. Returns the index and a line per unreadable image.

    A folder that is packed already is left as it is. Raises UserError for a missing or empty source, an unwritable
    folder, and for more than `max_bad` unreadable images.
    """
    out = Path(out)
    if (out / INDEX_NAME).exists():
        return Index.load(out), []
    images = open_source(source)
    splits = split_images(images, validation_share, seed)
    classes = sorted({image.class_name for image in images})
    labels = {name: number for number, name in enumerate(classes)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(f"{out}: cannot write shards there ({error.strerror or error})") from None
    bad: list[str] = []
    shards: dict[str, tuple[Shard, ...]] = {}
    done = 0
    for split, chosen in splits.items():
        written = []
        for number, first in enumerate(range(0, len(chosen), shard_samples)):
            part = chosen[first : first + shard_samples]
            shard = write_shard(out / f"{split}-{number:06d}.tar", part, labels, bad)
            if len(bad) > max_bad:
                raise UserError(f"{source}: more than {max_bad} unreadable images, the first: {bad[0]}")
            if shard:
                written.append(shard)
            done += len(part)
            progress(done, len(images))
        shards[split] = tuple(written)
    index = Index(out, tuple(classes), shards)
    index.save()
    return index, bad
