"""From a configuration, or a network of the user's own, to a network with multipliers, roles and initial weights."""

from dataclasses import dataclass

import torch
from torch import nn

from models.config import AnyModelConfig, ParameterizationConfig, Size, scale_of
from models.conv_resnet import CONV_RESNET
from models.errors import ModelError
from models.family import Family, ParameterRule, Roles, Slot, match_rules, modules_matching
from models.init import initialize, materialize
from models.multiplier import Multiplier, scale_input, scale_output
from models.parameterization import Scale
from models.resnet import RESNET
from models.vit import VIT

FAMILIES: dict[str, Family] = {family.name: family for family in (VIT, RESNET, CONV_RESNET)}


@dataclass(frozen=True)
class ScaledModel:
    """A network and what the scaling rules say of it, all by qualified name, decided before any wrapping."""

    network: nn.Module
    scale: Scale
    roles: Roles
    rules: dict[str, ParameterRule]  # parameter name -> role and base init
    branches: tuple[str, ...]  # modules at the ends of residual branches
    multipliers: dict[str, Multiplier]  # module name -> its multiplier, where it is not 1


def find_slots(network: nn.Module, slots: tuple[Slot, ...]) -> dict[str, Slot]:
    """Name of each module in `slots` -> its slot. Raises ModelError for a slot that matches no module."""
    return {name: slot for slot in slots for name in modules_matching(network, slot.output)}


def scaled_model(network: nn.Module, roles: Roles, scale: Scale) -> ScaledModel:
    """Gives every parameter its role and puts the multipliers on `network`. All names are checked before any change.

    Raises UnmatchedParameterError, or ModelError for a pattern that no module matches.
    """
    rules = match_rules((name for name, _ in network.named_parameters()), roles.parameters)
    branches, queries = find_slots(network, roles.branches), find_slots(network, roles.queries)
    if roles.readout not in dict(network.named_modules()):
        raise ModelError(f"no module of {type(network).__name__} is called {roles.readout!r} (the readout)")
    installed: dict[str, Multiplier | None] = {}
    for name in branches:
        installed[name] = scale_output(network, name, scale.branch_multiplier())
    for name in queries:
        installed[name] = scale_output(network, name, scale.attention_multiplier())
    installed[roles.readout] = scale_input(network, roles.readout, scale.readout_multiplier())
    multipliers = {name: multiplier for name, multiplier in installed.items() if multiplier is not None}
    return ScaledModel(network, scale, roles, rules, tuple(branches), multipliers)


def build_meta(config: AnyModelConfig, parameterization: ParameterizationConfig) -> ScaledModel:
    """The network on the meta device: shapes, roles and multipliers, no memory. Raises ModelError for a bad model."""
    family = FAMILIES[config.family]
    with torch.device("meta"):
        network = family.build(config)
    scale = scale_of(config.size, config.base_size, parameterization)
    return scaled_model(network, family.roles(config), scale)


def build(
    config: AnyModelConfig, parameterization: ParameterizationConfig, seed: int, device: torch.device | str = "cpu"
) -> ScaledModel:
    """The network on `device` with initial weights, a function of (seed, parameter name) alone."""
    scaled = build_meta(config, parameterization)
    materialize(scaled.network, device)
    initialize(scaled.network, scaled.rules, scaled.scale, seed)
    return scaled


def apply(
    parameterization: ParameterizationConfig, network: nn.Module, *, size: Size, base: Size, roles: Roles, seed: int = 0
) -> ScaledModel:
    """Scales a network of the user's own from `base` to its `size`: installs multipliers, draws initial weights anew.

    Raises ModelError for a parameter without exactly one role or a pattern that matches no module; `network` is then
    as it was. Train it with `models.parameter_groups`.
    """
    scaled = scaled_model(network, roles, scale_of(size, base, parameterization))
    initialize(network, scaled.rules, scaled.scale, seed)
    return scaled
