"""From a configuration, or a network of the user's own, to a network with multipliers, roles and initial weights."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from depthmup.models.config import AnyModelConfig, Size
from depthmup.models.conv_resnet import CONV_RESNET
from depthmup.models.discovery.find import find_readout_features, find_roles
from depthmup.models.discovery.growth import Builder, build_network, refuse_other_shapes
from depthmup.models.errors import ModelError
from depthmup.models.family import (
    Family,
    ParameterRule,
    Roles,
    Slot,
    find_matching_modules,
    list_stated_blocks,
    match_rules,
)
from depthmup.models.init import init_std, initialize, keep_whole
from depthmup.models.moe_vit import MOE_VIT
from depthmup.models.multiplier import Multiplier, is_scaled, scale_input, scale_output
from depthmup.models.own import OWN
from depthmup.models.parameterization import BRANCH_ROLES, Role, Scale
from depthmup.models.parameterization_config import ParameterizationConfig, scale_of
from depthmup.models.probabilistic import PROBABILISTIC
from depthmup.models.resnet import RESNET
from depthmup.models.timm_family import TIMM
from depthmup.models.vit import VIT

FAMILIES: dict[str, Family] = {
    family.name: family for family in (VIT, MOE_VIT, RESNET, CONV_RESNET, TIMM, OWN, PROBABILISTIC)
}


@dataclass(frozen=True)
class ScaledModel:
    """A network and what the scaling rules say of it, all by qualified name, decided before any wrapping."""

    network: nn.Module
    scale: Scale
    roles: Roles
    rules: dict[str, ParameterRule]  # parameter name -> role and base init
    branches: tuple[str, ...]  # modules at the ends of residual branches
    blocks: tuple[str, ...]  # residual blocks; none where `roles` does not state them
    multipliers: dict[str, Multiplier]  # module name -> its multiplier, where it is not 1


def find_slots(network: nn.Module, slots: tuple[Slot, ...]) -> dict[str, Slot]:
    """Name of each module in `slots` -> its slot. Raises ModelError for a slot that matches no module, or whose `last`
    is none."""
    found = {name: slot for slot in slots for name in find_matching_modules(network, slot.output)}
    names = {name for name, _ in network.named_modules()}
    for name, slot in found.items():
        if (last := slot.last_before(name)) not in names:
            raise ModelError(f"Slot.last {slot.last!r}: no module of {type(network).__name__} is called {last!r}")
    return found


def assign_rules(network: nn.Module, roles: Roles, scale: Scale) -> dict[str, ParameterRule]:
    """Name of each parameter -> its rule. Raises UnmatchedParameterError, or ModelError for an init that does not
    fit."""
    rules = match_rules((name for name, _ in network.named_parameters()), roles.parameters)
    for name, parameter in network.named_parameters():
        init_std(parameter.shape, rules[name], scale)
    return rules


def scale_model(network: nn.Module, roles: Roles, scale: Scale) -> ScaledModel:
    """Gives every parameter its role and puts the multipliers on `network`. All is checked before any change.

    Raises UnmatchedParameterError, or ModelError for a pattern that no module matches, an init that does not fit, or
    rules of depth for a network without branches.
    """
    rules = assign_rules(network, roles, scale)
    branches, queries = find_slots(network, roles.branches), find_slots(network, roles.queries)
    distributions = find_slots(network, roles.distributions)
    if not branches and (scale.parameterization.depth_rules or scale.parameterization.beta != 1):
        raise ModelError(
            f"{type(network).__name__} has no residual branches, so that rules of depth and beta would do nothing: use "
            "parameterization.name mup, or sp, and leave beta out"
        )
    blocks = list_stated_blocks(network, roles, branches)
    for readout in roles.readouts:
        if readout not in dict(network.named_modules()):
            raise ModelError(f"no module of {type(network).__name__} is called {readout!r} (the readout)")
    installed: dict[str, Multiplier | None] = {}
    for name in branches:
        installed[name] = scale_output(network, name, scale.branch_multiplier())
    for name in queries:
        installed[name] = scale_output(network, name, scale.attention_multiplier())
    for name in distributions:
        installed[name] = scale_output(network, name, scale.distribution_multiplier())
    for name in roles.readouts:
        installed[name] = scale_input(network, name, scale.readout_multiplier())
    multipliers = {name: multiplier for name, multiplier in installed.items() if multiplier is not None}
    return ScaledModel(network, scale, roles, rules, tuple(branches), blocks, multipliers)


def build_meta(config: AnyModelConfig, parameterization: ParameterizationConfig) -> ScaledModel:
    """The network on the meta device: shapes, roles and multipliers, no memory. Raises ModelError for a bad model."""
    return build_on("meta", config, parameterization)


def count_blocks(config: AnyModelConfig, parameterization: ParameterizationConfig) -> int:
    """How many residual blocks the network has. Raises ModelError, as where roles are not found."""
    return len(build_meta(config, parameterization).blocks)


def build_on(device: str, config: AnyModelConfig, parameterization: ParameterizationConfig) -> ScaledModel:
    """The family's network on `device` as its builder leaves it, with multipliers. Raises ModelError."""
    family = FAMILIES[config.family]
    network = build_network(lambda width, depth: family.build(config), config.width, config.depth, device)
    roles, size, base = family.roles(config), config.size, config.base_size
    if family.finds_roles and roles.queries:  # they are found where the head dim grows, as the width does
        size, base = (replace(each, head_dim=each.width) for each in (size, base))
    scale = scale_of(size, base, parameterization)
    if family.finds_roles:  # the width that is checked is that of the readout, which every network has
        features = find_readout_features(network, roles)
        at_base = features * config.base_width // config.width
        size, base = (Size(width=width, depth=config.depth) for width in (features, at_base))
        check_growth(network, assign_rules(network, roles, scale), roles, size, base)
    return scale_model(network, roles, scale)


