"""K replicas of one network as one: parameters stacked on a leading axis, one batched step for all of them.

Knows no files and no data sets. The forward pass is the network's own, under `torch.func.vmap`, with a few functions
batched by hand (train.packs.batched). The K losses do not share a parameter, so the gradient of their sum is each
replica's own. On a GPU the whole step (forward, backward, update) is one CUDA graph after a few eager steps: a tiny
network's step is otherwise nothing but the time to launch its kernels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from depthmup.data.errors import UserError
from depthmup.models.build import build, build_meta
from depthmup.models.optimizer import parameter_groups
from depthmup.train.average import WeightAverage
from depthmup.train.batch_norm import BatchStatistics, choose_grouping, find_batch_norms, move, read_momentum
from depthmup.train.config import RunConfig
from depthmup.train.engines.base import TensorState
from depthmup.train.networks import describe
from depthmup.train.packs.batched import HandBatched, choose_convolution, compute_losses
from depthmup.train.packs.graph import GraphedStep
from depthmup.train.packs.stacking import group_parameters, make_column, stack_multipliers
from depthmup.train.packs.telemetry import measure_roles
from depthmup.train.packs.updates import update_adamw, update_muon, update_sgd
from depthmup.train.prepare import prepare_autocast
from depthmup.train.schedule import schedule
from depthmup.train.stochastic_depth import install_stochastic_depth

PER_REPLICA = ("smoothing", "momentum", "coupled", "schedule_of", "alive", "losses", "logit_rms", "gradient_norms")


def number_seeds(configs: Sequence[RunConfig], device: torch.device) -> tuple[list[int], Tensor]:
    """The different seeds, and which of them is each run's, (K,)."""
    seeds = sorted({config.seed for config in configs})
    return seeds, torch.tensor([seeds.index(config.seed) for config in configs], device=device)


