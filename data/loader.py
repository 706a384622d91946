"""Batches for training and evaluation: the order of data.order, read by worker processes where asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from depthmup.data import memory
from depthmup.data.augment import crop_flip
from depthmup.data.bad import BadCount, StandIns
from depthmup.data.batch import Batch, decode_sample
from depthmup.data.config import DataConfig, find_window_misfit
from depthmup.data.decode import center_crop, reuse_memory
from depthmup.data.distort import count_draws, make_rand_augment, prepare_training_image
from depthmup.data.errors import UserError
from depthmup.data.index import NO_LABEL, Index, Span
from depthmup.data.nvjpeg import Jpeg, cut, decode_batches, open_sample
from depthmup.data.order import EpochOrder, State, list_rows, list_streams
from depthmup.data.reader import BadSample, prefetch
from depthmup.data.workers import Slots, Work, make_batches

CPU = torch.device("cpu")
Place = tuple[Span, int]  # a sample's number in a span
Samples = StandIns[Place, tuple[Jpeg | Tensor, int]]
Prepared = tuple[Jpeg | Tensor, np.ndarray, int]  # image (channels, size, size), its random numbers, its label
NO_DRAWS = np.empty(0)


def open_image(
    config: DataConfig, index: Index, place: Place, channels: int, buffer: np.ndarray
) -> tuple[Jpeg | Tensor, int]:
    """A sample's picture, decoded unless the device does it, and its label. Raises BadSample."""
    if config.backend == "nvjpeg":
        return open_sample(index, *place, channels)
    return decode_sample(index, *place, channels, config.backend, buffer)


def prepare_training(image: Jpeg | Tensor, config: DataConfig, size: int, draws: np.ndarray) -> Jpeg | Tensor:
    """Cropped and distorted, as far as that is not the device's work."""
    if config.backend == "nvjpeg":
        return cut(image, config.augment, size, draws)
    assert isinstance(image, Tensor)
    return prepare_training_image(image, config, size, draws)


