"""Images per second and MFU of the training step, and its cost over a bare hand-written loop.

    python benchmarks/train_throughput.py                       # on a GPU: ViT-S/16, ViT-B/16, ResNet-50
    python benchmarks/train_throughput.py --models tiny --compile off      # on a CPU

Images are synthetic uint8 pixels that lie on the device already, so no loader takes part: figures for the step alone.
`ours` is what train.loop does for each step: learning rate, normalisation, micro-batches, backward, clipping,
optimizer, loss window, read every 10 steps. `bare` is ten plain lines around the same timm network, built without
multipliers. Both alternate in rounds; the table shows medians. FLOPs are counted on the network (a multiply-add is 2,
backward is twice forward, no recomputation counted); MFU is FLOP/s over the device's dense peak.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm

from models.build import build
from models.config import OptimizerConfig, ParameterizationConfig, VisionTransformerConfig
from models.flops import training_flops
from models.optimizer import build_optimizer, parameter_groups
from train.config import ScheduleConfig, TrainConfig
from train.engine import Engine
from train.schedule import schedule, set_learning_rate
from train.step import autocast, autocast_dtype, prepare, set_backends, take_step
from train.telemetry import LossWindow, memory_gb, peak_flops

LOG_EVERY = 10
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-4, weight_decay=1e-4)


@dataclass(frozen=True)
class Case:
    timm_name: str
    batch_size: int
    vit: VisionTransformerConfig | None  # our own network; None: timm's, with one group
    image_size: int = 224


def vit(width: int, depth: int, image_size: int = 224, num_classes: int = 1000) -> VisionTransformerConfig:
    return VisionTransformerConfig(
        width=width,
        depth=depth,
        base_width=64,
        base_depth=depth // 2,
        head_dim=64,
        patch_size=16,
        image_size=image_size,
        num_classes=num_classes,
    )


CASES = {
    "vit_s16": Case("vit_small_patch16_224", 1024, vit(384, 12)),
    "vit_b16": Case("vit_base_patch16_224", 512, vit(768, 12)),
    "resnet50": Case("resnet50", 512, None),
    "tiny": Case("vit_tiny_patch16_224", 8, vit(192, 12)),
}


def normalise(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as data.batch does it."""
    return (pixels.float() / 255 - 0.5) / 0.5


def our_network(case: Case, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    if case.vit:
        scaled = build(case.vit, ParameterizationConfig(name="depth_mup"), seed=0, device=device)
        groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, OPTIMIZER)
        return scaled.network, build_optimizer(groups, OPTIMIZER)
    network = timm.create_model(case.timm_name).to(device)
    settings = {"name": "all", "lr": OPTIMIZER.lr, "lr_mult": 1.0, "weight_decay": 0.05, "eps": 1e-8}
    return network, build_optimizer([{"params": list(network.parameters()), **settings}], OPTIMIZER)


def our_step(case: Case, config: TrainConfig, pixels: Tensor, labels: Tensor) -> Callable[[int], None]:
    """A function of the step number that does what train.loop does for one step."""
    device = pixels.device
    network, optimizer = our_network(case, device)
    dtype = autocast_dtype(config, device)
    blocks = [name for name, m in network.named_modules() if name.startswith("blocks.") and name.count(".") == 1]
    blocks = blocks or [name for name, m in network.named_modules() if type(m).__name__ == "Bottleneck"]
    channels_last = prepare(network, blocks, config, "none", device, dtype)
    engine, window, peak_lr = Engine(network, lambda _: optimizer), LossWindow([]), ScheduleConfig()

    def step(number: int) -> None:
        images = normalise(pixels)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        set_learning_rate(optimizer, OPTIMIZER.lr, schedule(peak_lr, number, 10**6))
        result = take_step(engine, images, labels, autocast_dtype=dtype, clip_norm=config.clip_norm)
        window.pending.append(result.loss)
        if number % LOG_EVERY == 0:
            window.drain(number)

    return step


def bare_step(case: Case, config: TrainConfig, pixels: Tensor, labels: Tensor) -> Callable[[int], None]:
    device = pixels.device
    dtype = autocast_dtype(config, device)
    network = timm.create_model(case.timm_name, img_size=case.image_size) if case.vit else timm.create_model("resnet50")
    network = network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.05, fused=device.type == "cuda")
    channels_last = device.type == "cuda" and not case.vit
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    if config.compile == "model":
        network.compile()
    elif config.compile == "block":
        for block in network.blocks if case.vit else [b for n in range(1, 5) for b in getattr(network, f"layer{n}")]:
            block.compile()

    def step(number: int) -> None:
        images = normalise(pixels)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or 1.0)
        optimizer.step()
        if number % LOG_EVERY == 0:
            loss.item()

    return step


def seconds(step: Callable[[int], None], first: int, count: int, device: torch.device) -> float:
    """Seconds per step over `count` steps, the device idle at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(first, first + count):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def measure(name: str, case: Case, arguments: argparse.Namespace, device: torch.device) -> str:
    config = TrainConfig(
        samples=10**9, global_batch_size=case.batch_size, compile=arguments.compile, clip_norm=1.0,
        precision=arguments.precision, bf16_residual=arguments.bf16_residual,
    )  # fmt: skip
    batch = arguments.batch or case.batch_size
    pixels = torch.randint(256, (batch, 3, case.image_size, case.image_size), dtype=torch.uint8, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    with torch.device("meta"):
        flops = training_flops(timm.create_model(case.timm_name), (3, case.image_size, case.image_size))
    steps = {"ours": our_step(case, config, pixels, labels)}
    if not arguments.no_bare:
        steps["bare"] = bare_step(case, config, pixels, labels)
    for step in steps.values():
        seconds(step, 1, arguments.warmup, device)  # compilation, cudnn's search
    times: dict[str, list[float]] = {key: [] for key in steps}
    for round_number in range(arguments.rounds):
        order = list(steps) if round_number % 2 else list(reversed(steps))
        for key in order:
            times[key].append(seconds(steps[key], 1, arguments.steps, device))
    median = {key: statistics.median(values) for key, values in times.items()}
    peak = peak_flops(device, autocast_dtype(config, device))
    mfu = f"{flops * batch / median['ours'] / peak:6.1%}" if peak else "   n/a"
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times.get("bare", times["ours"]), strict=True))
    overhead = "   n/a" if arguments.no_bare else f"{ratio:6.3f}"
    return (
        f"{name:10} {batch:6} {median['ours'] * 1000:9.1f} {batch / median['ours']:10.0f} {flops / 1e9:10.2f} {mfu} "
        f"{overhead:>10} {memory_gb(device):8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_s16", "vit_b16", "resnet50"], choices=list(CASES))
    parser.add_argument("--compile", default="model", choices=["off", "block", "model"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--bf16-residual", action="store_true", help="keep a ViT's residual stream in bf16")
    parser.add_argument("--batch", type=int, help="images a step [default: per model]")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-bare", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_backends(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, timm {timm.__version__}, {vars(arguments)}")
    print("model       batch   ms/step   images/s  GFLOP/img    MFU  ours/bare  peak GB", flush=True)
    for model in arguments.models:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        print(measure(model, CASES[model], arguments, device), flush=True)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
