"""One run's configuration: YAML and dotted overrides -> frozen dataclasses, or one clear error.

`run_hash` is a run's identity: its directory, its wandb id, and how the launcher knows that it is done. Paths, logging
and hardware do not enter it: their fields carry `identity: False`.
"""

import dataclasses
import hashlib
import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from depthmup.data.config import (
    NOT_IDENTITY,
    DataConfig,
    Positive,
    Whole,
    find_channel_misfit,
    find_stream_misfit,
    simplify_channels,
)
from depthmup.data.errors import UserError
from depthmup.models.config import OF_SEVERAL_EXPERTS, AnyModelConfig, MixtureVitConfig, ResNetConfig
from depthmup.models.config_errors import STRICT, checked
from depthmup.models.number import Number
from depthmup.models.optimizer_config import OptimizerConfig, refuse_idle
from depthmup.models.parameterization_config import ParameterizationConfig

# Independent weight decay is a mistake where weights remember fewer than 100 steps and the run is many times as long:
# only e^-3 of what was there at the start is left (a warning), or e^-30 (refused). The runs of a few hundred steps of a
# proxy may need more than 1 % a step, and long runs forget their start many times over, but slowly.
TAKES_MUCH, LEAVES_LITTLE, LEAVES_NOTHING = 0.01, 3, 30

checked_setting = checked(UserError)
checked_setting(DataConfig)  # here, as the packages data and models know nothing of each other
Switch = BeforeValidator(lambda value: "off" if value is False else value)  # YAML 1.1 reads a bare `off` as false


