"""What grows: parameters at a base size, at twice its width, and at twice its depth."""

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depthmup.models.errors import ModelError

Builder = Callable[[int, int], nn.Module]  # (width, depth) -> network


@dataclass(frozen=True)
class Growth:
    """A base network, two larger ones, and what grows. The wide one is on meta, the others have weights."""

    base: nn.Module
    wide: nn.Module  # at twice the base's width
    deep: nn.Module  # at twice its depth
    grows: dict[str, tuple[bool, ...]]  # base's parameter -> for each dimension, whether it grows with width
    containers: tuple[str, ...]  # up to the number of what a deeper network has more of: "blocks.", "stage1.b"

    @cached_property
    def grows_in_blocks(self) -> dict[tuple[str, bool], tuple[bool, ...]]:
        """(pattern, whether of the first block of a container, which may read what does not grow) -> what grows."""
        return {(self.pattern(name), self.is_first(name)): grows for name, grows in self.grows.items()}

    def grows_of(self, name: str) -> tuple[bool, ...] | None:
        """What grows of a parameter of a network of any depth: as in the base's block of the same name or, where the
        base has one block alone, in that. None for what no block of the base has."""
        pattern, first = self.pattern(name), self.is_first(name)
        return self.grows_in_blocks.get((pattern, first), self.grows_in_blocks.get((pattern, not first)))

    def place(self, name: str) -> tuple[str, str, str] | None:
        """(container, number, rest) of a parameter or module in a block; None outside of blocks."""
        for container in sorted(self.containers, key=len, reverse=True):
            if match := re.match(rf"{re.escape(container)}(\d+)(?=\.|$)", name):
                return container, match[1], name[match.end() :]
        return None

    def is_first(self, name: str) -> bool:
        """Whether it is in the block of number 0."""
        place = self.place(name)
        return place is not None and int(place[1]) == 0

    def pattern(self, name: str, first: bool | None = None) -> str:
        """A regular expression for a parameter or module in every block: its number stands for all numbers. `first`:
        for that of the first block alone, or of all others."""
        if not (place := self.place(name)):
            return re.escape(name)
        numbers = {None: r"\d+", True: "0", False: r"[1-9]\d*"}[first]
        return rf"{re.escape(place[0])}{numbers}{re.escape(place[2])}"


def build_network(build: Builder, width: int, depth: int, device: str) -> nn.Module:
    """The builder's network, with the same weights each time. What cannot be built on meta is built on the CPU and
    moved. Raises ModelError."""
    try:
        inspect.signature(build).bind(width, depth)
    except TypeError as error:
        raise ModelError(f"the builder must take (width, depth), two numbers: {error}") from None
    except ValueError:  # written in C, which says nothing of its arguments
        pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with torch.device(device):
                network = build(width, depth)
        except (RuntimeError, NotImplementedError):  # what asks a meta tensor for its numbers, as .item() does
            if device == "cpu":
                raise
            network = build(width, depth).to(device)
    if not isinstance(network, nn.Module):
        raise ModelError(f"the builder gave a {type(network).__name__} and no torch.nn.Module")
    return network


def list_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Raises ModelError for a parameter that has two names: two roles in one tensor."""
    names: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(id(parameter), name)) != name:
            raise ModelError(
                f"{other} and {name} are one parameter: what is shared has one init and one learning rate, for which "
                "there is no rule. Give each module its own weights"
            )
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def refuse_without_rule(network: nn.Module) -> None:
    """Raises ModelError, with its name, for a parameter whose init or rate no rule of the table is about."""
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"{name} has no shape before the first forward pass: give its module its sizes")
        if not parameter.requires_grad:
            raise ModelError(
                f"{name} is frozen, and all initial weights are drawn anew: make it a buffer (register_buffer), which "
                "stays as it is, or let it train"
            )
        if not parameter.is_floating_point():
            raise ModelError(f"{name} is {parameter.dtype}, for which there is no rule: use two real parameters")
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        if parametrize.is_parametrized(module) or any(isinstance(hook, SpectralNorm | WeightNorm) for hook in hooks):
            raise ModelError(
                f"a weight of {name} is computed from others (weight_norm, spectral_norm or the like): there is no "
                "rule for its size. Use the plain module, with a norm beside it"
            )


def find_repeating_modules(shallow: nn.Module, deep: nn.Module) -> tuple[str, ...]:
    """Names, up to the number, of modules that are more in the deeper network."""
    counts = [
        Counter(re.sub(r"\d+$", "", name) for name, _ in network.named_modules() if re.search(r"\d$", name))
        for network in (shallow, deep)
    ]
    return tuple(name for name, count in counts[1].items() if 0 < counts[0][name] < count)


def compare_sizes(build: Builder, width: int, depth: int) -> Growth:
    """Builds the network at a base size, at twice its width and at twice its depth, and compares names and shapes.

    Raises ModelError for a builder that ignores a size, for a dimension that grows in another ratio than the width
    does, and for a parameter whose shape depends on the depth.
    """
    base = build_network(build, width, depth, "cpu")
    refuse_without_rule(base)
    wide = build_network(build, 2 * width, depth, "meta")
    deep = build_network(build, width, 2 * depth, "cpu")
    shapes, wider, deeper = list_shapes(base), list_shapes(wide), list_shapes(deep)
    kind = type(base).__name__
    if odd := sorted(set(shapes) ^ set(wider)):
        raise ModelError(
            f"{kind} has other parameters at width {2 * width} than at {width}: {', '.join(odd[:3])}. The width "
            "changes shapes alone, and a builder takes (width, depth) in this order"
        )
    grows: dict[str, tuple[bool, ...]] = {}
    growth = Growth(base, wide, deep, grows, find_repeating_modules(base, deep))
    # A block of a deeper network may be what another one was in the base: the last, or the first of a stage.
    by_pattern = defaultdict(set)
    for name, shape in shapes.items():
        by_pattern[growth.pattern(name)].add(shape)
    for name, shape in shapes.items():
        ratios = [new / old if old else 1.0 for old, new in zip(shape, wider[name], strict=True)]
        if any(ratio not in (1.0, 2.0) for ratio in ratios):
            raise ModelError(
                f"{name} is of shape {tuple(shape)} at width {width} and {tuple(wider[name])} at {2 * width}: a "
                "dimension grows as the width does, or stays"
            )
        grows[name] = tuple(ratio == 2.0 for ratio in ratios)
        if deeper.get(name, shape) not in by_pattern[growth.pattern(name)]:
            raise ModelError(
                f"{name} is of shape {tuple(shape)} at depth {depth} and {tuple(deeper[name])} at {2 * depth}: a "
                "parameter that grows with depth has no rule. Give each block its own parameters"
            )
    if not any(map(any, grows.values())):
        raise ModelError(
            f"the builder ignores its width: {kind} has the same shapes at {width} and {2 * width}. Let layers have it"
        )
    if set(deeper) == set(shapes):
        raise ModelError(
            f"the builder ignores its depth, or shares weights over it: {kind} has the same parameters at depth "
            f"{depth} and {2 * depth}. Let it have as many blocks, each with its own weights"
        )
    patterns = {growth.pattern(name) for name in deeper}
    if lost := sorted(name for name in shapes if growth.pattern(name) not in patterns):
        raise ModelError(f"{kind} of depth {2 * depth} lacks {', '.join(lost[:3])}, which it has at depth {depth}")
    return growth
