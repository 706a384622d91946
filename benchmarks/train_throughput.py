"""Images per second and MFU of whole runs of train.loop, and their cost over a bare hand-written loop.

    python -m benchmarks.train_throughput                                # on a GPU: ViT-S/16, ViT-B/16, ResNet-50
    python -m benchmarks.train_throughput --models tiny --compile off    # on a CPU

`ours` is train.loop.run itself on shards of random pictures, decoded once and kept on the device (data.in_memory), so
that no disk and no decoder takes part. `bare` is ten plain lines around the same timm network, built without
multipliers, on one batch that lies on the device. After every metrics line, the bare loop takes its turn for as many
steps; the table shows medians of the turns. FLOPs are counted on the network (a multiply-add is 2, backward is twice
forward, no recomputation counted); MFU is FLOP/s over the device's dense peak.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.rows import describe_failure
from PIL import Image

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm

from depthmup.data.pack import pack
from depthmup.models.build import build_meta
from depthmup.models.flops import count_training_flops
from depthmup.train.config import RunConfig
from depthmup.train.loop import run
from depthmup.train.prepare import choose_autocast_dtype
from depthmup.train.reading import from_plain
from depthmup.train.step import autocast
from depthmup.train.telemetry import find_peak_flops, measure_memory

NUM_CLASSES, IMAGES_PER_CLASS, IMAGE_SIZE = 1000, 4, 224


@dataclass(frozen=True)
class Case:
    timm_name: str
    batch_size: int
    model: dict[str, Any]


def vit(width: int) -> dict[str, Any]:
    shape = {"width": width, "depth": 12, "base_width": 64, "base_depth": 6, "head_dim": 64, "patch_size": 16}
    return {"family": "vit", **shape}


RESNET50 = {"family": "resnet", "block": "bottleneck", "blocks": [3, 4, 6, 3]}
CASES = {
    "vit_s16": Case("vit_small_patch16_224", 1024, vit(384)),
    "vit_b16": Case("vit_base_patch16_224", 512, vit(768)),
    "resnet50": Case("resnet50", 512, RESNET50 | {"width": 64, "depth": 16, "base_width": 16, "base_depth": 16}),
    "tiny": Case("vit_tiny_patch16_224", 8, vit(192)),
}


def make_shards(folder: Path) -> Path:
    """Eight pictures of noise under many names."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(8):
        content = io.BytesIO()
        Image.fromarray(generator.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(content, "jpeg")
        pictures.append(content.getvalue())
    for number in range(NUM_CLASSES * IMAGES_PER_CLASS):
        path = folder / "images" / f"{number % NUM_CLASSES:04}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % 8])
    pack(str(folder / "images"), folder / "shards")
    return folder / "shards"


def configuration(case: Case, shards: Path, arguments: argparse.Namespace) -> RunConfig:
    batch_size = arguments.batch or case.batch_size
    train = {
        "samples": batch_size * arguments.steps * (1 + arguments.rounds),
        "global_batch_size": batch_size, "clip_norm": 1.0, "evaluate": [], "log_every": arguments.steps,
        "checkpoint_every": 10**6, "compile": arguments.compile, "precision": arguments.precision,
        "bf16_residual": arguments.bf16_residual,
    }  # fmt: skip
    raw = {
        "model": case.model,
        "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 1e-4},
        "data": {"name": "noise", "root": str(shards), "in_memory": True, "minival": 0, "num_streams": 8},
        "train": train,
    }
    return from_plain(RunConfig, raw, "train_throughput")


def bare_step(case: Case, config: RunConfig, device: torch.device) -> Callable[[int], None]:
    size, dtype = config.train.global_batch_size, choose_autocast_dtype(config.train, device)
    pixels = torch.randint(256, (size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    labels = torch.randint(NUM_CLASSES, (size,), device=device)
    is_vit = config.model.family == "vit"
    memory_format = torch.channels_last if device.type == "cuda" and not is_vit else torch.contiguous_format
    network = timm.create_model(case.timm_name).to(device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.05, fused=device.type == "cuda")
    if config.train.compile == "model":
        network.compile()
    elif config.train.compile == "block":
        for block in network.blocks if is_vit else [b for n in range(1, 5) for b in getattr(network, f"layer{n}")]:
            block.compile()

    def step(number: int) -> None:
        images = (pixels.float() / 255 - 0.5) / 0.5
        with autocast(device, dtype):
            loss = F.cross_entropy(network(images.contiguous(memory_format=memory_format)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_norm)
        optimizer.step()
        if number % config.train.log_every == 0:
            loss.item()

    return step


@dataclass
class Turns:
    """The `watch` of a run. Called at its metrics lines, when the device has nothing left to do, it takes the time of
    the run's steps since the last line, then lets the bare loop make as many."""

    steps: int
    device: torch.device
    bare: Callable[[int], None] | None
    ours: list[float] = field(default_factory=list)  # seconds a step
    theirs: list[float] = field(default_factory=list)
    since: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, line: dict[str, Any]) -> None:
        after_ours, warm = self.now(), line["step"] > self.steps  # the first turns compile, and search algorithms
        if warm:
            self.ours.append((after_ours - self.since) / self.steps)
        if self.bare:
            for number in range(1, self.steps + 1):
                self.bare(number)
            if warm:
                self.theirs.append((self.now() - after_ours) / self.steps)
        self.since = self.now()


def measure(name: str, case: Case, shards: Path, out: Path, arguments: argparse.Namespace, device: torch.device) -> str:
    config = configuration(case, shards, arguments)
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    flops = count_training_flops(build_meta(config.model, config.parameterization).network, shape)
    turns = Turns(arguments.steps, device, None if arguments.no_bare else bare_step(case, config, device))
    run(config, out, watch=turns)
    batch, seconds = config.train.global_batch_size, statistics.median(turns.ours)
    peak = find_peak_flops(device, choose_autocast_dtype(config.train, device))
    mfu = f"{flops * batch / seconds / peak:6.1%}" if peak else "   n/a"
    ratios = [ours / bare for ours, bare in zip(turns.ours, turns.theirs, strict=False)]
    overhead = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})" if ratios else "n/a"
    return (
        f"{name:10} {batch:6} {seconds * 1000:9.1f} {batch / seconds:10.0f} {flops / 1e9:10.2f} {mfu} "
        f"{overhead:>22} {measure_memory(device):8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_s16", "vit_b16", "resnet50"], choices=list(CASES))
    parser.add_argument("--compile", default="model", choices=["off", "block", "model"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--bf16-residual", action="store_true", help="keep a ViT's residual stream in bf16")
    parser.add_argument("--batch", type=int, help="images a step [default: per model]")
    parser.add_argument("--steps", type=int, default=20, help="a turn, with one metrics line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-bare", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, timm {timm.__version__}, {vars(arguments)}")
    print("model       batch   ms/step   images/s  GFLOP/img    MFU  ours/bare (min to max)  peak GB", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        for model in arguments.models:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                row = measure(model, CASES[model], shards, Path(folder) / model, arguments, device)
            except Exception as error:  # one network's; the others go on
                row, failed = f"{model:10} {describe_failure(error)}", True
            print(row, flush=True)
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
