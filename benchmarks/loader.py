"""Images per second and core: this loader beside others, on the same photographs.

    OMP_NUM_THREADS=1 python benchmarks/loader.py PHOTOS [--repeats 15] [--workers 0] [--resize 256]

PHOTOS is a folder (or tar) of class folders of JPEG files; they are repeated to 512 samples. Each loader delivers uint8
or float batches of 64 random resized crops of 224 pixels, ready for the network, and all take turns, so that a busy
machine slows all alike. Medians over the turns. litdata and opencv are compared when they are installed.

A second is one of CPU time, of this process and of the loader's workers together, so that what it costs to hand batches
over counts, and other work on the machine does not. The bare loop has no workers.
"""

import argparse
import importlib.util
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from depthmup.data.augment import NUM_DRAWS, prepare
from depthmup.data.batch import Batch, to_float
from depthmup.data.config import DataConfig
from depthmup.data.decode import decode, reuse_memory
from depthmup.data.index import Index, Span
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import State
from depthmup.data.pack import pack
from depthmup.data.reader import read_sample
from depthmup.models import torchvision_ops  # noqa: F401  before torchvision: mends its import beside a CPU build of torch

SIZE, BATCH, SAMPLES = 224, 64, 512


def make_shards(photos: str, folder: Path, resize: int | None = None) -> Index:
    """The photographs, repeated, in shards of 128; with `resize` their shorter side is at most that (pack --resize)."""
    from depthmup.data.sources import open_source

    images = open_source(photos, folder).images
    for number in range(SAMPLES):
        image = images[number % len(images)]
        path = folder / "images" / image.class_name / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.read())
    return pack(str(folder / "images"), folder / "shards", shard_samples=128, resize=resize)[0]


def own(index: Index, backend: str, workers: int) -> Iterator[object]:
    config = DataConfig(
        name="photos",
        root=index.root,
        augment="resized_crop_flip",
        backend=backend,
        minival=0,
        num_streams=16,
        num_workers=workers,
    )
    for batch in TrainingLoader(TrainingStream(config, index, State(0), BATCH, SIZE, 3)):
        yield to_float(batch, config, "cpu")


def bare(index: Index) -> Iterator[object]:
    """Decodes and crops the same bytes with the same library; nothing is read, ordered or flipped."""
    samples = [read_sample(index, Span(s, 0, s.samples), n).image for s in index.shards for n in range(s.samples)]
    random, config, buffer = np.random.default_rng(0), DataConfig(name="photos", root=index.root), reuse_memory()
    while True:
        images = torch.from_numpy(np.empty((BATCH, 3, SIZE, SIZE), np.uint8))
        for image, number in zip(images, random.integers(len(samples), size=BATCH), strict=True):
            draws = random.random(NUM_DRAWS["resized_crop_flip"])
            decoded = decode(samples[number], 3, "fast", buffer)
            image.copy_(prepare(decoded, "resized_crop_flip", SIZE, draws, "fast"))
        yield to_float(Batch(images, torch.zeros(BATCH)), config, "cpu")


def as_users_write_it(index: Index, workers: int) -> Iterator[object]:
    """webdataset, PIL, torchvision's transforms (timm's are the same code), default collate."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )
    shards = [index.location(shard) for shard in index.shards]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=4)
        .shuffle(64)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .repeat()
    )
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def opencv(index: Index, workers: int) -> Iterator[object]:
    """webdataset's reader, opencv's decode and area resize, uint8 until the batch is whole."""
    import cv2

    from depthmup.data.augment import draw_box

    cv2.setNumThreads(1)
    shards = [index.location(shard) for shard in index.shards]
    random = np.random.default_rng(0)

    def crop(content: bytes) -> torch.Tensor:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        top, left, height, width = draw_box(*image.shape[:2], random.random(40))
        small = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(cv2.cvtColor(small, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=4).shuffle(64).to_tuple("jpg", "cls").map_tuple(crop, int).repeat()
    )
    for images, _ in torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers):
        yield images.float().mul_(1 / 127.5).sub_(1)


def litdata(index: Index, folder: Path, workers: int) -> Iterator[object]:
    """litdata's streaming of the same JPEG bytes; PIL and torchvision, uint8 until the batch is whole."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter
    from torchvision import transforms

    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )

    class Photos(StreamingDataset):
        def __getitem__(self, number: object) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(number)
            return crop(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    samples = [read_sample(index, Span(s, 0, s.samples), n) for s in index.shards for n in range(s.samples)]
    for number, sample in enumerate(samples):
        writer.add_item(number, {"image": sample.image, "label": sample.label})
    writer.done()
    writer.merge()
    photos = Photos(str(folder), shuffle=True)
    while True:
        for images, _ in StreamingDataLoader(photos, batch_size=BATCH, num_workers=workers):
            yield images.float().mul_(1 / 127.5).sub_(1)


def cpu_seconds() -> float:
    """Of this process and its workers. Waits until they rest, their batches made ready."""
    workers = psutil.Process().children()

    def of_workers() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in workers)

    before = -1.0
    while workers and (now := of_workers()) > before:
        before = now
        time.sleep(0.3)
    return time.process_time() + max(before, 0)


def serve(make: Callable[[], Iterator[object]], turns: Connection, batches: int) -> None:
    """Answers each turn that is asked for with its images per second."""
    torch.set_num_threads(1)
    loader = make()
    next(loader)
    while turns.recv():
        before = cpu_seconds()
        for _ in islice(loader, batches):
            pass
        turns.send(batches * BATCH / (cpu_seconds() - before))


def measure(loaders: dict[str, Callable[[], Iterator[object]]], repeats: int, batches: int) -> dict[str, float]:
    """Median images per second of each, in turns; each has a process, so that none pays for another's use of memory."""
    context, turns = multiprocessing.get_context("fork"), {}
    for name, make in loaders.items():
        turns[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make, theirs, batches)).start()
        theirs.close()  # so that the end of the process is seen here
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(repeats):
        for name, turn in turns.items():
            turn.send(True)
            rates[name].append(turn.recv())
    for turn in turns.values():
        turn.send(False)
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0, help="processes of each loader")
    parser.add_argument("--batches", type=int, default=4, help="in one turn")
    parser.add_argument("--resize", type=int, help="pack smaller photographs: pixels of their shorter side")
    arguments = parser.parse_args()
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = make_shards(arguments.photos, folder, arguments.resize)
        loaders = {
            "depthmup": partial(own, index, "fast", workers),
            "depthmup, data.backend: pil": partial(own, index, "pil", workers),
            "bare loop, same decoder": partial(bare, index),
            "webdataset + PIL + torchvision": partial(as_users_write_it, index, workers),
        }
        if importlib.util.find_spec("cv2"):
            loaders["webdataset + opencv (area)"] = partial(opencv, index, workers)
        if importlib.util.find_spec("litdata"):
            loaders["litdata + PIL + torchvision"] = partial(litdata, index, folder / "litdata", workers)
        rates = measure(loaders, arguments.repeats, arguments.batches)
        for loader, rate in rates.items():
            print(f"{loader:32} {rate:6.0f} images/s  {rate / rates['webdataset + PIL + torchvision']:5.2f}")
        print(f"depthmup / bare loop: {rates['depthmup'] / rates['bare loop, same decoder']:.2f}")


if __name__ == "__main__":
    main()
