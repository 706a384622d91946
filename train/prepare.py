"""A device and a network made ready for training: precision, memory format, recomputation, compilation."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from depthmup.data.errors import UserError
from depthmup.train.config import TrainConfig

# Blocks of one class share torch's cache of compiled code. A ResNet-50 has 8 kinds of block, times training and
# evaluation; past the limit, whose default is 8, torch runs the others uncompiled.
RECOMPILE_LIMIT = 64


def choose_autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
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


def prepare_device(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Sets how the device computes; returns what autocast computes in, None for float32. Raises UserError."""
    set_tf32(config)
    set_backends(device)
    return choose_autocast_dtype(config, device)


def prepare_autocast(
    network: nn.Module,
    blocks: Iterable[str],
    branches: Iterable[str],
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """What a network needs under autocast to `dtype`, in place. `branches`: names of their ends."""
    set_stream_type(network, blocks, branches, dtype if config.bf16_residual else torch.float32)
    if device.type == "cpu":
        drop_idle_strides(network)


def set_stream_type(network: nn.Module, blocks: Iterable[str], branches: Iterable[str], dtype: torch.dtype) -> None:
    """Keeps the residual stream in `dtype` under autocast, whose convolutions and products return bf16: what enters a
    block (from the stem, or from the layer between two stages) and what every branch adds is cast to it, the latter
    before its multiplier. `branches`: names of their ends."""

    def cast_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(dtype), *inputs[1:])

    def cast_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(dtype)

    for name in blocks:
        network.get_submodule(name).register_forward_pre_hook(cast_input)
    for name in branches:
        network.get_submodule(name).register_forward_hook(cast_output, prepend=True)


def drop_idle_strides(network: nn.Module) -> None:
    """Convolutions of a single pixel get no stride, which would move nothing. Where they have one, oneDNN in bf16
    leaves the gradient of their outer weights unwritten (torch 2.13; kernels of 3 pixels and more, as in the last
    stages of a ResNet whose images are small), and whatever is in the memory counts in its norm."""

    def choose_stride(conv: nn.Conv2d, inputs: tuple[Tensor, ...], *, stride: tuple[int, ...]) -> None:
        conv.stride = (1, 1) if inputs[0].shape[-2:] == (1, 1) else stride

    for conv in network.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1) and keeps_size(conv):
            conv.register_forward_pre_hook(partial(choose_stride, stride=conv.stride))


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether its padding makes up for its kernel, so that without a stride the image keeps its size."""
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    sides = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return all(dilation * (kernel - 1) == 2 * padding for kernel, dilation, padding in sides)


def is_convolutional(network: nn.Module) -> bool:
    """More convs than linear layers: a ResNet, but not a ViT with its one patch embedding."""
    convs = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    return convs > sum(isinstance(module, nn.Linear) for module in network.modules())


def recompute_in_backward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
            block.forward = recompute_in_backward(block.forward)
        if config.compile == "block":  # the method, not the module: FSDP's hooks stay outside
            block.forward = torch.compile(block.forward)
    if config.compile == "model":
        network.compile()
    return channels_last
