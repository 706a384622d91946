"""Random augmentation as a pure function of uniform numbers, which the order draws for each sample.

`prepare` is done an image at a time, where it is decoded (random resized crops are flipped there, too: a tenth of the
time at 224 pixels, see data.distort.prepare_training_image); `crop_flip` a batch at a time, on any device.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.data.decode import center_box, center_crop, crop_resize

CROP_TRIES = 10
NUM_DRAWS = {"none": 0, "crop_flip": 3, "resized_crop_flip": 1 + 4 * CROP_TRIES}  # uniform numbers for one sample


def draw_box(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) with 8 to 100 % of the area and aspect ratio 3/4 to 4/3 (arXiv 1409.4842).

    `draws`: 4 uniform numbers for each try; the central square when no try fits.
    """
    log_ratio = math.log(4 / 3)
    for area, ratio, vertical, horizontal in draws.reshape(-1, 4).tolist():
        area, ratio = height * width * (0.08 + 0.92 * area), math.exp(log_ratio * (2 * ratio - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
    return center_box(height, width)


def prepare(image: Tensor, recipe: str, size: int, draws: np.ndarray, backend: str) -> Tensor:
    """(channels, height, width) uint8 -> (channels, size, size): random for resized_crop_flip, else the centre."""
    if recipe == "resized_crop_flip":
        return crop_resize(image, draw_box(image.shape[1], image.shape[2], draws[1:]), size, backend)
    return center_crop(image, size, backend)


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Flips half of (batch, channels, size, size), shifts all by up to 1/8, black beyond the edge.

    `draws`: (batch, NUM_DRAWS["crop_flip"] or more) float64 on the images' device.
    """
    size = images.shape[-1]
    columns = torch.arange(size, device=images.device)
    flip = draws[:, :1] < 0.5
    columns = torch.where(flip, columns.flip(0), columns)  # (batch, size)
    padding = max(size // 8, 1)
    offsets = (draws[:, 1:3] * (2 * padding + 1)).long()  # (batch, 2)
    rows = torch.arange(size, device=images.device) + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    channels_last = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images), device=images.device)
    return channels_last[batch[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
