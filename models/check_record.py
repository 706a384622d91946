"""What the coordinate check measures in a network: what flows at its positions, its weights, and inside branches."""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from depthmup.models.build import ScaledModel, find_slots
from depthmup.models.errors import ModelError
from depthmup.models.family import find_matching_modules
from depthmup.models.parameterization import BRANCH_ROLES
from depthmup.models.stream import find_stream_modules, look_once


class Position(NamedTuple):
    """Where something is measured."""

    group: str = ""  # what blocks that follow each other have in common, as `stages.2`
    number: int = 0  # which of them it is
    kind: str = ""  # of block, where blocks of several kinds follow each other
    before: int = 0  # of the stream: what else acted on it since the container's first block, as a position encoding


Values = dict[str, dict[Position, Tensor]]  # quantity -> position -> what flows there
ONLY = Position()  # the position of what there is one of


def describe_kind(block: nn.Module) -> str:
    """What blocks of one kind have in common at every size: names of parameters and numbers of their dimensions."""
    return " ".join(f"{name}:{parameter.ndim}" for name, parameter in block.named_parameters())


def list_positions(names: Sequence[str], blocks: Sequence[str], kinds: Mapping[str, str] = {}) -> list[Position]:
    """Each module's place among those that stand alike in the blocks of one container, as `stages.2`, in order.
    kinds: of blocks, where that counts."""
    positions: list[Position] = []
    counts = Counter[str]()
    for name in names:
        block = next((each for each in blocks if f"{name}.".startswith(f"{each}.")), name)
        group = re.sub(r"\d+(?=\D*$)", "#", block) + name[len(block) :]
        positions.append(Position(group, counts[group], kinds.get(block, "")))
        counts[group] += 1
    return positions


