"""From a configuration to a network with its multipliers, roles and initial weights."""

from dataclasses import dataclass

import torch
from torch import nn

from models.config import AnyModelConfig, ParameterizationConfig
from models.conv_resnet import CONV_RESNET
from models.family import Family, ParameterRule, match_rules, modules_matching
from models.init import initialize, materialize
from models.multiplier import Multiplier, scale_input, scale_output
from models.parameterization import Scale
from models.vit import VIT

FAMILIES: dict[str, Family] = {family.name: family for family in (VIT, CONV_RESNET)}


@dataclass(frozen=True)
class ScaledModel:
    """A network and what the scaling rules say of it, all by qualified name, decided before any wrapping."""

    network: nn.Module
    scale: Scale
    rules: dict[str, ParameterRule]  # parameter name -> role and base init
    multipliers: dict[str, Multiplier]  # module name -> its multiplier, where it is not 1


def scale_of(config: AnyModelConfig, parameterization: ParameterizationConfig) -> Scale:
    return Scale(parameterization.resolve(), config.width_ratio, config.depth_ratio)


def install_multipliers(
    network: nn.Module, family: Family, config: AnyModelConfig, scale: Scale
) -> dict[str, Multiplier]:
    """Puts branch, attention and readout multipliers on the family's slots; returns those that are not 1."""
    installed: dict[str, Multiplier | None] = {}
    for pattern in family.branches:
        for name in modules_matching(network, pattern):
            installed[name] = scale_output(network, name, scale.branch_multiplier())
    if family.attention and family.head_dims:
        attention = scale.attention_multiplier(*family.head_dims(config))
        for name in modules_matching(network, family.attention):
            installed[name] = scale_output(network, name, attention)
    installed[family.readout] = scale_input(network, family.readout, scale.readout_multiplier())
    return {name: multiplier for name, multiplier in installed.items() if multiplier is not None}


def build_meta(config: AnyModelConfig, parameterization: ParameterizationConfig) -> ScaledModel:
    """The network on the meta device: shapes, roles and multipliers, no memory. Raises ValueError for a bad size."""
    family = FAMILIES[config.family]
    with torch.device("meta"):
        network = family.build(config)
    scale = scale_of(config, parameterization)
    rules = match_rules((name for name, _ in network.named_parameters()), family.rules)
    return ScaledModel(network, scale, rules, install_multipliers(network, family, config, scale))


def build(
    config: AnyModelConfig, parameterization: ParameterizationConfig, seed: int, device: torch.device | str = "cpu"
) -> ScaledModel:
    """The network on `device` with initial weights, a function of (seed, parameter name) alone."""
    scaled = build_meta(config, parameterization)
    materialize(scaled.network, device)
    initialize(scaled.network, scaled.rules, scaled.scale, seed)
    return scaled
