"""`depthmup inspect`: what a folder of shards holds, and every sample of it that cannot be used."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from depthmup.data.decode import decode, to_pil
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.images import FORMATS, BadImage
from depthmup.data.index import Index, Shard, Span, show_count
from depthmup.data.keys import make_generator
from depthmup.data.reader import BadSample, read_sample
from depthmup.data.scan import map_in_processes

ORIENTATION = 0x0112  # the EXIF tag
SHEET_COLUMNS, SHEET_ROWS, SHEET_PIXELS = 10, 6, 96


@dataclass
class Findings:
    """Of some samples: counts by label, (width, height) of each, EXIF-rotated ones, and bad ones."""

    labels: Counter[int] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    rotated: int = 0
    bad: list[BadSample] = field(default_factory=list)


def inspect_shard(index: Index, shard: Shard) -> Findings:
    """Decodes every sample of one shard."""
    found = Findings()
    for number in range(shard.samples):
        try:
            sample = read_sample(index, Span(shard, 0, shard.samples), number)
            height, width = decode(sample.image, 3, "fast").shape[1:]
        except BadSample as error:
            found.bad.append(error)
            continue
        except BadImage as error:
            found.bad.append(BadSample(shard.name, sample.key, str(error)))
            continue
        found.labels[sample.label] += 1
        found.sizes.append((width, height))
        with Image.open(io.BytesIO(sample.image), formats=FORMATS) as image:
            found.rotated += image.getexif().get(ORIENTATION, 1) != 1
    return found


def inspect_split(
    index: Index,
    split: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> Findings:
    """Findings of all shards of a split, decoded by several processes. `progress`: (shards done, shards in all)."""
    total, shards = Findings(), index.splits[split]
    for done, found in enumerate(map_in_processes(inspect_shard, processes, [index] * len(shards), shards), 1):
        total.labels.update(found.labels)
        total.sizes += found.sizes
        total.rotated += found.rotated
        total.bad += found.bad
        progress(done, len(shards))
    return total


def write_contact_sheet(index: Index, split: str, path: Path) -> None:
    """Writes a PNG of up to 60 images drawn from all over the split. Raises UserError when none can be decoded."""
    shards = index.splits[split]
    places = [(shard, number) for shard in shards for number in range(shard.samples)]
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_PIXELS, SHEET_ROWS * SHEET_PIXELS), "white")
    shown = 0
    for place in make_generator("contact sheet").permutation(len(places)):
        shard, number = places[place]
        try:
            image = to_pil(decode(read_sample(index, Span(shard, 0, shard.samples), number).image, 3, "fast"))
        except (BadSample, BadImage):
            continue  # inspect_split lists them
        image.thumbnail((SHEET_PIXELS - 4, SHEET_PIXELS - 4))
        row, column = divmod(shown, SHEET_COLUMNS)
        sheet.paste(image, (column * SHEET_PIXELS + 2, row * SHEET_PIXELS + 2))
        shown += 1
        if shown == SHEET_COLUMNS * SHEET_ROWS:
            break
    if not shown:
        raise UserError(f"{index.root}: no image of {split} can be decoded")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    sheet.save(drawn, "png")
    write_atomically(path, drawn.getvalue())


def summarize_split(index: Index, split: str, found: Findings) -> list[str]:
    """Lines of text: counts, class balance, sizes, EXIF."""
    counts = np.array([found.labels[label] for label in range(len(index.classes))])
    lines = [
        f"{split}: {index.describe(split)}, "
        f"{sum(shard.size for shard in index.splits[split]) / 1e6:.1f} MB, {len(found.bad)} bad"
    ]
    if found.sizes:
        widths, heights = np.array(found.sizes).T
        low, high = int(counts.argmin()), int(counts.argmax())
        lines += [
            f"  {show_count(len(index.classes), 'class')}, {counts.min()} ({index.classes[low]}) to {counts.max()} "
            f"({index.classes[high]}) images each, {np.count_nonzero(counts == 0)} empty",
            f"  width {widths.min()} to {widths.max()}, median {int(np.median(widths))}; "
            f"height {heights.min()} to {heights.max()}, median {int(np.median(heights))} pixels",
        ]
    if found.rotated:
        lines.append(f"  {show_count(found.rotated, 'image')} with an EXIF rotation, which training does not apply")
    if split == "train" and (order := index.class_order()):
        lines.append(order)
    return lines + [f"  bad: {sample}" for sample in found.bad]
