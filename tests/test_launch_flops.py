"""The formulas that spare a plan the import of torch say what torch counts."""

import pytest

from launch.flops import by_formula
from models.build import build_meta
from models.config import (
    AnyModelConfig,
    ConvResNetConfig,
    ParameterizationConfig,
    ResNetConfig,
    VisionTransformerConfig,
)
from models.flops import forward_flops, num_parameters

SMALL = {"width": 64, "depth": 6, "base_width": 64, "base_depth": 3, "num_classes": 10, "image_size": 32}
VIT = {**SMALL, "patch_size": 4}


@pytest.mark.parametrize(
    "model",
    [
        ConvResNetConfig(**SMALL),
        ConvResNetConfig(**{**SMALL, "image_size": 9, "in_channels": 1}, convs_per_branch=2, norm="batch"),
        VisionTransformerConfig(**VIT, head_dim=16),
        VisionTransformerConfig(
            **VIT, num_heads=2, class_token=False, global_pool="avg", mlp_ratio=2.5, qk_norm=True, layer_scale=1e-5
        ),
        VisionTransformerConfig(
            width=64, depth=2, base_width=64, base_depth=2, head_dim=64, timm_name="deit_tiny_patch16_224"
        ),
    ],
    ids=lambda model: model.family,
)
def test_the_formula_equals_the_count(model: AnyModelConfig) -> None:
    network = build_meta(model, ParameterizationConfig()).network
    shape = (model.in_channels, model.image_size, model.image_size)
    assert by_formula(model) == (num_parameters(network), forward_flops(network, shape))


def test_other_networks_are_left_to_torch() -> None:
    assert by_formula(ResNetConfig(width=64, depth=4, base_width=64, base_depth=4)) is None
    registers = VisionTransformerConfig(**VIT, head_dim=16, timm_name="vit_base_patch14_reg4_dinov2")
    assert by_formula(registers) is None
