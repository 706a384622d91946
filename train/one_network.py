"""One network in training: a plain torch module and a plain torch optimizer, spread over processes by an engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.models.build import build, build_unfilled, fill
from depthmup.models.moe_vit import find_mixtures
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.train.average import WeightAverage, average_tensors
from depthmup.train.batch_norm import BatchStatistics, choose_grouping, find_batch_norms, find_process_group
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, sum_over_ranks
from depthmup.train.engines.base import Fill, TensorState, average_buffers
from depthmup.train.engines.choice import make_engine, starts_on_meta
from depthmup.train.expert_load import balance_experts, load_metrics
from depthmup.train.networks import describe
from depthmup.train.prepare import prepare, prepare_autocast, prepare_device
from depthmup.train.schedule import schedule, set_learning_rate
from depthmup.train.step import StepResult, autocast, take_step
from depthmup.train.stochastic_depth import install_stochastic_depth
from depthmup.train.telemetry import RoleStatistics
from depthmup.train.tensors import spread_like


def do_nothing(*, take: Callable[[nn.Module], object] | None = None) -> None:
    """In the place of what fills a network on meta, for one that is whole."""


class OneNetwork:
    """train.networks.Networks with K = 1; its leading axes of length 1 are views."""

    def __init__(
        self, config: RunConfig, engine_name: str, micro_batches: int, world: World, device: torch.device
    ) -> None:
        """Raises UserError for what does not go together, or is not installed."""
        self.config, self.device, self.micro_batches = config, device, micro_batches
        self.seeds, self.steps = [config.seed], 0
        self.descriptions: list[str] = []
        self.dtype = prepare_device(config.train, device)
        if starts_on_meta(engine_name, config.parallel):
            scaled = build_unfilled(config.model, config.parameterization)
            fill_network: Fill = partial(fill, scaled, config.seed, device, spread_like)
        else:
            scaled = build(config.model, config.parameterization, config.seed, device)
            fill_network = do_nothing
        branches, blocks = list(scaled.branches), list(scaled.blocks)
        self.draws = install_stochastic_depth(scaled.network, branches, blocks, config.train.drop_path)
        self.num_drop_branches = self.draws.num_branches
        if self.dtype:
            prepare_autocast(scaled.network, blocks, branches, config.train, device, self.dtype)
        self.channels_last = prepare(scaled.network, blocks, config.train, engine_name, device)

        def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
            groups = parameter_groups(network, scaled.rules, scaled.scale, config.resolved_optimizer)
            place = f"{engine_name} on {world.size} x {device.type}, {micro_batches} micro-batch(es), {self.dtype}"
            self.descriptions.append(describe(config, scaled, groups, place))
            return build_optimizer(groups, config.resolved_optimizer)

        self.engine = make_engine(
            engine_name,
            scaled.network,
            make_optimizer,
            blocks=blocks,
            device=device,
            fill=fill_network,
            config=config.parallel,
            autocast_dtype=self.dtype,
            clip_norm=config.train.clip_norm,
            micro_batches=micro_batches,
            micro_batch_size=config.train.global_batch_size // world.size // micro_batches,
        )
        self.grouping, self.statistics = None, None
        if find_batch_norms(scaled.network):  # it adds buffers, and so comes once the network is on the device
            self.grouping = choose_grouping(config, world.size, micro_batches)
            shared = find_process_group(self.grouping)
            self.statistics = BatchStatistics(scaled.network, self.grouping.images, shared)
        self.average: WeightAverage | None = None
        if config.train.ema:
            if engine_name == "deepspeed" and config.parallel.zero_stage == 3:
                raise UserError("train.ema cannot see ZeRO 3's shards: use parallel.engine=fsdp, or zero_stage 2")
            self.average = WeightAverage(average_tensors(scaled.network), config.train.ema)
        roles = {name: rule.role.value for name, rule in scaled.rules.items()}
        self.roles = RoleStatistics(scaled.network, roles) if engine_name != "deepspeed" else None
        self.mixtures = find_mixtures(scaled.network)
        self.loads: list[Tensor] = []  # of each step since the last measurement
        self.result: StepResult | None = None  # of the last step

    def step(self, images: Tensor, targets: Tensor, uniform: Tensor | None = None, measure: bool = False) -> Tensor:
        config = self.config
        factor = schedule(config.schedule, self.steps, config.train.num_steps)
        set_learning_rate(self.engine.optimizer, config.optimizer.lr, factor)
        if measure and self.roles:
            self.roles.before_step()
        self.result = take_step(
            self.engine,
            images[0],
            targets[0],
            micro_batches=self.micro_batches,
            statistics=self.statistics,
            draws=self.draws,
            uniform=None if uniform is None else uniform[0],
            autocast_dtype=self.dtype,
            label_smoothing=config.train.label_smoothing,
            clip_norm=config.train.clip_norm,
        )
        if self.mixtures:
            self.loads.append(balance_experts(self.mixtures, sum_over_ranks))
        if self.average:
            self.average.update(self.steps)
        self.steps += 1
        return self.result.loss[None]

    def measurements(self) -> list[dict[str, float]]:
        assert self.result is not None
        norm = self.engine.gradient_norm() if self.result.grad_norm is None else self.result.grad_norm
        rms = self.result.logits.float().square().mean().sqrt()
        line = {"grad_norm": float(norm), "logit_rms": float(rms), **(self.roles.after_step() if self.roles else {})}
        if self.mixtures:
            line |= load_metrics(self.mixtures, torch.stack(self.loads).mean(0))
            self.loads.clear()
        return [line]

    def logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            logits: Tensor = self.engine.module(images)
        return logits.float()[None]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        average_buffers(self.engine.network)
        self.engine.module.eval()
        try:
            yield
        finally:
            self.engine.reshard()
            self.engine.module.train()

    def state(self, number: int) -> TensorState:
        """What it says of BatchNorm is the mean over the processes. The average shares its tensors with it."""
        average_buffers(self.engine.network)
        if self.average is None:
            return self.engine.state()
        with self.average.swapped_in():
            average_buffers(self.engine.network)
        return {**self.engine.state(), "average": self.average.weights}

    def load(self, number: int, state: TensorState, step: int) -> None:
        self.steps = step
        self.engine.load_state(state)

    def keep(self, numbers: Sequence[int]) -> None:
        """There is one."""

    def full_weights(self, number: int) -> dict[str, Tensor]:
        average_buffers(self.engine.network)
        return self.engine.full_weights()
