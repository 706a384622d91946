"""Packed replicas against one run alone: images x replicas per second, and memory.

    python -m benchmarks.packed              # from the root of the repository; under six minutes on a GPU
    python -m benchmarks.packed --quick      # 8 pixels (--image-size) only; what a CPU can do

Needs torch, timm, pydantic and PyYAML. The images are random and lie on the device, so that only the steps are timed:
`alone` is the step of train.loop, `packed` that of train.packs.replicas, timed in turns; each figure is a median.
--after leaves out what a file of an earlier call has figures of.
Memory is the peak of allocated tensors while a run or a pack is built and takes its first steps.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.rows import BEGUN, describe_failure, find_unmeasured
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from depthmup.data.config import DataConfig
from depthmup.data.mixing import mix, mixes
from depthmup.models.build import build
from depthmup.models.config import (
    ConvResNetConfig,
    MixtureVitConfig,
    ModelConfig,
    ProbabilisticConfig,
    ResNetConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, TrainConfig
from depthmup.train.packs.batched import CONVOLUTIONS
from depthmup.train.packs.replicas import Replicas
from depthmup.train.schedule import schedule, set_learning_rate

BATCH, NUM_STEPS, ROUNDS = 64, 1000, 3
Step = Callable[[], Tensor]


FAMILIES: dict[str, tuple[type[ModelConfig], dict[str, Any]]] = {
    "vit": (VisionTransformerConfig, {"head_dim": 16, "patch_size": 4}),
    "conv_resnet": (ConvResNetConfig, {}),
    "conv_resnet_bn": (ConvResNetConfig, {"norm": "batch", "convs_per_branch": 2}),
    "resnet": (ResNetConfig, {"depth": 8, "base_depth": 4}),
    "convnext": (
        TimmConfig,
        {"timm_name": "convnext_atto", "depth": 3, "base_depth": 1},
    ),
    "probabilistic": (ProbabilisticConfig, {"channels": 8}),
    "moe_vit, dense": (MixtureVitConfig, {"head_dim": 16, "patch_size": 4}),
}
SGD = ("conv_resnet", "conv_resnet_bn", "resnet")  # the others have AdamW


def config(family: str, width: int, image_size: int, lr: float, seed: int = 0, mixup: float | None = None) -> RunConfig:
    kind, options = FAMILIES[family]
    size = {"width": width, "depth": 6, "base_width": 32, "base_depth": 3, "num_classes": 10, "image_size": image_size}
    if family == "convnext":
        options = options | {"arguments": {"patch_size": max(image_size // 16, 1)}}
    model: Any = kind(**(size | options))
    rules = ParameterizationConfig(
        name="mup" if family == "probabilistic" else "depth_mup"
    )  # the former has no branches
    optimizer = OptimizerConfig(name="sgd" if family in SGD else "adamw", lr=lr, weight_decay=1e-4)
    train = TrainConfig(samples=BATCH * NUM_STEPS, global_batch_size=BATCH)
    data = DataConfig(name="none", root=".", num_streams=1, mixup=mixup)
    return RunConfig(model=model, optimizer=optimizer, data=data, train=train, parameterization=rules, seed=seed)


def rates(first: RunConfig, num_replicas: int) -> list[RunConfig]:
    return [
        replace(first, optimizer=replace(first.optimizer, lr=first.optimizer.lr * 2 ** (-k / 4)))
        for k in range(num_replicas)
    ]


def batches(run: RunConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight batches on the device, over and over: uint8 pixels to float, and mixed, as train.loop does it."""
    generator = torch.Generator().manual_seed(run.seed)
    model = run.model
    batch = run.train.global_batch_size
    shape = (batch, model.in_channels, model.image_size, model.image_size)
    pixels = [torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(8)]
    labels = [torch.randint(model.num_classes, (batch,), generator=generator).to(device) for _ in range(8)]
    for step in count():
        images, classes = (pixels[step % 8].float() / 255 - 0.5) / 0.5, labels[step % 8]
        yield (
            mix(images, classes, run.data, model.num_classes, run.seed, step) if mixes(run.data) else (images, classes)
        )


