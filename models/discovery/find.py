"""The Roles of a network, found by looking: which dimensions grow, where branches end, which module is the readout."""

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from depthmup.models.discovery.attention import find_queries
from depthmup.models.discovery.branches import (
    MOVES,
    NORMS,
    PARTS,
    PRODUCTS,
    STACKS,
    SUMS,
    TRANSPOSED,
    Branch,
    find_branches,
)  # fmt: skip
from depthmup.models.discovery.growth import Builder, Growth, compare_sizes
from depthmup.models.discovery.initial import refuse_structured
from depthmup.models.discovery.own_factors import refuse_factors_of_depth, refuse_factors_of_width
from depthmup.models.discovery.parameters import (
    BY_HAND,
    CONTRACTIONS,
    MORE_BLOCKS,
    Weights,
    decide_role,
    make_rules,
    settle_roles,
)
from depthmup.models.discovery.stream_roles import find_stream_vectors
from depthmup.models.discovery.trace import (
    ATTENTION,
    SCALINGS,
    Node,
    compare_widths,
    trace,
)
from depthmup.models.errors import ModelError
from depthmup.models.family import Roles, Slot
from depthmup.models.parameterization import Role


@dataclass(frozen=True)
class Discovery:
    """What was found of a network."""

    roles: Roles
    features: int  # that the base's readout reads
    head_dim: int | None  # of the base network's attention, where it grows with width
    growth: Growth = field(compare=False)


def find_roles(build: Builder, inputs: Any, width: int, depth: int) -> Discovery:
    """The roles of the networks that `build(width, depth)` gives, by building three and watching a forward pass.

    inputs: what the network is called with, a tensor or a tuple: as (batch, channels, height, width); values do not
    matter. width, depth: the base's, as the builder takes them; 2 width and 2 depth are built as well.
    Raises ModelError, with the parameter's or module's name, for what cannot be decided.
    """
    growth = compare_sizes(build, width, depth)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    refuse_structured(growth.base, growth.deep)
    drawn = list_weights(growth.base), list_weights(growth.deep)  # before they go to meta
    base, nodes, wide = trace_in_either_mode(growth, given)
    branches = find_branches(nodes, growth.repeats)
    if not branches:
        raise ModelError(
            f"{type(growth.base).__name__} has no residual stream: nothing adds a branch to what it reads. Without one "
            f"there are rules for width alone (mup): {BY_HAND}"
        )
    used = find_users(nodes)
    names = [name for name, _ in growth.deep.named_parameters()]
    roles = settle_roles(growth, {name: decide_role(name, growth, used[name], branches) for name in names})
    roles |= dict.fromkeys(find_gates(growth, roles, used), Role.GATE)
    exempt = set(getattr(growth.base, "no_weight_decay", set)())  # timm's networks say which they mean
    queries, head_dim, scalings = find_queries(nodes, wide)
    roles |= find_stream_vectors(growth, (base, nodes), branches, used)
    summing = {name for name, role in roles.items() if role in (Role.READOUT, Role.ROUTER, Role.GATE)}
    slots = [slot for branch in branches for slot in find_slots(branch, growth.deep)]
    readout, *more = find_readouts(roles, used, nodes[-1])
    matrices = summing | {name for name, role in roles.items() if role in (Role.HIDDEN, Role.BRANCH_HIDDEN)}
    refuse_factors_of_width(nodes, scalings, summing, matrices)
    refuse_factors_of_depth(growth, base, nodes)
    found = Roles(
        parameters=tuple(make_rules(growth, roles, used, drawn, exempt)),
        branches=merge_slots(growth, growth.deep, slots),
        readout=readout,
        queries=merge_slots(growth, growth.deep, queries),
        blocks=find_blocks(growth, branches),
        more_readouts=tuple(more),
    )
    refuse_missing(growth.base, found)
    return Discovery(found, find_readout_features(growth.base, found), head_dim, growth)


def trace_in_either_mode(growth: Growth, given: tuple[Any, ...]) -> tuple[list[Node], list[Node], list[Node]]:
    """The passes of the base, the deep and the wide network: in training or, where that cannot be followed, as of one
    that leaves blocks out at random, in evaluation. Raises ModelError of the former."""
    errors = []
    for training in (True, False):
        try:
            base, nodes = (trace(network.train(training), given) for network in (growth.base, growth.deep))
            wide = trace(growth.wide.train(training), given, growth.constants)
            compare_widths(nodes, wide)
            used = find_users(nodes)
            if idle := [name for name, _ in growth.deep.named_parameters() if name not in used]:
                raise ModelError(f"the forward pass does not use {', '.join(idle[:3])}: remove it, or {BY_HAND}")
            return base, nodes, wide
        except ModelError as error:
            errors.append(error)
    raise errors[0]