def build(
    config: AnyModelConfig, parameterization: ParameterizationConfig, seed: int, device: torch.device | str = "cpu"
) -> ScaledModel:
    """The network on `device` with initial weights, a function of (seed, parameter name) alone."""
    scaled = build_unfilled(config, parameterization)
    fill(scaled, seed, device)
    return scaled


def build_unfilled(config: AnyModelConfig, parameterization: ParameterizationConfig) -> ScaledModel:
    """The network for `fill`: its parameters on meta, and so are its buffers, but not those of a network that others
    wrote. Its builder may compute them, and makes the whole of it on the CPU first. Raises ModelError."""
    if not FAMILIES[config.family].finds_roles:
        return build_meta(config, parameterization)
    scaled = build_on("cpu", config, parameterization)
    for module in scaled.network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    return scaled


def fill(
    scaled: ScaledModel,
    seed: int,
    device: torch.device | str,
    spread: Callable[[Tensor, Tensor], Tensor] = keep_whole,
    take: Callable[[nn.Module], object] | None = None,
) -> None:
    """Moves a network on meta, or this process's shards of one, to `device` with initial weights, a function of (seed,
    parameter name) alone. No more than one whole parameter is held beside it, and with `take` no more than a module's
    own beside what that leaves of the others. `spread`, `take`: see `initialize`."""
    initialize(scaled.network, scaled.rules, scaled.scale, seed, spread, device, take)


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


def find_growing_sides(parameter: Tensor, rule: ParameterRule, module: nn.Module) -> list[tuple[int, ...]]:
    """Sides of a parameter that grow with width: of each tuple at least one side does."""
    sides = tuple(parameter.shape)
    match rule.role:
        case Role.HIDDEN | Role.BRANCH_HIDDEN:
            return [(side,) for side in sides[:2]]
        case Role.READOUT:
            return [(sides[1],)] if len(sides) > 1 else []
        case Role.ROUTER | Role.GATE:  # a layer's weight (out, in), or a parameter (in, out) of a matrix product
            return [sides]
        case Role.EXPERT_UP | Role.EXPERT_DOWN:
            return [(side,) for side in sides[1:]]
        case Role.SCALAR | Role.BRANCH_SCALAR:
            return []
        case _:  # rows of a matrix or conv; an embedding has its width elsewhere
            plain = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            return [sides[:1] if plain else sides]


