"""From a configuration, or a network of the user's own, to a network with multipliers, roles and initial weights."""

import difflib
import re
from dataclasses import dataclass

import torch
from torch import nn

from models.config import AnyModelConfig, ParameterizationConfig, Size, scale_of
from models.conv_resnet import CONV_RESNET
from models.errors import ModelError
from models.family import Family, ParameterRule, Roles, Slot, match_rules, modules_matching
from models.init import init_std, initialize, materialize
from models.multiplier import Multiplier, is_scaled, scale_input, scale_output
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
    """Name of each module in `slots` -> its slot. Raises ModelError for a slot that matches no module, or whose `last`
    is none."""
    found = {name: slot for slot in slots for name in modules_matching(network, slot.output)}
    names = {name for name, _ in network.named_modules()}
    for name, slot in found.items():
        if (last := slot.last_before(name)) not in names:
            raise ModelError(f"Slot.last {slot.last!r}: no module of {type(network).__name__} is called {last!r}")
    return found


def scaled_model(network: nn.Module, roles: Roles, scale: Scale) -> ScaledModel:
    """Gives every parameter its role and puts the multipliers on `network`. All is checked before any change.

    Raises UnmatchedParameterError, or ModelError for a pattern that no module matches or an init that does not fit.
    """
    rules = match_rules((name for name, _ in network.named_parameters()), roles.parameters)
    for name, parameter in network.named_parameters():
        init_std(parameter.shape, rules[name], scale)
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


def check_own(network: nn.Module, roles: Roles) -> None:
    """Raises ModelError for what a network of the user's own can have wrong, and one of the families here cannot."""
    kind, names = type(network).__name__, [name for name, _ in network.named_parameters()]
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ModelError(f"this {kind} is on the meta device, which has no weights to draw: build it on another one")
    if is_scaled(network):
        raise ModelError(f"this {kind} has multipliers from an earlier models.apply: apply to one that is newly built")
    for rule in roles.parameters:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            nearest = ", ".join(difflib.get_close_matches(rule.pattern, names, 3, cutoff=0))
            raise ModelError(f"ParameterRule {rule.pattern!r} matches no parameter of {kind}; nearest: {nearest}")


def apply(
    parameterization: ParameterizationConfig, network: nn.Module, *, size: Size, base: Size, roles: Roles, seed: int = 0
) -> ScaledModel:
    """Scales a network of the user's own from `base` to its `size`: installs multipliers, draws initial weights anew.

    Raises ModelError for a parameter without exactly one role, a pattern that matches nothing, an init that does not
    fit, a network on meta, or one that was scaled before; `network` is then as it was. Train it with
    `models.parameter_groups`.
    """
    check_own(network, roles)
    scaled = scaled_model(network, roles, scale_of(size, base, parameterization))
    initialize(network, scaled.rules, scaled.scale, seed)
    return scaled
