"""One image file -> uint8 pixels (channels, height, width). Floating point starts on the device, after the copy.

Two backends give the same pictures: `fast` (libjpeg-turbo through simplejpeg, torch's uint8 antialiased resize) and
`pil`, the reference. What is no plain JPEG (PNG, WebP, CMYK) is read by PIL in both, and what comes here of a third,
`nvjpeg` (data.nvjpeg).
"""

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from depthmup.data.images import check_pixels, open_image, reduce_to_eight_bits, refusing_bad_images

SCRATCH_BYTES = 16 << 20  # larger images get memory of their own


def from_array(pixels: np.ndarray) -> Tensor:
    """(height, width[, channels]) -> (channels, height, width), the same memory."""
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def decode_pil(content: bytes, channels: int) -> Tensor:
    mode = "L" if channels == 1 else "RGB"
    with refusing_bad_images():
        image = reduce_to_eight_bits(open_image(content))
        return from_array(np.array(image if image.mode == mode else image.convert(mode)))  # PIL converts by a copy


def reuse_memory() -> np.ndarray:
    """Memory for `decode` to use again and again: to touch new memory for each image takes 15 % of a JPEG's time."""
    return np.empty(SCRATCH_BYTES, np.uint8)


def decode(content: bytes, channels: int, backend: str, buffer: np.ndarray | None = None) -> Tensor:
    """(channels, height, width) uint8: grey (1 channel) or RGB (3). Raises BadImage.

    With a `buffer` from scratch() the pixels may lie in it, and are good until it is used again. EXIF orientation is
    not applied: torchvision's and timm's loaders do not either, and published results rest on that.
    """
    if backend == "fast" and content[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
            check_pixels(height, width)
            if colorspace in ("YCbCr", "RGB", "Gray"):
                fits = height * width * channels <= SCRATCH_BYTES
                color = "GRAY" if channels == 1 else "RGB"
                return from_array(simplejpeg.decode_jpeg(content, color, buffer=buffer if fits else None))
        except (ValueError, KeyError):  # stricter than PIL, whose verdict counts; KeyError: an odd chroma subsampling
            pass
    return decode_pil(content, channels)


def crop_resize(image: Tensor, box: tuple[int, int, int, int], size: int, backend: str) -> Tensor:
    """Rows [top, top + height), columns [left, left + width) of `image`, bicubic to (channels, size, size): a copy."""
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return crop.clone()
    if backend != "fast":
        return from_array(np.array(to_pil(crop).resize((size, size), Image.Resampling.BICUBIC)))
    pixels = crop[None].contiguous(
        memory_format=torch.channels_last
    )  # or torch would resize to planes, for a fifth more
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


def center_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the central square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def center_crop(image: Tensor, size: int, backend: str) -> Tensor:
    """The central square, resized to `size`."""
    return crop_resize(image, center_box(image.shape[1], image.shape[2]), size, backend)
