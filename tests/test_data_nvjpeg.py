"""data.backend nvjpeg: the samples, crops and flips of the others, decoded elsewhere. A CPU stands in for the GPU."""

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from depthmup.models import torchvision_ops  # noqa: F401  isort: skip  (mends the import of torchvision)
import torchvision.io  # type: ignore[import-untyped]

from depthmup.data import nvjpeg
from depthmup.data.bad import BadCount
from depthmup.data.batch import Batch
from depthmup.data.config import DataConfig
from depthmup.data.decode import from_array
from depthmup.data.errors import UserError
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream, iterate_evaluation_batches
from depthmup.data.nvjpeg import check_decoder, decode_files
from depthmup.data.order import State
from depthmup.data.scan import index_shards
from depthmup.train.config import run_hash
from image_sets import config, write_tar
from train_configs import run_config

LEVELS = 3  # of 255: most that a pixel may differ from the reference's, whose resize rounds twice
CPU = torch.device("cpu")


def photograph(number: int, mode: str = "RGB") -> Image.Image:
    """Colours that change smoothly, and some noise: another size and another look for each number."""
    random = np.random.default_rng(number)
    height, width = random.integers(24, 60, 2)
    rows, columns = np.mgrid[:height, :width] / 60
    colors = [np.sin(random.uniform(2, 9) * rows + random.uniform(2, 9) * columns) for _ in range(3)]
    pixels = 120 + 90 * np.stack(colors, 2) + random.normal(0, 5, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "jpeg", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


OTHERS = {  # what is left to PIL
    "picture.png": encode(photograph(100), "png"),
    "grey.jpg": encode(photograph(101, "L")),
    "print.jpg": encode(photograph(102, "CMYK")),
    "kept.jpg": encode(photograph(103), keep_rgb=True),
    "large.jpg": encode(photograph(104)) + bytes(nvjpeg.FILE_BYTES),
}
CUT = encode(photograph(200))[:-40]
BROKEN = encode(photograph(201)).replace(b"\xff\xdb", b"\xff\xfe")  # a header and an end, and no quantisation


def make_index(folder: Path, others: dict[str, bytes]) -> Index:
    """64 samples in three shards: these `others`, and photographs, some of them progressive."""
    photographs = {
        f"{number:03}.jpg": encode(photograph(number), quality=90, progressive=number % 5 == 0)
        for number in range(64 - len(others))
    }
    samples = [(name, content, b"%d" % (len(content) % 2)) for name, content in (others | photographs).items()]
    for number in range(3):
        write_tar(folder / f"train-{number}.tar", samples[number::3])
    return index_shards(str(folder), classes=["a", "b"], processes=1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("photographs"), OTHERS)


def settings(index: Index, **options: object) -> DataConfig:
    return config(index, **{"minival": 0, "num_streams": 8, "window": 6, "backend": "nvjpeg"} | options)


def served(
    options: DataConfig, index: Index, state: State | None = None, channels: int = 3, **rank: int
) -> Iterator[Batch]:
    state = state or State(3)
    return iter(TrainingLoader(TrainingStream(options, index, state, 16, 20, channels, **rank), CPU))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_batches_are_the_references_to_a_few_levels_with_all_kinds_of_images(
    photographs: Index, augment: str, channels: int
) -> None:
    options = settings(photographs, augment=augment)
    reference = served(replace(options, backend="pil"), photographs, channels=channels)
    for got, expected in islice(zip(served(options, photographs, channels=channels), reference, strict=True), 6):
        assert torch.equal(got.labels, expected.labels)
        assert got.images.dtype == torch.uint8
        different = (got.images.int() - expected.images.int()).abs()
        assert different.max() <= LEVELS
        assert different.float().mean() < 0.3


def test_batches_are_bit_identical_for_worlds_and_workers_and_after_a_resume(photographs: Index) -> None:
    options = settings(photographs, augment="resized_crop_flip")
    loader = TrainingLoader(TrainingStream(options, photographs, State(3), 16, 20, 3), CPU)
    expected, states = [], []
    for batch in islice(loader, 7):  # 4 steps an epoch
        expected.append(batch)
        states.append(loader.state)
    for world_size, num_workers in [(1, 3), (2, 2), (4, 0), (8, 3)]:
        ranks = [
            served(replace(options, num_workers=num_workers), photographs, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for whole, parts in zip(expected, zip(*ranks, strict=True), strict=False):
            of_streams = torch.stack([part.images.unflatten(0, (-1, 2)) for part in parts], dim=1).flatten(0, 2)
            assert torch.equal(of_streams, whole.images)
    for done in (1, 4, 5):
        for got, whole in zip(served(options, photographs, states[done - 1]), expected[done:], strict=False):
            assert torch.equal(got.images, whole.images)


def test_what_is_left_to_pil_is_counted_each_time_and_over_all_processes(photographs: Index) -> None:
    options = settings(photographs)
    loader = TrainingLoader(TrainingStream(options, photographs, State(3), 16, 20, 3), CPU)
    missed = sum(batch.missed for batch in islice(loader, 4))  # an epoch, of all 64 samples
    assert missed == loader.bad.missed == len(OTHERS)
    both = BadCount(0.1, 64).merge_ranks([loader.bad, loader.bad])
    assert both.metrics() == {"bad_samples": 0, "decoded_by_pil": 2 * len(OTHERS)}
    fast = TrainingLoader(TrainingStream(replace(options, backend="fast"), photographs, State(3), 16, 20, 3), CPU)
    next(iter(fast))
    assert fast.bad.metrics() == {"bad_samples": 0}


def test_an_evaluation_has_the_references_pixels_to_a_few_levels_on_any_world_size(photographs: Index) -> None:
    options = settings(photographs, minival=0.3)
    whole = torch.cat([b.images for b in iterate_evaluation_batches(options, photographs, "minival", 7, 20, 3)])
    reference = iterate_evaluation_batches(replace(options, backend="pil"), photographs, "minival", 7, 20, 3)
    assert (whole.int() - torch.cat([b.images for b in reference]).int()).abs().max() <= LEVELS
    workers = replace(options, num_workers=2)
    parts = [
        b.images for r in range(3) for b in iterate_evaluation_batches(workers, photographs, "minival", 4, 20, 3, r, 3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_file_that_is_cut_has_the_stand_in_that_it_has_with_the_reference(tmp_path: Path) -> None:
    index = make_index(tmp_path, {"cut.jpg": CUT})
    options = settings(index, max_bad_fraction=0.1)
    reference = served(replace(options, backend="pil"), index)
    found = []
    for got, expected in islice(zip(served(options, index), reference, strict=True), 4):  # an epoch
        assert [str(bad) for bad in got.bad] == [str(bad) for bad in expected.bad]
        assert torch.equal(got.labels, expected.labels)
        assert (got.images.int() - expected.images.int()).abs().max() <= LEVELS
        found += [bad.key for bad in got.bad]
    assert found == ["cut.jpg"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_only_decoding_shows_to_be_bad_is_black_and_counted_and_not_evaluated(
    tmp_path: Path, num_workers: int
) -> None:
    index = make_index(tmp_path, {"broken.jpg": BROKEN})
    options = settings(index, max_bad_fraction=0.1, num_workers=num_workers)
    batches = list(islice(served(options, index), 4))  # an epoch
    assert [int((batch.images == 0).flatten(1).all(1).sum()) for batch in batches] == [len(b.bad) for b in batches]
    assert [bad.key for batch in batches for bad in batch.bad] == ["broken.jpg"]
    evaluated = list(iterate_evaluation_batches(options, index, "train", 7, 20, 3))
    assert sum(len(batch.images) for batch in evaluated) == sum(len(batch.labels) for batch in evaluated) == 63
    assert [(bad.key, bad.reason) for batch in evaluated for bad in batch.bad] == [
        ("broken.jpg", "not a readable image (OSError)")
    ]
    with pytest.raises(UserError, match=r"1 of 64 samples are bad.*x not a readable image"):
        list(iterate_evaluation_batches(replace(options, max_bad_fraction=0.0), index, "train", 7, 20, 3))


def test_one_file_that_the_device_refuses_costs_no_other_its_picture() -> None:
    contents = [encode(photograph(number)) for number in range(9)]
    contents[4] = BROKEN
    files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    pictures = decode_files(files, 3, CPU)
    assert [number for number, picture in enumerate(pictures) if picture is None] == [4]
    assert pictures[8] is not None
    assert torch.equal(pictures[8], decode_files(files[8:], 3, CPU)[0])  # type: ignore[arg-type]


def test_a_picture_lies_as_in_its_file_also_where_the_decoder_would_turn_it_upright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    index = make_index(tmp_path, {"turned.jpg": encode(photograph(103), exif=turned)})

    def decode_upright(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor | None]:
        opened = [Image.open(io.BytesIO(file.numpy().tobytes())) for file in files]
        return [from_array(np.array(ImageOps.exif_transpose(image))) for image in opened]

    monkeypatch.setattr(nvjpeg, "decode_files", decode_upright)
    whole = list(iterate_evaluation_batches(settings(index), index, "train", 64, 20, 3))
    reference = iterate_evaluation_batches(settings(index, backend="pil"), index, "train", 64, 20, 3)
    for got, expected in zip(whole, reference, strict=True):
        assert (got.images.int() - expected.images.int()).abs().max() <= LEVELS


def test_torchcodec_decodes_where_it_is_installed_and_torchvision_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    def decode_jpeg(files: list[Tensor], *, mode: str, device: torch.device) -> list[Tensor]:
        said.append((mode, device.type))
        return files

    stand_in = SimpleNamespace(decode_jpeg=decode_jpeg)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace(decoders=stand_in))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", stand_in)
    for channels in (1, 3):
        nvjpeg.find_decoder.cache_clear()
        assert len(nvjpeg.decode_by_nvjpeg([torch.zeros(3)], channels, torch.device("cuda"))) == 1
    assert said == [("GRAY", "cuda"), ("RGB", "cuda")]

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    nvjpeg.find_decoder.cache_clear()
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda files, mode, device: said.append(mode) or files)
    nvjpeg.decode_by_nvjpeg([torch.zeros(3)], 3, torch.device("cuda"))
    assert said[2:] == [torchvision.io.ImageReadMode.RGB]
    nvjpeg.find_decoder.cache_clear()


def test_without_a_gpu_or_without_nvjpeg_a_run_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"decodes on a GPU, and this run is on the CPU: use data.backend=fast"
    ) as refused:
        check_decoder(CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_a_torchvision_without_nvjpeg_is_named() -> None:
    import depthmup.models.torchvision_ops  # noqa: F401

    with pytest.raises(
        UserError, match=r"needs a torchcodec or torchvision with nvJPEG, .* install .depthmup\[nvjpeg\]., or use "
    ) as no:
        check_decoder(torch.device("cuda"))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("option", ["rand_augment=rand-m9", "color_jitter=0.4", "in_memory=true"])
def test_what_needs_pixels_on_the_cpu_is_refused_beside_it(option: str) -> None:
    with pytest.raises(UserError, match=rf"nvjpeg does not go with {option.partition('=')[0]}.*use data.backend=fast"):
        run_config("nowhere", "data.backend=nvjpeg", f"data.{option}")


def test_its_pixels_are_its_own_and_so_is_the_runs_name() -> None:
    names = {run_hash(run_config("nowhere", f"data.backend={backend}")) for backend in ("fast", "pil", "nvjpeg")}
    assert len(names) == 3
