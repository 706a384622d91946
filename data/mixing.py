"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, as a pure function of (seed, step)."""

import numpy as np
from torch import Tensor

from depthmup.data.config import DataConfig
from depthmup.data.distort import seeded
from depthmup.data.errors import UserError
from depthmup.data.keys import seed_for


def order_pairs(places: np.ndarray, num_streams: int, global_batch_size: int) -> np.ndarray:
    """The order of images in which `mix`, which pairs the first with the last, pairs the same ones whatever the number
    of processes: int64.

    places: those of this process in the global batch (data.order.list_places). An image's partner is of its own stream
    or, where a batch has an odd number of each stream, half of all streams away: in the same process, as `mix` needs.
    """
    length = global_batch_size // num_streams
    number, stream = np.divmod(places, num_streams)
    if length % 2 == 0:
        second, pair = number >= length // 2, stream * length + np.minimum(number, length - 1 - number)
    else:
        second, pair = stream >= num_streams // 2, number * num_streams + stream % max(num_streams // 2, 1)
    ordered = np.argsort(pair, kind="stable")
    return np.concatenate([ordered[~second[ordered]], ordered[second[ordered]][::-1]])


def mixes(config: DataConfig) -> bool:
    return bool(config.mixup or config.cutmix)


def mix(
    images: Tensor, labels: Tensor, config: DataConfig, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """timm's Mixup in mode `batch`: image i is mixed with image -1 - i of the batch, all by one share or in one box.

    images: (batch, channels, size, size) float, changed in place; labels: (batch,) int64. Returns the images and
    (batch, classes) float probabilities; label smoothing is left to the loss, where it gives the same as before mixing.
    With both switched on, each step takes one of them at random. Raises UserError for a batch of odd size.
    """
    if len(images) % 2:
        raise UserError(
            f"data.mixup and data.cutmix mix pairs, but a process takes {len(images)} images of a batch: "
            "choose train.global_batch_size so that each process gets an even number"
        )
    from timm.data.mixup import Mixup  # slow to import: for those who use it

    mixup = Mixup(config.mixup or 0.0, config.cutmix or 0.0, label_smoothing=0.0, num_classes=num_classes)
    with seeded(seed_for("mix", seed, step) % 2**32):
        mixed: tuple[Tensor, Tensor] = mixup(images, labels)
    return mixed
