"""Image files as PIL reads them, for packing and for training alike. Nothing here imports torch."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no others: for EPS, PIL would start Ghostscript
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # PIL's own limit against decompression bombs
# PIL's are about single images, which are counted where they are bad, and of large ones check_pixels refuses more.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image file that cannot be decoded; the message is the reason, in words that do not name the file."""


def check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS} pixels")


@contextmanager
def refusing_bad_images() -> Iterator[None]:
    """Turns what PIL raises for a damaged file into BadImage."""
    try:
        yield
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(f"not a readable image ({type(error).__name__})") from None


def open_image(content: bytes) -> Image.Image:
    """The image, decoded to its last row: a header says nothing about the rest. Within refusing_bad_images."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    check_pixels(image.height, image.width)
    image.load()
    return image


def reduce_to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel scaled to 8, where PIL's own conversion would clip; any other as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def convert_image(content: bytes, resize: int | None, quality: int) -> bytes:
    """The image as it is packed: with `resize` as a JPEG whose shorter side is at most that. Raises BadImage."""
    with refusing_bad_images():
        image = open_image(content)
        if resize is None:
            return content
        upright = reduce_to_eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        scale = min(resize / min(upright.size), 1)
        size = (max(round(upright.width * scale), 1), max(round(upright.height * scale), 1))
        output = io.BytesIO()
        upright.resize(size, Image.Resampling.BICUBIC).save(output, "jpeg", quality=quality)
    return output.getvalue()
