"""timm's VisionTransformer as a family: parameter names, forward pass and base-size behaviour are timm's own."""

from functools import partial

from torch import nn

from models.config import VisionTransformerConfig
from models.family import ONES, ZEROS, Family, Init, ParameterRule
from models.parameterization import Role


def build(config: VisionTransformerConfig) -> nn.Module:
    import models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.in_channels,
        num_classes=config.num_classes,
        global_pool=config.global_pool,
        class_token=config.class_token,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads(config.width)[0],
        mlp_ratio=config.mlp_ratio,
        qk_norm=config.qk_norm,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="reset",  # every parameter is initialised by models.init
    )


TIMM = Init("normal", 0.02)  # timm's trunc_normal_(std=0.02) cuts at 100 standard deviations: a normal

VIT = Family(
    name="vit",
    build=build,
    rules=(
        ParameterRule(r"patch_embed\.proj\.weight", Role.INPUT, Init("uniform_fan_in", 3**-0.5)),
        ParameterRule(r"patch_embed\.proj\.bias", Role.VECTOR, ZEROS),
        ParameterRule(r"pos_embed", Role.INPUT, TIMM),
        ParameterRule(r"cls_token|reg_token", Role.INPUT, Init("normal", 1e-6)),
        ParameterRule(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", Role.BRANCH_HIDDEN, TIMM),
        ParameterRule(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.bias", Role.BRANCH_VECTOR, ZEROS),
        ParameterRule(r"blocks\.\d+\.(norm[12]|attn\.[qk]_norm)\.weight", Role.BRANCH_VECTOR, ONES),
        ParameterRule(r"blocks\.\d+\.(norm[12]|attn\.[qk]_norm)\.bias", Role.BRANCH_VECTOR, ZEROS),
        ParameterRule(r"(norm|fc_norm)\.weight", Role.VECTOR, ONES),
        ParameterRule(r"(norm|fc_norm)\.bias", Role.VECTOR, ZEROS),
        ParameterRule(r"head\.weight", Role.READOUT, TIMM),
        ParameterRule(r"head\.bias", Role.VECTOR, ZEROS),
    ),
    branches=(r"blocks\.\d+\.ls[12]",),
    readout="head",
    attention=r"blocks\.\d+\.attn\.q_norm",
    head_dims=lambda config: (config.heads(config.width)[1], config.heads(config.base_width)[1]),
)
