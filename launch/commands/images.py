"""The commands on data: pack, index, inspect."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from depthmup.data.files import refuse_locked
from depthmup.launch.commands.group import command, open_console
from depthmup.launch.paths import FilePath, Location

if TYPE_CHECKING:
    from rich.console import Console

    from depthmup.data.index import Index
    from depthmup.launch.progress import Display

COUNT = click.IntRange(min=1)
FILE = FilePath(exists=True, dir_okay=False)


def make_reporter(shown: "Display", unit: str) -> Callable[[int, int], None]:
    """Shows (done, total) with the rate and the time that is left."""
    from depthmup.launch.wording import show_duration

    started = time.monotonic()

    def report(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        text = f"{done} of {total} {unit}"
        if done:
            text += f", {rate:.0f}/s, {show_duration((total - done) / rate)} left"
        shown.update(done / total, text, final=done == total)

    return report


def print_index(index: "Index", console: "Console", left_out: Sequence[str], unchanged: str | None) -> None:
    """Lines about what is `left_out`, and what a command has made, or that it was `unchanged` ('packed', 'indexed')
    already."""
    for line in left_out:
        console.print(line, highlight=False, markup=False)
    if unchanged:
        console.print(f"already {unchanged}: {index.describe()}", highlight=False)
    for split in () if unchanged else index.splits:
        console.print(f"{split} has {index.describe_classes(split)}", highlight=False, markup=False)
    for split in index.splits:
        console.print(f"{split}: {index.describe(split, 'image')}", highlight=False)


@command(
    "pack",
    example="depthmup pack photos/ shards/photos --validation-share 0.1",
    short_help="Pack images into WebDataset shards with an index.",
)
@click.argument("source", type=Location())
@click.argument("out", type=FilePath())
@click.option(
    "--validation-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share held out where SOURCE has no splits.",
)
@click.option("--validation-list", type=FILE, help="Lines 'IMAGE CLASS': these images are the validation split.")
@click.option("--train", multiple=True, metavar="PATTERN", help="Folders that are the training split, by name.")
@click.option("--val", multiple=True, metavar="PATTERN", help="Folders that are the validation split, by name.")
@click.option("--class-names", type=FILE, help="Lines 'CLASS NAME': readable names of the class folders.")
@click.option("--shard-samples", type=COUNT, default=1024, show_default=True, help="Most images in a shard.")
@click.option("--shard-megabytes", type=COUNT, help="Most megabytes of images in a shard.")
@click.option("--resize", type=COUNT, metavar="PIXELS", help="Shrink to this shorter side, as JPEG.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Quality of the JPEGs, with --resize."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the one shuffle before packing.")
@click.option(
    "--max-bad", type=click.IntRange(min=0), default=100, show_default=True, help="Unreadable images to leave out."
)
@click.option("--processes", type=COUNT, help="[default: one for each core and 2000 images]")
def pack(
    source: str,
    out: Path,
    validation_share: float,
    validation_list: Path | None,
    train: tuple[str, ...],
    val: tuple[str, ...],
    class_names: Path | None,
    shard_samples: int,
    shard_megabytes: int | None,
    resize: int | None,
    quality: int,
    seed: int,
    max_bad: int,
    processes: int | None,
) -> None:
    """Pack SOURCE into shuffled shards in OUT: a folder of class folders, a tar of one, compressed or not,
    sklearn:digits, or a folder of shards that are not shuffled.

    Continues where an earlier call was interrupted. Changes nothing in a folder that already holds these images packed
    with these options, and refuses a folder that was packed with other options.
    """
    from depthmup.data.index import INDEX_NAME
    from depthmup.data.pack import pack as pack_images
    from depthmup.launch.progress import display

    console = open_console()
    packed_before = (out / INDEX_NAME).exists()
    with display(console, f"packing {source}") as shown:
        index, left_out = pack_images(
            source,
            out,
            validation_share=validation_share,
            validation_list=validation_list,
            train=train,
            val=val,
            class_names=class_names,
            shard_samples=shard_samples,
            shard_bytes=shard_megabytes and shard_megabytes * 1_000_000,
            resize=resize,
            quality=quality,
            seed=seed,
            max_bad=max_bad,
            processes=processes,
            progress=make_reporter(shown, "images"),
        )
    print_index(index, console, left_out, "packed" if packed_before else None)


@command(
    "index",
    example="depthmup index 's3://bucket/train-{000000..001299}.tar' --out shards/imagenet",
    short_help="Index shards that exist already.",
)
@click.argument("shards", type=Location())
@click.option("--out", type=FilePath(), help="Folder for the index [default: SHARDS, when it is a folder].")
@click.option("--classes", type=FILE, help="One class name a line, in the order of the labels.")
@click.option(
    "--first-label", type=click.IntRange(min=0), default=0, show_default=True, help="Label of the first class."
)
@click.option("--train", multiple=True, metavar="PATTERN", help="Shards or folders of the training split, by name.")
@click.option("--val", multiple=True, metavar="PATTERN", help="Shards or folders of the validation split, by name.")
@click.option("--processes", type=COUNT, help="[default: one for each core]")
def index(
    shards: str,
    out: Path | None,
    classes: Path | None,
    first_label: int,
    train: tuple[str, ...],
    val: tuple[str, ...],
    processes: int | None,
) -> None:
    """Index SHARDS that exist already: a folder of tars, or a pattern of paths or URLs. Reads each of them once.

    The splits follow from words such as train, val and test in the names of shards and folders; test is the validation
    split where there is no val. An existing index of the same shards and classes is left unchanged; an index of other
    shards or classes is refused.
    """
    from depthmup.data.index import INDEX_NAME
    from depthmup.data.scan import index_shards
    from depthmup.data.sources import read_lines
    from depthmup.launch.progress import display

    console = open_console()
    indexed_before = ((out or Path(shards)) / INDEX_NAME).exists()
    names = read_lines(classes) if classes else ()
    left_out: list[str] = []
    with display(console, f"indexing {shards}") as shown:
        made = index_shards(
            shards,
            out,
            classes=names,
            train=train,
            val=val,
            first_label=first_label,
            processes=processes,
            progress=make_reporter(shown, "shards"),
            say=left_out.append,
        )
    print_index(made, console, left_out, "indexed" if indexed_before else None)
    if order := made.class_order():
        console.print(order, highlight=False, markup=False)


@command(
    "inspect",
    example="depthmup inspect shards/photos --sheet photos.png",
    short_help="Count and show the images of shards; find unreadable ones.",
)
@click.argument("shards", type=Location())
@click.option("--sheet", type=FilePath(), help="Write a contact sheet of the first split to this PNG file.")
@click.option("--processes", type=COUNT, help="[default: one for each core]")
def inspect(shards: str, sheet: Path | None, processes: int | None) -> None:
    """Decode all images of the folder SHARDS: counts, classes, sizes, bad samples. Exits with status 1 when there
    is a bad one."""
    from depthmup.data.index import Index
    from depthmup.data.inspect import inspect_split, summarize_split, write_contact_sheet
    from depthmup.launch.progress import display

    if sheet:
        refuse_locked(sheet, "name another file")  # before all images are decoded
    console = open_console()
    opened = Index.load(shards)
    opened.check_files()
    bad = 0
    for split in opened.splits:
        with display(console, f"reading {split}") as shown:
            found = inspect_split(opened, split, make_reporter(shown, "shards"), processes)
        for line in summarize_split(opened, split, found):
            console.print(line, highlight=False, markup=False)
        bad += len(found.bad)
    if sheet:
        write_contact_sheet(opened, next(iter(opened.splits)), sheet)
        console.print(f"contact sheet: {sheet}", highlight=False)
    if bad:
        sys.exit(1)