def alone(run: RunConfig, device: torch.device, dtype: torch.dtype | None) -> Step:
    """The step of train.loop, one replica."""
    scaled = build(run.model, run.parameterization, run.seed, device)
    memory = torch.contiguous_format
    if device.type == "cuda" and run.model.family != "vit":
        memory = torch.channels_last
        scaled.network.to(memory_format=memory)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, run.optimizer)
    optimizer = build_optimizer(groups, run.optimizer)
    stream = batches(run, device)
    done = 0

    def step() -> Tensor:
        nonlocal done
        images, labels = next(stream)
        set_learning_rate(optimizer, run.optimizer.lr, schedule(run.schedule, done, run.train.num_steps))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(scaled.network(images.contiguous(memory_format=memory)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        return loss.detach()[None]

    return step


def packed(runs: list[RunConfig], device: torch.device, dtype: torch.dtype | None, variant: str = "default") -> Step:
    """The step of train.packs.replicas; `variant`: default, eager (no CUDA graph), vmap (torch's own batching rules),
    compiled, or one of the ways to convolve."""
    replicas = Replicas(runs, device, dtype, variant if variant in CONVOLUTIONS else None)
    if variant == "eager":
        replicas.graph = None
    if variant in ("vmap", "compiled"):
        replicas.mode = nullcontext()  # no mode at all
    if variant == "compiled":
        replicas.forward = torch.compile(replicas.forward)
        replicas.update = torch.compile(replicas.update)
    stream = batches(runs[0], device)

    def step() -> Tensor:
        images, labels = next(stream)
        return replicas.step(images[None], labels[None])

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepare(make: Callable[[], Step], device: torch.device) -> tuple[Step, int]:
    """The step after its warm-up, and the peak of memory that building and warming it took, in bytes."""

    def warm(count: int) -> Step:
        step = make()
        for _ in range(count):
            step()
        synchronize(device)
        return step

    gc.collect()  # the last row's replicas, which would be freed while this row's memory is counted
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = warm(2)
        return step, allocation_peak(profiler)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = warm(8)
    return step, torch.cuda.max_memory_allocated() - before


def allocation_peak(profiler: profile) -> int:
    """Most bytes that were allocated on the CPU at once: the profiler has them in its trace file only."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate(change for _, change in changes))


def seconds_per_step(steps: list[Step], device: torch.device, count: int) -> list[float]:
    """Median over rounds in which the steps take turns."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, mine in zip(steps, times, strict=True):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            mine.append((time.perf_counter() - started) / count)
    return [statistics.median(mine) for mine in times]


def label_of(first: RunConfig, family: str, num_replicas: int, variant: str, dtype: torch.dtype | None) -> str:
    model = first.model
    name = f"{family} {model.image_size}px {'bf16' if dtype else 'fp32'}{' mixup' if mixes(first.data) else ''}"
    return f"{name:32} {model.width:>5} {num_replicas:>3} {variant:12}"


def measure(
    first: RunConfig, num_replicas: int, device: torch.device, count: int, variant: str, dtype: torch.dtype | None
) -> str:
    """The figures of one line of the table."""
    runs = rates(first, num_replicas)
    one, one_bytes = prepare(lambda: alone(first, device, dtype), device)
    many, many_bytes = prepare(lambda: packed(runs, device, dtype, variant), device)
    one_seconds, many_seconds = seconds_per_step([one, many], device, count)
    batch = first.train.global_batch_size
    alone_rate, packed_rate = batch / one_seconds, batch * num_replicas / many_seconds
    memory = f"{many_bytes / one_bytes:7.2f} = {many_bytes / one_bytes / num_replicas:.2f} K"
    return f"{alone_rate:>12,.0f} {packed_rate:>12,.0f} {packed_rate / alone_rate:>7.2f} {memory}"


def disagreement(first: RunConfig, device: torch.device, variant: str, steps: int) -> float:
    """Largest relative difference between the last losses, packed and alone, in full fp32."""
    runs = rates(first, 3)
    together = packed(runs, device, None, variant)
    single = [alone(run, device, None) for run in runs]
    for _ in range(steps):
        losses = together()
        expected = torch.cat([step() for step in single])
    return float(((losses - expected).abs() / expected.abs()).max())


def plan(
    quick: bool, quick_widths: list[int], quick_size: int
) -> Iterator[tuple[str, RunConfig, int, str, torch.dtype | None]]:
    """(family, first replica, K, variant, autocast type), what matters most first."""
    bf16 = torch.bfloat16
    vit, small, large = ("vit", 32, 1e-3), ("conv_resnet", 8, 0.05), ("conv_resnet", 32, 0.05)
    others = [(family, 32, 0.05 if family in SGD else 1e-3) for family in FAMILIES]

    def of(case: tuple[str, int, float], width: int, num_replicas: int, variant: str, dtype: Any, **more: Any) -> Any:
        family, image_size, lr = case
        return family, config(family, width, image_size, lr, **more), num_replicas, variant, dtype

    if quick:
        for width in quick_widths:
            for num_replicas in (8, 16):
                for family, lr in (("vit", 1e-3), ("conv_resnet", 0.05)):
                    yield of((family, quick_size, lr), width, num_replicas, "default", None)
            for family, _, lr in others[2:]:
                yield of((family, quick_size, lr), max(width, 32), 4, "default", None)
            yield of(("vit", quick_size, 1e-3), width, 4, "default", None, mixup=0.2)
        return
    for case in others:
        for width in (64, 256):
            yield of(case, width, 16, "default", bf16)
    for case in (vit, large):
        for width in (64, 256):
            yield of(case, width, 16, "default", bf16, mixup=0.2)
    for case in (large, small):
        for width in (64, 128):
            for variant in CONVOLUTIONS:
                yield of(case, width, 8, variant, bf16)
    for case in (vit, small, large):
        for width in (32, 64, 128, 256):
            for num_replicas in (8, 16):
                yield of(case, width, num_replicas, "default", bf16)
    for case in (vit, small, large):
        for width in (32, 64, 128):
            yield of(case, width, 8, "default", None)
    for case in (vit, small, large):
        for variant in ("eager", "vmap"):
            yield of(case, 64, 8, variant, bf16)
    for case in (vit, large):
        yield of(case, 64, 8, "compiled", bf16)
    for variant in CONVOLUTIONS:
        for num_replicas in (8, 16):
            yield of(large, 32, num_replicas, variant, None)


def print_disagreements(device: torch.device, steps: int) -> None:
    print("largest relative difference of the losses, packed against alone, in fp32 (TF32 off)")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for family, image_size, lr in (("vit", 32, 1e-3), ("conv_resnet", 8, 0.05)):
        for variant in ("default",) if family == "vit" else CONVOLUTIONS:
            try:
                found = f"{disagreement(config(family, 32, image_size, lr), device, variant, steps):.1e}"
            except Exception as error:
                found = describe_failure(error)
            print(f"  {family:12} {variant:9} {found}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fp32, no comparison of ways")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="with --quick")
    parser.add_argument("--image-size", type=int, default=8, help="pixels, with --quick")
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step and replica")
    parser.add_argument("--seconds", type=float, default=330, help="start no further row after this many seconds")
    parser.add_argument("--after", type=Path, help="what earlier calls printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    started = time.monotonic()
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {what}, torch {torch.__version__}, depth 6, batch {arguments.batch}", flush=True)
    rows = {
        label_of(first, family, *others): (first, *others)
        for family, first, *others in plan(arguments.quick, arguments.widths, arguments.image_size)
    }
    left = find_unmeasured(list(rows), arguments.after)
    if len(left) == len(rows):
        print_disagreements(device, 10 if arguments.quick else 50)
    torch.backends.cudnn.benchmark = True

    print(f"{'network':32} {'width':>5} {'K':>3} {'variant':12} {'alone':>12} {'packed':>12} {'ratio':>7} memory")
    failed = False
    for label in left:
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s; rows above are complete")
            break
        first, num_replicas, variant, dtype = rows[label]
        first = replace(first, train=replace(first.train, global_batch_size=arguments.batch))
        if arguments.after:
            print(label, BEGUN, flush=True)
        try:
            found = measure(first, num_replicas, device, 3 if device.type == "cpu" else 30, variant, dtype)
        except Exception as error:  # the table says what works where
            found, failed = describe_failure(error), True
        print(label, found, flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
