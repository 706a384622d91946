"""Functions of a network over K replicas at once, where torch's own batching rules are slow, absent or keep too much.

`torch.func.vmap` batches everything else. Each function here is an autograd.Function of which only the static method
`vmap` runs: it sees the stacked tensors, and autograd sees the functions that it calls.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = ("grouped", "grouped_last", "product", "loop")  # ways to do K convolutions at once, see `convolve`
BATCH_NORM_KEYS = ("weight", "bias", "training", "momentum", "eps")
PLAIN_POOL = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}.items()


def choose_convolution(device: torch.device) -> str:
    """The method of `convolve` that a measurement found fastest there (docs/packed.md)."""
    return "product" if device.type == "cuda" else "grouped"


class BatchedAttention(torch.autograd.Function):
    """Scaled dot-product attention with the replicas folded into the batch, which has kernels on every device."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved: `vmap` below is what runs, and autograd sees the functions that it calls."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *qkv: Tensor) -> tuple[Tensor, int]:
        query, key, value = (t.movedim(dim or 0, 0) for t, dim in zip(qkv, in_dims, strict=True))
        out = F.scaled_dot_product_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
        return out.unflatten(0, query.shape[:2]), 0  # from (K * batch, heads, tokens, head_dim)


class LayerNorm(torch.autograd.Function):
    """LayerNorm of (K, ..., channels) with gains and shifts (K, channels), which keeps what an ordinary LayerNorm
    keeps: its input, not the normalised values as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        one_per_replica = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        return torch.addcmul(bias.view(one_per_replica), normal, weight.view(one_per_replica))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, mean, rstd, weight = ctx.saved_tensors
        gradient = gradients[0]
        others = tuple(range(1, x.ndim - 1))
        to_weight, to_bias = (gradient * ((x - mean) * rstd)).sum(others), gradient.sum(others)
        to_normal = gradient * weight.view(len(x), *[1] * (x.ndim - 2), -1)
        to_x = torch.ops.aten.native_layer_norm_backward(
            to_normal, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return to_x, to_weight, to_bias, None


class BatchedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved: see BatchedAttention."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, int]:
        x, weight, bias = (t.movedim(dim or 0, 0) for t, dim in zip((x, weight, bias), in_dims, strict=False))
        return LayerNorm.apply(x, weight, bias, eps), 0


class BatchedBatchNorm(torch.autograd.Function):
    """BatchNorm with the replicas among the channels: one ordinary BatchNorm, whose statistics are per replica."""

    @staticmethod
    def forward(images: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        return F.batch_norm(images, mean, variance, weight, bias, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved: see BatchedAttention."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        stacked = [t.movedim(dim or 0, 0) for t, dim in zip(inputs[:5], in_dims, strict=False)]
        images = stacked[0].transpose(0, 1).flatten(1, 2)  # (batch, K * channels, height, width)
        statistics = [t.view(-1) for t in stacked[1:3]]  # views: BatchNorm updates them in place
        weights = [t.flatten() for t in stacked[3:]]
        out = F.batch_norm(images, *statistics, *weights, *inputs[5:])
        return out.unflatten(1, (info.batch_size, -1)).transpose(0, 1), 0


class ProductConvolution(torch.autograd.Function):
    """Convolutions of stride 1 with odd kernel and 'same' padding, K at once, as one batched matrix product.

    images (K, in, batch, height, width), weights (K, out, in, k, k) -> (K, out, batch, height, width). The patches are
    laid out again in the backward pass, so that no more is kept than by an ordinary convolution.
    """

    @staticmethod
    def patches(images: Tensor, kernel: int) -> Tensor:
        """(K, channels, batch, height, width) -> (K, channels * kernel^2, batch * height * width)"""
        height, width = images.shape[-2:]
        padded = F.pad(images, [kernel // 2] * 4)
        shifted = [padded[..., i : i + height, j : j + width] for i in range(kernel) for j in range(kernel)]
        return torch.stack(shifted, 2).flatten(3).flatten(1, 2)

    @staticmethod
    def product(images: Tensor, weights: Tensor) -> Tensor:
        out = torch.bmm(weights.flatten(2), ProductConvolution.patches(images, weights.shape[-1]))
        return out.unflatten(2, images.shape[2:])

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(images, weights)
        return ProductConvolution.product(images, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        images, weights = ctx.saved_tensors
        gradient = gradients[0]
        to_images = ProductConvolution.product(gradient, weights.transpose(1, 2).flip(3, 4))
        patches = ProductConvolution.patches(images, weights.shape[-1])
        to_weights = torch.bmm(gradient.flatten(2), patches.transpose(1, 2))
        return to_images, to_weights.view_as(weights)


def as_channels(images: Tensor, method: str) -> Tensor:
    """(K, batch, channels, h, w) with the replicas among the channels, in the order in memory that `method` works in,
    so that a layer's output is the next layer's input as it stands: (K, channels, batch, h, w) for products of
    matrices, else (batch, K * channels, h, w)."""
    return images.transpose(1, 2).contiguous() if method == "product" else images.transpose(0, 1).flatten(1, 2)


def convolve(images: Tensor, weights: Tensor, method: str) -> Tensor:
    """K convolutions, 'same' padding, stride 1: (K, batch, in, h, w), (K, out, in, k, k) -> (K, batch, out, h, w)."""
    num_replicas, padding = len(weights), weights.shape[-1] // 2
    if method == "product":
        return ProductConvolution.apply(as_channels(images, method), weights).transpose(1, 2)
    if method == "loop":
        pairs = zip(images.unbind(), weights.unbind(), strict=True)
        return torch.stack([F.conv2d(x, w, padding=padding) for x, w in pairs])
    memory = torch.channels_last if method == "grouped_last" else torch.contiguous_format
    grouped = as_channels(images, method).contiguous(memory_format=memory)
    kernels = weights.flatten(0, 1).contiguous(memory_format=memory)
    out = F.conv2d(grouped, kernels, padding=padding, groups=num_replicas)
    return out.unflatten(1, (num_replicas, -1)).transpose(0, 1)


def pool(images: Tensor, size: int, method: str) -> Tensor:
    """Max-pool of (K, batch, channels, h, w) that keeps the order in memory."""
    if method == "product":
        pooled = F.max_pool2d(as_channels(images, method).flatten(0, 1), size)
        return pooled.unflatten(0, (len(images), -1)).transpose(1, 2)
    if method == "loop":
        return F.max_pool2d(images.flatten(0, 1), size).unflatten(0, (len(images), -1))
    return F.max_pool2d(as_channels(images, method), size).unflatten(1, (len(images), -1)).transpose(0, 1)


def make_convolution(method: str) -> type[torch.autograd.Function]:
    """What replaces a convolution inside vmap; `method` is one of CONVOLUTIONS."""

    class BatchedConvolution(torch.autograd.Function):
        @staticmethod
        def forward(images: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(images, weight, padding=weight.shape[-1] // 2)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            """Nothing is saved: see BatchedAttention."""

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], images: Tensor, weights: Tensor) -> tuple[Tensor, int]:
            weights = weights.movedim(in_dims[1] or 0, 0)
            if in_dims[0] is None:  # images shared by the replicas: one convolution with K times the channels
                out = F.conv2d(images, weights.flatten(0, 1), padding=weights.shape[-1] // 2)
                stacked = out.unflatten(1, (info.batch_size, -1)).transpose(0, 1)
                return (as_channels(stacked, method).transpose(1, 2) if method == "product" else stacked), 0
            return convolve(images.movedim(in_dims[0], 0), weights, method), 0

    return BatchedConvolution


def make_pool(method: str) -> type[torch.autograd.Function]:
    """What replaces a max-pool inside vmap."""

    class BatchedPool(torch.autograd.Function):
        @staticmethod
        def forward(images: Tensor, size: int) -> Tensor:
            return F.max_pool2d(images, size)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            """Nothing is saved: see BatchedAttention."""

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], images: Tensor, size: int) -> tuple[Tensor, int]:
            return pool(images.movedim(in_dims[0] or 0, 0), size, method), 0

    return BatchedPool


def compute_losses(logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
    """(K, batch, classes) logits, (K, batch) classes or (K, batch, classes) probabilities -> (K,) cross entropies, each
    with its run's smoothing (K, 1): F.cross_entropy takes one number for all. In the order of its own operations."""
    likelihoods = logits.log_softmax(2)
    if targets.is_floating_point():
        of_targets = -(likelihoods * targets).sum(2)
    else:
        of_targets = -likelihoods.gather(2, targets[..., None]).squeeze(2)
    of_all = -likelihoods.sum(2)
    kept, spread = (1 - smoothing).float(), (smoothing / logits.shape[2]).float()
    return (of_targets * kept + of_all * spread).mean(1)


