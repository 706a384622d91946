"""What grows: parameters at a base size, at twice its width, and at twice its depth."""

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depthmup.models.discovery.trace import Constants
from depthmup.models.errors import ModelError

Builder = Callable[[int, int], nn.Module]  # (width, depth) -> network


@dataclass(frozen=True)
class Growth:
    """A base network, two deeper ones, and what grows. The wide one is on meta, the others have weights."""

    base: nn.Module
    deep: nn.Module  # at twice the base's depth
    wide: nn.Module  # at twice its depth and twice its width
    constants: Constants  # of the wide one
    grows: dict[str, tuple[bool, ...]]  # parameter of the deep one -> for each dimension, whether it grows with width
    containers: tuple[str, ...]  # up to the number of what a deeper network has more of: "blocks.", "stage1.b"

    def place(self, name: str) -> tuple[str, str, str] | None:
        """(container, number, rest) of a parameter or module in a block; None outside of blocks."""
        for container in sorted(self.containers, key=len, reverse=True):
            if match := re.match(rf"{re.escape(container)}(\d+)", name):
                return container, match[1], name[match.end() :]
        return None

    def repeats(self, name: str) -> bool:
        """Whether there are more of a module or parameter in a deeper network, or of the block that it is in."""
        return self.place(name) is not None

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


def build_network(build: Builder, width: int, depth: int, device: str, seed: int = 0) -> nn.Module:
    """The builder's network, with the same weights for each seed. What cannot be built on meta is built on the CPU and
    moved. Raises ModelError."""
    try:
        inspect.signature(build).bind(width, depth)
    except TypeError as error:
        raise ModelError(f"the builder must take (width, depth), two numbers: {error}") from None
    except ValueError:  # written in C, which says nothing of its arguments
        pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
        if not parameter.numel():
            raise ModelError(f"{name} has no numbers, its shape being {tuple(parameter.shape)}: leave it out")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device, which has no weights to measure: build it on the CPU")
        if not parameter.isfinite().all():
            raise ModelError(f"{name} starts with numbers that are not finite: give it an init (torch.nn.init)")
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
    numbered = re.compile(r"(.*\D|)\d+[^.\d]*")  # "blocks.0", "stage1.b0", "layer0_attention"
    counts = [
        Counter(match[1] for name, _ in network.named_modules() if (match := numbered.fullmatch(name)))
        for network in (shallow, deep)
    ]
    return tuple(name for name, count in counts[1].items() if 0 < counts[0][name] < count)


def refuse_other_shapes(growth: Growth, network: nn.Module, ratio: float) -> None:
    """Raises ModelError for a parameter of a network of any size, `ratio` times as wide as the base, whose shape does
    not follow from what grows from the base's width to twice that."""
    expected = defaultdict(set)
    for name, parameter in growth.deep.named_parameters():
        sides = zip(parameter.shape, growth.grows[name], strict=True)
        expected[growth.pattern(name)].add(tuple(side * ratio if grows else side for side, grows in sides))
    for name, parameter in network.named_parameters():
        shapes = expected.get(growth.pattern(name))
        if shapes and tuple(parameter.shape) not in shapes:
            raise ModelError(
                f"{name} is of shape {tuple(parameter.shape)} at {ratio:g} times the base's width, where "
                f"{' or '.join(str(tuple(map(int, shape))) for shape in sorted(shapes))} follows from the base and one "
                "twice as wide, as where a size is rounded or has a least value: take a base at which it grows as the "
                "width does"
            )


def compare_sizes(build: Builder, width: int, depth: int) -> Growth:
    """Builds the network at a base size, at twice its depth, and at twice both depth and width; compares names and
    shapes.

    Raises ModelError for a builder that ignores a size, for a dimension that grows in another ratio than the width
    does, and for a parameter whose shape depends on the depth.
    """
    base = build_network(build, width, depth, "cpu")
    refuse_without_rule(base)
    deep = build_network(build, width, 2 * depth, "cpu", seed=1)  # another: what is equal in both was not drawn
    with Constants() as constants:
        wide = build_network(build, 2 * width, 2 * depth, "meta")
    shapes, deeper, wider = list_shapes(base), list_shapes(deep), list_shapes(wide)
    kind = type(base).__name__
    if list_shapes(build_network(build, width, depth, "meta")) != shapes:
        raise ModelError(f"the builder gives another {kind} each time: let its sizes alone decide what it builds")
    if odd := sorted(set(deeper) ^ set(wider)):
        raise ModelError(
            f"{kind} has other parameters at width {2 * width} than at {width}: {', '.join(odd[:3])}. The width "
            "changes shapes alone, and a builder takes (width, depth) in this order"
        )
    grows: dict[str, tuple[bool, ...]] = {}
    growth = Growth(base, deep, wide, constants, grows, find_repeating_modules(base, deep))
    # A block of a deeper network may be what another one was in the base: the last, or the first of a stage.
    by_pattern = defaultdict(set)
    for name, shape in shapes.items():
        by_pattern[growth.pattern(name)].add(shape)
    for name, shape in deeper.items():
        ratios = [new / old if old else 1.0 for old, new in zip(shape, wider[name], strict=True)]
        if any(ratio not in (1.0, 2.0) for ratio in ratios):
            raise ModelError(
                f"{name} is of shape {tuple(shape)} at width {width} and {tuple(wider[name])} at {2 * width}: a "
                "dimension grows as the width does, or stays"
            )
        grows[name] = tuple(ratio == 2.0 for ratio in ratios)
        if name in shapes and shape not in by_pattern[growth.pattern(name)]:
            raise ModelError(
                f"{name} is of shape {tuple(shapes[name])} at depth {depth} and {tuple(shape)} at {2 * depth}: a "
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
    if not growth.containers:
        raise ModelError(
            f"{kind} has no module of which a deeper network has more, but parameters alone: make each block a "
            "torch.nn.Module, the sum of stream and branch included"
        )
    patterns = {growth.pattern(name) for name in deeper}
    if lost := sorted(name for name in shapes if growth.pattern(name) not in patterns):
        raise ModelError(f"{kind} of depth {2 * depth} lacks {', '.join(lost[:3])}, which it has at depth {depth}")
    return growth
