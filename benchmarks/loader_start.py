"""How soon the first batch comes, from the start and in mid-epoch, and what memory a worker takes over an epoch.

    OMP_NUM_THREADS=1 python -m benchmarks.loader_start PHOTOS

PHOTOS is a folder (or tar) of class folders of JPEG files. They are packed into one shard, which stands under 1,300
names (hard links): 985 samples each for the times, as many as ImageNet has, and 16 for the memory, a short epoch.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch

from depthmup.data.config import DataConfig
from depthmup.data.index import Index, Shard, Span, locate_sidecar
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import EpochOrder, State
from depthmup.data.pack import pack
from depthmup.data.sources import open_source

SIZE, BATCH, SHARDS = 224, 64, 1300


def make_shards(photos: str, folder: Path, samples: int) -> Index:
    """1,300 shards of `samples` photographs each, all with the same content."""
    for number, image in enumerate(islice(cycle(open_source(photos, folder).images), samples)):
        path = folder / "images" / image.class_name / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.read())
    index, _ = pack(str(folder / "images"), folder / "shards", shard_samples=samples)
    [shard] = index.shards
    shards = [replace(shard, name=f"train-{number:06d}.tar") for number in range(SHARDS)]
    for copy in shards[1:]:
        os.link(index.location(shard), index.location(copy))
        os.link(locate_sidecar(index.root, shard.name), locate_sidecar(index.root, copy.name))
    index = Index(index.root, index.classes, {"train": tuple(shards)})
    index.save()
    return index


def loader(root: str, position: int, num_workers: int) -> TrainingLoader:
    config = DataConfig(name="photos", root=root, augment="resized_crop_flip", num_workers=num_workers)
    return TrainingLoader(TrainingStream(config, Index.load(root), State(0, 0, position), BATCH, SIZE, 3))


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def plan_for_one_of_many_readers() -> None:
    spans = [Span(Shard(f"{number}.tar", 1281, 0, ""), 0, 1281) for number in range(10_000)]
    order = EpochOrder(spans, seed=0, epoch=0, num_streams=32768, global_batch_size=32768, window=64)
    order.contiguous(12345, *order.window_bounds(0))


def worker_memory(root: str) -> list[int]:
    """Memory that a worker process has for itself, MB, after each tenth of an epoch."""
    batches = loader(root, 0, 1)
    parts, used = iter(batches), []
    for _ in range(10):
        for _ in islice(parts, batches.steps_per_epoch // 10):
            pass
        [worker] = psutil.Process().children()
        used.append(round(worker.memory_full_info().uss / 1e6))
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"order planned for one of 4,096 x 8 readers: {seconds(plan_for_one_of_many_readers):.3f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = make_shards(arguments.photos, folder / "long", 985).root
        total = loader(root, 0, 0).steps_per_epoch * BATCH
        for num_workers in (0, 2):
            for share in (0, 0.1, 0.5, 0.999):
                position = int(total * share) // BATCH * BATCH
                took = seconds(lambda at=position, workers=num_workers: next(iter(loader(root, at, workers))))
                print(
                    f"first batch of {BATCH}, {num_workers} workers, at {100 * share:.1f} % of an epoch: {took:.2f} s"
                )
        short = make_shards(arguments.photos, folder / "short", 16)
        print(f"worker's memory after each tenth of an epoch: {worker_memory(short.root)} MB")


if __name__ == "__main__":
    main()