class HandBatched(TorchFunctionMode):
    """Inside this mode and `vmap`, the functions above stand in for torch's, where they fit."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.convolution, self.pool = make_convolution(method), make_pool(method)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            settings = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | kwargs
            if len(args) == 3 and settings == {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}:
                return BatchedAttention.apply(*args)
        if func is F.layer_norm and len(args) == 2 and len(args[1]) == 1 and kwargs["weight"] is not None:
            x = args[0].float() if torch.is_autocast_enabled(args[0].device.type) else args[0]  # as autocast does
            return BatchedLayerNorm.apply(x, kwargs["weight"], kwargs["bias"], kwargs["eps"])
        if func is F.batch_norm and len(args) == 3 and args[1] is not None and kwargs["weight"] is not None:
            return BatchedBatchNorm.apply(*args, *(kwargs[key] for key in BATCH_NORM_KEYS))
        if func is F.max_pool2d and len(args) == 2 and isinstance(args[1], int) and kwargs.items() <= PLAIN_POOL:
            return self.pool.apply(*args)
        if func is F.conv2d and len(args) == 7 and not kwargs:
            images, weight, bias, stride, padding, dilation, groups = args
            kernel = weight.shape[-1]
            plain = (stride, padding, dilation, groups) == ((1, 1), (kernel // 2,) * 2, (1, 1), 1)
            if plain and bias is None and weight.shape[-2] == kernel and kernel % 2:
                return self.convolution.apply(*cast_as_autocast(images, weight))
        return func(*args, **kwargs)


def cast_as_autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast would do at the call of a library's convolution."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]
