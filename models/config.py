"""The models' configuration. Nothing here imports torch, so that a plan of thousands of runs is read in no time."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from models.parameterization import PRESETS, Parameterization

POWER = re.compile(r"\s*([+-]?[\d.]+)\s*(?:\*\*|\^)\s*([+-]?[\d.]+)\s*")


def parse_number(value: Any) -> Any:
    """'2**-9' -> 2^-9 and '1e-3' -> 0.001 (YAML 1.1 reads the latter as text). Anything else is passed on."""
    if isinstance(value, str):
        if power := POWER.fullmatch(value):
            return float(power[1]) ** float(power[2])
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size and shape of a model. At the base size every scaling factor is 1."""

    width: Positive
    depth: Positive
    base_width: Positive
    base_depth: Positive
    num_classes: Positive = 1000
    image_size: Positive = 224
    in_channels: Literal[1, 3] = 3

    @property
    def width_ratio(self) -> float:
        """N = width / base_width."""
        return self.width / self.base_width

    @property
    def depth_ratio(self) -> float:
        """L = depth / base_depth."""
        return self.depth / self.base_depth


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(ModelConfig):
    """timm's ViT. Give `head_dim` to let the number of heads grow with width, or `num_heads` to let the head dim
    grow (Bordelon et al.)."""

    family: Literal["vit"] = "vit"
    patch_size: Positive = 16
    head_dim: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: Annotated[Number, Field(gt=0)] = 4.0
    qk_norm: bool = False
    class_token: bool = True
    global_pool: Literal["token", "avg"] = "token"

    def __post_init__(self) -> None:
        if (self.head_dim is None) == (self.num_heads is None):
            raise ValueError("give exactly one of head_dim (heads grow with width) and num_heads (head dim grows)")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs class_token: true (or use global_pool: avg)")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        what, divisor = ("head_dim", self.head_dim) if self.head_dim else ("num_heads", self.num_heads)
        assert divisor is not None
        for name, width in (("width", self.width), ("base_width", self.base_width)):
            if width % divisor:
                lower = width // divisor * divisor
                nearest = f"{lower} or {lower + divisor}" if lower else str(divisor)
                raise ValueError(f"{name} {width} must be a multiple of {what} {divisor}: use {nearest}")

    def heads(self, width: int) -> tuple[int, int]:
        """(number of heads, head dim) at `width`."""
        num_heads = self.num_heads or width // (self.head_dim or 1)
        return num_heads, width // num_heads


@dataclass(frozen=True, kw_only=True)
class ConvResNetConfig(ModelConfig):
    """The paper's net: `depth` residual blocks in `num_stages` stages of equal length and width."""

    family: Literal["conv_resnet"] = "conv_resnet"
    num_stages: Positive = 3
    convs_per_branch: Positive = 1
    norm: Literal["none", "batch", "layer"] = "none"

    def __post_init__(self) -> None:
        for name, depth in (("depth", self.depth), ("base_depth", self.base_depth)):
            if depth % self.num_stages:
                lower = depth // self.num_stages * self.num_stages
                nearest = f"{lower} or {lower + self.num_stages}" if lower else str(self.num_stages)
                raise ValueError(f"{name} {depth} must be a multiple of num_stages {self.num_stages}: use {nearest}")
        if self.image_size < 2 ** (self.num_stages - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved between {self.num_stages} stages")


AnyModelConfig = Annotated[VisionTransformerConfig | ConvResNetConfig, Field(discriminator="family")]


@dataclass(frozen=True, kw_only=True)
class ParameterizationConfig:
    """A preset by name; a field that is not null overrides the preset's."""

    name: Literal["sp", "mup", "depth_mup", "completep"] = "depth_mup"
    alpha: Annotated[Number, Field(ge=0)] | None = None
    adam_depth_lr: Number | None = None
    eps_scaling: Literal["table", "branch", "none"] | None = None
    weight_decay_scaling: Number | None = None
    beta: Annotated[Number, Field(gt=0)] = 1.0
    gamma0: Annotated[Number, Field(gt=0)] = 1.0

    def resolve(self) -> Parameterization:
        """The preset with this config's overrides."""
        overrides = {key: value for key, value in vars(self).items() if value is not None and key != "name"}
        return replace(PRESETS[self.name], **overrides)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Base hyperparameters: those of the proxy. `lr` is the peak learning rate of the base model.

    weight_decay_mode: `independent` shrinks a weight by weight_decay * schedule(step) a step, whatever the learning
    rate; `coupled` is torch's own rule (lr * weight_decay), with the table's factor.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[Number, Field(gt=0)]
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    weight_decay_mode: Literal["independent", "coupled"] = "independent"
