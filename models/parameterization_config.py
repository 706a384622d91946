"""The parameterization's configuration, and what it makes of two sizes. Imports no torch, as models/config.py."""

from dataclasses import fields, replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from depthmup.models.config import AnyModelConfig, ConvResNetConfig, Size
from depthmup.models.config_errors import STRICT, checked_model
from depthmup.models.errors import ModelError
from depthmup.models.number import Number
from depthmup.models.parameterization import AUTO, PRESETS, Parameterization, Scale


def find_kind(model: AnyModelConfig) -> str:
    """The kind of network, as rows of parameterization.AUTO name it."""
    if not isinstance(model, ConvResNetConfig):
        return model.family
    layers = "1 layer" if model.convs_per_branch == 1 else f"{model.convs_per_branch} layers"
    return f"conv_resnet with {'no' if model.norm == 'none' else model.norm} norm and {layers} a branch"


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ParameterizationConfig:
    """A preset by name; a field that is not null overrides the preset's.

    `auto` is what published studies of this kind of network and optimizer say (parameterization.AUTO): preset and beta
    both. A run's configuration replaces it by these, so that they are its identity.
    """

    # sp: the standard one, no rules; mup: rules of width; depth_mup and completep: of width and depth; auto: see above
    name: Literal["sp", "mup", "depth_mup", "completep", "auto"] = "depth_mup"
    alpha: Annotated[Number, Field(ge=0)] | None = None  # residual branches are multiplied by beta * L^-alpha
    adam_depth_lr: Number | None = None  # exponent of L in AdamW's learning rate inside branches
    # which of AdamW's eps scale: every parameter's as its gradient does, those in residual branches, or none
    eps_scaling: Literal["table", "branch", "none"] | None = None
    weight_decay_scaling: Number | None = None  # exponent of N in a hidden matrix's coupled weight decay
    batch_lr: Number | None = None  # lr ~ (batch / base's)^batch_lr * (samples / base's)^samples_lr; null: the table's
    samples_lr: Number | None = None  # see batch_lr
    beta: Annotated[Number, Field(gt=0)] = 1.0  # scale of the residual branches; base_depth^-1/2 is the paper's form
    gamma0: Annotated[Number, Field(gt=0)] = 1.0  # richness of feature learning: features move gamma0 times as far

    def __post_init__(self) -> None:
        if self.name == "auto":
            if stated := [f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) != f.default]:
                raise ModelError(f"auto chooses {' and '.join(stated)} itself: leave that out, or name a preset")
            return
        for rules, keys in (("depth", ("alpha", "adam_depth_lr")), ("width", ("eps_scaling", "weight_decay_scaling"))):
            stated = [key for key in keys if getattr(self, key) is not None]
            if stated and not getattr(PRESETS[self.name], f"{rules}_rules"):
                others = " or ".join(name for name, preset in PRESETS.items() if getattr(preset, f"{rules}_rules"))
                raise ModelError(
                    f"{' and '.join(stated)} would do nothing: {self.name} has no {rules} rules; use {others}"
                )

    def choose(self, model: AnyModelConfig, optimizer: str) -> "ParameterizationConfig":
        """This one, or what `auto` means for the model and the optimizer. Raises ModelError where no study tells."""
        if self.name != "auto":
            return self
        kind = find_kind(model)
        choice = AUTO.get((kind, optimizer))
        if choice is None:
            known = "; ".join(f"{kind} under {name}" for kind, name in AUTO)
            raise ModelError(
                f"parameterization auto has no evidence for {kind} under {optimizer}: name a preset "
                f"({', '.join(PRESETS)}), best with a study of your own. There is evidence for {known}"
            )
        beta = model.base_depth ** -PRESETS[choice.preset].alpha if choice.absolute else 1.0
        return replace(self, name=choice.preset, beta=beta)

    def resolve(self) -> Parameterization:
        """The preset with this config's overrides. Raises ModelError for `auto`, which needs a model to be chosen."""
        if self.name == "auto":
            raise ModelError("parameterization auto depends on the model and the optimizer: take its `choose` of them")
        overrides = {key: value for key, value in vars(self).items() if value is not None and key != "name"}
        return replace(PRESETS[self.name], **overrides)


def scale_of(size: Size, base: Size, parameterization: ParameterizationConfig) -> Scale:
    """The ratios of `size` to `base` in width, depth, head dim, MLP ratio and experts, from which the rule table
    (parameterization.TABLE) computes its factors. Raises ModelError for `auto`, which a network has to resolve."""
    keys = ("width", "depth", "head_dim", "mlp_ratio", "num_experts")  # in the order of Scale's ratios
    return Scale(parameterization.resolve(), *(getattr(size, key) / getattr(base, key) for key in keys))
