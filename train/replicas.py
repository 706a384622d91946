"""K replicas of one network as one: parameters stacked on a leading axis, one batched step for all of them.

Knows no files and no data sets; train.pack gives every replica its run directory. The forward pass is the network's
own, under `torch.func.vmap`, with a few functions batched by hand (train.batched). The K losses do not share a
parameter, so the gradient of their sum is each replica's own. On a GPU the whole step (forward, backward, update) is
one CUDA graph after a few eager steps: a tiny network's step is otherwise nothing but the time to launch its kernels.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from depthmup.data.errors import UserError
from depthmup.models.build import ScaledModel, build, build_meta
from depthmup.models.multiplier import OutputMultiplier, scale_input, scale_output
from depthmup.models.optimizer import parameter_groups
from depthmup.train.batch_norm import BatchStatistics, momentum_of, move
from depthmup.train.batched import HandBatched, default_convolution
from depthmup.train.config import RunConfig
from depthmup.train.schedule import schedule
from depthmup.train.step import set_stream_type

EAGER_STEPS = 3  # before a CUDA graph is captured: libraries choose their kernels and workspaces in them
MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # torch's names of the moments
SETTINGS = ("lr", "weight_decay", "eps")  # of an optimizer's group, that may differ between replicas


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
        if autocast_dtype:
            set_stream_type(self.network, scaled[0].blocks[0], scaled[0].branches, torch.float32)
        self.multipliers = stack_multipliers(scaled, device)
        self.installed = scaled[0].multipliers
        self.roles = {name: rule.role.value for name, rule in scaled[0].rules.items()}
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
        self.coupled = column([float(o.weight_decay_mode == "coupled") for o in optimizers], device)
        self.betas = [column([o.scaled_betas[i] for o in optimizers], device) for i in (0, 1)]
        clips = [c.train.clip_norm for c in configs]
        self.clip = column([clip or float("inf") for clip in clips], device) if any(clips) else None
        num_steps = configs[0].train.num_steps
        shapes = list(dict.fromkeys(c.schedule for c in configs))  # mostly one
        factors = [[schedule(shape, step, num_steps) for shape in shapes] for step in range(num_steps)]
        self.schedules = torch.tensor(factors, dtype=torch.float64, device=device)  # (steps, shapes)
        self.schedule_of = torch.tensor([shapes.index(c.schedule) for c in configs], device=device)
        self.steps_done = torch.zeros(1, dtype=torch.int64, device=device)
        self.alive = torch.ones(len(configs), 1, dtype=torch.bool, device=device)
        self.losses = torch.zeros(len(configs), device=device)
        self.logit_rms = torch.zeros(len(configs), device=device)
        self.gradients: Sequence[Tensor] = []  # of the last step, after clipping, one (K, weights) for each group
        self.gradient_norms = torch.zeros(len(configs), device=device)  # before clipping
        self.step_function = GraphedStep(self.eager_step) if device.type == "cuda" else self.eager_step
        self.check_batches()
        self.install_batch_norm()

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
            raise UserError(f"module {name!r} ({kind}) does not batch over replicas: {reason}") from None
        finally:
            for handle in handles:
                handle.remove()
        for name, buffer in buffers.items():
            self.buffers[name].copy_(buffer)

    def install_batch_norm(self) -> None:
        """Statistics over train.batch_norm_images, as a run alone takes them."""
        statistics = BatchStatistics(self.network, self.configs[0].train.batch_norm_images)
        for name, buffer in self.network.named_buffers():
            if name not in self.buffers:
                self.buffers[name] = torch.zeros(len(self.configs), *buffer.shape, device=self.device)
        self.batch_norms = [
            (momentum_of(module), {key: self.buffers[f"{name}.{key}"] for key, _ in module.named_buffers()})
            for name, module in statistics.modules.items()
        ]

    # ------------------------------------------------------------ one step

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update of all replicas on a batch for each seed, (seeds, batch, ...); returns the losses (K,)."""
        self.step_function(images, labels)
        return self.losses.clone()

    def eager_step(self, images: Tensor, labels: Tensor) -> None:
        self.gradients = []  # the last step's would take memory beside this one's
        logits = self.forward(images)
        labels = labels.expand(len(logits), -1) if len(labels) == 1 else labels[self.seed_of]  # (K, batch)
        smoothing = self.configs[0].train.label_smoothing
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing, reduction="none"
        )
        losses = each.view(labels.shape).mean(1)
        self.gradients = torch.autograd.grad(losses.sum(), [group.values for group in self.groups])
        for momentum, buffers in self.batch_norms:
            move(buffers, momentum)
        self.losses.copy_(losses.detach())
        self.logit_rms.copy_(logits.detach().float().square().mean((1, 2)).sqrt())
        self.update()

    def values(self) -> list[Tensor]:
        """A copy of all weights, one (K, weights) for each group."""
        return [group.values.detach().clone() for group in self.groups]

    @torch.no_grad()
    def role_statistics(self, before: Sequence[Tensor]) -> list[dict[str, float]]:
        """For each replica what train.telemetry.RoleStatistics says of the last step; `before`: `values()` before it.
        NaN for one that has diverged. Waits for the device."""
        updates = [group.values - values for group, values in zip(self.groups, before, strict=True)]
        means = {f"grad_rms/{role}": value for role, value in self.mean_squares(self.gradients).items()}
        means |= {f"update_rms/{role}": value for role, value in self.mean_squares(updates).items()}
        rows = torch.stack(list(means.values()), dim=1).sqrt().masked_fill(~self.alive, float("nan"))
        return [dict(zip(means, row, strict=True)) for row in rows.tolist()]

    def mean_squares(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Role -> (K,), the mean square over the role's columns of `matrices`, which are laid out as the weights."""
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        for group, matrix in zip(self.groups, matrices, strict=True):
            for name, (first, shape) in group.slots.items():
                squares = torch.linalg.vector_norm(matrix[:, first : first + shape.numel()], dim=1).square()
                role = self.roles[name]
                sums[role] = sums[role] + squares if role in sums else squares
                counts[role] += shape.numel()
        return {role: total / counts[role] for role, total in sums.items()}

    @torch.no_grad()
    def update(self) -> None:
        """The runs' own SGD or AdamW in all replicas at once. One whose loss is not finite stays as it is from then."""
        self.alive &= self.losses.isfinite()[:, None]
        factors = self.schedules.index_select(0, self.steps_done)[0]
        factor = factors.index_select(0, self.schedule_of)[:, None] * self.alive  # (K, 1)
        self.steps_done += 1
        norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in self.gradients])
        self.gradient_norms.copy_(torch.linalg.vector_norm(norms, dim=0))
        shrink = (
            (self.clip / (self.gradient_norms[:, None] + 1e-6)).clamp(max=1).float() if self.clip is not None else None
        )
        for group, gradient in zip(self.groups, self.gradients, strict=True):
            if shrink is not None:
                gradient.mul_(shrink)
            gradient.masked_fill_(~self.alive, 0)  # a NaN times zero would not be zero
            lr = group.settings["lr"] * factor
            if self.configs[0].optimizer.name == "sgd":
                self.update_sgd(group, gradient, lr)
            else:
                self.update_adamw(group, gradient, lr)

    def update_sgd(self, group: Group, gradient: Tensor, lr: Tensor) -> None:
        """In place: a copy of the weights beside the moments would be a fifth of a pack's memory at a small batch."""
        momentum, decay = self.momentum.float(), (group.settings["weight_decay"] * self.coupled).float()
        buffer = group.moments["momentum_buffer"].mul_(momentum).add_(gradient).addcmul_(group.values, decay)
        if self.configs[0].optimizer.nesterov:
            buffer = gradient.addcmul(group.values, decay).addcmul_(buffer, momentum)
        group.values.mul_((1 - lr * group.settings["weight_decay"] * (1 - self.coupled)).float())
        group.values.addcmul_(buffer, -lr.float())

    def update_adamw(self, group: Group, gradient: Tensor, lr: Tensor) -> None:
        first, second = group.moments["exp_avg"], group.moments["exp_avg_sq"]
        corrections = [1 - beta**self.steps_done for beta in self.betas]  # (K, 1)
        group.values.mul_((1 - lr * group.settings["weight_decay"]).float())
        first.lerp_(gradient, (1 - self.betas[0]).float())
        second.lerp_(gradient.square(), (1 - self.betas[1]).float())
        denominator = second.sqrt().div_(corrections[1].sqrt().float()).add_(group.settings["eps"].float())
        quotient = torch.div(first, denominator, out=denominator)  # in place: a pack's memory is K runs' and no more
        group.values.addcmul_(quotient, (-lr / corrections[0]).float())


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
            # "thread_local": the loader's thread may allocate pinned memory meanwhile, which "global" takes for a fault
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.function(*self.inputs)
        self.graph.replay()
