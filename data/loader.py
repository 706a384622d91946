"""Batches for training and evaluation: the order of data.order, read by worker processes where asked for."""

import ctypes
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from data import memory
from data.augment import augment
from data.bad import BadCount, StandIns
from data.batch import Batch, collate, decode_sample
from data.config import DataConfig
from data.decode import center_crop, scratch
from data.distort import num_draws, rand_augment, training_image
from data.errors import UserError
from data.index import Index, Span
from data.machine import check_shared_memory
from data.order import EpochOrder, State, streams_of
from data.reader import BadSample, prefetch

warnings.filterwarnings("ignore", "This DataLoader will create")  # data.machine says it once, and what to do

CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# Sent to all processes of a job, they are for the one that trains: a worker that died of them would end the run.
JOB_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
Prepared = tuple[Tensor, np.ndarray, int]  # image (channels, size, size), its random numbers, its label


@dataclass
class TrainingStream(IterableDataset):
    """One rank's share of the global batches, from `state` on, without end. A worker yields its streams' part."""

    config: DataConfig
    index: Index
    state: State
    global_batch_size: int
    image_size: int
    channels: int
    rank: int = 0
    world_size: int = 1

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self.index.spans("train", self.config.minival),
            seed=self.state.seed,
            epoch=epoch,
            num_streams=self.config.num_streams,
            global_batch_size=self.global_batch_size,
            window=self.config.window,
        )

    def stand_ins(self, order: EpochOrder, buffer: np.ndarray) -> StandIns[tuple[Span, int], tuple[Tensor, int]]:
        """Reads samples from the shards."""

        def places(stream: int, window: int) -> list[tuple[Span, int]]:
            spans = order.contiguous(stream, *order.window_bounds(window))
            for span in spans:
                prefetch(self.index, span)
            unshuffled = [(span, number) for span in spans for number in range(span.samples)]
            return [unshuffled[place] for place in order.permutation(stream, window)]

        def read(place: tuple[Span, int]) -> tuple[Tensor, int]:
            return decode_sample(self.index, *place, self.channels, self.config.backend, buffer)

        return StandIns(order, places, read, self.config.max_bad_fraction)

    def stream(
        self,
        samples: StandIns[tuple[Span, int], tuple[Tensor, int]],
        order: EpochOrder,
        stream: int,
        position: int,
        bad: list[BadSample],
    ) -> Iterator[Prepared]:
        """Decoded samples of one stream, from stream position `position` on; bad ones are added to `bad`."""
        config = self.config
        for window in range(position // order.window, order.num_windows):
            first, last = order.window_bounds(window)
            places = samples.places(stream, window)
            draws = order.draws(stream, window, num_draws(config))
            for served in range(max(position - first, 0), last - first):
                image, label = samples.first_good(stream, window, served, places)
                if places[served] in samples.bad:
                    bad.append(samples.bad[places[served]])
                yield training_image(image, config, self.image_size, draws[served]), draws[served], label

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 0)
        mine = streams_of(self.rank, self.world_size, worker, num_workers, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        buffer = scratch()
        while True:
            order = self.order(epoch)
            step = position // self.global_batch_size
            bad: list[BadSample] = []
            samples = self.stand_ins(order, buffer)
            start = step * order.per_stream_batch
            streams = [self.stream(samples, order, stream, start, bad) for stream in mine]
            for _ in range(step, order.num_steps):
                images, draws, labels = zip(
                    *[next(stream) for stream in streams for _ in range(order.per_stream_batch)], strict=True
                )
                batch = collate(images, labels, bad)
                bad.clear()
                augmented = augment(batch.images, self.config.augment, torch.from_numpy(np.stack(draws)))
                yield replace(batch, images=augmented)
            epoch, position = epoch + 1, 0

    def from_memory(self, device: torch.device) -> Iterator[Batch]:
        """The batches that iterating gives, from pixels that are decoded once, on `device` where they fit."""
        store = memory.open_store(self.config, self.index, "train", self.image_size, self.channels, device)
        mine = streams_of(self.rank, self.world_size, 0, 0, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        while True:
            step = position // self.global_batch_size
            yield from memory.training_steps(store, self.config, self.order(epoch), mine, step, self.image_size)
            epoch, position = epoch + 1, 0


def merge_worker_parts(parts: Sequence[Batch], per_stream_batch: int) -> Batch:
    """The parts of one step from workers 0, 1, ... -> the rank's batch in the order of its streams."""
    if len(parts) == 1:
        return parts[0]

    def interleave(tensors: list[Tensor]) -> Tensor:
        streams = torch.stack([tensor.unflatten(0, (-1, per_stream_batch)) for tensor in tensors], dim=1)
        return streams.flatten(0, 2)  # stream k of worker w is the rank's stream k * num_workers + w

    return Batch(
        interleave([part.images for part in parts]),
        interleave([part.labels for part in parts]),
        tuple(bad for part in parts for bad in part.bad),
    )


def start_worker(worker: int) -> None:
    """In a new worker: it ends when the process that trains says so or is gone, and sleeps through JOB_SIGNALS.

    Has glibc give freed pictures back at once: its heap of buffers of all sizes grew from 80 to 280 MB a worker.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none, and no need of it
        mallopt(M_MMAP_THRESHOLD, 256 * 1024)


def end_with_parent() -> None:
    """Ends this worker at a SIGTERM of its parent, which is how Python stops workers that are left at its exit."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def read_by_workers(
    dataset: Dataset[Batch], num_workers: int, device: torch.device, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """The dataset's batches, in pinned memory for a GPU. Raises a worker's UserError with its own words, which torch
    buries in a traceback."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        generator=generator,
        # Python's default until 3.14. There a server starts them, and they would not end with this process.
        multiprocessing_context="fork" if num_workers else None,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # workers are born with it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class TrainingLoader:
    """Endless batches of one rank; `state` is where the global stream stands after the batches taken so far, and
    `bad` counts the rank's samples that others had to stand in for. A run of one rank is checked for them at once; with
    several the caller adds the ranks' counts up (BadCount.over_ranks) and checks the sum, now and then."""

    def __init__(self, stream: TrainingStream, device: torch.device = CPU) -> None:
        self.stream, self.device = stream, device
        self.state = stream.state
        self.steps_per_epoch = stream.order(stream.state.epoch).num_steps
        config = stream.config
        self.bad = BadCount(config.max_bad_fraction, self.steps_per_epoch * stream.global_batch_size)
        streams_of(stream.rank, stream.world_size, 0, config.num_workers, config.num_streams)  # refuse early
        if config.num_workers and not config.in_memory:
            images = stream.global_batch_size // stream.world_size
            check_shared_memory(images * stream.channels * stream.image_size**2)
        if config.rand_augment:
            rand_augment(config.rand_augment, stream.image_size, config.mean)  # one import of timm for all workers

    def local_batches(self) -> Iterator[Batch]:
        config = self.stream.config
        if config.in_memory:
            yield from self.stream.from_memory(self.device)
        parts = read_by_workers(self.stream, config.num_workers, self.device)
        per_stream_batch = self.stream.global_batch_size // config.num_streams
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        while True:
            of_step = [next(parts).to(self.device, copies) for _ in range(max(config.num_workers, 1))]
            yield merge_worker_parts(of_step, per_stream_batch)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.local_batches():
            self.bad.add(batch.bad, self.state.epoch)
            if self.stream.world_size == 1:
                self.bad.check()
            position = self.state.position + self.stream.global_batch_size
            ended = position >= self.steps_per_epoch * self.stream.global_batch_size
            self.state = replace(self.state, epoch=self.state.epoch + ended, position=0 if ended else position)
            yield batch


def share(spans: Sequence[Span], rank: int, world_size: int) -> list[Span]:
    """The part of `spans` that one rank evaluates: contiguous, and every sample belongs to exactly one rank."""
    total = sum(span.samples for span in spans)
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    mine, seen = [], 0
    for span in spans:
        first, last = max(start - seen, 0), min(stop - seen, span.samples)
        if last > first:
            mine.append(Span(span.shard, span.first + first, last - first))
        seen += span.samples
    return mine


def evaluation_batches(
    config: DataConfig,
    index: Index,
    split: str,
    batch_size: int,
    image_size: int,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
    bad: BadCount | None = None,
) -> Iterator[Batch]:
    """Every sample of `split` (val or minival) exactly once over all ranks, in order; the last batch may be short.

    Bad samples are left out, and counted in `bad`, which the caller checks. Without it: UserError past
    data.max_bad_fraction of them.
    """
    spans = index.spans(split, config.minival)
    count = bad or BadCount(config.max_bad_fraction, sum(span.samples for span in spans))
    mine = share(spans, rank, world_size)
    for batch in evaluated(config, index, split, mine, batch_size, image_size, channels, device):
        count.add(batch.bad)
        if bad is None:
            count.check()
        if len(batch.labels):
            yield batch


def evaluated(
    config: DataConfig,
    index: Index,
    split: str,
    spans: Sequence[Span],
    batch_size: int,
    image_size: int,
    channels: int,
    device: torch.device,
) -> Iterator[Batch]:
    if config.in_memory and spans:
        store = memory.open_store(config, index, split, image_size, channels, device)
        rows = store.row_numbers(spans)
        yield from (store.take_good(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size))
        return
    dataset = EvaluationBatches(config, index, spans, batch_size, image_size, channels)
    generator = torch.Generator()  # its own, so that an evaluation takes no number from the training's
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in read_by_workers(dataset, min(config.num_workers, len(dataset)), device, generator):
        yield batch.to(device, copies)


class EvaluationBatches(Dataset[Batch]):
    """Batch number i of the samples of `spans`, in order, without its bad ones, which stand in `bad`."""

    def __init__(
        self, config: DataConfig, index: Index, spans: Sequence[Span], batch_size: int, image_size: int, channels: int
    ) -> None:
        self.config, self.index = config, index
        self.image_size, self.channels, self.batch_size = image_size, channels, batch_size
        self.places = [(span, number) for span in spans for number in range(span.samples)]
        self.buffer: np.ndarray | None = None  # each worker makes its own

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        self.buffer = scratch() if self.buffer is None else self.buffer
        images, labels, bad = [], [], []
        for span, position in self.places[number * self.batch_size : (number + 1) * self.batch_size]:
            try:
                image, label = decode_sample(
                    self.index, span, position, self.channels, self.config.backend, self.buffer
                )
            except BadSample as error:
                bad.append(error)
                continue
            images.append(center_crop(image, self.image_size, self.config.backend))
            labels.append(label)
        if images:
            return collate(images, labels, bad)
        none = torch.empty(0, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        return Batch(none, torch.empty(0, dtype=torch.int64), tuple(bad))
