"""Feeds damaged images and shards to the reader until the time is up: each is read, or refused with a reason.

    nice -n 10 python -m benchmarks.fuzz_reader --seconds 600

Hypothesis draws the damage. An exception of any other kind is a fault, and so is a sample that is neither served nor
counted as bad: it is printed with the smallest example that shows it, and the command ends 1.
"""

import argparse
import io
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from depthmup.data.config import DataConfig
from depthmup.data.decode import decode, reuse_memory
from depthmup.data.errors import UserError
from depthmup.data.images import BadImage
from depthmup.data.index import INDEX_NAME, Index, load_members
from depthmup.data.inspect import inspect_split
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import State
from depthmup.data.scan import index_shards

ROUND = 500  # examples between two looks at the clock
SAMPLES = 8


def encode(kind: str, mode: str = "RGB", **options: object) -> bytes:
    content, random = io.BytesIO(), np.random.default_rng(0)
    pixels = Image.fromarray(random.integers(0, 256, (16, 24, 3), dtype=np.uint8))
    exif = pixels.getexif()
    exif[0x0112] = 6
    if mode == "I;16":
        pixels = pixels.convert("L")  # from RGB only newer versions of Pillow convert to it
    pixels.convert(mode).save(content, kind, **({"exif": exif} if mode == "RGB" else {}), **options)
    return content.getvalue()


IMAGES = [
    encode("jpeg"),
    encode("jpeg", subsampling=0, restart_marker_rows=1),
    encode("jpeg", progressive=True),
    encode("jpeg", "L"),
    encode("jpeg", "CMYK"),
    encode("png"),
    encode("png", "P"),
    encode("png", "I;16"),
    encode("webp"),
    encode("bmp"),
]
counts = {"images read": 0, "images called bad": 0, "shards read": 0, "shards refused": 0}


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of `contents` with some bytes replaced, and sometimes cut."""
    changed = bytearray(draw(st.sampled_from(contents)))
    places = st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255))
    for place, value in draw(st.lists(places, max_size=12)):
        changed[place] = value
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.booleans()) else changed)


def decode_one(content: bytes) -> None:
    for backend, buffer in (("fast", reuse_memory()), ("pil", None)):
        try:
            channels, height, width = decode(content, 3, backend, buffer).shape
            assert channels == 3
            assert height * width > 0
            counts["images read"] += 1
        except BadImage:
            counts["images called bad"] += 1


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(SAMPLES):
            for name, content in ((f"{number}.jpg", IMAGES[number]), (f"{number}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def read_all(root: Path) -> None:
    """What `depthmup inspect` and an epoch of training do."""
    load_members.cache_clear()
    index = Index.load(root)
    index.check_files()
    found = [inspect_split(index, split, processes=1) for split in index.splits]
    assert sum(len(part.sizes) + len(part.bad) for part in found) == SAMPLES, "samples are lost"
    config = DataConfig(name="fuzz", root=str(root), minival=0, num_streams=2, window=4, max_bad_fraction=1.0)
    loader = TrainingLoader(TrainingStream(config, index, State(0), 2, 8, 3))
    list(islice(loader, loader.steps_per_epoch))


def shard_test(root: Path, files: dict[str, bytes], damaged_name: str) -> Callable[[], None]:
    """Reads the folder of shards with one damaged file, under the index of before or under a new one."""

    @given(damaged([files[damaged_name]]), st.booleans())
    def read_shards(content: bytes, index_again: bool) -> None:
        for name, original in files.items():
            (root / name).write_bytes(content if name == damaged_name else original)
        try:
            if index_again:
                (root / INDEX_NAME).unlink()
                index_shards(str(root), processes=1)
            read_all(root)
            counts["shards read"] += 1
        except UserError:
            counts["shards refused"] += 1

    return read_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    end = time.monotonic() + parser.parse_args().seconds
    options = settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_tar(root / "train-0.tar")
        index_shards(str(root), processes=1)
        files = {path.name: path.read_bytes() for path in root.iterdir()}
        tests = [given(damaged(IMAGES))(decode_one), *(shard_test(root, files, file) for file in files)]
        tests = [options(test) for test in tests]
        while time.monotonic() < end:
            for test in tests:
                try:
                    test()
                except Exception:  # of any kind: that is what is looked for
                    traceback.print_exc()
                    faults += 1
    print(", ".join(f"{count} {what}" for what, count in counts.items()) + f"; {faults} rounds with a fault")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
