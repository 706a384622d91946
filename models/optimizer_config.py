"""The optimizer's configuration. Nothing here imports torch."""

from dataclasses import field, fields, replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from depthmup.models.config_errors import STRICT, checked_model
from depthmup.models.errors import ModelError
from depthmup.models.number import Number
from depthmup.models.parameterization import PRESETS, Parameterization
from depthmup.models.training_scale import TRAINING_TABLE, combine_powers

RoleRate = Annotated[Number, Field(gt=0)]


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class RoleRates:
    """What multiplies the learning rate of each role (models.parameterization.Role), at every size alike."""

    input: RoleRate = 1.0
    branch_hidden: RoleRate = 1.0
    hidden: RoleRate = 1.0
    branch_vector: RoleRate = 1.0
    vector: RoleRate = 1.0
    branch_scalar: RoleRate = 1.0
    stream_vector: RoleRate = 1.0
    scalar: RoleRate = 1.0
    readout: RoleRate = 1.0
    router: RoleRate = 1.0
    gate: RoleRate = 1.0
    expert_up: RoleRate = 1.0
    expert_down: RoleRate = 1.0


USERS = {  # of a key that not every optimizer has
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd",),
    "betas": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
    "beta_scaling": ("adamw", "muon"),
}


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class OptimizerConfig:
    """Base hyperparameters: those of the proxy. `lr` is the peak learning rate of the base model.

    weight_decay_mode: `independent` shrinks a weight by weight_decay * schedule(step) a step, whatever the optimizer,
    its momentum and the learning rate; `coupled` is torch's own rule (lr * weight_decay), with the table's factor.
    tau_ema: in place of weight_decay, the share of the run that a weight remembers at the peak rate, 1 / (lr * decay *
    steps) (2405.13698): what is tuned and kept over sizes and horizons. `with_decay` makes a weight decay of it.
    muon: torch's Muon for hidden matrices, with AdamW's update size, so that one `lr` serves it and AdamW, which
    trains the rest; `momentum` is Muon's (0.95 is usual), `betas` and `eps` are AdamW's.
    batch_ratio, samples_ratio: global batch size and sample budget over the proxy's. They move learning rate, decay,
    eps and betas by the optimizer's row of models.training_scale.TRAINING_TABLE; at 1 nothing moves.
    role_lr: the ratio of the roles' learning rates, which transfers as `lr` does. Independent decay does not see it.
    """

    name: Literal["sgd", "adamw", "muon"] = "adamw"  # muon: AdamW trains what is no hidden matrix
    lr: Annotated[Number, Field(gt=0)]  # the peak
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9  # of sgd and muon
    nesterov: bool = False  # of sgd
    # of adamw, and of what AdamW trains beside muon
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[Number, Field(gt=0)] = 1e-8  # as betas
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0  # of matrices and convs; norms and biases are not decayed
    weight_decay_mode: Literal["independent", "coupled"] = "independent"
    tau_ema: Annotated[Number, Field(gt=0)] | None = None
    batch_ratio: Annotated[Number, Field(gt=0)] = 1.0
    samples_ratio: Annotated[Number, Field(gt=0)] = 1.0
    beta_scaling: Literal["both", "second", "none"] = "both"  # which of the betas the two ratios move
    role_lr: RoleRates = field(default_factory=RoleRates)

    def __post_init__(self) -> None:
        for each in fields(self):
            users = USERS.get(each.name, (self.name,))
            if self.name not in users and getattr(self, each.name) != each.default:
                raise ModelError(
                    f"{each.name} would do nothing: {self.name} has none; leave it out, or use {' or '.join(users)}"
                )
        if self.tau_ema and self.weight_decay:
            raise ModelError("weight_decay and tau_ema set the same thing: leave one of them out")
        if self.nesterov and not self.momentum:
            raise ModelError("nesterov needs a momentum above 0")
        if min(self.scaled_betas) < 0:
            ratios = f"batch_ratio {self.batch_ratio:g} and samples_ratio {self.samples_ratio:g}"
            raise ModelError(f"{ratios} make a beta of {self.betas} negative: use beta_scaling second, or larger betas")

    def with_decay(self, num_steps: int) -> "OptimizerConfig":
        """With the weight decay that `tau_ema` is in a run of `num_steps`; itself where none is stated."""
        if self.tau_ema is None:
            return self
        a_step = 1 / (self.tau_ema * num_steps)  # the share of a weight that a step takes off, at this batch and length
        stated = a_step / self.noise_ratio  # the rules multiply by it
        decay = stated if self.weight_decay_mode == "independent" else stated / self.lr
        return replace(self, tau_ema=None, weight_decay=decay)

    @property
    def noise_ratio(self) -> float:
        """m_B / m_D: the share of a run's samples that one step sees, over the proxy's."""
        return self.batch_ratio / self.samples_ratio

    @property
    def scaled_betas(self) -> tuple[float, float]:
        """With 1 - beta as the table has it."""
        factor = combine_powers(TRAINING_TABLE[self.name].averaging, self.batch_ratio, self.samples_ratio)
        moved = {"both": (True, True), "second": (False, True), "none": (False, False)}[self.beta_scaling]
        first, second = (
            1 - (1 - beta) * factor if moves else beta for beta, moves in zip(self.betas, moved, strict=True)
        )
        return first, second


def refuse_idle(parameterization: Parameterization, optimizer: OptimizerConfig) -> None:
    """Raises ModelError for a field of the parameterization that is not its preset's, and that `optimizer` never reads.
    At every size the field would do nothing."""
    coupled = optimizer.weight_decay_mode == "coupled"
    readers = {
        "adam_depth_lr": (optimizer.name != "sgd", "optimizer.name adamw or muon"),
        "eps_scaling": (optimizer.name != "sgd", "optimizer.name adamw or muon"),
        "weight_decay_scaling": (
            optimizer.name != "sgd" and coupled,
            "optimizer.weight_decay_mode coupled and optimizer.name adamw or muon",
        ),
    }
    for axis in ("batch", "samples"):
        if getattr(parameterization, f"{axis}_lr") is not None and getattr(optimizer, f"{axis}_ratio") == 1:
            raise ModelError(
                f"parameterization.{axis}_lr would do nothing: optimizer.{axis}_ratio is 1; leave it out, or state the "
                "ratio to the base's"
            )
    preset = PRESETS[parameterization.name]
    for key, (is_read, needed) in readers.items():
        if not is_read and getattr(parameterization, key) != getattr(preset, key):
            raise ModelError(
                f"parameterization.{key} would do nothing under {optimizer.name} with {optimizer.weight_decay_mode} "
                f"weight decay: leave it out, or use {needed}"
            )
