"""Small data sets of generated images, packed into real shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from depthmup.data.config import DataConfig
from depthmup.data.index import Index
from depthmup.data.pack import pack


def make_folder(
    root: Path, samples: int, classes: int = 3, size: tuple[int, int] | None = (8, 8), suffix: str = "png"
) -> Path:
    """ImageFolder tree of noise pictures; `size` (width, height), or None for a different one for each image."""
    random = np.random.default_rng(0)
    for number in range(samples):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = size or (int(random.integers(12, 40)), int(random.integers(12, 40)))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.{suffix}")
    return root


def make_shards(root: Path, samples: int, shard_samples: int = 17, **options) -> Index:
    """Shards in `root`/shards of a folder from make_folder."""
    return pack(str(make_folder(root / "images", samples, **options)), root / "shards", shard_samples=shard_samples)[0]


def config(index: Index, **options) -> DataConfig:
    return DataConfig(name="generated", root=str(index.root), **options)


def write_tar(path: Path, samples: list[tuple[str, bytes, bytes | None]]) -> None:
    """Each sample: name of the image member, its bytes, the content of .cls or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, image, label in samples:
            for member, content in ((name, image), (name.partition(".")[0] + ".cls", label)):
                if content is not None:
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
