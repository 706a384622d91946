"""What acts on the residual stream itself in every block, outside of branches."""

import warnings
from collections import Counter, defaultdict

from depthmup.models.discovery.branches import MOVES, NORMS, STACKS, SUMS, Branch, find_branches, find_stream
from depthmup.models.discovery.growth import Growth
from depthmup.models.discovery.parameters import BY_HAND
from depthmup.models.discovery.trace import SCALINGS, Node
from depthmup.models.errors import ModelError
from depthmup.models.parameterization import Role

WRITES = {"__setitem__"}  # to a part of a tensor


def find_stream_vectors(
    growth: Growth, passes: tuple[list[Node], list[Node]], branches: list[Branch], used: dict[str, list[Node]]
) -> dict[str, Role]:
    """What weighs, norms or is added to the stream itself in every block, by name.

    passes: of the base and of the deeper network. Raises ModelError for a number by which the stream is multiplied in
    each block, for what is neither a sum nor a product of it, as torch.lerp, and for a part of a branch that is read
    elsewhere. Warns of a matrix or a gate there: many in a row have no limit, and no rule of depth.
    """

    def place(node: Node) -> tuple[str, str]:
        return growth.pattern(node.module), node.operation

    def find_repeated(own: list[Node], deeper: list[Node]) -> list[Node]:
        counts = Counter(map(place, own)), Counter(map(place, deeper))
        return [node for node in deeper if counts[1][place(node)] > counts[0][place(node)]]

    streams = find_stream(passes[0], find_branches(passes[0], growth.repeats)), find_stream(passes[1], branches)
    repeated, leaks = (find_repeated(own, deeper) for own, deeper in zip(*streams, strict=True))
    if leaks:
        raise ModelError(
            f"a part of a branch in {leaks[0].module or 'the network itself'} is read outside of it as well, as where "
            f"two streams add to each other: {BY_HAND}"
        )
    names = defaultdict(list)
    for name, users in used.items():
        for user in users:
            names[user].append(name)
    for node in sorted(repeated, key=lambda node: not joins_stream(node)):
        place_of = node.module or "the network itself"
        scaled = node.operation in SCALINGS
        if (joins_stream(node) and not scaled) or (scaled and node.factor != 1 and not names[node]):
            raise ModelError(
                f"the stream itself goes through {node.operation} in every block, as in {place_of}, so that a deeper "
                "network has no limit: write x + branch(x), with all else in the branch"
            )
    products = [node for node in repeated if node.operation not in SUMS | NORMS | SCALINGS and names[node]]
    gates = [node for node in repeated if node.operation in SCALINGS and joins_stream(node)]
    for node in (products + gates)[:1]:
        warnings.warn(
            f"{names[node][0] if names[node] else node.module} multiplies the stream itself in every block, for which "
            "there is no rule of depth: move it into a branch, or see whether depthmup check passes",
            stacklevel=2,
        )
    vectors = [node for node in repeated if node.operation in SUMS | NORMS | SCALINGS]
    return {name: Role.STREAM_VECTOR for node in vectors for name in names[node] if any(growth.grows[name])}


def joins_stream(node: Node) -> bool:
    """Whether an operation makes one of several tensors, other than by putting them side by side."""
    return len([each for each in node.inputs if each.data]) > 1 and node.operation not in SUMS | MOVES | STACKS | WRITES