@contextmanager
def recording(scaled: ScaledModel, inputs: Tensor) -> Iterator[Values]:
    """Fills the yielded dict, anew in each forward pass, with what the network's positions put out. `inputs`: a batch,
    by which residual blocks are found where nobody stated them."""
    modules, values = dict(scaled.network.named_modules()), Values()

    stream: Any = None  # what the block before put out
    before = 0

    def record(quantity: str, position: Position) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal stream
            first = output[0] if isinstance(output, tuple) else output
            at = position
            if quantity == "stream":
                stream, at = first, position._replace(before=before)
            values.setdefault(quantity, {})[at] = first.detach().clone()

        return hook

    def follow(position: Position) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal before
            before = before + all(each is not stream for each in inputs) if position.number else 0

        return hook

    def record_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values["stream input"] = {ONLY: inputs[0].detach().clone()}

    blocks = find_stream_modules(scaled, inputs)
    watched = {"stream": blocks, "branch": list(scaled.branches), "logits": [""]}
    watched["queries"] = list(find_slots(scaled.network, scaled.roles.queries))
    if scaled.roles.routers:
        watched["router logits"] = find_matching_modules(scaled.network, scaled.roles.routers)
    if scaled.roles.keys:
        watched["keys"] = find_matching_modules(scaled.network, scaled.roles.keys)
    kinds = {name: describe_kind(modules[name]) for name in blocks}
    handles = [modules[blocks[0]].register_forward_pre_hook(record_input)]
    handles += [
        modules[name].register_forward_pre_hook(follow(at))
        for name, at in zip(blocks, list_positions(blocks, blocks), strict=True)
    ]
    for quantity, names in watched.items():
        places = list_positions(names, blocks, kinds)
        handles += [
            modules[name].register_forward_hook(record(quantity, at)) for name, at in zip(names, places, strict=True)
        ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def observe(scaled: ScaledModel, values: Values, by_muon: set[str]) -> Values:
    """A copy of `values` with attention logits in place of queries and keys, and the weights of each role; matrices
    that muon trains, `by_muon`, one by one."""
    observed = {quantity: dict(at) for quantity, at in values.items() if quantity not in ("queries", "keys")}
    if "queries" in values and "keys" in values:
        observed["attention logits"] = {
            at: q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (batch, heads, tokens, tokens)
            for (at, q), k in zip(values["queries"].items(), values["keys"].values(), strict=True)
        }
    weights: dict[str, list[Tensor]] = {}
    for name, parameter in scaled.network.named_parameters():
        role = scaled.rules[name].role.value
        if name in by_muon:
            matrices = observed.setdefault(f"muon {role}", {})
            matrices[Position("", len(matrices))] = parameter.detach().flatten(1).clone()
        else:
            weights.setdefault(role, []).append(parameter.detach().flatten())
    return observed | {role: {ONLY: torch.cat(tensors)} for role, tensors in weights.items()}


# ---------------------------------------------------------------- inside branches

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # put out a linear function of one input


@dataclass(frozen=True)
class Layer:
    """One layer of a branch: the `number`-th of `count`, in the `branch`-th branch of the `block`-th block; from 1, but
    blocks from 0."""

    name: str
    block: int
    branch: int
    number: int
    count: int

    def quantity(self, part: str) -> str:
        """'inner layer, own 2.1': of the first layer of each block's second branch."""
        place = "only" if self.count == 1 else "last" if self.number == self.count else "inner"
        return f"{place} layer, {part} {self.branch}.{self.number}"


def list_branch_layers(scaled: ScaledModel, inputs: Tensor) -> list[Layer]:
    """The layers inside the branches of `scaled`, in the order in which they run: those that hold a matrix or a
    convolution that `roles` puts inside a branch, from one branch's end to the next.

    Raises ModelError for such a parameter of another module, whose input is not seen.
    """
    inside = {
        name.rpartition(".")[0]
        for name, parameter in scaled.network.named_parameters()
        if parameter.ndim > 1 and scaled.rules[name].role in BRANCH_ROLES
    }
    modules = dict(scaled.network.named_modules())
    if others := sorted(name for name in inside if not isinstance(modules[name], LAYERS)):
        raise ModelError(
            f"{others[0]} is a {type(modules[others[0]]).__name__}: the check sees inside a branch of linear layers "
            "and convolutions; write it with these, or check without the inside"
        )
    found, open_layers, block, branch = list[Layer](), list[str](), -1, 0

    def begin_block(module: nn.Module, inputs: Any) -> None:
        nonlocal block, branch
        block, branch = block + 1, 0

    def add(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: open_layers.append(name)

    def end_branch(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal branch
        branch += 1
        found.extend(
            Layer(name, block, branch, number, len(open_layers)) for number, name in enumerate(open_layers, start=1)
        )
        open_layers.clear()

    blocks = find_stream_modules(scaled, inputs)
    handles = [modules[name].register_forward_pre_hook(begin_block) for name in blocks]
    handles += [modules[name].register_forward_hook(add(name)) for name in sorted(inside)]
    handles += [modules[name].register_forward_hook(end_branch) for name in scaled.branches]  # after `add`'s
    look_once(scaled.network, inputs, handles)
    return found


class Inside:
    """Watches `layers` of a network from its first step on. `close` takes the hooks off."""

    def __init__(self, scaled: ScaledModel, layers: list[Layer]) -> None:
        modules = dict(scaled.network.named_modules())
        self.layers = layers
        self.modules = {layer.name: modules[layer.name] for layer in layers}
        self.initial = {name: copy.deepcopy(module) for name, module in self.modules.items()}
        self.inputs: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.handles = [module.register_forward_hook(self.keep(name)) for name, module in self.modules.items()]

    def keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self.inputs[name] = inputs[0].detach().clone()
            self.first.setdefault(name, self.inputs[name])

        return hook

    @torch.no_grad()
    def changes(self) -> Values:
        """Of each layer's output since the first forward pass: `own`, (W - W0) x, and `passed`, W0 (x - x0). They are
        functions alone: no multiplier on a layer's output enters."""
        found: Values = {}
        for layer in self.layers:
            now, then = self.inputs[layer.name], self.first[layer.name]
            module, initial = self.modules[layer.name], self.initial[layer.name]
            passed = initial.forward(now)
            place = Position("", layer.block)
            found.setdefault(layer.quantity("own"), {})[place] = module.forward(now) - passed
            found.setdefault(layer.quantity("passed"), {})[place] = passed - initial.forward(then)
        return found

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
