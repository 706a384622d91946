"""RandAugment and colour jitter of one training image, as a pure function of the uniform numbers drawn for it.

timm's and torchvision's functions draw from global generators. RandAugment is timm's own, with these generators set
from one of the image's numbers; colour jitter is PIL's enhancers in random order, which is all that torchvision does.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from depthmup.data.augment import NUM_DRAWS, prepare
from depthmup.data.config import DataConfig, expand_per_channel
from depthmup.data.decode import from_array, to_pil

JITTER_ORDERS = tuple(permutations((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)))
JITTER_DRAWS = 1 + 3  # the order, and a factor for each enhancer
RAND_AUGMENT_DRAWS = 1  # the seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's global generators start from `seed`; afterwards they go on as if unused."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def posterize(picture: Image.Image, bits: int, **fill: Any) -> Image.Image:
    """timm's own, but for 0 bits, which its magnitudes lead to and PIL 13 refuses: black."""
    return ImageOps.posterize(picture, bits) if 0 < bits < 8 else picture.point(lambda value: value if bits else 0)


@lru_cache(maxsize=4)
def make_rand_augment(recipe: str, size: int, mean: float | tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment of `size` x `size` RGB images, with timm's translations (at most 45 %) and fill (the mean)."""
    from timm.data import auto_augment  # slow to import: for those who use it

    fill = tuple(min(255, round(255 * value)) for value in expand_per_channel(mean, 3))
    fill = fill if len(fill) == 3 else fill * 3  # of a grey image, which is made RGB
    transform = auto_augment.rand_augment_transform(recipe, {"translate_const": int(size * 0.45), "img_mean": fill})
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def color_jitter(picture: Image.Image, strength: float, draws: np.ndarray) -> Image.Image:
    """Brightness, contrast and saturation, each times 1 - strength to 1 + strength, in random order.

    `draws`: JITTER_DRAWS uniform numbers.
    """
    order, *factors = draws.tolist()
    for enhancer, factor in zip(JITTER_ORDERS[int(order * len(JITTER_ORDERS))], factors, strict=True):
        picture = enhancer(picture).enhance(1 + strength * (2 * factor - 1))
    return picture


def count_draws(config: DataConfig) -> int:
    """Uniform numbers that one training image takes: those of the crop and flip first."""
    of_distortions = bool(config.rand_augment) * RAND_AUGMENT_DRAWS + bool(config.color_jitter) * JITTER_DRAWS
    return NUM_DRAWS[config.augment] + of_distortions


def distorts(config: DataConfig) -> bool:
    return bool(config.rand_augment or config.color_jitter)


def distort(image: Tensor, config: DataConfig, draws: np.ndarray) -> Tensor:
    """RandAugment, then colour jitter, of (channels, size, size) uint8. `draws`: those that the crop leaves."""
    if not distorts(config):
        return image
    original = to_pil(image)
    picture = original.convert("RGB")  # timm's fill value has three channels
    if config.rand_augment:
        with seeded(int(draws[0] * 2**32)):
            picture = make_rand_augment(config.rand_augment, image.shape[1], config.mean)(picture)
    if config.color_jitter:
        picture = color_jitter(picture, config.color_jitter, draws[-JITTER_DRAWS:])
    return from_array(np.array(picture.convert(original.mode)))


def prepare_training_image(image: Tensor, config: DataConfig, size: int, draws: np.ndarray) -> Tensor:
    """A decoded image -> its (channels, size, size) uint8 of training, but for what data.augment.crop_flip does.

    `draws`: (count_draws(config),).
    """
    of_crop = NUM_DRAWS[config.augment]
    crop = prepare(image, config.augment, size, draws[:of_crop], config.backend)
    distorted = distort(crop, config, draws[of_crop:])
    return distorted.flip(2) if config.augment == "resized_crop_flip" and draws[0] < 0.5 else distorted