def refuse_auto(value: Any) -> Any:
    if value == "auto":
        raise ValueError("auto meant another result on another device: state bf16 (what it was on GPUs) or fp32 (CPUs)")
    return value


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over the run; `warmup` and `decay` are shares of its steps."""

    # after the warm-up: half a cosine to 0; constant; or constant, then linear to 0 (warm-up, stable, decay)
    name: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.1  # the share at the start that rises linearly from 0
    decay: Annotated[Number, Field(gt=0, le=1)] = 0.2  # wsd: the share at the end that falls linearly to zero

    def __post_init__(self) -> None:
        if self.name != "wsd" and self.decay != ScheduleConfig.decay:
            raise ValueError(f"decay would do nothing: {self.name} has none; leave it out, or use wsd")
        if self.name == "wsd" and self.warmup + self.decay > 1 + 1e-9:  # shares as 0.9 and 0.1 are rounded
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than the whole run together")

    def decay_step(self, num_steps: int) -> int:
        """How many steps of a run go by before the rate begins to fall, under wsd."""
        return num_steps - max(round(self.decay * num_steps), 1)

    @property
    def mean(self) -> float:
        """Mean of the factor over a run."""
        falling = {"cosine": 1 - self.warmup, "constant": 0.0, "wsd": self.decay}[self.name]
        return 1 - (self.warmup + falling) / 2


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Users state samples; steps are derived: samples // global_batch_size."""

    samples: Positive  # images of the whole run, those that come again in a later epoch counted again
    global_batch_size: Positive  # images of a step, over all processes
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0  # of the training loss
    clip_norm: Annotated[Number, Field(gt=0)] | None = None  # the gradient's largest norm; null: no limit
    drop_path: Annotated[Number, Field(ge=0, lt=1)] = 0.0  # stochastic depth of the last block; linear from 0
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None  # decay a step of the average of the weights, in fp32
    # Products and convolutions in it; weights, optimizer and the residual stream are fp32 always. tf32: GPUs only.
    precision: Annotated[Literal["fp32", "tf32", "bf16"], BeforeValidator(refuse_auto)] = "fp32"
    bf16_residual: bool = False  # with bf16, the residual stream too: faster, but small branch outputs are rounded away
    # images that each BatchNorm statistic is taken over, however they are spread; null: the whole global batch
    batch_norm_images: Annotated[Whole, Field(ge=2)] | None = None
    evaluate: tuple[Literal["minival", "val"], ...] = ("minival",)  # at the end of the run
    evaluate_every: Positive | None = field(default=None, metadata=NOT_IDENTITY)  # steps; null: at the end only
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=NOT_IDENTITY)  # auto: a GPU if there is one
    # what torch.compile makes one piece: each block (ViT), or the whole network
    compile: Annotated[Literal["off", "block", "model"], Switch] = field(default="off", metadata=NOT_IDENTITY)
    channels_last: bool | None = field(default=None, metadata=NOT_IDENTITY)  # null: for networks of convs
    activation_checkpointing: bool = field(default=False, metadata=NOT_IDENTITY)  # recompute blocks: less memory
    log_every: Positive = field(default=10, metadata=NOT_IDENTITY)  # steps
    checkpoint_every: Positive = field(default=1000, metadata=NOT_IDENTITY)  # steps
    keep_last: Positive = field(default=2, metadata=NOT_IDENTITY)  # checkpoints
    keep_every: Positive | None = field(default=None, metadata=NOT_IDENTITY)  # steps: these checkpoints stay for good
    keep_steps: tuple[Positive, ...] = field(default=(), metadata=NOT_IDENTITY)  # and these, as of a ladder's trunk
    # Most runs of a study that train as one process. 0 or 1: one by one; null: packs where they pay (docs/packed.md).
    pack: Annotated[Whole, Field(ge=0)] | None = field(default=None, metadata=NOT_IDENTITY)

    def __post_init__(self) -> None:
        if self.bf16_residual and self.precision != "bf16":
            raise ValueError(
                f"bf16_residual would do nothing: precision is {self.precision}; leave it out, or use precision bf16"
            )
        if twice := [split for split in self.evaluate if self.evaluate.count(split) > 1]:
            raise ValueError(f"evaluate: {twice[0]} is there twice: leave one out")
        if self.evaluate_every and not self.evaluate:
            raise ValueError("evaluate_every would do nothing: evaluate names no split; leave it out, or name one")
        if self.samples < self.global_batch_size:
            raise ValueError(f"samples {self.samples} is less than one global batch of {self.global_batch_size}")
        if self.batch_norm_images and self.global_batch_size % self.batch_norm_images:
            raise ValueError(
                f"batch_norm_images {self.batch_norm_images} must divide global_batch_size {self.global_batch_size}"
            )

    @property
    def num_steps(self) -> int:
        return self.samples // self.global_batch_size

    # After which steps something happens beside training. Steps are counted from 1.

    def evaluates(self, step: int) -> bool:
        """In mid-run; the evaluation at the end is not meant."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0 and step < self.num_steps

    def logs(self, step: int) -> bool:
        """Every evaluation has a line, whatever log_every is."""
        return step % self.log_every == 0 or step == self.num_steps or self.evaluates(step)

    def saves(self, step: int) -> bool:
        """What is to be kept for good is saved, whatever checkpoint_every is."""
        return (step % self.checkpoint_every == 0 or self.keeps(step)) and step < self.num_steps

    def keeps(self, step: int) -> bool:
        """Whether its checkpoint stays for good."""
        return step in self.keep_steps or (self.keep_every is not None and step % self.keep_every == 0)


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over processes: hardware, no part of its identity.

    engine: `auto` is `none` for one process and `ddp` for several. `fsdp` shards parameters, gradients and optimizer
    state block by block; `deepspeed` does as much of it as `zero_stage` says (0 nothing ... 3 everything).
    shard_size: of `fsdp`, how many neighbouring processes hold one copy of the model between them, as the GPUs of a
    node; the groups hold copies, and average their gradients. null: all processes hold one copy.
    gather: of `fsdp`, what the matrices and kernels of the blocks are sent in. With train.precision bf16, which rounds
    them all the same, `bf16` halves what is sent.
    """

    engine: Literal["auto", "none", "ddp", "fsdp", "deepspeed"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 2  # of deepspeed
    shard_size: Positive | None = None  # of fsdp: processes to a copy; null: all
    gather: Literal["fp32", "bf16"] = "fp32"  # of fsdp
    micro_batch_size: Positive | None = None  # images a process takes at once; null: its whole share of the batch
    init_timeout: Positive = 120  # seconds for the processes to find each other
    step_timeout: Positive = 300  # seconds that a step waits for the others, once the first step is done

    def __post_init__(self) -> None:
        if self.zero_stage != ParallelConfig.zero_stage and self.engine != "deepspeed":
            raise ValueError(
                f"zero_stage would do nothing: engine is {self.engine}; leave it out, or use engine deepspeed"
            )
        for key in ("shard_size", "gather"):
            if getattr(self, key) != getattr(ParallelConfig, key) and self.engine != "fsdp":
                raise ValueError(f"{key} would do nothing: engine is {self.engine}; leave it out, or use engine fsdp")

    def copies(self, world_size: int) -> int:
        """How many copies of the model `fsdp` holds. Raises ValueError when shard_size does not divide `world_size`."""
        size = self.shard_size or world_size
        if world_size % size:
            fitting = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
            raise ValueError(
                f"parallel.shard_size {size} must divide the {world_size} processes: use {', '.join(fitting)}"
            )
        return world_size // size

    def micro_batches(self, global_batch_size: int, world_size: int) -> int:
        """Number of forward and backward passes a step. Raises ValueError when sizes do not divide."""
        if global_batch_size % world_size:
            lower = global_batch_size // world_size * world_size
            nearest = f"{lower} or {lower + world_size}" if lower else str(world_size)
            raise ValueError(
                f"train.global_batch_size {global_batch_size} must be a multiple of the {world_size} processes: "
                f"use {nearest}"
            )
        local = global_batch_size // world_size
        size = self.micro_batch_size or local
        if local % size:
            raise ValueError(
                f"parallel.micro_batch_size {size} must divide the {local} images that each of {world_size} "
                f"process(es) takes of a global batch of {global_batch_size}"
            )
        return local // size


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go beside metrics.jsonl: no part of a run's identity."""

    wandb: Annotated[Literal["off", "offline", "online"], Switch] = "off"  # offline: into the run's folder
    tensorboard: bool = False  # event files in the run's folder
    project: str = "depthmup"  # on W&B
    group: str | None = None  # on W&B; null: of a study's runs its name

    def __post_init__(self) -> None:
        if self.wandb == "off" and self.project != TrackConfig.project:
            raise ValueError("project would do nothing: wandb is off; leave it out, or use wandb online or offline")


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class RunConfig:
    """Everything that one run needs."""

    model: AnyModelConfig
    parameterization: ParameterizationConfig = field(default_factory=ParameterizationConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=NOT_IDENTITY)
    track: TrackConfig = field(default_factory=TrackConfig, metadata=NOT_IDENTITY)
    seed: Annotated[Whole, Field(ge=0)] = 0  # of the weights, the order of images and all chance; a study sets it

    def __post_init__(self) -> None:
        chosen = self.parameterization.choose(self.model, self.optimizer.name)
        object.__setattr__(self, "parameterization", chosen)  # the identity has what `auto` meant
        refuse_idle(self.parameterization.resolve(), self.optimizer)
        if self.parallel.gather == "bf16" and self.train.precision != "bf16":
            raise ValueError(
                f"parallel.gather bf16 would round the weights of a run in {self.train.precision}: leave it out, or "
                "use train.precision=bf16"
            )
        if self.optimizer.name == "muon" and self.parallel.engine == "deepspeed":
            raise ValueError("optimizer.name muon needs whole matrices, which deepspeed flattens: use ddp")
        if self.train.batch_norm_images and getattr(self.model, "norm", None) != "batch":
            raise ValueError(
                f"train.batch_norm_images would do nothing: model.family {self.model.family} has no BatchNorm as "
                "stated; leave it out"
            )
        if self.train.drop_path and not self.model.may_drop_branches:
            raise ValueError(
                f"train.drop_path would do nothing: family {self.model.family} of depth {self.model.depth} has no "
                "residual branch after its first block; leave it out"
            )
        norm = getattr(self.model, "norm", None)
        if norm != "group" and getattr(self.model, "num_groups", None) not in (None, ResNetConfig.num_groups):
            raise ValueError(
                f"model.num_groups would do nothing: model.norm is {norm}; leave it out, or use model.norm group"
            )
        if getattr(self.model, "num_experts", None) == 1:
            for key in OF_SEVERAL_EXPERTS:
                if getattr(self.model, key) != getattr(MixtureVitConfig, key):
                    raise ValueError(
                        f"model.{key} would do nothing: model.num_experts is 1; leave it out, or use more experts"
                    )
        if misfit := find_channel_misfit(self.data, self.model.in_channels):
            raise ValueError(misfit)
        object.__setattr__(self, "data", simplify_channels(self.data))
        if misfit := find_stream_misfit(self.data.num_streams, self.train.global_batch_size):
            raise ValueError(misfit)
        if self.forgets >= LEAVES_NOTHING:
            raise ValueError(str(self.decay_warning))

    @property
    def resolved_optimizer(self) -> OptimizerConfig:
        """What trains: with a weight decay, whichever way it is stated."""
        return self.optimizer.with_decay(self.train.num_steps)

    @property
    def forgets(self) -> float:
        """What independent weight decay takes off over the run, as an exponent: e to the minus this is what it leaves.
        0 where a step takes little, and in the coupled mode."""
        taken = self.resolved_optimizer.weight_decay * self.optimizer.noise_ratio
        if self.optimizer.weight_decay_mode == "coupled" or taken < TAKES_MUCH:
            return 0.0
        return taken * self.schedule.mean * self.train.num_steps

    @property
    def decay_warning(self) -> str | None:
        """Says that weight decay takes off too much to be meant, and what would be."""
        if self.forgets < LEAVES_LITTLE:
            return None
        decay, lr = self.resolved_optimizer.weight_decay, self.optimizer.lr
        if tau := self.optimizer.tau_ema:
            mend = tau * self.forgets / LEAVES_LITTLE
            return (
                f"optimizer.tau_ema {tau:g} lets a weight remember {tau * self.train.num_steps:.3g} of the run's "
                f"{self.train.num_steps} steps, which leave e^-{self.forgets:.3g} of it: use "
                f"optimizer.tau_ema={mend:.3g} or more"
            )
        return (
            f"optimizer.weight_decay {decay:g} does not depend on the learning rate: a step takes up to "
            f"{decay * self.optimizer.noise_ratio:.3g} of every weight, and {self.train.num_steps} steps leave "
            f"e^-{self.forgets:.3g} of it. A recipe for torch's own rule, lr * weight_decay, means "
            f"optimizer.weight_decay_mode=coupled; the same in this mode is optimizer.weight_decay={decay * lr:.3g}"
        )


def find_default(f: "dataclasses.Field[Any]") -> Any:
    """A field's default; dataclasses.MISSING, which equals nothing, where a value has to be stated."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def find_identity(config: Any, defaults: bool = True) -> Any:
    """The configuration as plain data, without the fields that do not change a result.

    Without `defaults` also without what equals its default, so that a field that is new, and has a default under which
    nothing changes, leaves every older run what it was. Which of several classes a section is of is never left out. Of
    a text that has other ways to say the same, its fingerprint stands for it.
    """
    if isinstance(config, tuple):
        return [find_identity(item, defaults) for item in config]
    if not dataclasses.is_dataclass(config):
        return config
    found = {}
    for f in dataclasses.fields(config):
        value, part = getattr(config, f.name), f.metadata.get("identity", "unless default")
        if part and (defaults or part == "always" or value != find_default(f)):
            found[f.name] = part(value) if callable(part) else find_identity(value, defaults)
    return found


def run_hash(config: RunConfig) -> str:
    """12 hexadecimal digits, the same for every way of writing the same run."""
    return hashlib.sha256(json.dumps(find_identity(config, defaults=False), sort_keys=True).encode()).hexdigest()[:12]


def flatten(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"depth": 3}} -> {"model.depth": 3}"""
    found: dict[str, Any] = {}
    for key, value in sections.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