def check_growth(network: nn.Module, rules: dict[str, ParameterRule], roles: Roles, size: Size, base: Size) -> None:
    """Raises ModelError where the sizes cannot be those of the network and its base."""
    kind, widths = type(network).__name__, set[int]()
    if (size.head_dim == 1) != (base.head_dim == 1):
        raise ModelError(
            f"head_dim is {size.head_dim} here and {base.head_dim} in the base: state it in both or neither"
        )
    if size.head_dim != base.head_dim and not roles.queries:
        raise ModelError(
            f"head_dim grows from {base.head_dim} to {size.head_dim}, and Roles.queries names no module whose output "
            f"is the queries of {kind}: attention would lack its multiplier. Give Roles.queries, or keep head_dim and "
            "let the number of heads grow"
        )
    for name, parameter in network.named_parameters():
        rule = rules[name]
        growing = find_growing_sides(parameter, rule, network.get_submodule(name.rpartition(".")[0]))
        if rule.role not in BRANCH_ROLES:
            widths.update(side for sides in growing for side in sides)
        if any(all(side * base.width % size.width for side in sides) for sides in growing):
            raise ModelError(
                f"{name} of shape {tuple(parameter.shape)} is {rule.role.value}, which grows with width, but a ratio "
                f"of {size.width / base.width:g} (width {base.width} to {size.width}) does not divide it: choose "
                "widths whose ratio does, or give it a role that does not grow"
            )
    if widths and size.width not in widths:
        raise ModelError(
            f"size.width is {size.width}, but no parameter of {kind} outside of branches has a growing side of that: "
            f"found {', '.join(map(str, sorted(widths)))}. State the width of the network, and its base's likewise"
        )


def apply(
    parameterization: ParameterizationConfig, network: nn.Module, *, size: Size, base: Size, roles: Roles, seed: int = 0
) -> ScaledModel:
    """Scales a network of the user's own from `base` to its `size`: installs multipliers, draws initial weights anew.

    Raises ModelError for a parameter without exactly one role, a pattern that matches nothing, an init that does not
    fit, sizes that are not the network's, a head dim that grows without queries, a network on meta, or one that was
    scaled before; `network` is then as it was. Train it with `models.parameter_groups`.
    """
    check_own(network, roles)
    scale = scale_of(size, base, parameterization)
    check_growth(network, assign_rules(network, roles, scale), roles, size, base)
    scaled = scale_model(network, roles, scale)
    initialize(network, scaled.rules, scaled.scale, seed)
    return scaled


def build_scaled(
    build: Builder,
    *,
    size: Size,
    base: Size,
    inputs: Any,
    parameterization: ParameterizationConfig | None = None,
    seed: int = 0,
) -> ScaledModel:
    """The network that `build` gives at `size`, scaled from `base`: roles found, multipliers put on, weights drawn.

    size, base: width and depth as the builder takes them; a head dim that grows is found. inputs: what the network is
    called with (`find_roles`). parameterization: depth_mup where none is given. The groups of its optimizer are
    `models.parameter_groups(scaled.network, scaled.rules, scaled.scale, optimizer)`.
    Raises ModelError as `find_roles` and `models.apply` do.
    """
    found = find_roles(build, inputs, base.width, base.depth)
    network = build_network(build, size.width, size.depth, device="cpu")
    features, of_base = find_readout_features(network, found.roles), found.features
    if features * base.width != of_base * size.width:
        raise ModelError(
            f"the readout has {of_base} features at width {base.width} and {features} at {size.width}: the builder's "
            "width is not what grows"
        )
    refuse_other_shapes(found.growth, network, size.width / base.width)
    head_dim = found.head_dim or 1
    return apply(
        parameterization or ParameterizationConfig(name="depth_mup"),
        network,
        size=Size(width=features, depth=size.depth, head_dim=head_dim * (features // of_base if found.head_dim else 1)),
        base=Size(width=of_base, depth=base.depth, head_dim=head_dim),
        roles=found.roles,
        seed=seed,
    )
