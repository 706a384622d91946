"""Small data sets in memory: decoded once to one uint8 tensor, shared by all runs of a process; the same batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from depthmup.data.augment import crop_flip
from depthmup.data.bad import StandIns
from depthmup.data.batch import Batch, decode_sample, on_device
from depthmup.data.config import DataConfig
from depthmup.data.decode import center_crop
from depthmup.data.distort import count_draws, distorts, prepare_training_image
from depthmup.data.errors import UserError
from depthmup.data.index import Index, Shard, Span
from depthmup.data.order import EpochOrder
from depthmup.data.reader import BadSample


@dataclass(frozen=True)
class PixelStore:
    """images: (samples, channels, height, width) uint8 and labels: (samples,) int64, on one device.

    `rows` gives for each shard the row of each of its samples (-1 for those of another split).
    """

    images: Tensor
    labels: Tensor
    rows: dict[Shard, np.ndarray]
    bad: dict[int, BadSample]  # by row; their pixels are black

    def list_row_numbers(self, spans: Sequence[Span]) -> np.ndarray:
        """Rows of all samples of `spans`, one span after the other."""
        return np.concatenate([self.rows[s.shard][s.first : s.first + s.samples] for s in spans])

    def take(self, rows: np.ndarray) -> Batch:
        numbers = on_device(rows, self.images.device)
        return Batch(self.images[numbers], self.labels[numbers])

    def gather_good_rows(self, rows: np.ndarray) -> Batch:
        """The samples of `rows` without the bad ones."""
        bad = [self.bad[row] for row in rows.tolist() if row in self.bad]
        kept = rows[[row not in self.bad for row in rows.tolist()]] if bad else rows
        return replace(self.take(kept), bad=tuple(bad))

    def good(self, row: int) -> int:
        """The row itself. Raises BadSample."""
        if row in self.bad:
            raise self.bad[row]
        return row


def pick_device(num_bytes: int, device: torch.device) -> torch.device:
    """`device` where the pixels take at most half of its free memory, else the host."""
    fits = device.type == "cuda" and num_bytes * 2 <= torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """An index as a key of the cache; the spans beside it hold the shards' checksums."""

    index: Index

    def __hash__(self) -> int:
        return hash((self.index.root, self.index.classes))


@lru_cache(maxsize=4)  # train, minival and val of one data set, and one more
def decode_all(
    source: "Source", spans: tuple[Span, ...], size: int | None, channels: int, backend: str, device: torch.device
) -> PixelStore:
    images: list[Tensor | None] = []
    labels: list[int] = []
    rows = {span.shard: np.full(span.shard.samples, -1) for span in spans}
    bad = {}
    for span in spans:
        rows[span.shard][span.first : span.first + span.samples] = np.arange(span.samples) + len(images)
        for number in range(span.samples):
            try:
                image, label = decode_sample(source.index, span, number, channels, backend)
                images.append(image if size is None else center_crop(image, size, backend))
                labels.append(label)
            except BadSample as error:
                bad[len(images)] = error
                images.append(None)
                labels.append(0)
    good = next((image for image in images if image is not None), None)
    if good is None:
        raise UserError(f"{source.index.root}: no readable image in it, the first: {bad[0]}")
    if any(image is not None and image.shape != good.shape for image in images):
        raise UserError(
            "data.in_memory with augment resized_crop_flip needs images of one size: set data.in_memory=false"
        )
    pixels = torch.stack([torch.zeros_like(good) if image is None else image for image in images])
    device = pick_device(pixels.nbytes, device)
    return PixelStore(pixels.to(device), torch.tensor(labels).to(device), rows, bad)


def open_store(
    config: DataConfig, index: Index, split: str, image_size: int, channels: int, device: torch.device
) -> PixelStore:
    """The pixels of a split, decoded by the first call in this process.

    Raises UserError when no image can be decoded, and for random resized crops of images of different sizes.
    """
    originals = split == "train" and config.augment == "resized_crop_flip"
    spans = tuple(index.spans(split, config.minival))
    size = None if originals else image_size
    return decode_all(Source(index), spans, size, channels, config.backend, device)


def make_training_batches(
    store: PixelStore, config: DataConfig, order: EpochOrder, streams: Sequence[int], first_step: int, image_size: int
) -> Iterator[Batch]:
    """The batches of one epoch from `first_step` on, for the rank that serves `streams`."""
    ring = store.list_row_numbers(order.spans)
    count = count_draws(config)
    step_length = order.per_stream_batch
    rows = np.empty((len(streams), 0), np.int64)  # samples in the order served that no batch has taken yet
    draws = np.empty((len(streams), 0, count))
    intended = rows  # the samples whose turn it is: the same, but for bad ones
    position = first_step * step_length
    skip = position % order.window

    def in_order(stream: int, window: int) -> list[int]:
        return ring[order.compute_ring_places(stream, window)].tolist()

    samples = StandIns(order, in_order, store.good, config.max_bad_fraction)
    for window in range(position // order.window, order.num_windows):
        new_rows, new_draws, new_intended = [], [], []
        for stream in streams:
            of_window = in_order(stream, window)
            new_intended.append(of_window)
            if store.bad:
                of_window = [samples.find_first_good(stream, window, n, of_window) for n in range(len(of_window))]
            new_rows.append(of_window)
            new_draws.append(order.draws(stream, window, count))
        intended = np.concatenate([intended, np.stack(new_intended)[:, skip:]], axis=1)
        rows = np.concatenate([rows, np.stack(new_rows)[:, skip:]], axis=1)
        draws = np.concatenate([draws, np.stack(new_draws)[:, skip:]], axis=1)
        skip = 0
        while rows.shape[1] >= step_length:
            taken = rows[:, :step_length].reshape(-1)
            taken_draws = draws[:, :step_length].reshape(len(taken), count)
            bad = [store.bad[row] for row in intended[:, :step_length].reshape(-1).tolist() if row in store.bad]
            intended, rows, draws = intended[:, step_length:], rows[:, step_length:], draws[:, step_length:]
            batch = store.take(taken)
            images = batch.images
            if config.augment == "resized_crop_flip" or distorts(config):
                images = torch.stack(
                    [
                        prepare_training_image(image, config, image_size, drawn)
                        for image, drawn in zip(images.cpu(), taken_draws, strict=True)
                    ]
                ).to(images.device)
            if config.augment == "crop_flip":
                images = crop_flip(images, on_device(taken_draws, images.device))
            yield Batch(images, batch.labels, tuple(bad))
