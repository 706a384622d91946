"""A batch, and how it becomes the network's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.config import DataConfig
from data.decode import BadImage, decode
from data.errors import UserError
from data.reader import RawSample


@dataclass(frozen=True)
class Batch:
    """images: (batch, channels, size, size) uint8; labels: (batch,) int64."""

    images: Tensor
    labels: Tensor


def check_labels(sample: RawSample, num_classes: int) -> None:
    if sample.label >= num_classes:
        raise UserError(f"sample {sample.key}: label {sample.label}, but model.num_classes is {num_classes}")


def decode_sample(sample: RawSample, num_classes: int, channels: int, backend: str) -> Tensor:
    """The sample's pixels, (channels, height, width) uint8. Raises UserError for what is no image or has no class."""
    check_labels(sample, num_classes)
    try:
        return decode(sample.image, channels, backend)
    except BadImage as error:
        raise UserError(f"sample {sample.key}: {error}") from None


def collate(images: Sequence[Tensor], labels: Sequence[int]) -> Batch:
    return Batch(torch.stack(list(images)), torch.tensor(labels))


def to_float(batch: Batch, config: DataConfig, device: Any) -> tuple[Tensor, Tensor]:
    """uint8 pixels to normalised float32 on `device`: (batch, channels, size, size), and the labels."""
    images = batch.images.to(device, non_blocking=True).float()
    labels = batch.labels.to(device, non_blocking=True)
    return (images / 255 - config.mean) / config.std, labels