def start_reading(
    work: Work, config: DataConfig, shape: tuple[int, int, int, int], num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of `work` on `device`, decoded by workers or there."""
    if config.backend == "nvjpeg":
        augment = None if isinstance(work, Evaluation) else config.augment
        return decode_batches(work, shape, num_workers, device, augment)
    return make_batches(work, shape, num_workers, device)


@dataclass(frozen=True)
class OpenWindow:
    """A stream's window that a worker serves from: samples and (samples, count) random numbers in the order served."""

    stream: int
    window: int
    places: Sequence[tuple[Span, int]]
    draws: np.ndarray


@dataclass
class TrainingStream:
    """One rank's share of the global batches, from `state` on, without end. Each worker fills some rows of it."""

    config: DataConfig
    index: Index
    state: State
    global_batch_size: int
    image_size: int
    channels: int
    rank: int = 0
    world_size: int = 1

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self.index.spans("train", self.config.minival),
            seed=self.state.seed,
            epoch=epoch,
            num_streams=self.config.num_streams,
            global_batch_size=self.global_batch_size,
            window=self.config.window,
        )

    def stand_ins(self, order: EpochOrder, buffer: np.ndarray) -> Samples:
        """Reads samples from the shards."""

        def places(stream: int, window: int) -> list[tuple[Span, int]]:
            self.read_ahead(order, stream, window)
            return order.samples(stream, window)

        def read(place: Place) -> tuple[Jpeg | Tensor, int]:
            return open_image(self.config, self.index, place, self.channels, buffer)

        return StandIns(order, places, read, self.config.max_bad_fraction)

    def read_ahead(self, order: EpochOrder, stream: int, window: int) -> None:
        for span in order.read_ahead(stream, window):
            prefetch(self.index, span)

    def open_window(self, samples: Samples, order: EpochOrder, stream: int, window: int) -> OpenWindow:
        """With the next window on its way, where the shards are remote, while this one is served."""
        if self.index.is_remote and window + 1 < order.num_windows:
            self.read_ahead(order, stream, window + 1)
        draws = order.draws(stream, window, count_draws(self.config))
        return OpenWindow(stream, window, samples.places(stream, window), draws)

    def read_sample(self, samples: Samples, opened: OpenWindow, served: int) -> Prepared:
        """The sample that is served as number `served` of a window."""
        image, label = samples.find_first_good(opened.stream, opened.window, served, opened.places)
        draws = opened.draws[served]
        return prepare_training(image, self.config, self.image_size, draws), draws, label

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        """See data.workers.Work."""
        mine = list_streams(self.rank, self.world_size, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        buffer, numbers = reuse_memory(), count()
        while True:
            order = self.order(epoch)
            samples = self.stand_ins(order, buffer)
            windows: dict[int, OpenWindow] = {}  # by stream
            if self.index.is_remote:
                rows = list_rows(worker, num_workers, self.local_batch_size, 0)
                first = position // self.config.num_streams // order.window
                for place in range(rows.start // order.per_stream_batch, -(-rows.stop // order.per_stream_batch)):
                    self.read_ahead(order, mine[place], first)  # of all streams, before the first is waited for
            for step in range(position // self.global_batch_size, order.num_steps):
                number = next(numbers)
                images, labels = slots.of(number)
                rows = list_rows(worker, num_workers, self.local_batch_size, number)
                draws, bad = [], []
                for row in rows:
                    place, of_stream = divmod(row, order.per_stream_batch)
                    stream = mine[place]
                    window, served = divmod(step * order.per_stream_batch + of_stream, order.window)
                    if stream not in windows or windows[stream].window != window:
                        windows[stream] = self.open_window(samples, order, stream, window)
                    opened = windows[stream]
                    image, drawn, labels[row] = self.read_sample(samples, opened, served)
                    slots.put(number, row, image, drawn)
                    draws.append(drawn)
                    if opened.places[served] in samples.bad:
                        bad.append(samples.bad[opened.places[served]])
                if draws and self.config.augment == "crop_flip" and self.config.backend != "nvjpeg":
                    filled = slice(rows.start, rows.stop)
                    images[filled] = crop_flip(images[filled], torch.from_numpy(np.stack(draws)))
                yield tuple(bad)
            epoch, position = epoch + 1, 0

    def from_memory(self, device: torch.device) -> Iterator[Batch]:
        """The batches that `fill` makes, from pixels that are decoded once, on `device` where they fit."""
        store = memory.open_store(self.config, self.index, "train", self.image_size, self.channels, device)
        mine = list_streams(self.rank, self.world_size, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        while True:
            step = position // self.global_batch_size
            yield from memory.make_training_batches(store, self.config, self.order(epoch), mine, step, self.image_size)
            epoch, position = epoch + 1, 0


class TrainingLoader:
    """Endless batches of one rank; `state` is where the global stream stands after the batches taken so far, and
    `bad` counts the rank's samples that others had to stand in for. A run of one rank is checked for them at once; with
    several the caller adds the ranks' counts up (BadCount.merge_ranks) and checks the sum, now and then."""

    def __init__(self, stream: TrainingStream, device: torch.device = CPU) -> None:
        self.stream, self.device = stream, device
        self.state = stream.state
        self.steps_per_epoch = stream.order(stream.state.epoch).num_steps
        config = stream.config
        self.bad = BadCount(config.max_bad_fraction, self.steps_per_epoch * stream.global_batch_size)
        list_streams(stream.rank, stream.world_size, config.num_streams)  # refuse early
        check_window(config, stream.index)
        if config.rand_augment:
            make_rand_augment(config.rand_augment, stream.image_size, config.mean)  # one import of timm for all workers

    def iterate_local_batches(self) -> Iterator[Batch]:
        stream, config = self.stream, self.stream.config
        if config.in_memory:
            return stream.from_memory(self.device)
        if config.window == "epoch":
            stream.index.keep_members("train")  # before the workers start, who share it
        shape = (stream.local_batch_size, stream.channels, stream.image_size, stream.image_size)
        return start_reading(stream, config, shape, config.num_workers, self.device)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.iterate_local_batches():
            self.bad.add(batch.bad, self.state.epoch)
            self.bad.missed += batch.missed
            if self.stream.world_size == 1:
                self.bad.check()
            position = self.state.position + self.stream.global_batch_size
            ended = position >= self.steps_per_epoch * self.stream.global_batch_size
            self.state = replace(self.state, epoch=self.state.epoch + ended, position=0 if ended else position)
            yield batch


def check_window(config: DataConfig, index: Index) -> None:
    """Raises UserError for a shuffled epoch of shards that are read in blocks over the network."""
    for shard in index.splits["train"]:
        if misfit := find_window_misfit(config, index.location(shard)):
            raise UserError(misfit)


def share_spans(spans: Sequence[Span], rank: int, world_size: int) -> list[Span]:
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


def iterate_evaluation_batches(
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
    mine = share_spans(spans, rank, world_size)
    for batch in read_evaluation_batches(config, index, split, mine, batch_size, image_size, channels, device):
        count.add(batch.bad)
        if bad is None:
            count.check()
        if len(batch.labels):
            yield batch


def read_evaluation_batches(
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
        rows = store.list_row_numbers(spans)
        yield from (
            store.gather_good_rows(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)
        )
        return
    work = Evaluation(config, index, spans, batch_size, image_size, channels)
    num_workers = min(config.num_workers, batch_size, len(work.places))
    shape = (batch_size, channels, image_size, image_size)
    yield from start_reading(work, config, shape, num_workers, device)


class Evaluation:
    """The samples of `spans` in order, each batch shared by all workers."""

    def __init__(
        self, config: DataConfig, index: Index, spans: Sequence[Span], batch_size: int, image_size: int, channels: int
    ) -> None:
        self.config, self.index = config, index
        self.image_size, self.channels, self.batch_size = image_size, channels, batch_size
        self.places = [(span, number) for span in spans for number in range(span.samples)]

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        """See data.workers.Work."""
        buffer = reuse_memory()
        for step, first in enumerate(range(0, len(self.places), self.batch_size)):
            places = self.places[first : first + self.batch_size]
            labels = slots.of(step)[1]
            labels[worker::num_workers] = NO_LABEL
            bad = []
            for row in range(worker, len(places), num_workers):
                try:
                    image, labels[row] = open_image(self.config, self.index, places[row], self.channels, buffer)
                except BadSample as error:
                    bad.append(error)
                    continue
                if isinstance(image, Jpeg):
                    slots.put(step, row, cut(image, "none", self.image_size, NO_DRAWS), NO_DRAWS)
                else:
                    slots.put(step, row, center_crop(image, self.image_size, self.config.backend), NO_DRAWS)
            yield tuple(bad)
