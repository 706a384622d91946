"""Batches for training and evaluation: the order of data.order, read by worker processes where asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.config import DataConfig
from data.decode import augment, center_crop, decode, to_tensor
from data.errors import UserError
from data.index import Index, Span
from data.order import EpochOrder, State, random_generator, streams_of
from data.reader import RawSample, read_span


@dataclass(frozen=True)
class Batch:
    """images: (batch, channels, size, size) uint8; labels: (batch,) int64."""

    images: Tensor
    labels: Tensor


def check_labels(sample: RawSample, num_classes: int) -> None:
    if sample.label >= num_classes:
        raise UserError(f"sample {sample.key}: label {sample.label}, but model.num_classes is {num_classes}")


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

    def stream(self, order: EpochOrder, stream: int, position: int) -> Iterator[tuple[Tensor, int]]:
        """Decoded samples of one stream, from stream position `position` on."""
        for window in range(position // order.window, -(-order.stream_length // order.window)):
            first, last = order.window_bounds(window)
            raw = [s for span in order.contiguous(stream, first, last) for s in read_span(self.index.root, span)]
            permutation = order.permutation(stream, window)
            for served in range(max(position - first, 0), last - first):
                sample = raw[permutation[served]]
                check_labels(sample, len(self.index.classes))
                random = random_generator(order.seed, order.epoch, stream, first + served, 1)
                image = decode(sample, self.channels)
                yield augment(image, self.config.augment, self.image_size, random), sample.label

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 0)
        mine = streams_of(self.rank, self.world_size, worker, num_workers, self.config.num_streams)
        epoch, position = self.state.epoch, self.state.position
        while True:
            order = self.order(epoch)
            step = position // self.global_batch_size
            streams = [self.stream(order, stream, step * order.per_stream_batch) for stream in mine]
            for _ in range(step, order.num_steps):
                samples = [next(stream) for stream in streams for _ in range(order.per_stream_batch)]
                yield collate(samples)
            epoch, position = epoch + 1, 0


def collate(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels))


def merge_worker_parts(parts: Sequence[Batch], per_stream_batch: int) -> Batch:
    """The parts of one step from workers 0, 1, ... -> the rank's batch in the order of its streams."""
    if len(parts) == 1:
        return parts[0]

    def interleave(tensors: list[Tensor]) -> Tensor:
        streams = torch.stack([tensor.unflatten(0, (-1, per_stream_batch)) for tensor in tensors], dim=1)
        return streams.flatten(0, 2)  # stream k of worker w is the rank's stream k * num_workers + w

    return Batch(interleave([part.images for part in parts]), interleave([part.labels for part in parts]))


class TrainingLoader:
    """Endless batches of one rank; `state` is where the global stream stands after the batches taken so far."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream
        self.state = stream.state
        self.steps_per_epoch = stream.order(stream.state.epoch).num_steps
        config = stream.config
        streams_of(stream.rank, stream.world_size, 0, config.num_workers, config.num_streams)  # refuse early

    def __iter__(self) -> Iterator[Batch]:
        config = self.stream.config
        loader = DataLoader(
            self.stream, batch_size=None, num_workers=config.num_workers, pin_memory=torch.cuda.is_available()
        )
        parts = iter(loader)
        per_stream_batch = self.stream.global_batch_size // config.num_streams
        while True:
            batch = merge_worker_parts([next(parts) for _ in range(max(config.num_workers, 1))], per_stream_batch)
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
) -> Iterator[Batch]:
    """Every sample of `split` (val or minival) exactly once over all ranks, in order; the last batch may be short."""
    samples: list[tuple[Tensor, int]] = []
    for span in share(index.spans(split, config.minival), rank, world_size):
        for raw in read_span(index.root, span):
            check_labels(raw, len(index.classes))
            samples.append((to_tensor(center_crop(decode(raw, channels), image_size)), raw.label))
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
    if samples:
        yield collate(samples)


def to_float(batch: Batch, config: DataConfig, device: Any) -> tuple[Tensor, Tensor]:
    """uint8 pixels to normalised float32 on `device`: (batch, channels, size, size), and the labels."""
    images = batch.images.to(device, non_blocking=True).float()
    labels = batch.labels.to(device, non_blocking=True)
    return (images / 255 - config.mean) / config.std, labels
