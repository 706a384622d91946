"""Which sample comes when: a pure function of (seed, epoch, position), the same for any number of ranks and workers.

An epoch's samples stand in a ring: the shards in an order permuted by (seed, epoch), one after the other. From a start
point drawn likewise, C canonical streams take equal contiguous slices, with sample-exact bounds from the index. Every
global batch of B samples takes B / C from each stream. Inside a stream fixed windows are permuted, so a resume
re-reads at most one window a stream. What B does not divide is left out, and moves with the start point. With the
window `epoch` the ring itself is permuted, sample by sample, and the windows only number what is served.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby
from typing import Literal

import numpy as np

from depthmup.data.config import find_stream_misfit
from depthmup.data.errors import UserError
from depthmup.data.index import Span
from depthmup.data.keys import make_generator

SERVED_TOGETHER = 64  # of a stream of a shuffled epoch: random numbers are drawn for so many samples at once


@dataclass(frozen=True)
class State:
    """Where training stands in its data: `position` samples of epoch `epoch` are consumed, over all ranks."""

    seed: int
    epoch: int = 0
    position: int = 0


def fit_batch(samples: int) -> int:
    """The largest power of two of at most `samples` >= 1."""
    return 1 << (samples.bit_length() - 1)


def find_batch_misfit(samples: int, num_streams: int, global_batch_size: int) -> str | None:
    """What is wrong where there are less training samples than one batch, and what would do; None where there are
    enough. samples: at least 1."""
    if global_batch_size <= samples:
        return None
    largest, fitting = samples // num_streams * num_streams, fit_batch(samples)
    mend = f"use at most {largest}" if largest else f"use {fitting}, and data.num_streams={fitting}"
    return f"train.global_batch_size {global_batch_size} is more than the {samples} training samples: {mend}"


class EpochOrder:
    """The order of one epoch over `spans`, of which those of a shard stand together."""

    def __init__(
        self,
        spans: Sequence[Span],
        *,
        seed: int,
        epoch: int,
        num_streams: int,
        global_batch_size: int,
        window: int | Literal["epoch"],
    ) -> None:
        """Raises UserError when `num_streams` does not divide the batch or the data holds less than one batch."""
        if misfit := find_stream_misfit(num_streams, global_batch_size):
            raise UserError(misfit)
        self.seed, self.epoch, self.num_streams = seed, epoch, num_streams
        self.shuffles_epoch, self.window = window == "epoch", SERVED_TOGETHER if window == "epoch" else window
        self.global_batch_size = global_batch_size
        self.per_stream_batch = global_batch_size // num_streams
        total = sum(span.samples for span in spans)
        self.num_steps = total // global_batch_size
        if misfit := find_batch_misfit(total, num_streams, global_batch_size):
            raise UserError(misfit)
        self.stream_length = self.num_steps * self.per_stream_batch
        self.num_windows = -(-self.stream_length // self.window)
        generator = make_generator("epoch", seed, epoch)
        of_shards = [list(of_shard) for _, of_shard in groupby(spans, key=lambda span: span.shard)]
        self.spans = [span for i in generator.permutation(len(of_shards)) for span in of_shards[i]]
        self.start = int(generator.integers(total))
        self.ends = np.cumsum([span.samples for span in self.spans])
        self.total = total

    @cached_property
    def shuffled_ring(self) -> np.ndarray:
        """Every place of the ring once, in the order of a shuffled epoch, of the smallest integers that hold them."""
        places = np.arange(self.total, dtype=np.min_scalar_type(self.total))
        make_generator("shuffled epoch", self.seed, self.epoch).shuffle(places)
        return places

    def stream_start(self, stream: int) -> int:
        """Where a stream begins in the ring of the epoch's samples."""
        return (self.start + stream * self.stream_length) % self.total

    def contiguous(self, stream: int, first: int, last: int) -> list[Span]:
        """Positions [first, last) of a stream before shuffling, as spans in the order in which they are read."""
        spans = []
        position = (self.stream_start(stream) + first) % self.total
        remaining = last - first
        while remaining:
            number = int(np.searchsorted(self.ends, position, side="right"))
            span = self.spans[number]
            inside = position - int(self.ends[number] - span.samples)
            taken = min(remaining, span.samples - inside)
            spans.append(Span(span.shard, span.first + inside, taken))
            remaining -= taken
            position = (position + taken) % self.total
        return spans

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First and last (exclusive) stream position of a window."""
        return window * self.window, min((window + 1) * self.window, self.stream_length)

    def windows_after(self, stream: int, window: int) -> Iterator[tuple[int, int]]:
        """Every (stream, window) in a ring without end, from the one after the given one on."""
        for number in count(stream * self.num_windows + window + 1):
            yield divmod(number % (self.num_streams * self.num_windows), self.num_windows)

    def permutation(self, stream: int, window: int) -> np.ndarray:
        """Order in which the window's samples are served, int64 of the window's length."""
        first, last = self.window_bounds(window)
        return make_generator("window", self.seed, self.epoch, stream, window).permutation(last - first)

    def compute_ring_places(self, stream: int, window: int) -> np.ndarray:
        """Where in the ring a window's samples stand, in the order served: int64 of the window's length."""
        first, last = self.window_bounds(window)
        places = (self.stream_start(stream) + np.arange(first, last)) % self.total
        return (
            self.shuffled_ring[places].astype(np.int64)
            if self.shuffles_epoch
            else places[self.permutation(stream, window)]
        )

    def samples(self, stream: int, window: int) -> list[tuple[Span, int]]:
        """A window's samples in the order served, each as a span and its number in it."""
        places = self.compute_ring_places(stream, window)
        numbers = np.searchsorted(self.ends, places, side="right")
        spans = [self.spans[number] for number in numbers]
        return [
            (span, int(place - end + span.samples))
            for span, place, end in zip(spans, places, self.ends[numbers], strict=True)
        ]

    def read_ahead(self, stream: int, window: int) -> list[Span]:
        """The spans that hold a window's samples and no others, as long as may be."""
        if self.shuffles_epoch:
            return [Span(span.shard, span.first + number, 1) for span, number in self.samples(stream, window)]
        return self.contiguous(stream, *self.window_bounds(window))

    def draws(self, stream: int, window: int, count: int) -> np.ndarray:
        """`count` uniform numbers in [0, 1) for each sample of the window, in the order served: float64."""
        first, last = self.window_bounds(window)
        return make_generator("draws", self.seed, self.epoch, stream, window).random((last - first, count))


