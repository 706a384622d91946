"""The models' configuration. Nothing here imports torch, so that a plan of thousands of runs is read in no time."""

import difflib
import math
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from depthmup.models.config_errors import STRICT, checked_model
from depthmup.models.errors import ModelError
from depthmup.models.named_sizes import expand_named_size
from depthmup.models.number import Number, Positive
from depthmup.models.source_code import fingerprint_source, list_defined_names

TAG = {"identity": "always"}  # on a field that says which class this is: never left out of a run's identity


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class Size:
    """What the scaling rules compare between a model and its base. `head_dim` matters only where it grows.

    num_experts, mlp_ratio: of a mixture of experts, how many there are and how wide one is over the network's width.
    """

    width: Positive
    depth: Positive
    head_dim: Positive = 1
    num_experts: Positive = 1
    mlp_ratio: Annotated[Number, Field(gt=0)] = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """Size and shape of a model. At the base size every scaling factor is 1."""

    width: Positive  # channels of the residual stream (resnet, timm: of the first stage)
    depth: Positive  # residual blocks: a ViT's have two branches each (timm: see its section)
    base_width: Positive  # of the base, from which every factor of the rules counts
    base_depth: Positive  # likewise
    num_classes: Positive = 1000  # as many as the data has
    image_size: Positive = 224  # pixels of a side, as the network sees it
    in_channels: Literal[1, 3] = 3  # 1: grey images

    @property
    def size(self) -> Size:
        return Size(width=self.width, depth=self.depth)

    @property
    def base_size(self) -> Size:
        return Size(width=self.base_width, depth=self.base_depth)

    @property
    def head_dim_grows(self) -> bool:
        """Whether the dimension over which attention sums grows with width."""
        return False

    @property
    def may_drop_branches(self) -> bool:
        """Whether there is a residual branch beside the first block's, which stochastic depth never drops."""
        return self.depth > 1

    @property
    def title(self) -> str:
        """What a report calls the network."""
        return str(getattr(self, "family"))  # noqa: B009  (a field of each family, and none of this base)

    @property
    def chance(self) -> float:
        """The loss of a guess."""
        return math.log(self.num_classes)


