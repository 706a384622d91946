"""Where images come from before they are packed: a folder, a tar of one, or a data set that a Python package ships."""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data.errors import UserError
from data.scan import IMAGE_EXTENSIONS

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "val"}


@dataclass(frozen=True)
class SourceImage:
    """One image of a source: `size` bytes of `file` from `offset` on, or `content`.

    `split` is train, val, or None where the source has no splits of its own.
    """

    path: str
    class_name: str
    split: str | None
    size: int
    file: str = ""
    offset: int = 0
    content: bytes | None = None

    def read(self) -> bytes:
        if self.content is not None:
            return self.content
        with open(self.file, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def is_image(path: str) -> bool:
    return path.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def folder_images(root: Path) -> Iterator[SourceImage]:
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders.sort()
        for name in sorted(filter(is_image, files)):
            file = os.path.join(folder, name)
            yield SourceImage(os.path.relpath(file, root), "", None, os.path.getsize(file), file)


def tar_images(path: Path) -> Iterator[SourceImage]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile() and is_image(member.name):
                yield SourceImage(member.name, "", None, member.size, str(path), member.offset_data)


def digits_images() -> Iterator[SourceImage]:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 grey levels, as PNG files (UCI optical digits, test part)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("source sklearn:digits needs scikit-learn: pip install 'depthmup[demo]'") from None
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        content = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(content, "png")
        png = content.getvalue()
        yield SourceImage(f"{label}/{number:04d}.png", "", None, len(png), content=png)


PACKAGED = {"sklearn:digits": digits_images}


def place(image: SourceImage, validation: Mapping[str, str]) -> SourceImage | None:
    """The image with its class and split; None for one that lies in no class folder and is not listed.

    'train/dog/1.jpg' is a dog of the split train, 'dog/1.jpg' one of no split.
    """
    path = PurePosixPath(image.path)
    listed = validation.get(path.name) or validation.get(path.stem)
    if listed:
        return replace(image, class_name=listed, split="val")
    if len(path.parts) < 2 or path.parts[-2] in SPLITS:
        return None
    split = next((SPLITS[part] for part in path.parts[:-2] if part in SPLITS), "train" if validation else None)
    return replace(image, class_name=path.parts[-2], split=split)


def read_list(path: Path, what: str) -> dict[str, str]:
    """The lines 'NAME REST' or 'NAME,REST' of a text file. Raises UserError for a line without REST."""
    entries = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line == "ImageId,PredictionString":  # the heading of ImageNet's list
            continue
        parts = re.split(r"[\s,]+", line.strip(), maxsplit=1)
        if len(parts) < 2:
            raise UserError(f"{path}, line {number}: expected {what}, found {line!r}")
        entries[parts[0]] = parts[1]
    return entries


def open_source(source: str, validation_list: Path | None = None) -> list[SourceImage]:
    """All images of `source`, each in a class. `validation_list`: lines 'IMAGE CLASS' that name the split val.

    Raises UserError when the source does not exist or holds no image in a class folder, or lacks a listed one.
    """
    path = Path(source)
    try:
        if source in PACKAGED:
            found = list(PACKAGED[source]())
        elif path.is_dir():
            found = list(folder_images(path))
        elif path.is_file():
            found = list(tar_images(path))
        else:
            raise UserError(f"{source}: no such folder or tar (packaged sources: {', '.join(PACKAGED)})")
    except tarfile.TarError as error:
        raise UserError(f"{source}: not a whole, uncompressed tar ({error}); unpack it and pack the folder") from None
    validation = {}
    if validation_list:
        listed = read_list(validation_list, "'IMAGE CLASS'")
        validation = {name: rest.split()[0] for name, rest in listed.items()}
    images = [placed for image in found if (placed := place(image, validation))]
    if not images:
        raise UserError(
            f"{source}: no images. Expected class folders ({source}/CLASS/IMAGE.jpg or {source}/train/CLASS/IMAGE.jpg)"
        )
    names = {name for image in images for name in (PurePosixPath(image.path).name, PurePosixPath(image.path).stem)}
    if missing := [name for name in validation if name not in names]:
        raise UserError(f"{validation_list}: {len(missing)} listed images are not in {source}, the first: {missing[0]}")
    return images
