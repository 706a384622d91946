"""What a network's own forward pass multiplies by, where that depends on its size: the rules would scale it twice."""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence

from depthmup.models.discovery.branches import MOVES
from depthmup.models.discovery.growth import Growth
from depthmup.models.discovery.parameters import BY_HAND
from depthmup.models.discovery.trace import DIVISIONS, SCALINGS, Node
from depthmup.models.errors import ModelError

# What doubles as the width does, and what grows, or shrinks, as its root or as itself
OVER_WIDTH = {"sum": 2.0, "norm": 2**0.5, "vector_norm": 2**0.5, "linalg_vector_norm": 2**0.5} | {
    "normalize": 2**-0.5,
    "softmax": 0.5,
}
POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "__rtruediv__": -1.0}
KEEPING = MOVES | {"clamp", "clamp_min", "add", "__add__", "__radd__", "add_", "relu", "maximum"}  # as with an eps
LEAST_RATIO = 2**0.125  # over twice the depth: half of the smallest exponent in use, 1/4 (2203.00555)


def refuse_factors_of_width(
    nodes: Sequence[Node], allowed: Collection[Node], summing: set[str], matrices: set[str]
) -> None:
    """Raises ModelError, with the module's name, for a sum, norm or softmax over the width that nothing makes up for,
    and for a number that depends on the width and makes up for nothing.

    allowed: whose numbers have a rule, as attention's. summing: parameters by which the width is weighed and summed.
    matrices: these and all others that read what grows.
    """
    explained = set(allowed)
    for node in nodes:
        data = [each for each in node.inputs if each.data]
        if (
            not (data and node.readers)
            or node.operation not in OVER_WIDTH
            or not any(data[0].grows[dim] for dim in node.over)
        ):
            continue
        if summing & {name for each in (node, *node.inputs) for name in each.parameters}:
            continue
        ratio, chain = follow_ratio(node, OVER_WIDTH[node.operation])
        explained.update(chain)
        if not math.isclose(ratio, 1, rel_tol=1e-3):
            raise ModelError(
                f"{node.module or 'the network itself'} applies {node.operation} over the width, and what it gives "
                "depends on the width: take the mean, or multiply by a root of the width as an RMS norm does, or "
                f"{BY_HAND}"
            )
    for node in nodes:
        own, wide = node.factor, node.wide_factor
        if not node.data and not matrices & set(node.parameters):
            continue  # a gain of what is normalised, as of a standardised weight
        if node not in explained and own and wide and not math.isclose(own, wide, rel_tol=1e-6):
            raise ModelError(
                f"{node.module or 'the network itself'} multiplies by a number that depends on the width, {own:.3g} "
                f"here and {wide:.3g} at twice the width, beside which the rules scale once more: leave it out, or "
                f"{BY_HAND}"
            )


def follow_ratio(node: Node, ratio: float) -> tuple[float, list[Node]]:
    """By what a tensor grows with twice the width, after all that numbers, roots and divisions do to it; and those."""
    chain = [node]
    while not math.isclose(ratio, 1, rel_tol=1e-3) and len(node.readers) == 1:
        reader = node.readers[0]
        data = [each for each in reader.inputs if each.data]
        if reader.operation in SCALINGS:
            ratio = 1 / ratio if reader.operation in DIVISIONS and len(data) == 2 and data[1] is node else ratio
            ratio *= reader.wide_factor / reader.factor if reader.wide_factor and reader.factor else 1.0
        elif reader.operation in POWERS:
            ratio **= POWERS[reader.operation]
        elif reader.operation not in KEEPING or len(data) > 1:
            break
        node = reader
        chain.append(node)
    return ratio, chain


def refuse_factors_of_depth(growth: Growth, base: Sequence[Node], deep: Sequence[Node]) -> None:
    """Raises ModelError, with the module's name, for a number in blocks that goes further from 1 in a deeper network.
    One that goes from block to block up to the same bound, as rates of stochastic depth do, is none."""
    found: list[dict[tuple[str, str], list[float]]] = []
    for nodes in (base, deep):
        numbers = defaultdict(list)
        for node in nodes:
            if node.factor and node.data:
                numbers[growth.pattern(node.module), node.operation].append(abs(node.factor))
        found.append(numbers)
    for key, own in found[0].items():
        furthest = [max(numbers, key=lambda number: abs(math.log(number))) for numbers in (own, found[1].get(key, own))]
        if not 1 / LEAST_RATIO < furthest[1] / furthest[0] < LEAST_RATIO:
            module = next(node.module for node in base if growth.pattern(node.module) == key[0])
            raise ModelError(
                f"{module or 'the network itself'} multiplies by a number that depends on the depth, {furthest[0]:.3g} "
                f"here and {furthest[1]:.3g} at twice the depth, beside which the rules scale once more: leave it "
                f"out, or {BY_HAND}"
            )
