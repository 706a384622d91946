"""The role of each parameter, from what grows in it and where it is used; and a rule for each that blocks share."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from depthmup.models.discovery.branches import MOVES, PRODUCTS, TRANSPOSED, Branch
from depthmup.models.discovery.growth import Growth
from depthmup.models.discovery.initial import measure_init
from depthmup.models.discovery.trace import SCALINGS, Node
from depthmup.models.errors import ModelError
from depthmup.models.family import ParameterRule
from depthmup.models.parameterization import Role

Weights = dict[str, Tensor]  # by name
BY_HAND = "write its Roles by hand, see docs/your-model.md"
MORE_BLOCKS = "take a base of more blocks"
MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}
CONTRACTIONS = MATRIX_PRODUCTS | {"addmm", "addbmm", "mm", "einsum", "tensordot", "lstm", "gru", "rnn_tanh", "rnn_relu"}


def decide_role(name: str, growth: Growth, users: list[Node], branches: list[Branch]) -> Role:
    """Raises ModelError for a parameter that no rule covers."""
    places = {next((i for i, branch in enumerate(branches) if user in branch.nodes), None) for user in users}
    shared_in_block = growth.place(name) is not None and None not in places  # a block has as many uses at every depth
    if len(places) > 1 and not shared_in_block:
        raise ModelError(
            f"{name} is used in several places, branches among them: shared weights have no rule. {BY_HAND}"
        )
    in_branch, grows = places != {None}, growth.grows[name]
    user, growing = users[0], sum(grows)
    if growing == 0:
        return Role.BRANCH_SCALAR if in_branch else Role.SCALAR
    if growing > 2 or (growing == 2 and len(grows) > 2 and user.operation not in PRODUCTS | TRANSPOSED):
        raise ModelError(f"{name}: {growing} of its {len(grows)} dimensions grow, in {user.operation}: {BY_HAND}")
    if growing == 2:
        return Role.BRANCH_HIDDEN if in_branch else Role.HIDDEN
    reads = {reads_width(name, each, grows) for each in users}
    if len(reads) > 1:
        raise ModelError(f"{name} reads the width in one place, and puts it out in another: {BY_HAND}")
    if reads == {True}:
        return Role.ROUTER if in_branch else Role.READOUT
    if in_branch:
        return Role.BRANCH_VECTOR
    is_gain = user.operation in PRODUCTS and name not in user.parameters  # of a weight's rows
    return Role.VECTOR if len(grows) == 1 or user.grouped or is_gain else Role.INPUT


def reads_width(name: str, user: Node, grows: tuple[bool, ...]) -> bool:
    """Whether an operation sums over the one dimension of a parameter that grows, or the next one that is no move or
    factor does. Raises ModelError for a mean over it, and a transposed convolution."""
    if len(grows) > 1 and user.operation in TRANSPOSED and not user.grouped:
        raise ModelError(f"{name} grows in one dimension, and {user.operation} has no rule for that: {BY_HAND}")
    node = user
    while any(node.grows) and node.operation in SCALINGS | MOVES and len(node.readers) == 1:
        node = node.readers[0]  # as in (x * q).sum(-1)
    if node is not user and node.operation == "mean" and any(node.inputs[0].grows[dim] for dim in node.over):
        raise ModelError(f"{name} weighs the width, and the mean over it is taken: take the sum, or {BY_HAND}")
    summed = node is not user and node.operation == "sum"
    return not any((node if summed else user).grows)


def settle_roles(growth: Growth, roles: dict[str, Role]) -> dict[str, Role]:
    """One role for a parameter in every block. What some blocks have in a branch, and others before both branch and
    shortcut, is the branch's. The first block of a container may have no shortcut, and roles of its own. Raises
    ModelError for blocks that differ otherwise."""
    by_pattern: dict[Any, set[Role]] = defaultdict(set)
    for name, role in roles.items():
        by_pattern[growth.pattern(name)].add(role)
        if not growth.is_first(name):
            by_pattern[growth.pattern(name), "later"].add(role)
    vectors = {Role.VECTOR, Role.BRANCH_VECTOR}
    settled = {}
    for name, role in roles.items():
        same = by_pattern[growth.pattern(name)]
        later = by_pattern[growth.pattern(name), "later"]
        if len(same) > 1 and same != vectors and len(later) > 1:
            raise ModelError(
                f"{name} is {role.value}, and the same parameter of other blocks "
                f"{', '.join(sorted(each.value for each in same - {role}))}: {BY_HAND}"
            )
        settled[name] = Role.BRANCH_VECTOR if same == vectors else role
    return settled


def make_rules(
    growth: Growth,
    roles: dict[str, Role],
    used: dict[str, list[Node]],
    drawn: tuple[Weights, Weights],
    exempt: set[str],
) -> Iterator[ParameterRule]:
    """A rule for each parameter of a block and each outside of blocks, in the network's order."""
    alike = defaultdict(list)
    for name in drawn[1]:
        alike[growth.pattern(name), roles[name]].append(name)
    patterns = Counter(pattern for pattern, _ in alike)
    for (pattern, _), names in alike.items():
        if patterns[pattern] > 1:
            pattern = growth.pattern(names[0], first=growth.is_first(names[0]))
        first = names[0]
        fans = used[first][0].operation in PRODUCTS | TRANSPOSED and drawn[1][first].ndim > 1
        base, deeper = ([weights[name] for name in names if name in weights] for weights in drawn)
        init = measure_init(first, base or deeper, deeper, fans)  # the base may have no second block of a kind
        yield ParameterRule(pattern, roles[first], init, decays=not exempt & set(names))