class Replicas:
    """train.networks.Networks for any K. `losses` (K,) are the last step's, `alive` (K, 1) tells which replicas still
    learn."""

    channels_last = False

    def __init__(
        self,
        configs: Sequence[RunConfig],
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        convolution: str | None = None,
    ) -> None:
        """Draws every replica's initial weights. Raises UserError when the network cannot be batched."""
        self.configs, self.device, self.dtype, train = configs, device, autocast_dtype, configs[0].train
        scaled = [build_meta(c.model, c.parameterization) for c in configs]
        self.network = scaled[0].network
        branches, blocks = list(scaled[0].branches), list(scaled[0].blocks)
        rates = [c.train.drop_path for c in configs]
        self.draws = install_stochastic_depth(self.network, branches, blocks, max(rates))
        self.num_drop_branches = self.draws.num_branches
        # (K, branches), or (1, branches) where all runs drop alike
        keeps = [self.draws.keeps_at(rate) for rate in (rates if len(set(rates)) > 1 else rates[:1])]
        self.keeps = torch.tensor(keeps, dtype=torch.float64, device=device)
        self.smoothing = make_column([c.train.label_smoothing for c in configs], device)
        if autocast_dtype:
            prepare_autocast(self.network, blocks, branches, train, device, autocast_dtype)
        self.multipliers = stack_multipliers(scaled, device)
        self.installed = scaled[0].multipliers
        self.roles = {name: rule.role.value for name, rule in scaled[0].rules.items()}
        self.groups = group_parameters(scaled, configs, device)
        self.seeds, self.seed_of = number_seeds(configs, device)
        self.share_images = len(self.seeds) == 1
        self.mode = HandBatched(convolution or choose_convolution(device))

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
        self.momentum = make_column([o.momentum for o in optimizers], device)
        self.coupled = make_column([float(o.weight_decay_mode == "coupled") for o in optimizers], device)
        self.betas = [make_column([o.scaled_betas[i] for o in optimizers], device) for i in (0, 1)]
        self.descriptions = []
        for number, (s, c) in enumerate(zip(scaled, configs, strict=True)):
            place = f"replica {number} of a pack of {len(configs)} on {device.type}, {autocast_dtype}"
            groups = parameter_groups(s.network, s.rules, s.scale, c.resolved_optimizer)
            self.descriptions.append(describe(c, s, groups, place))
        clips = [c.train.clip_norm for c in configs]
        self.clip = make_column([clip or float("inf") for clip in clips], device) if any(clips) else None
        num_steps = train.num_steps
        shapes = list(dict.fromkeys(c.schedule for c in configs))  # mostly one
        factors = [[schedule(shape, step, num_steps) for shape in shapes] for step in range(num_steps)]
        self.schedules = torch.tensor(factors, dtype=torch.float64, device=device)  # (steps, shapes)
        self.schedule_of = torch.tensor([shapes.index(c.schedule) for c in configs], device=device)
        self.steps, self.steps_done = 0, torch.zeros(1, dtype=torch.int64, device=device)  # the same number
        self.alive = torch.ones(len(configs), 1, dtype=torch.bool, device=device)
        self.losses = torch.zeros(len(configs), device=device)
        self.logit_rms = torch.zeros(len(configs), device=device)
        self.gradients: Sequence[Tensor] = []  # of the last step, after clipping, one (K, weights) for each group
        self.gradient_norms = torch.zeros(len(configs), device=device)  # before clipping
        self.graph = GraphedStep() if device.type == "cuda" else None
        self.check_batches()
        self.grouping = choose_grouping(configs[0], 1, 1) if find_batch_norms(self.network) else None
        self.install_batch_norm()
        decays = [c.train.ema or 0.0 for c in configs]  # all of them, or none
        decay = torch.tensor(decays, dtype=torch.float64, device=device) if len(set(decays)) > 1 else decays[0]
        self.average = WeightAverage(self.averaged(), decay) if any(decays) else None

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

    def averaged(self) -> dict[str, Tensor]:
        """What is averaged: each group's weights, by its number, and what is saved of BatchNorm."""
        saved = self.network.state_dict().keys()
        buffers = {name: b for name, b in self.buffers.items() if name in saved and b.is_floating_point()}
        return {str(number): group.values for number, group in enumerate(self.groups)} | buffers

    def state(self, number: int) -> TensorState:
        """As a run alone has it: views, but for the count of steps."""
        optimizer, moments = self.configs[number].optimizer, self.moments(number)
        for of_parameter in moments.values():
            if "exp_avg" in of_parameter:  # AdamW's
                of_parameter["step"] = torch.tensor(float(self.steps))
        if optimizer.name == "sgd" and not optimizer.momentum:  # then torch's SGD keeps nothing
            moments = {}
        state: TensorState = {"model": self.weights(number), "optimizer": moments}
        if self.average:
            average = dict(self.average.weights)
            of_groups = [group.replica(average.pop(str(n)), number) for n, group in enumerate(self.groups)]
            statistics = {name: buffer[number] for name, buffer in average.items()}
            state["average"] = {name: w for of_group in [*of_groups, statistics] for name, w in of_group.items()}
        return state

    def load(self, number: int, state: TensorState, step: int) -> None:
        self.steps = step  # the rest of the state are views, written into already
        self.steps_done.fill_(step)

    def keep(self, numbers: Sequence[int]) -> None:
        rows = torch.tensor(numbers, device=self.device)
        self.configs = [self.configs[number] for number in numbers]
        self.descriptions = [self.descriptions[number] for number in numbers]
        self.seeds, self.seed_of = number_seeds(self.configs, self.device)
        for group in self.groups:
            group.keep(rows)
        for name in PER_REPLICA:
            setattr(self, name, getattr(self, name)[rows])
        for tensors in (self.multipliers, self.buffers):
            tensors.update({name: tensor[rows] for name, tensor in tensors.items()})
        self.batch_norms = self.list_batch_norms()
        self.betas = [beta[rows] for beta in self.betas]
        if len(self.keeps) > 1:
            self.keeps = self.keeps[rows]
        if self.clip is not None:
            self.clip = self.clip[rows]
        if self.average:
            self.average.keep(rows, self.averaged())
        self.graph = GraphedStep() if self.graph else None

    def full_weights(self, number: int) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.weights(number).items()}

    # ------------------------------------------------------------ forward

    def forward(self, images: Tensor, uniform: Tensor | None = None) -> Tensor:
        """(K, batch, channels, size, size) images, (K, branches, batch) uniform numbers -> (K, batch, classes) logits.
        A leading 1 in place of K: the same for all."""
        parameters = {name: value for group in self.groups for name, value in group.parameters().items()}
        if uniform is None:  # nothing is dropped
            uniform = images.new_zeros(len(images), self.num_drop_branches, images.shape[1])
        shared, alike = len(images) == 1, len(self.keeps) == 1
        inputs = [tensor[0] if shared else tensor for tensor in (images, uniform)]
        inputs.append(self.keeps[0] if alike else self.keeps)
        in_dims = (0, 0, 0, *((None, None) if shared else (0, 0)), None if alike else 0)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None), self.mode:
            return vmap(self.forward_one, in_dims=in_dims)(parameters, self.buffers, self.multipliers, *inputs)

    def forward_one(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        multipliers: dict[str, Tensor],
        images: Tensor,
        uniform: Tensor,
        keeps: Tensor,
    ) -> Tensor:
        for name, value in multipliers.items():
            self.installed[name].value = value  # type: ignore[assignment]  # a number without shape inside vmap
        self.draws.now, self.draws.keeps = uniform, keeps.float()
        return functional_call(self.network, {**parameters, **buffers}, (images,))

    def logits(self, images: Tensor) -> Tensor:
        return self.forward(images[None]).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.network.eval()
        try:
            yield
        finally:
            self.network.train()

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
        count = 1 if self.share_images else len(self.configs)
        shape = (count, 2, model.in_channels, model.image_size, model.image_size)
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
        BatchStatistics(self.network, self.configs[0].train.batch_norm_images)
        for name, buffer in self.network.named_buffers():
            if name not in self.buffers:
                self.buffers[name] = torch.zeros(len(self.configs), *buffer.shape, device=self.device)
        self.batch_norms = self.list_batch_norms()

    def list_batch_norms(self) -> list[tuple[float, dict[str, Tensor]]]:
        """(momentum, buffers (K, channels) by their own names) of each."""
        return [
            (read_momentum(module), {key: self.buffers[f"{name}.{key}"] for key, _ in module.named_buffers()})
            for name, module in find_batch_norms(self.network).items()
        ]

    # ------------------------------------------------------------ one step

    def step(self, images: Tensor, targets: Tensor, uniform: Tensor | None = None, measure: bool = False) -> Tensor:
        self.before = self.values() if measure else []
        inputs = [images, targets, *([] if uniform is None else [uniform])]
        if self.graph:
            self.graph(self.eager_step, *inputs)
        else:
            self.eager_step(*inputs)
        if self.average:
            self.average.update(self.steps)
        self.steps += 1
        return self.losses.clone()

    def eager_step(self, images: Tensor, targets: Tensor, uniform: Tensor | None = None) -> None:
        """One step of all replicas, kernel by kernel, which `step` captures as one CUDA graph: sets losses (K,) and
        logit_rms (K,), and updates the weights. Arguments as those of `step`."""
        self.gradients = []  # the last step's would take memory beside this one's
        if not self.share_images:
            images, uniform = images[self.seed_of], None if uniform is None else uniform[self.seed_of]
        logits = self.forward(images, uniform)
        losses = compute_losses(logits.float(), targets[self.seed_of], self.smoothing)
        self.gradients = torch.autograd.grad(losses.sum(), [group.values for group in self.groups])
        for momentum, buffers in self.batch_norms:
            move(buffers, momentum)
        self.losses.copy_(losses.detach())
        self.logit_rms.copy_(logits.detach().float().square().mean((1, 2)).sqrt())
        self.update()

    def measurements(self) -> list[dict[str, float]]:
        norms, logits = self.gradient_norms.tolist(), self.logit_rms.tolist()
        of_roles = measure_roles(self.groups, self.roles, self.gradients, self.before, self.alive)
        return [
            {"grad_norm": norm, "logit_rms": rms, **roles}
            for norm, rms, roles in zip(norms, logits, of_roles, strict=True)
        ]

    def values(self) -> list[Tensor]:
        """A copy of all weights, one (K, weights) for each group."""
        return [group.values.detach().clone() for group in self.groups]

    @torch.no_grad()
    def update(self) -> None:
        """The runs' own optimizer in all replicas at once. One whose loss is not finite stays as it is from then."""
        optimizer = self.configs[0].optimizer
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
            if group.algorithm == "sgd":
                nesterov = optimizer.nesterov
                update_sgd(group, gradient, lr, momentum=self.momentum, coupled=self.coupled, nesterov=nesterov)
            elif group.algorithm == "muon":
                update_muon(group, gradient, lr, momentum=self.momentum)
            else:
                update_adamw(group, gradient, lr, betas=self.betas, steps_done=self.steps_done)