def check_multiple(name: str, value: int, divisor: int, what: str) -> None:
    """Raises ModelError, with the nearest values that fit, unless `divisor` divides `value`."""
    if value % divisor:
        lower = value // divisor * divisor
        nearest = f"{lower} or {lower + divisor}" if lower else str(divisor)
        raise ModelError(f"{name} {value} must be a multiple of {what} {divisor}: use {nearest}")


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class VisionTransformerConfig(ModelConfig):
    """timm's ViT called `timm_name`, at this width and depth; a key that is null is as timm has it under that name.

    Give `head_dim` to let the number of heads grow with width, or `num_heads` to let the head dim grow (Bordelon et
    al.). Block types other than timm's plain one, and attention pooling, have no rules and are refused.
    """

    family: Literal["vit"] = field(default="vit", metadata=TAG)
    timm_name: str = "vit_base_patch16_224"  # the ViT or DeiT to start from
    head_dim: Positive | None = None  # of attention: the number of heads grows with width
    num_heads: Positive | None = None  # instead of head_dim: the head dim grows with width
    patch_size: Positive | None = None  # pixels of a side; image_size is a multiple
    mlp_ratio: Annotated[Number, Field(gt=0)] | None = None  # hidden width of a block's MLP over width
    qk_norm: bool | None = None  # norms of queries and keys in attention
    class_token: bool | None = None  # beside the patches
    global_pool: Literal["token", "avg"] | None = None  # what the readout sees: the class token, or the mean
    layer_scale: Annotated[Number, Field(ge=0)] | None = None  # initial value; 0 leaves LayerScale out

    def __post_init__(self) -> None:
        if (self.head_dim is None) == (self.num_heads is None):
            raise ModelError("give exactly one of head_dim (heads grow with width) and num_heads (head dim grows)")
        if self.class_token is False and self.global_pool != "avg":
            raise ModelError("class_token: false needs global_pool: avg")
        if self.patch_size and self.image_size % self.patch_size:
            raise ModelError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        what, divisor = ("head_dim", self.head_dim) if self.head_dim else ("num_heads", self.num_heads)
        assert divisor is not None
        check_multiple("width", self.width, divisor, what)
        check_multiple("base_width", self.base_width, divisor, what)

    @property
    def head_dim_grows(self) -> bool:
        return self.num_heads is not None

    def heads(self, width: int) -> tuple[int, int]:
        """(number of heads, head dim) at `width`."""
        num_heads = self.num_heads or width // (self.head_dim or 1)
        return num_heads, width // num_heads

    @property
    def size(self) -> Size:
        return Size(width=self.width, depth=self.depth, head_dim=self.heads(self.width)[1])

    @property
    def base_size(self) -> Size:
        return Size(width=self.base_width, depth=self.base_depth, head_dim=self.heads(self.base_width)[1])


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """timm's ResNet, or its ResNetV2 (`preactivation`). `width` is the channels of the stem and of the first stage's
    3x3 convs, 64 in ResNet-50; `depth` counts residual blocks and is a multiple of the pattern `blocks`."""

    family: Literal["resnet"] = field(default="resnet", metadata=TAG)
    block: Literal["basic", "bottleneck"] = "basic"  # as in ResNet-18, or as in ResNet-50
    blocks: tuple[Positive, Positive, Positive, Positive] = (1, 1, 1, 1)  # of each stage; their sum divides depth
    preactivation: bool = False  # norm and ReLU before each conv: timm's ResNetV2
    norm: Literal["batch", "group", "none"] = "batch"  # after each conv, or before it (preactivation)
    num_groups: Positive = 32  # of norm group

    def __post_init__(self) -> None:
        check_multiple("depth", self.depth, sum(self.blocks), f"the blocks in {list(self.blocks)},")
        if self.base_depth < len(self.blocks):  # the base's pattern may be another: that of ResNet-18 for ResNet-50
            raise ModelError(f"base_depth {self.base_depth} must be at least {len(self.blocks)}: a block in each stage")
        divisor, what = (self.num_groups, "num_groups") if self.norm == "group" else (8, "timm's channel step")
        for name, width in (("width", self.width), ("base_width", self.base_width)):
            check_multiple(name, width, divisor, what)

    @property
    def blocks_per_stage(self) -> tuple[int, ...]:
        return tuple(count * self.depth // sum(self.blocks) for count in self.blocks)


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ConvResNetConfig(ModelConfig):
    """The paper's net: `depth` residual blocks in `num_stages` stages of equal length and width."""

    family: Literal["conv_resnet"] = field(default="conv_resnet", metadata=TAG)
    num_stages: Positive = 3  # of depth / num_stages blocks each; images are halved between them
    convs_per_branch: Positive = 1  # one after another in a block
    norm: Literal["none", "batch", "layer"] = "none"  # before the activation that is before each conv
    activation: Literal["relu", "tanh"] = "relu"  # before each conv, and before the readout

    def __post_init__(self) -> None:
        check_multiple("depth", self.depth, self.num_stages, "num_stages")
        check_multiple("base_depth", self.base_depth, self.num_stages, "num_stages")
        if self.image_size < 2 ** (self.num_stages - 1):
            raise ModelError(f"image_size {self.image_size} cannot be halved between {self.num_stages} stages")


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class TimmConfig(ModelConfig):
    """timm's network called `timm_name`, its roles found by looking. `width` is that of its first stage, `depth` the
    blocks of each stage, or as many times the pattern of its architecture in models/timm_sizes.py.

    `head_dim` where it has attention: the number of heads grows with width. `arguments` are given to timm as they are.
    """

    family: Literal["timm"] = field(default="timm", metadata=TAG)
    timm_name: str  # of a network whose width and depth are arguments (models/timm_sizes.py)
    head_dim: Positive | None = None  # where it has attention: the number of heads grows with width
    arguments: dict[str, bool | int | float | str | list[int]] = field(default_factory=dict)  # as {patch_size: 2}

    def __post_init__(self) -> None:
        if self.head_dim:
            check_multiple("width", self.width, self.head_dim, "head_dim")
            check_multiple("base_width", self.base_width, self.head_dim, "head_dim")

    @property
    def title(self) -> str:
        return self.timm_name

    @property
    def may_drop_branches(self) -> bool:
        return True  # most have several stages, of `depth` blocks each


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class OwnConfig(ModelConfig):
    """A network of one's own, its roles found by looking. `builder` is FILE.py:FUNCTION: FUNCTION(width, depth) gives
    the torch.nn.Module, and takes num_classes, image_size or in_channels where it has arguments of these names.

    FILE is read where the configuration is: its text stays with every run as `code`, which is part of the run's
    identity but for comments and layout, and needs nothing but what is installed.
    """

    family: Literal["own"] = field(default="own", metadata=TAG)
    builder: str  # FILE.py:FUNCTION; in what is written, FUNCTION of `code`
    code: str = field(default="", metadata={"identity": fingerprint_source})  # the text of FILE, read from there

    def __post_init__(self) -> None:
        if not self.code:
            raise ModelError(f"builder {self.builder!r} names no file: write FILE.py:FUNCTION")
        if self.builder not in (known := list_defined_names(self.code)):
            nearest = difflib.get_close_matches(self.builder, known, 3, cutoff=0) or ["none"]
            raise ModelError(f"builder: nothing there is called {self.builder!r}; nearest: {', '.join(nearest)}")

    @property
    def title(self) -> str:
        return self.builder

    @property
    def may_drop_branches(self) -> bool:
        return True  # how many branches a block has is found where the network is built


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class MixtureVitConfig(VisionTransformerConfig):
    """timm's ViT with a mixture of experts in the place of each block's MLP; one expert is a dense ViT, a proxy.

    `active_share` of the `num_experts` serve each token; `mlp_ratio` is one expert's width over the network's, so that
    4 experts at a share of 1/2 and a ratio of 2 compute as much as a dense MLP of ratio 4. `balance_rate`: how far an
    expert's bias moves in a step for a load that is off by all tokens.
    """

    family: Literal["moe_vit"] = field(default="moe_vit", metadata=TAG)  # type: ignore[assignment]  # a tag of its own
    num_experts: Positive = 1  # in each block; 1 is a dense MLP
    base_num_experts: Positive = 1  # the proxy's
    active_share: Annotated[Number, Field(gt=0, le=1)] = 1.0  # of the experts, that serve each token
    mlp_ratio: Annotated[Number, Field(gt=0)] = 4.0  # hidden width of one expert over width
    base_mlp_ratio: Annotated[Number, Field(gt=0)] = 4.0  # the proxy's
    balance_rate: Annotated[Number, Field(ge=0)] = 0.02  # how far an expert's balance moves in a step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts > 1 and self.active_experts != self.num_experts * self.active_share:
            raise ModelError(
                f"active_share {self.active_share:g} of num_experts {self.num_experts} is no whole number of experts: "
                f"use {self.active_experts / self.num_experts:g}"
            )
        if self.expert_width != self.width * self.mlp_ratio:
            raise ModelError(f"width {self.width} times mlp_ratio {self.mlp_ratio:g} is no whole width of an expert")

    @property
    def active_experts(self) -> int:
        """How many serve each token."""
        return max(1, round(self.num_experts * self.active_share))

    @property
    def expert_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def size(self) -> Size:
        return replace(super().size, num_experts=self.num_experts, mlp_ratio=self.mlp_ratio)

    @property
    def base_size(self) -> Size:
        return replace(super().base_size, num_experts=self.base_num_experts, mlp_ratio=self.base_mlp_ratio)


@checked_model
@dataclass(config=STRICT, frozen=True, kw_only=True)
class ProbabilisticConfig(ModelConfig):
    """The Probabilistic Transformer on patches: `width` labels of each, and `depth` iterations of one tied block, whose
    number has no factor. Its ternary factors have rank width / channels, which grows."""

    family: Literal["probabilistic"] = field(default="probabilistic", metadata=TAG)
    channels: Positive = 4  # of dependencies between patches; it divides the width
    patch_size: Positive = 4  # pixels of a side; image_size is a multiple
    tau: Annotated[Number, Field(gt=0)] = 0.5  # strength of all potentials, a constant to tune

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, self.patch_size, "patch_size")
        check_multiple("width", self.width, self.channels, "channels")
        check_multiple("base_width", self.base_width, self.channels, "channels")
        if self.num_patches == 1:
            raise ModelError("one patch has no other to depend on: take a smaller patch_size")

    @property
    def head_dim_grows(self) -> bool:
        return True  # it is the rank

    @property
    def may_drop_branches(self) -> bool:
        return False  # it has no branches

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def size(self) -> Size:
        return Size(width=self.width, depth=self.depth, head_dim=self.width // self.channels)

    @property
    def base_size(self) -> Size:
        return Size(width=self.base_width, depth=self.base_depth, head_dim=self.base_width // self.channels)


OF_SEVERAL_EXPERTS = ("active_share", "balance_rate")  # what the dense network of one expert does not read

AnyModelConfig = Annotated[
    VisionTransformerConfig
    | ResNetConfig
    | ConvResNetConfig
    | TimmConfig
    | OwnConfig
    | MixtureVitConfig
    | ProbabilisticConfig,
    Field(discriminator="family"),
    BeforeValidator(expand_named_size),
]
