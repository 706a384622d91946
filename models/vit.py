"""timm's VisionTransformer as a family: parameter names, forward pass and base-size behaviour are timm's own."""

import difflib
from typing import Any

from torch import nn

from depthmup.models.config import VisionTransformerConfig
from depthmup.models.errors import ModelError
from depthmup.models.family import ONES, ZEROS, Family, Init, ParameterRule, Roles, Slot
from depthmup.models.parameterization import Role


def list_timm_arguments(config: VisionTransformerConfig) -> dict[str, Any]:
    """What timm.create_model is told beside the name: the size, and what else the config states."""
    arguments = {
        "img_size": config.image_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads(config.width)[0],
        "patch_size": config.patch_size,
        "mlp_ratio": config.mlp_ratio,
        "qk_norm": config.qk_norm,
        "class_token": config.class_token,
        "global_pool": config.global_pool,
        "init_values": config.layer_scale,
    }
    return {key: value for key, value in arguments.items() if value is not None}


START = "start from vit_base_patch16_224, say, and state model.patch_size, mlp_ratio ... beside it"


def build(config: VisionTransformerConfig) -> nn.Module:
    """The timm ViT called `config.timm_name` at this width and depth, with what else the config states.

    Raises ModelError for a name that timm does not know, or whose network has parts without rules or without a value.
    """
    import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
    import timm

    name = config.timm_name
    names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    if name not in names:
        plain, tag, _ = name.partition(".")
        nearest = ", ".join(difflib.get_close_matches(plain, names, n=3, cutoff=0))
        what = "no plain ViT (timm's VisionTransformer)" if timm.is_model(plain) else "unknown to timm"
        what = "a name with a tag of weights, which are not loaded" if tag else what
        raise ModelError(f"model.timm_name: {name!r} is {what}; nearest: {nearest}")
    try:
        # weight_init: every parameter is initialised by models.init, so timm need not
        network: Any = timm.create_model(name, weight_init="skip", **list_timm_arguments(config))
    except AssertionError as error:
        raise ModelError(f"model: timm cannot build {name} with these keys: {error}") from None
    if why := find_uncovered(network):
        raise ModelError(f"model.timm_name: {name} has {why}")
    if config.layer_scale is None and hasattr(network.blocks[0].ls1, "gamma"):
        raise ModelError(
            f"model.layer_scale: {name} has LayerScale; state its initial value (timm's is mostly 1e-5), "
            "or 0 to leave it out"
        )
    patch_size = network.patch_embed.patch_size[0]
    if config.image_size % patch_size:
        raise ModelError(f"model.image_size {config.image_size} must be a multiple of {name}'s patch size {patch_size}")
    return network


def find_uncovered(network: Any) -> str | None:
    """What of timm's network the rules do not cover, and what to do instead."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(network) is not VisionTransformer:
        return f"a second readout ({type(network).__name__}), for which there is no rule: {START}"
    if getattr(network, "attn_pool", None) is not None:
        return "attention pooling, for which there is no rule: state model.global_pool: avg"
    for part, plain in ((network.blocks[0], Block), (getattr(network.blocks[0], "attn", None), Attention)):
        if type(part) is not plain:
            return f"another {plain.__name__} than timm's plain one ({type(part).__name__}), without rules: {START}"
    return None


TIMM = Init("normal", 0.02)  # timm's trunc_normal_(std=0.02) cuts at 100 standard deviations: a normal
BRANCH_MATRIX = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc[12]|fc1_[gx]))"
BRANCH_NORM = r"blocks\.\d+\.(norm[12]|attn\.norm|mlp\.norm)"
OUTER_NORM = r"patch_embed\.norm|norm_pre|norm|fc_norm"
QK_NORM = r"blocks\.\d+\.attn\.[qk]_norm"


def roles(config: VisionTransformerConfig) -> Roles:
    """The role and the base's initial values of each parameter of timm's plain ViT, and its two branches a block.

    | parameter                          | shape                 | initial values of the base                        |
    |------------------------------------|-----------------------|---------------------------------------------------|
    | patch_embed.proj.weight            | (N, channels, p, p)   | uniform, std (3 fan_in)^-1/2: torch's convolution |
    | pos_embed                          | (1, tokens, N)        | normal, std 0.02                                  |
    | cls_token, reg_token               | (1, tokens, N)        | normal, std 1e-6                                  |
    | attn.qkv, attn.proj, mlp.fc1, .fc2 | (multiples of N, ..)  | normal, std 0.02                                  |
    | norms, ls.gamma                    | (N,)                  | 1, `layer_scale`                                  |
    | head.weight                        | (classes, N)          | normal, std 0.02                                  |
    | all biases                         | (outputs,)            | 0                                                 |

    Matrices are timm's `trunc_normal_(std=.02)`. timm starts the bias of patch_embed uniformly.
    """
    # QK-norm's gain is shared by all heads: with a fixed head dim no dimension of it grows.
    qk_norm = Role.BRANCH_SCALAR if config.head_dim else Role.BRANCH_VECTOR
    return Roles(
        parameters=(
            ParameterRule(r"patch_embed\.proj\.weight", Role.INPUT, Init("uniform_fan_in", 3**-0.5)),
            ParameterRule(r"patch_embed\.proj\.bias", Role.VECTOR, ZEROS),
            ParameterRule(r"pos_embed", Role.INPUT, TIMM, decays=False),
            ParameterRule(r"cls_token|reg_token", Role.INPUT, Init("normal", 1e-6), decays=False),
            ParameterRule(rf"{BRANCH_MATRIX}\.weight", Role.BRANCH_HIDDEN, TIMM),
            ParameterRule(rf"{BRANCH_MATRIX}\.bias", Role.BRANCH_VECTOR, ZEROS),
            ParameterRule(rf"{BRANCH_NORM}\.weight", Role.BRANCH_VECTOR, ONES),
            ParameterRule(rf"{BRANCH_NORM}\.bias", Role.BRANCH_VECTOR, ZEROS),
            ParameterRule(rf"{QK_NORM}\.weight", qk_norm, ONES),
            ParameterRule(rf"{QK_NORM}\.bias", qk_norm, ZEROS),
            ParameterRule(r"blocks\.\d+\.ls[12]\.gamma", Role.BRANCH_VECTOR, Init("constant", config.layer_scale or 0)),
            ParameterRule(rf"({OUTER_NORM})\.weight", Role.VECTOR, ONES),
            ParameterRule(rf"({OUTER_NORM})\.bias", Role.VECTOR, ZEROS),
            ParameterRule(r"head\.weight", Role.READOUT, TIMM),
            ParameterRule(r"head\.bias", Role.SCALAR, ZEROS),
        ),
        branches=(
            Slot(r"(blocks\.\d+)\.ls1", r"\1.attn.proj"),
            Slot(r"(blocks\.\d+)\.ls2", r"\1.mlp.fc2"),
        ),
        readout="head",
        queries=(Slot(r"(blocks\.\d+\.attn)\.q_norm", r"\1.qkv", share=1 / 3),),
        keys=r"blocks\.\d+\.attn\.k_norm",
        blocks=r"blocks\.\d+",
    )


VIT = Family(name="vit", build=build, roles=roles)
