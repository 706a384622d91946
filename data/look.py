"""A quick look at images: how many classes, how large, with colours or not. Nothing here imports torch."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from depthmup.data.errors import UserError
from depthmup.data.images import BadImage, open_image, reduce_to_eight_bits, refusing_bad_images
from depthmup.data.index import INDEX_NAME, Index, Span
from depthmup.data.reader import BadSample, read_sample
from depthmup.data.sources import open_source

LOOKED_AT = 64  # images that are decoded


@dataclass(frozen=True)
class Look:
    """What a few images of a source show. pixels: the median of their shorter sides."""

    is_indexed: bool  # a folder of shards with an index; else images to be packed
    classes: int
    images: int  # to train on; those of the validation split are not counted
    has_validation: bool
    pixels: int
    has_colours: bool

    @property
    def channels(self) -> Literal[1, 3]:
        return 3 if self.has_colours else 1


def spread_out(count: int) -> Sequence[int]:
    """LOOKED_AT places or a few more, from all over a list of that length."""
    return range(0, count, max(count // LOOKED_AT, 1))


def read_from_index(index: Index) -> Iterator[bytes]:
    """Raises UserError when a shard cannot be read."""
    shards = index.splits["train"]
    for place in spread_out(sum(shard.samples for shard in shards)):
        for shard in shards:
            if place < shard.samples:
                break
            place -= shard.samples
        try:
            yield read_sample(index, Span(shard, 0, shard.samples), place).image
        except BadSample:
            continue  # training counts them; here others stand for them


def look_at_images(source: str) -> Look:
    """Looks at `source`: a folder of shards with an index, or what can be packed. Raises UserError."""
    if is_indexed := (Path(source) / INDEX_NAME).exists():
        index = Index.load(source)
        classes, images = len(index.classes), sum(shard.samples for shard in index.splits["train"])
        has_validation, contents = "val" in index.splits, read_from_index(index)
        sides, has_colours = measure_images(source, contents)
    else:
        with tempfile.TemporaryDirectory() as scratch:  # of a compressed tar, unpacked
            opened = open_source(source, Path(scratch))
            training = [image for image in opened.images if image.split != "val"]
            classes, images = len(opened.classes), len(training)
            has_validation = len(training) < len(opened.images)
            contents = (training[place].read() for place in spread_out(images))
            sides, has_colours = measure_images(source, contents)
    return Look(is_indexed, classes, images, has_validation, sides[len(sides) // 2], has_colours)


def measure_images(source: str, contents: Iterator[bytes]) -> tuple[list[int], bool]:
    """(shorter sides in ascending order, whether any image has colours). Raises UserError when none can be read."""
    sides, has_colours = [], False
    for content in contents:
        try:
            with refusing_bad_images():
                image = reduce_to_eight_bits(open_image(content))
        except BadImage:
            continue  # packing and training count them
        sides.append(min(image.size))
        has_colours |= image.mode not in ("1", "L", "LA")
    if not sides:
        raise UserError(f"{source}: none of its images can be read; 'depthmup inspect' says why for shards")
    return sorted(sides), has_colours
