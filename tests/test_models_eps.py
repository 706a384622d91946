"""AdamW's eps stands beside a gradient: every cell of its column is held to the gradients of real networks.

Not to a published table: those belong to other forms of the readout, whose gradients have other sizes.
"""

import math
import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F

from depthmup.models.build import build, build_meta
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import BAND, Settings, draw_fixed_batch
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig

CLASSES = {"num_classes": 10, "in_channels": 1}
VIT = VisionTransformerConfig(
    # with a class token the patches reach the logits through L^-alpha branches alone, which disagree at first
    **{"width": 32, "depth": 2, "base_width": 32, "base_depth": 2, "class_token": False, "global_pool": "avg"},
    **{"num_heads": 4, "patch_size": 4, "image_size": 16, **CLASSES},
)
NETWORKS: dict[str, AnyModelConfig] = {
    "conv_resnet": ConvResNetConfig(
        **{"width": 16, "depth": 3, "base_width": 16, "base_depth": 3, "norm": "layer", "convs_per_branch": 2},
        **{"image_size": 8, **CLASSES},
    ),
    "vit": VIT,
    "vit with QK-norm": replace(VIT, num_heads=None, head_dim=8, qk_norm=True),
    "timm's ResNet": ResNetConfig(
        **{"width": 16, "depth": 4, "base_width": 16, "base_depth": 4, "norm": "group", "num_groups": 8},
        **{"image_size": 16, **CLASSES},
    ),
}
TIMES = 8  # the base's width, then its depth
SEEDS = {"width": 2, "depth": 4}
# A QK-norm's gain and bias are shared by N heads, each with a gradient of 1/N: 1 where the heads agree, N^-1/2 where
# they do not, as at first. The keys' bias adds the same to all logits of a query: its gradient is rounding.
SHARED, WITHOUT_GRADIENT = (Role.BRANCH_SCALAR,), r"blocks\.#\.attn\.k_norm\.bias"

Kind = tuple[str, Role]  # a parameter's name without numbers, its role


def gradients(config: AnyModelConfig, parameterization: ParameterizationConfig, seed: int) -> dict[Kind, float]:
    """RMS of each kind of parameter's gradient in the first step."""
    scaled = build(config, parameterization, seed)
    images, labels = draw_fixed_batch(config, Settings(), seed)
    logits = scaled.network(images)
    # without the readout's noise, which shrinks with width, and gradients with it
    F.cross_entropy(logits - logits.detach(), labels).backward()
    squares: dict[Kind, list[Any]] = defaultdict(list)
    for name, parameter in scaled.network.named_parameters():
        assert parameter.grad is not None
        squares[re.sub(r"\d+", "#", name), scaled.rules[name].role].append(parameter.grad.square().mean())
    return {kind: math.sqrt(sum(found) / len(found)) for kind, found in squares.items()}


@pytest.mark.parametrize(("axis", "alpha"), [("width", 0.5), ("depth", 0.5), ("depth", 1.0)])
@pytest.mark.parametrize("network", NETWORKS)
def test_eps_scales_as_the_gradient_beside_which_it_stands(network: str, axis: str, alpha: float) -> None:
    config = NETWORKS[network]
    larger = replace(config, **{axis: TIMES * getattr(config, axis)})
    parameterization = ParameterizationConfig(alpha=alpha, beta=config.base_depth**-0.5)
    slopes: dict[Kind, list[float]] = defaultdict(list)
    for seed in range(SEEDS[axis]):
        base, scaled = (gradients(c, parameterization, seed) for c in (config, larger))
        for kind, size in base.items():
            slopes[kind].append(math.log(scaled[kind] / size, TIMES))
    eps_of = build_meta(larger, parameterization).scale.factors
    off = {}
    for (name, role), found in slopes.items():
        if re.fullmatch(WITHOUT_GRADIENT, name):
            continue
        slope, eps = sum(found) / len(found), math.log(eps_of(role, "adamw").eps, TIMES)
        lowest = eps - 0.5 if role in SHARED and axis == "width" else eps
        if not lowest - BAND < slope < eps + BAND:
            off[name] = (role.value, round(slope, 2), round(eps, 2))
    assert not off


def test_every_role_is_in_one_of_these_networks() -> None:
    found = {
        rule.role
        for config in NETWORKS.values()
        for rule in build_meta(config, ParameterizationConfig()).rules.values()
    }
    # test_models_moe, test_models_discovery, test_models_strangers
    elsewhere = {Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.GATE, Role.STREAM_VECTOR}
    assert found == set(Role) - elsewhere
