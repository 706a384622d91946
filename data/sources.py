"""Where images come from before they are packed: a folder, a tar of one, or a data set that a Python package ships."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import UserError
from data.reader import IMAGE_EXTENSIONS

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "val"}


@dataclass(frozen=True)
class SourceImage:
    """One image of a source. `split` is train, val, or None where the source has no splits of its own."""

    path: str
    class_name: str
    split: str | None
    read: Callable[[], bytes]


def place(path: str) -> tuple[str | None, str] | None:
    """'train/dog/1.jpg' -> ('train', 'dog'); 'dog/1.jpg' -> (None, 'dog'); None for what is no image in a class."""
    parts = Path(path).parts
    if len(parts) < 2 or Path(path).suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        return None
    split = next((SPLITS[part] for part in parts[:-2] if part in SPLITS), None)
    return split, parts[-2]


def folder_images(root: Path) -> Iterator[SourceImage]:
    for path in sorted(root.rglob("*")):
        relative = str(path.relative_to(root))
        if (placed := place(relative)) and path.is_file():
            yield SourceImage(relative, placed[1], placed[0], path.read_bytes)


def tar_images(path: Path) -> Iterator[SourceImage]:
    def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            with tarfile.open(path) as archive:
                file = archive.extractfile(member)
                assert file is not None
                return file.read()

        return read

    with tarfile.open(path) as archive:
        for member in archive:
            if (placed := place(member.name)) and member.isfile():
                yield SourceImage(member.name, placed[1], placed[0], reader(member))


def digits_images() -> Iterator[SourceImage]:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 grey levels, as PNG files (UCI optical digits, test part)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("source sklearn:digits needs scikit-learn: pip install 'depthmup[demo]'") from None
    digits = load_digits()

    def png(pixels: np.ndarray) -> Callable[[], bytes]:
        def encode() -> bytes:
            content = io.BytesIO()
            Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(content, "png")
            return content.getvalue()

        return encode

    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        yield SourceImage(f"{label}/{number:04d}.png", str(label), None, png(pixels))


PACKAGED = {"sklearn:digits": digits_images}


def open_source(source: str) -> list[SourceImage]:
    """All images of `source`. Raises UserError when it does not exist or holds no image in a class folder."""
    path = Path(source)
    if source in PACKAGED:
        images = list(PACKAGED[source]())
    elif path.is_dir():
        images = list(folder_images(path))
    elif path.is_file() and tarfile.is_tarfile(path):
        images = list(tar_images(path))
    else:
        raise UserError(f"{source}: no such folder or tar (packaged sources: {', '.join(PACKAGED)})")
    if not images:
        raise UserError(
            f"{source}: no images. Expected class folders ({source}/CLASS/IMAGE.jpg or {source}/train/CLASS/IMAGE.jpg)"
        )
    return images