def list_places(rank: int, world_size: int, num_streams: int, global_batch_size: int) -> np.ndarray:
    """Where the samples of one rank's share of a global batch stand in the whole batch, in the order in which they are
    served (one stream's after the other's): int64 of the share's length. The batch itself is counted across streams,
    so that a rank has every `world_size`-th place."""
    streams = np.arange(rank, num_streams, world_size)
    return (np.arange(global_batch_size // num_streams) * num_streams + streams[:, None]).ravel()


def list_streams(rank: int, world_size: int, num_streams: int) -> list[int]:
    """The streams that one rank serves. Raises UserError when they do not divide evenly."""
    if num_streams % world_size:
        raise UserError(f"data.num_streams {num_streams} must be a multiple of the {world_size} processes")
    return list(range(rank, num_streams, world_size))


def list_rows(worker: int, num_workers: int, num_rows: int, number: int) -> range:
    """The rows of batch `number` that one worker of a rank fills: for any number of workers, each row once, in parts
    that differ by one at most. Rows of a stream stand together, so a worker stays with few streams. Which of the
    workers have one row more moves on with `number`, so that over `num_workers` batches all do the same."""
    phase = number % num_workers
    return range((worker * num_rows + phase) // num_workers, ((worker + 1) * num_rows + phase) // num_workers)
