"""Small data sets in memory: decoded once to one uint8 tensor, shared by all runs of a process; the same batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.augment import NUM_DRAWS, augment, prepare
from data.batch import Batch, collate, decode_sample
from data.config import DataConfig
from data.decode import center_crop
from data.errors import UserError
from data.index import Index, Span
from data.order import EpochOrder
from data.reader import read_span


@dataclass(frozen=True)
class PixelStore:
    """images: (samples, channels, height, width) uint8 and labels: (samples,) int64, on one device.

    `rows` gives for each shard the row of its sample number 0 (or where it would be, when the split starts later).
    """

    images: Tensor
    labels: Tensor
    rows: dict[str, int]

    def row_numbers(self, spans: Sequence[Span]) -> np.ndarray:
        """Rows of all samples of `spans`, one span after the other."""
        return np.concatenate([np.arange(s.samples) + (self.rows[s.shard] + s.first) for s in spans])

    def take(self, rows: np.ndarray) -> Batch:
        numbers = torch.from_numpy(rows).to(self.images.device)
        return Batch(self.images[numbers], self.labels[numbers])


def pick_device(num_bytes: int, device: torch.device) -> torch.device:
    """`device` where the pixels take at most half of its free memory, else the host."""
    fits = device.type == "cuda" and num_bytes * 2 <= torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


@lru_cache(maxsize=4)  # train, minival and val of one data set, and one more
def decode_all(
    root: Path,
    checksums: tuple[str, ...],  # part of the cache's key: shards that were packed anew are decoded anew
    spans: tuple[Span, ...],
    num_classes: int,
    size: int | None,
    channels: int,
    backend: str,
    device: torch.device,
) -> PixelStore:
    images: list[Tensor] = []
    labels: list[int] = []
    rows = {}
    for span in spans:
        rows[span.shard] = len(images) - span.first
        for sample in read_span(root, span):
            image = decode_sample(sample, num_classes, channels, backend)
            images.append(image if size is None else center_crop(image, size, backend))
            labels.append(sample.label)
    if any(image.shape != images[0].shape for image in images):
        raise UserError(
            "data.in_memory with augment resized_crop_flip needs images of one size: set data.in_memory=false"
        )
    batch = collate(images, labels)
    device = pick_device(batch.images.nbytes, device)
    return PixelStore(batch.images.to(device), batch.labels.to(device), rows)


def open_store(
    config: DataConfig, index: Index, split: str, image_size: int, channels: int, device: torch.device
) -> PixelStore:
    """The pixels of a split, decoded by the first call in this process.

    Raises UserError for an image that cannot be decoded, and for random resized crops of images of different sizes.
    """
    originals = split == "train" and config.augment == "resized_crop_flip"
    return decode_all(
        index.root,
        tuple(shard.sha256 for shards in index.splits.values() for shard in shards),
        tuple(index.spans(split, config.minival)),
        len(index.classes),
        None if originals else image_size,
        channels,
        config.backend,
        device,
    )


def training_steps(
    store: PixelStore, config: DataConfig, order: EpochOrder, streams: Sequence[int], first_step: int, image_size: int
) -> Iterator[Batch]:
    """The batches of one epoch from `first_step` on, for the rank that serves `streams`."""
    ring = store.row_numbers(order.spans)
    num_draws = NUM_DRAWS[config.augment]
    step_length = order.per_stream_batch
    rows = np.empty((len(streams), 0), np.int64)  # samples in the order served that no batch has taken yet
    draws = np.empty((len(streams), 0, num_draws))
    position = first_step * step_length
    skip = position % order.window
    for window in range(position // order.window, order.num_windows):
        first, last = order.window_bounds(window)
        new_rows, new_draws = [], []
        for stream in streams:
            unshuffled = ring[(order.stream_start(stream) + np.arange(first, last)) % order.total]
            new_rows.append(unshuffled[order.permutation(stream, window)])
            new_draws.append(order.draws(stream, window, num_draws))
        rows = np.concatenate([rows, np.stack(new_rows)[:, skip:]], axis=1)
        draws = np.concatenate([draws, np.stack(new_draws)[:, skip:]], axis=1)
        skip = 0
        while rows.shape[1] >= step_length:
            taken = rows[:, :step_length].reshape(-1)
            taken_draws = draws[:, :step_length].reshape(len(taken), num_draws)
            rows, draws = rows[:, step_length:], draws[:, step_length:]
            batch = store.take(taken)
            images = batch.images
            if config.augment == "resized_crop_flip":
                images = torch.stack(
                    [
                        prepare(image, config.augment, image_size, drawn, config.backend)
                        for image, drawn in zip(images.cpu(), taken_draws, strict=True)
                    ]
                ).to(images.device)
            yield Batch(augment(images, config.augment, torch.from_numpy(taken_draws).to(images.device)), batch.labels)
