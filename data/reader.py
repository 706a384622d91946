"""Samples out of tar shards, through webdataset, from any sample number on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset

from data.errors import UserError
from data.index import Span, load_offsets

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample: its key, the image file's bytes and the class label."""

    key: str
    image: bytes
    label: int


def parse(sample: dict) -> RawSample:
    """A webdataset sample -> RawSample. Raises UserError when the image or a whole-number label is missing."""
    image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if image is None:
        raise UserError(f"{sample['__url__']}: sample {sample['__key__']} has no image ({', '.join(IMAGE_EXTENSIONS)})")
    label = sample.get("cls", b"").strip()
    if not label.isdigit():
        raise UserError(f"{sample['__url__']}: sample {sample['__key__']} needs a member .cls with its class number")
    return RawSample(sample["__key__"], image, int(label))


def read_span(root: Path, span: Span) -> Iterator[RawSample]:
    """The samples of `span`, in the shard's own order; seeks to the first one, so nothing before it is read."""
    path = root / span.shard
    offsets = load_offsets(path)
    if span.first + span.samples > len(offsets):
        raise UserError(f"{path}: the index has {len(offsets)} samples, {span.first + span.samples} are wanted")
    with open(path, "rb") as file:
        file.seek(int(offsets[span.first]))
        files = ({**item, "__url__": str(path)} for item in webdataset.tariterators.tar_file_iterator(file))
        samples = webdataset.tariterators.group_by_keys(files)
        for number in range(span.samples):
            sample = next(samples, None)
            if sample is None:
                raise UserError(f"{path}: ends after {span.first + number} samples; the index has {len(offsets)}")
            yield parse(sample)