def list_weights(network: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def find_users(nodes: list[Node]) -> dict[str, list[Node]]:
    """Parameter name -> the operations that take it. What is first made of parameters alone, as in a convolution whose
    weight is standardised, is taken by the operation that gets it. Results that nothing reads do not count."""
    found = defaultdict(list)
    carried: dict[Node, set[str]] = {}
    last = nodes[-1]
    for node in nodes:
        names = set(node.parameters).union(*(carried.get(each, ()) for each in node.inputs))
        if not node.data and node.operation not in PRODUCTS | TRANSPOSED | CONTRACTIONS:
            carried[node] = names
        elif node.readers or node is last or node.emitted_by:
            for name in names:
                found[name].append(node)
    return found


# ---------------------------------------------------------------- modules


def find_last_weight(node: Node) -> str | None:
    """The module whose weights were the last to act on a tensor; None where a function comes after them that does not
    carry a factor through."""
    while True:
        if node.parameters and node.operation in PRODUCTS | TRANSPOSED | NORMS:
            return node.module
        if node.operation == ATTENTION:
            return f"{node.module}.out_proj"
        before = [each for each in node.inputs if each.data]
        if node.operation not in MOVES | SCALINGS | PARTS or len(before) != 1:
            return None
        node = before[0]


def find_slots(branch: Branch, network: nn.Module) -> list[tuple[str, str]]:
    """(module whose output is the branch, the last module with weights before that). Of a branch that is a sum of what
    several modules put out, one for each. Raises ModelError for none."""
    ends = [branch.end]
    while sums := [end for end in ends if not end.emitted_by and end.operation in SUMS and len(end.readers) == 1]:
        ends = [end for end in ends if end not in sums] + [node for end in sums for node in end.inputs if node.data]
    return [find_slot(end, branch, network) for end in ends]


def find_slot(end: Node, branch: Branch, network: nn.Module) -> tuple[str, str]:
    last = find_last_weight(end)
    if len(end.readers) > 1:
        raise ModelError(f"the branch that ends in {end.module} is read in two places: {BY_HAND}")
    if end.emitted_by:
        output = end.emitted_by[-1]
        return output, last or output
    if last is None or last not in dict(network.named_modules()) or last == end.module:
        raise ModelError(
            f"no module puts out the branch that is added in {branch.total.module or 'the network itself'}: wrap it in "
            "a module, or end it in a torch.nn.Identity"
        )
    return last, last


def which_blocks(growth: Growth, network: nn.Module, among: Collection[str]) -> dict[str, bool | None]:
    """What `growth.pattern` is to be told of each module in `among`, so that it matches no other one of `network`: all
    blocks, the first one alone, or all others. Raises ModelError where none of these does."""
    others = {(growth.pattern(name), growth.is_first(name)) for name, _ in network.named_modules() if name not in among}
    found: dict[str, bool | None] = {}
    for name in among:
        pattern, first = growth.pattern(name), growth.is_first(name)
        if (pattern, first) in others:
            raise ModelError(f"a branch ends in {name}, and in other blocks none ends there: {BY_HAND}")
        found[name] = first if (pattern, not first) in others else None
    return found


def merge_slots(growth: Growth, network: nn.Module, found: list[tuple[str, str]]) -> tuple[Slot, ...]:
    """One slot for all blocks that have it in the same place; `found` in `network`. Where the last module with weights
    is not the same in all of them, the slot names its own module, and an export refuses what that cannot hold."""
    slots: dict[str, Slot] = {}
    which = which_blocks(growth, network, {output for output, _ in found})
    for output, last in found:
        first = which[output]
        pattern = growth.pattern(output, first)
        start = next((c for c in growth.containers if output.startswith(c) and last.startswith(c)), None)
        if start is None:
            slot = Slot(pattern, last.replace("\\", "\\\\"))
        else:
            head = start + output[len(start) :].partition(".")[0]
            rest = pattern.removeprefix(growth.pattern(head, first))
            slot = Slot(f"({growth.pattern(head, first)}){rest}", rf"\1{last.removeprefix(head)}")
        alike = slots.setdefault(pattern, slot) == slot
        slots[pattern] = slot if alike else replace(slot, last=r"\g<0>")
    return tuple(slots.values())


def refuse_missing(base: nn.Module, roles: Roles) -> None:
    """Raises ModelError for a kind of branch or block that the deeper network has, and no block of the base."""
    names = [name for name, _ in base.named_modules()]
    for what in (*(slot.output for slot in roles.branches), roles.blocks):
        if what and not any(re.fullmatch(what, name) for name in names):
            raise ModelError(
                f"a deeper network has branches in modules like {what}, and the base none, so that it is no base of "
                f"them: {MORE_BLOCKS}"
            )


def find_blocks(growth: Growth, branches: list[Branch]) -> str | None:
    """The modules in which branches are added; None where the network itself adds one."""
    modules = [branch.total.module for branch in branches]
    if not all(modules):
        return None
    which = which_blocks(growth, growth.deep, set(modules))
    return "|".join(dict.fromkeys(growth.pattern(module, which[module]) for module in modules))


def find_gates(growth: Growth, roles: dict[str, Role], used: dict[str, list[Node]]) -> list[str]:
    """The weights outside of branches that read the width, and on whose output another such weight depends, as the
    scores of attention pooling before the readout. Raises ModelError for one of which a deeper network has more."""
    readers = {name: used[name][0] for name, role in roles.items() if role is Role.READOUT}
    gates = []
    for name, node in readers.items() if len(readers) > 1 else ():
        later = [reader for reader in readers.values() if reader.number > node.number]
        if any(node in find_ancestors(reader, node.number) for reader in later):
            gates.append(name)
    if more := [name for name in gates if growth.pattern(name) != re.escape(name)]:
        raise ModelError(
            f"{more[0]} reads the width outside of residual branches, and a deeper network has more of them: there is "
            f"no rule for that. Put it into a branch, or {BY_HAND}"
        )
    return gates


def find_ancestors(node: Node, least: int) -> set[Node]:
    """What a tensor was computed from, down to the number `least`."""
    waiting, seen = [node], set[Node]()
    while waiting:
        new = [each for each in waiting.pop().inputs if each.number >= least and each not in seen]
        seen.update(new)
        waiting += new
    return seen


def find_readouts(roles: dict[str, Role], used: dict[str, list[Node]], last: Node) -> list[str]:
    """The modules of the readout's weights: one, or several whose outputs are added to what the network puts out,
    `last`. Raises ModelError for none, for others, and for a weight that is no module's."""
    readouts = [name for name, role in roles.items() if role is Role.READOUT]
    if not readouts:
        raise ModelError(f"the network has no readout, which reads the width alone. The rules are for one: {BY_HAND}")
    if len(readouts) > 1 and not are_added([used[name][0] for name in readouts], last):
        raise ModelError(
            f"the network has {len(readouts)} readouts: {', '.join(readouts)}. The rules are for one, or for several "
            f"whose outputs are added: {BY_HAND}"
        )
    modules = [name.rpartition(".")[0] for name in readouts]
    for name, module in zip(readouts, modules, strict=True):
        if used[name][0].module != module:
            raise ModelError(f"the readout {name} is not used by its own module {module or '(the network)'}: {BY_HAND}")
        if not (module and name.endswith(".weight") and multiplies_input(used[name][0], name)):
            raise ModelError(
                f"the readout {name} is not the weight of a module that multiplies the module's input by it, as where "
                f"either is normalised first: take a plain torch.nn.Linear, or {BY_HAND}"
            )
    return modules


def multiplies_input(node: Node, name: str) -> bool:
    """Whether an operation takes the parameter as it is, and what its module is given but for moves and factors."""
    module, taken = node.module, name in node.parameters
    while taken and len(before := [each for each in node.inputs if each.data]) == 1:
        node = before[0]
        if node.module != module:
            return True
        taken = node.operation in MOVES | SCALINGS
    return False


def are_added(nodes: list[Node], last: Node) -> bool:
    """Whether sums and means alone, of tensors with the shape of `last` or stacks of them, lead from all `nodes` to
    `last`: a sum of linear maps is one linear map."""
    waiting, seen = [last], {last}
    while waiting:
        node = waiting.pop()
        before = [each for each in node.inputs if each.data]
        if node in nodes or (node.operation in SCALINGS and len(before) > 1):
            continue
        if node.operation in SUMS | SCALINGS | STACKS | MOVES - {"cat"}:
            waiting += [each for each in before if each not in seen]
            seen.update(before)
    return all(node in seen and node.shape == last.shape for node in nodes)


def find_readout_features(network: nn.Module, roles: Roles) -> int:
    """How many features the readout reads."""
    return network.get_parameter(f"{roles.readout}.weight").shape[1]
