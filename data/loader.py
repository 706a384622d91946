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
from depthmup.data.config import DataConfig
from depthmup.data.decode import center_crop, scratch
from depthmup.data.distort import num_draws, rand_augment, training_image
from depthmup.data.index import NO_LABEL, Index, Span
from depthmup.data.order import EpochOrder, State, streams_of
from depthmup.data.reader import BadSample, prefetch
from depthmup.data.workers import Slots, batches

CPU = torch.device("cpu")
Prepared = tuple[Tensor, np.ndarray, int]  # image (channels, size, size), its random numbers, its label


@dataclass
class TrainingStream:
    """One rank's share of the global batches, from `state` on, without end. A worker fills its streams' part."""

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
                image, label = samples.find_first_good(stream, window, served, places)
                if places[served] in samples.bad:
                    bad.append(samples.bad[places[served]])
                yield training_image(image, config, self.image_size, draws[served]), draws[served], label

    def fill(self, slots: Slots, worker: int, num_workers: int) -> Iterator[tuple[BadSample, ...]]:
        """See data.workers.Work."""
        mine = streams_of(self.rank, self.world_size, worker, num_workers, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        buffer, numbers = scratch(), count()
        while True:
            order = self.order(epoch)
            step, length = position // self.global_batch_size, order.per_stream_batch
            bad: list[BadSample] = []
            samples = self.stand_ins(order, buffer)
            streams = [self.stream(samples, order, stream, step * length, bad) for stream in mine]
            # stream k of worker w is the rank's stream k * num_workers + w, and a stream's samples stand together
            rows = torch.arange(self.local_batch_size).view(-1, num_workers, length)[:, worker].flatten().tolist()
            for _ in range(step, order.num_steps):
                images, labels = slots.of(next(numbers))
                draws = []
                for place, row in enumerate(rows):
                    images[row], drawn, labels[row] = next(streams[place // length])
                    draws.append(drawn)
                if self.config.augment == "crop_flip":
                    images[rows] = crop_flip(images[rows], torch.from_numpy(np.stack(draws)))
                yield tuple(bad)
                bad.clear()
            epoch, position = epoch + 1, 0

    def from_memory(self, device: torch.device) -> Iterator[Batch]:
        """The batches that `fill` makes, from pixels that are decoded once, on `device` where they fit."""
        store = memory.open_store(self.config, self.index, "train", self.image_size, self.channels, device)
        mine = streams_of(self.rank, self.world_size, 0, 0, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        while True:
            step = position // self.global_batch_size
            yield from memory.training_steps(store, self.config, self.order(epoch), mine, step, self.image_size)
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
        streams_of(stream.rank, stream.world_size, 0, config.num_workers, config.num_streams)  # refuse early
        if config.rand_augment:
            rand_augment(config.rand_augment, stream.image_size, config.mean)  # one import of timm for all workers

    def local_batches(self) -> Iterator[Batch]:
        stream, config = self.stream, self.stream.config
        if config.in_memory:
            return stream.from_memory(self.device)
        shape = (stream.local_batch_size, stream.channels, stream.image_size, stream.image_size)
        return batches(stream, shape, config.num_workers, self.device)

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
        yield from (
            store.gather_good_rows(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)
        )
        return
    work = Evaluation(config, index, spans, batch_size, image_size, channels)
    num_workers = min(config.num_workers, batch_size, len(work.places))
    yield from batches(work, (batch_size, channels, image_size, image_size), num_workers, device)


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
        buffer = scratch()
        for step, first in enumerate(range(0, len(self.places), self.batch_size)):
            places = self.places[first : first + self.batch_size]
            images, labels = slots.of(step)
            labels[worker::num_workers] = NO_LABEL
            bad = []
            for row in range(worker, len(places), num_workers):
                try:
                    image, label = decode_sample(self.index, *places[row], self.channels, self.config.backend, buffer)
                except BadSample as error:
                    bad.append(error)
                    continue
                images[row], labels[row] = center_crop(image, self.image_size, self.config.backend), label
            yield tuple(bad)
