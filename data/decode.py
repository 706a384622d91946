"""One image file -> uint8 pixels. Floating point starts on the device, after the copy."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import UserError
from data.reader import RawSample


def decode(sample: RawSample, channels: int) -> Image.Image:
    """The image in grey (1 channel) or RGB (3). Raises UserError for a file that is not a readable image."""
    try:
        return Image.open(io.BytesIO(sample.image)).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"sample {sample.key}: not a readable image ({error})") from None


def to_tensor(image: Image.Image) -> Tensor:
    pixels = np.asarray(image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1).copy()).permute(2, 0, 1)  # (c, height, width)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized to `size`; an image of that size already is left as it is."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def random_resized_crop(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """A box of 8 to 100 % of the area and aspect ratio 3/4 to 4/3, resized (Szegedy et al., arXiv 1409.4842)."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(0.08, 1.0)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(random.integers(image.width - width + 1))
            top = int(random.integers(image.height - height + 1))
            return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return center_crop(image, size)


def augment(image: Image.Image, recipe: str, size: int, random: np.random.Generator) -> Tensor:
    """(channels, size, size) uint8. `recipe`: none, crop_flip (pad by 1/8, crop, flip) or resized_crop_flip."""
    if recipe == "none":
        return to_tensor(center_crop(image, size))
    if recipe == "crop_flip":
        padding = max(size // 8, 1)
        left, top = (int(offset) for offset in random.integers(-padding, padding + 1, size=2))
        image = center_crop(image, size).transform(
            (size, size), Image.Transform.AFFINE, (1, 0, left, 0, 1, top), Image.Resampling.NEAREST
        )
    else:
        image = random_resized_crop(image, size, random)
    if random.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(image)
