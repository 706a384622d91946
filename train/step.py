"""One optimizer step, and how a network is made ready for it: precision, memory format, recomputation, compilation."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from depthmup.data.errors import UserError
from depthmup.train.batch_norm import BatchStatistics
from depthmup.train.config import TrainConfig
from depthmup.train.engine import Engine
from depthmup.train.stochastic_depth import Draws

# Blocks of one class share torch's cache of compiled code. A ResNet-50 has 8 kinds of block, times training and
# evaluation; past the limit, whose default is 8, torch runs the others uncompiled.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class StepResult:
    """Of this process's share, still on the device."""

    loss: Tensor  # mean, ()
    grad_norm: Tensor | None  # of all processes, before clipping; None without clipping
    logits: Tensor  # of the last micro-batch, (images, classes)


def take_step(
    engine: Engine,
    images: Tensor,
    targets: Tensor,
    *,
    micro_batches: int = 1,
    statistics: BatchStatistics | None = None,
    draws: Draws | None = None,
    autocast_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
) -> StepResult:
    """One step on this process's share of a global batch; never waits for the device.

    images: (batch, channels, size, size) float; targets: (batch,) classes or (batch, classes) probabilities;
    statistics: BatchNorm's, where they are installed; draws: those of this step for stochastic depth.
    """
    engine.zero_grad()
    total = torch.zeros((), device=images.device)
    parts = zip(images.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
    for number, (micro_images, micro_targets) in enumerate(parts, start=1):
        engine.start_micro_batch(last=number == micro_batches)
        if draws:
            draws.start_micro_batch(number - 1, micro_batches)
        with autocast(images.device, autocast_dtype):
            logits = engine.module(micro_images)  # (micro batch, classes)
            loss = F.cross_entropy(logits.float(), micro_targets, label_smoothing=label_smoothing) / micro_batches
        engine.backward(loss)
        if statistics:
            statistics.move(number - 1, micro_batches)
        total += loss.detach()
    norm = engine.step(clip_norm)
    return StepResult(total, norm, logits.detach())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None for float32. Raises UserError when the device lacks train.precision."""
    on_gpu, wanted = device.type == "cuda", config.precision
    has_it = wanted == "fp32" or (wanted == "bf16" and not on_gpu)
    if on_gpu and wanted != "fp32":  # the first generation that has bf16 is that which has TF32
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    if not has_it:
        name = torch.cuda.get_device_name(device) if on_gpu else "a CPU"
        raise UserError(f"train.precision is {wanted}, which {name} lacks: use fp32")
    return torch.bfloat16 if wanted == "bf16" else None


def set_tf32(config: TrainConfig) -> None:
    """GPUs round the factors of float32 products to TF32 where train.precision says so, and nowhere else."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"


def set_backends(device: torch.device) -> None:
    """cudnn tries its algorithms once for each shape. CPU runs are untouched."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def set_stream_type(network: nn.Module, first_block: str, branches: Iterable[str], dtype: torch.dtype) -> None:
    """Keeps the residual stream in `dtype` under autocast, whose convolutions and products return bf16: what enters the
    first block and what every branch adds is cast to it, before its multiplier. `branches`: names of their ends."""

    def cast_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(dtype), *inputs[1:])

    def cast_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(dtype)

    network.get_submodule(first_block).register_forward_pre_hook(cast_input)
    for name in branches:
        network.get_submodule(name).register_forward_hook(cast_output, prepend=True)


def is_convolutional(network: nn.Module) -> bool:
    """More convs than linear layers: a ResNet, but not a ViT with its one patch embedding."""
    convs = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    return convs > sum(isinstance(module, nn.Linear) for module in network.modules())


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward`, recomputed in the backward pass. A function of ours, since torch.compile skips a bare `checkpoint`."""

    def recomputing(*inputs: Tensor) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputing


def cuts_patches(module: nn.Module) -> bool:
    """Whether it is a ViT's patch embedding: a conv of patches that neither overlap nor leave gaps."""
    plain = isinstance(module, nn.Conv2d) and module.dilation == (1, 1) and module.groups == 1
    return plain and module.kernel_size == module.stride != (1, 1) and module.padding == (0, 0)


def patch_product(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The forward pass of a conv that `cuts_patches` as one matrix product, for which GPUs have fast kernels: cudnn's
    for such a conv made a ViT-S/16's step 6 % longer (H200)."""
    height, width = conv.kernel_size

    def forward(images: Tensor) -> Tensor:  # (batch, channels, H, W) -> (batch, out channels, H / height, W / width)
        rows, columns = images.shape[2] // height, images.shape[3] // width
        patches = images[:, :, : rows * height, : columns * width].unflatten(3, (columns, width))
        patches = patches.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
        embedded = F.linear(patches.flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)
        return embedded.transpose(1, 2).unflatten(2, (rows, columns))

    return forward


def prepare(
    network: nn.Module,
    blocks: list[str],
    config: TrainConfig,
    engine: str,
    device: torch.device,
) -> bool:
    """Memory format, recomputation and compilation, in place and before wrapping, so that names stay.

    engine: its name. Returns whether images are to be channels_last.
    """
    channels_last = config.channels_last
    if channels_last is None:
        channels_last = is_convolutional(network)
    if channels_last and engine in ("none", "ddp"):  # the others shard flat weights; cudnn turns those as it goes
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    if device.type == "cuda":
        for conv in filter(cuts_patches, network.modules()):
            conv.forward = patch_product(cast(nn.Conv2d, conv))
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in map(network.get_submodule, blocks):
        if config.activation_checkpointing:
            block.forward = recomputed(block.forward)
        if config.compile == "block":  # the method, not the module: FSDP's hooks stay outside
            block.forward = torch.compile(block.forward)
    if config.compile == "model":
        network.compile()
    return channels_last
