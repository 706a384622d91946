"""On a GPU: the same runs as on the CPU, packs as one CUDA graph, and a host that never waits between metrics lines."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from depthmup.data.batch import Batch
from depthmup.data.config import DataConfig
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.memory import open_store
from depthmup.data.order import State
from depthmup.data.pack import pack
from depthmup.data.workers import Slots
from depthmup.train import loop
from depthmup.train.batches import open_data
from depthmup.train.config import ParallelConfig, RunConfig
from depthmup.train.distributed import World, process_group
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.packs.memory import count_bytes
from depthmup.train.packs.pack import run_pack
from train_configs import CONV_RESNET, VIT, losses, metric, pack_digits, run_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CUDA = torch.device("cuda", 0)
RESNET = {"family": "resnet", "width": 8, "depth": 4, "base_width": 8, "base_depth": 4, "norm": "batch"}
NETWORKS = {"vit": VIT, "conv_resnet": CONV_RESNET, "resnet": RESNET}
ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.002", "train.clip_norm=1")
FP32, BF16 = "train.precision=fp32", "train.precision=bf16"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("shards") / "digits")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """One process group for all runs of this file: DeepSpeed keeps the first that it sees."""
    with process_group(World(), CUDA, ParallelConfig(), "ddp"):
        yield


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 where a GPU is compared with a CPU, and always the same kernels where it is compared with itself."""

    def set_backends(device: torch.device) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True

    monkeypatch.setattr("depthmup.train.prepare.set_backends", set_backends)


def on_gpu(shards: Path, network: str, *overrides: str) -> RunConfig:
    return run_config(shards, "train.device=cuda", *overrides, model=NETWORKS[network])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_on_a_gpu_has_the_losses_of_the_cpu_from_workers_and_from_memory(
    shards: Path, tmp_path: Path, network: str
) -> None:
    loop.run(run_config(shards, *ADAMW, model=NETWORKS[network]), tmp_path / "cpu")
    for name, data in {"workers": "data.num_workers=2", "memory": "data.in_memory=true"}.items():
        loop.run(on_gpu(shards, network, *ADAMW, FP32, data), tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3), name
    assert losses(tmp_path / "workers") == losses(tmp_path / "memory")


def test_a_batch_on_a_gpu_keeps_its_pixels_when_workers_fill_its_slot_again(shards: Path) -> None:
    config = on_gpu(shards, "vit", "data.num_workers=2")

    def first_batches(num_workers: int, device: torch.device) -> list[Batch]:
        data = replace(config.data, num_workers=num_workers)
        stream = TrainingStream(data, open_data(config), State(0), 32, 8, 1)
        return list(islice(TrainingLoader(stream, device), 20))

    for got, expected in zip(first_batches(2, CUDA), first_batches(0, torch.device("cpu")), strict=True):
        assert got.images.device == CUDA
        assert torch.equal(got.images.cpu(), expected.images)
        assert torch.equal(got.labels.cpu(), expected.labels)


def photographs(folder: Path) -> Path:
    """64 pictures of smooth colours, of several sizes, and one that is no JPEG."""
    random = np.random.default_rng(0)
    for number in range(64):
        rows, columns = np.mgrid[: random.integers(100, 300), : random.integers(100, 300)] / 60
        colors = [np.sin(random.uniform(1, 4) * rows + random.uniform(1, 4) * columns) for _ in range(3)]
        path = folder / "images" / f"class{number % 2}" / f"{number}.{'png' if number == 7 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (127 + 100 * np.stack(colors, 2)).astype(np.uint8)
        Image.fromarray(pixels).save(path, **({} if number == 7 else {"quality": 90, "progressive": number % 5 == 0}))
    pack(str(folder / "images"), folder / "shards", shard_samples=17)
    return folder / "shards"


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_nvjpeg_has_the_references_samples_and_crops_and_its_pixels_to_three_levels_on_average(
    tmp_path: Path, augment: str, channels: int
) -> None:
    """On average, as nvJPEG enlarges the colours' planes in another way than libjpeg."""
    index = Index.load(str(photographs(tmp_path)))

    def batches(backend: str, num_workers: int, device: torch.device) -> list[Batch]:
        data = DataConfig(
            name="photographs", root=index.root, minival=0, num_streams=4, augment=augment, backend=backend,
            num_workers=num_workers,
        )  # fmt: skip
        stream = TrainingStream(data, index, State(0), 16, 64, channels)
        return list(islice(TrainingLoader(stream, device), 12))

    once, again = batches("nvjpeg", 2, CUDA), batches("nvjpeg", 0, CUDA)
    for got, other, expected in zip(once, again, batches("pil", 0, torch.device("cpu")), strict=True):
        assert got.images.device == CUDA
        assert torch.equal(got.images, other.images)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert (got.images.cpu().int() - expected.images.int()).abs().float().mean() < 3
    assert sum(batch.missed for batch in once[:4]) == 1


