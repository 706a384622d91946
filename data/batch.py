"""A batch, and how it becomes the network's input."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthmup.data.config import DataConfig
from depthmup.data.decode import decode
from depthmup.data.images import BadImage
from depthmup.data.index import Index, Span
from depthmup.data.reader import BadSample, read_sample


@dataclass(frozen=True)
class Batch:
    """images: (batch, channels, size, size) uint8, in any memory format; labels: (batch,) int64; `bad`: samples that
    could not be used."""

    images: Tensor
    labels: Tensor
    bad: tuple[BadSample, ...] = ()
    missed: int = 0  # samples that data.backend nvjpeg left to PIL

    def copy(self) -> "Batch":
        """In memory of its own, on the CPU."""
        images, labels = (allocate_like(tensor).copy_(tensor) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device | str, stream: torch.cuda.Stream | None = None) -> "Batch":
        """On `device`; from pinned memory the host does not wait for the copy, and with a `stream` of its own the copy
        runs while the GPU still computes what was asked of it before."""
        with torch.cuda.stream(stream) if stream else nullcontext():
            images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        batch = replace(self, images=images, labels=labels)
        return batch.after(stream.record_event()) if stream else batch

    def after(self, made: torch.cuda.Event) -> "Batch":
        """For use in the current stream, which waits until another one has `made` it."""
        computing = torch.cuda.current_stream(self.images.device)
        computing.wait_event(made)
        for tensor in (self.images, self.labels):
            tensor.record_stream(computing)  # or its memory would be reused too early
        return self


def decode_sample(
    index: Index, span: Span, number: int, channels: int, backend: str, buffer: np.ndarray | None = None
) -> tuple[Tensor, int]:
    """Pixels (channels, height, width) uint8 and label of sample `number` of `span`. Raises BadSample.

    `buffer`: see `decode`.
    """
    sample = read_sample(index, span, number)
    try:
        return decode(sample.image, channels, backend, buffer), sample.label
    except BadImage as error:
        raise BadSample(sample.shard, sample.key, str(error)) from None


def allocate_like(tensor: Tensor, dtype: npt.DTypeLike | None = None) -> Tensor:
    """Uninitialised memory of the CPU for a tensor of the same shape and strides, by numpy: it asks Linux for huge
    pages, whose first touch costs far less."""
    return torch.from_numpy(np.empty_like(tensor.numpy(), dtype))


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`. From pageable memory the host would wait for all that the GPU was asked to do before."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=8)
def make_normalization(
    mean: float | tuple[float, ...], std: float | tuple[float, ...], device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    """(scale, shift): bytes x become x * scale - shift, which is (x / 255 - mean) / std. Numbers, or (channels, 1, 1)
    float32 on `device`, kept there so that no batch waits for a copy."""
    if not isinstance(mean, tuple) and not isinstance(std, tuple):
        return 1 / (255 * std), mean / std
    means, stds = (torch.tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (mean, std))
    return (1 / (255 * stds)).float().to(device), (means / stds).float().to(device)


def to_float(batch: Batch, config: DataConfig, device: Any, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """uint8 pixels to normalised float32 on `device`: (batch, channels, size, size), and the labels."""
    batch = batch.to(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    pixels = batch.images.contiguous(memory_format=memory_format)  # now, while they are bytes
    images = allocate_like(pixels, np.float32).copy_(pixels) if pixels.device.type == "cpu" else pixels.float()
    scale, shift = make_normalization(config.mean, config.std, images.device)
    return images.mul_(scale).sub_(shift), batch.labels
