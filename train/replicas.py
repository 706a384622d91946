"""K replicas of one network as one: parameters stacked on a leading axis, one batched step for all of them.

Knows no files and no data sets; train.pack gives every replica its run directory. The forward pass is the network's
own, under `torch.func.vmap`; three of its functions are batched by hand (`HandBatched`). The K losses do not share a
parameter, so the gradient of their sum is each replica's own. On a GPU the whole step (forward, backward, update) is
one CUDA graph after a few eager steps: a tiny network's step is otherwise nothing but the time to launch its kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from data.errors import UserError
from models.build import ScaledModel, build, build_meta
from models.multiplier import OutputMultiplier, scale_input, scale_output
from models.optimizer import parameter_groups
from train.config import RunConfig
from train.schedule import schedule

EAGER_STEPS = 3  # before a CUDA graph is captured: libraries choose their kernels and workspaces in them
MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # torch's names of the moments
CONVOLUTIONS = ("grouped", "grouped_last", "product", "loop")  # ways to do K convolutions at once, see `convolve`
SETTINGS = ("lr", "weight_decay", "eps")  # of an optimizer's group, that may differ between replicas


# ---------------------------------------------------------------- functions batched by hand


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


def convolve(images: Tensor, weights: Tensor, method: str) -> Tensor:
    """K convolutions, 'same' padding, stride 1: (K, batch, in, h, w), (K, out, in, k, k) -> (K, batch, out, h, w)."""
    num_replicas, padding = len(weights), weights.shape[-1] // 2
    if method == "product":
        # Channels before the batch: so every layer's output is the next one's input as it stands in memory.
        return ProductConvolution.apply(images.transpose(1, 2).contiguous(), weights).transpose(1, 2)
    if method == "loop":
        pairs = zip(images.unbind(), weights.unbind(), strict=True)
        return torch.stack([F.conv2d(x, w, padding=padding) for x, w in pairs])
    memory = torch.channels_last if method == "grouped_last" else torch.contiguous_format
    grouped = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=memory)  # (batch, K * in, height, width)
    kernels = weights.flatten(0, 1).contiguous(memory_format=memory)
    out = F.conv2d(grouped, kernels, padding=padding, groups=num_replicas)
    return out.unflatten(1, (num_replicas, -1)).transpose(0, 1)


def batched_convolution(method: str) -> type[torch.autograd.Function]:
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
                return out.unflatten(1, (info.batch_size, -1)), 1
            return convolve(images.movedim(in_dims[0], 0), weights, method), 0

    return BatchedConvolution


class HandBatched(TorchFunctionMode):
    """Inside this mode and `vmap`, attention and the plain convolutions take the hand-batched functions above."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.convolution = batched_convolution(method)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            settings = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | kwargs
            if len(args) == 3 and settings == {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}:
                return BatchedAttention.apply(*args)
        if func is F.conv2d and len(args) == 7 and not kwargs:
            images, weight, bias, stride, padding, dilation, groups = args
            kernel = weight.shape[-1]
            plain = (stride, padding, dilation, groups) == ((1, 1), (kernel // 2,) * 2, (1, 1), 1)
            if plain and bias is None and weight.shape[-2] == kernel and kernel % 2:
                return self.convolution.apply(*in_autocast_type(images, weight))
        return func(*args, **kwargs)


def in_autocast_type(*tensors: Tensor) -> list[Tensor]:
    """What autocast would do at the call of a library's convolution."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]


# ---------------------------------------------------------------- the stack


@dataclass
class Group:
    """Parameters with the same settings in every replica's optimizer, side by side in one matrix.

    values and moments: (K, number of weights); lr (peak), weight_decay, eps: (K, 1).
    """

    slots: dict[str, tuple[int, torch.Size]]  # parameter name -> first column, shape
    values: Tensor
    moments: dict[str, Tensor]
    settings: dict[str, Tensor]

    def parameters(self) -> dict[str, Tensor]:
        """Parameter name -> (K, *shape), views of `values` that autograd follows."""
        pieces = self.values.split([shape.numel() for _, shape in self.slots.values()], dim=1)
        return {
            name: piece.unflatten(1, shape) if shape else piece.squeeze(1)
            for (name, (_, shape)), piece in zip(self.slots.items(), pieces, strict=True)
        }

    def replica(self, matrix: Tensor, replica: int) -> dict[str, Tensor]:
        """Parameter name -> its part of `matrix` (values or a moment) in one replica, a view."""
        row = matrix.detach()[replica]
        return {name: row[first : first + shape.numel()].view(shape) for name, (first, shape) in self.slots.items()}


def parameter_settings(scaled: ScaledModel, config: RunConfig) -> dict[str, tuple[tuple[str, float], ...]]:
    """Parameter name -> what the run's own optimizer has for it: peak lr, weight decay and, for AdamW, eps."""
    names = {id(parameter): name for name, parameter in scaled.network.named_parameters()}
    return {
        names[id(parameter)]: tuple((key, group[key]) for key in SETTINGS if key in group)
        for group in parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
        for parameter in group["params"]
    }


def group_parameters(scaled: Sequence[ScaledModel], configs: Sequence[RunConfig], device: torch.device) -> list[Group]:
    """One group for each combination of settings over the replicas: at most one per role."""
    by_settings: dict[tuple[Any, ...], dict[str, torch.Size]] = {}
    settings_of = [parameter_settings(s, c) for s, c in zip(scaled, configs, strict=True)]
    for name, parameter in scaled[0].network.named_parameters():
        by_settings.setdefault(tuple(settings[name] for settings in settings_of), {})[name] = parameter.shape
    groups = []
    for settings, shapes in by_settings.items():
        slots, first = {}, 0
        for name, shape in shapes.items():
            slots[name] = (first, shape)
            first += shape.numel()
        values = torch.empty(len(configs), first, device=device)
        rows = [dict(row) for row in settings]
        columns = {key: column([row[key] for row in rows], device) for key in rows[0]}
        moments = {name: torch.zeros_like(values) for name in MOMENTS[configs[0].optimizer.name]}
        groups.append(Group(slots, values.requires_grad_(), moments, columns))
    return groups


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """(K, 1), float64: rounded to float32 only where it meets a weight, as a Python number is."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def stack_multipliers(scaled: Sequence[ScaledModel], device: torch.device) -> dict[str, Tensor]:
    """Puts every replica's multipliers on the first one's network; returns those that differ, (K,) by module name."""
    first, different = scaled[0], {}
    for name in sorted({name for s in scaled for name in s.multipliers}):
        values = [s.multipliers[name].value if name in s.multipliers else 1.0 for s in scaled]
        if name not in first.multipliers:
            other = next(s.multipliers[name] for s in scaled if name in s.multipliers)
            install = scale_output if isinstance(other, OutputMultiplier) else scale_input
            if installed := install(first.network, name, other.value):
                first.multipliers[name] = installed
        if len(set(values)) > 1:
            different[name] = torch.tensor(values, device=device)
    return different


class Replicas:
    """K replicas in training. `losses` (K,) are the last step's, `alive` (K, 1) tells which replicas still learn."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        convolution: str | None = None,
    ) -> None:
        """Draws every replica's initial weights. Raises UserError when the network cannot be batched."""
        self.configs, self.device, self.autocast_dtype = configs, device, autocast_dtype
        scaled = [build_meta(c.model, c.parameterization) for c in configs]
        self.network = scaled[0].network
        self.multipliers = stack_multipliers(scaled, device)
        self.installed = scaled[0].multipliers
        self.groups = group_parameters(scaled, configs, device)
        self.seeds = sorted({c.seed for c in configs})
        self.seed_of = torch.tensor([self.seeds.index(c.seed) for c in configs], device=device)
        self.mode = HandBatched(convolution or default_convolution(device))

        initial = [build(c.model, c.parameterization, c.seed).network for c in configs]
        self.buffers = {
            name: torch.stack([network.get_buffer(name) for network in initial]).to(device)
            for name, _ in self.network.named_buffers()
        }
        for replica, network in enumerate(initial):
            weights = self.weights(replica)
            for name, parameter in network.named_parameters():
                weights[name].copy_(parameter.detach())

        optimizers = [c.optimizer for c in configs]
        self.momentum = column([o.momentum for o in optimizers], device)
        self.betas = [column([o.betas[i] for o in optimizers], device) for i in (0, 1)]
        clips = [c.train.clip_norm for c in configs]
        self.clip = column([clip or float("inf") for clip in clips], device) if any(clips) else None
        num_steps = configs[0].train.num_steps
        shapes = {c.schedule: [schedule(c.schedule, s, num_steps) for s in range(num_steps)] for c in configs}
        factors = torch.tensor([shapes[c.schedule] for c in configs], dtype=torch.float64)
        self.schedules = factors.T[:, :, None].to(device)  # (steps, K, 1)
        self.steps_done = torch.zeros(1, dtype=torch.int64, device=device)
        self.alive = torch.ones(len(configs), 1, dtype=torch.bool, device=device)
        self.losses = torch.zeros(len(configs), device=device)
        self.gradients: Sequence[Tensor] = []
        self.step_function = GraphedStep(self.eager_step) if device.type == "cuda" else self.eager_step
        self.check_batches()

    # ------------------------------------------------------------ one replica's part

    def weights(self, replica: int) -> dict[str, Tensor]:
        """The replica's state dict: views, so copying into them sets the replica."""
        weights = {name: buffer[replica] for name, buffer in self.buffers.items()}
        for group in self.groups:
            weights |= group.replica(group.values, replica)
        return {name: weights[name] for name in self.network.state_dict()}

    def moments(self, replica: int) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> torch's name of a moment -> the replica's moment, a view."""
        moments: dict[str, dict[str, Tensor]] = {}
        for group in self.groups:
            for key, matrix in group.moments.items():
                for name, moment in group.replica(matrix, replica).items():
                    moments.setdefault(name, {})[key] = moment
        return moments

    # ------------------------------------------------------------ forward

    def forward(self, images: Tensor) -> Tensor:
        """(seeds, batch, channels, size, size) images -> (K, batch, num_classes) logits. A row of images a seed."""
        parameters = {name: value for group in self.groups for name, value in group.parameters().items()}
        shared = len(images) == 1
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled), self.mode:
            return vmap(self.forward_one, in_dims=(0, 0, 0, None if shared else 0))(
                parameters, self.buffers, self.multipliers, images[0] if shared else images[self.seed_of]
            )

    def forward_one(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], multipliers: dict[str, Tensor], images: Tensor
    ) -> Tensor:
        for name, value in multipliers.items():
            self.installed[name].value = value  # type: ignore[assignment]  # a number without shape inside vmap
        return functional_call(self.network, {**parameters, **buffers}, (images,))

    @torch.no_grad()
    def check_batches(self) -> None:
        """Raises UserError that names the module when an operation of the network has no batched form."""
        entered: list[str] = []

        def leave(*_: Any) -> None:
            entered.pop()

        handles = []
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
            handles.append(module.register_forward_hook(leave))
        model = self.configs[0].model
        shape = (len(self.seeds), 2, model.in_channels, model.image_size, model.image_size)
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        try:
            self.forward(torch.zeros(shape, device=self.device))
        except (RuntimeError, NotImplementedError) as error:
            name = entered[-1] if entered else ""
            kind = type(self.network.get_submodule(name)).__name__
            reason = str(error).splitlines()[0]
            raise UserError(
                f"module {name or 'network'!r} ({kind}) does not batch: {reason} Use train.pack=1"
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        for name, buffer in buffers.items():
            self.buffers[name].copy_(buffer)

    # ------------------------------------------------------------ one step

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update of all replicas on a batch for each seed, (seeds, batch, ...); returns the losses (K,)."""
        self.step_function(images, labels)
        return self.losses.clone()

    def eager_step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.forward(images)
        labels = labels.expand(len(logits), -1) if len(labels) == 1 else labels[self.seed_of]  # (K, batch)
        smoothing = self.configs[0].train.label_smoothing
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing, reduction="none"
        )
        losses = each.view(labels.shape).mean(1)
        self.gradients = torch.autograd.grad(losses.sum(), [group.values for group in self.groups])
        self.losses.copy_(losses.detach())
        self.update()

    def gradient_norms(self) -> Tensor:
        """(K, 1), of the last step, before clipping."""
        norms = [torch.linalg.vector_norm(gradient, dim=1) for gradient in self.gradients]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)[:, None]

    @torch.no_grad()
    def update(self) -> None:
        """torch's SGD or AdamW in all replicas at once. One whose loss is not finite stays as it is from then on."""
        self.alive &= self.losses.isfinite()[:, None]
        factor = self.schedules.index_select(0, self.steps_done)[0] * self.alive  # (K, 1)
        self.steps_done += 1
        shrink = None if self.clip is None else (self.clip / (self.gradient_norms() + 1e-6)).clamp(max=1).float()
        for group, gradient in zip(self.groups, self.gradients, strict=True):
            if shrink is not None:
                gradient = gradient * shrink
            gradient = gradient.masked_fill(~self.alive, 0)  # a NaN times zero would not be zero
            lr = group.settings["lr"] * factor
            if self.configs[0].optimizer.name == "sgd":
                self.update_sgd(group, gradient, lr)
            else:
                self.update_adamw(group, gradient, lr)

    def update_sgd(self, group: Group, gradient: Tensor, lr: Tensor) -> None:
        momentum = self.momentum.float()
        gradient = gradient.addcmul(group.values, group.settings["weight_decay"].float())
        buffer = group.moments["momentum_buffer"].mul_(momentum).add_(gradient)
        direction = gradient.addcmul(buffer, momentum) if self.configs[0].optimizer.nesterov else buffer
        group.values.addcmul_(direction, -lr.float())

    def update_adamw(self, group: Group, gradient: Tensor, lr: Tensor) -> None:
        first, second = group.moments["exp_avg"], group.moments["exp_avg_sq"]
        corrections = [1 - beta**self.steps_done for beta in self.betas]  # (K, 1)
        group.values.mul_((1 - lr * group.settings["weight_decay"]).float())
        first.lerp_(gradient, (1 - self.betas[0]).float())
        second.lerp_(gradient.square(), (1 - self.betas[1]).float())
        denominator = second.sqrt().div_(corrections[1].sqrt().float()).add_(group.settings["eps"].float())
        group.values.addcmul_(first / denominator, (-lr / corrections[0]).float())


class GraphedStep:
    """A step function of fixed shapes as one CUDA graph: eager for the first steps, captured once, then replayed."""

    def __init__(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.calls = 0
        self.stream = torch.cuda.Stream()  # autograd's bookkeeping must not tie the capture to the default stream

    def __call__(self, *inputs: Tensor) -> None:
        if not self.inputs:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        if self.graph is None and self.calls < EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.calls += 1
            return
        if self.graph is None:
            torch.cuda.empty_cache()  # a graph has memory of its own; leave it what the eager steps used
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function(*self.inputs)
        self.graph.replay()


def default_convolution(device: torch.device) -> str:
    """The method of `convolve` that a measurement found fastest there (docs/packed.md)."""
    return "product" if device.type == "cuda" else "grouped"