def test_a_run_that_decodes_on_the_gpu_trains_evaluates_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    overrides = ("data.backend=nvjpeg", "data.augment=resized_crop_flip", "data.num_workers=2", "data.minival=0.25")
    sizes = ("model.in_channels=3", "model.num_classes=2", "train.evaluate=[minival]", "train.evaluate_every=7")
    config = on_gpu(photographs(tmp_path), "vit", *ADAMW, *overrides, *sizes)
    loop.run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        loop.run(config, tmp_path / "stopped", interrupt=StopAfter(10))
    loop.run(config, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    assert metric(tmp_path / "whole", "decoded_by_pil")


def test_what_workers_fill_is_pinned_while_it_is_used() -> None:
    slots = Slots(3, (4, 3, 8, 8), 1)
    assert not slots.images.is_pinned()
    with slots.pinned():
        assert slots.images.is_pinned()
        assert slots.labels.is_pinned()
    assert not slots.images.is_pinned()


def test_pixels_in_memory_lie_on_the_gpu(shards: Path) -> None:
    config = on_gpu(shards, "vit", "data.in_memory=true")
    store = open_store(config.data, open_data(config), "train", 8, 1, CUDA)
    assert store.images.device == CUDA


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
@pytest.mark.parametrize("precision", [FP32, BF16])
def test_every_engine_on_a_gpu_has_the_losses_of_none(
    shards: Path, tmp_path: Path, engine: str, precision: str
) -> None:
    for network in ("vit", "conv_resnet"):
        settings = (*ADAMW, precision, "parallel.micro_batch_size=16", "train.keep_last=1")
        if not (tmp_path / "none" / network).exists():
            loop.run(on_gpu(shards, network, *settings), tmp_path / "none" / network)
        stages = (0, 1, 2, 3) if engine == "deepspeed" else (2,)
        for stage in stages:
            config = on_gpu(shards, network, *settings, f"parallel.engine={engine}", f"parallel.zero_stage={stage}")
            out = tmp_path / f"{engine}{stage}" / network
            loop.run(config, out)
            tolerance = 1e-5 if precision == FP32 else 2e-2
            assert losses(out) == pytest.approx(losses(tmp_path / "none" / network), rel=tolerance), (stage, network)


class StopAfter(Interrupt):
    """Asks to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("engine", ["none", "fsdp", "deepspeed"])
@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_a_run_stopped_on_a_gpu_and_resumed_has_the_metrics_of_one_that_never_was(
    shards: Path, tmp_path: Path, network: str, engine: str
) -> None:
    config = on_gpu(
        shards, network, *ADAMW, BF16, "train.drop_path=0.1", f"parallel.engine={engine}", "train.log_every=3"
    )
    loop.run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        loop.run(config, tmp_path / "stopped", interrupt=StopAfter(10))
    loop.run(config, tmp_path / "stopped")
    assert metric(tmp_path / "stopped", "step") == [3, 6, 9, 12, 15, 18, 20]
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp"])
@pytest.mark.parametrize("data", ["data.num_workers=2", "data.in_memory=true"])
def test_the_host_waits_for_the_gpu_at_metrics_lines_and_checkpoints_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, engine: str
) -> None:
    """torch raises where an operation waits, once the first line is written."""

    def allowed(name: str, then: int) -> None:
        method = getattr(loop.Loop, name)

        def waiting(self: loop.Loop, *arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode(0)
            result = method(self, *arguments)
            torch.cuda.set_sync_debug_mode(then)
            return result

        monkeypatch.setattr(loop.Loop, name, waiting)

    for name, then in {"write_metrics": 2, "save": 2, "finish": 0}.items():
        allowed(name, then)
    config = on_gpu(
        shards, "resnet", *ADAMW, BF16, "data.augment=crop_flip", "data.mixup=0.2", "train.label_smoothing=0.1",
        "train.ema=0.9", "train.drop_path=0.1", "train.log_every=5", "train.checkpoint_every=7",
        "parallel.micro_batch_size=16", data, f"parallel.engine={engine}",
    )  # fmt: skip
    try:
        assert loop.run(config, tmp_path / "run")["outcome"] == "completed"
    finally:
        torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_blocks_and_networks_have_the_losses_of_eager_ones(shards: Path, tmp_path: Path, network: str) -> None:
    for mode in ("off", "block", "model"):
        loop.run(on_gpu(shards, network, *ADAMW, FP32, f"train.compile={mode}"), tmp_path / mode)
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "off"), rel=1e-3), mode


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_pack_on_a_gpu_has_the_losses_of_its_runs_alone_and_goes_on_after_a_stop(
    shards: Path, tmp_path: Path, network: str, optimizer: str
) -> None:
    rates = (0.001, 0.002, 1e37)  # the last diverges
    settings = (f"optimizer.name={optimizer}", FP32, "data.in_memory=true", "train.clip_norm=1")
    configs = [on_gpu(shards, network, *settings, f"optimizer.lr={rate}") for rate in rates]
    alone = [tmp_path / f"alone-{number}" for number in range(3)]
    packed = [tmp_path / f"packed-{number}" for number in range(3)]
    found = [loop.run(config, path)["outcome"] for config, path in zip(configs, alone, strict=True)]
    with pytest.raises(Interrupted):
        run_pack(configs, packed, StopAfter(12))
    assert [done["outcome"] for done in run_pack(configs, packed)] == found == ["completed"] * 2 + ["diverged"]
    for one, other in zip(alone[:2], packed[:2], strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-3)


def test_memory_of_a_pack_is_what_the_gpus_allocator_counts(shards: Path) -> None:
    for network in NETWORKS:
        config = on_gpu(shards, network, *ADAMW, BF16, "data.in_memory=true")
        count_bytes(config, 4, CUDA)  # libraries take their workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        counted = count_bytes(config, 4, CUDA)
        taken = torch.cuda.max_memory_allocated() - before
        assert counted == pytest.approx(taken, rel=0.15), network
