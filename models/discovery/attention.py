"""Attention whose head dim grows with width: its queries, and what its logits are multiplied by."""

import math

from depthmup.models.discovery.branches import find_source
from depthmup.models.discovery.parameters import BY_HAND, MATRIX_PRODUCTS
from depthmup.models.discovery.trace import ATTENTION, PRODUCT_OF_QUERIES, Node
from depthmup.models.errors import ModelError


def find_attention_products(nodes: list[Node]) -> list[tuple[Node, Node, int]]:
    """(product, queries, size of the dimension that queries and keys are multiplied over) of each attention, in order.
    Torch's own hides its queries: of it what it puts out, and the head dim."""
    found = []
    for node in nodes:
        data = [each for each in node.inputs if each.data]
        if node.summed and (len(data) >= 2 or node.operation == ATTENTION):
            found.append((node, node if node.operation == ATTENTION else data[0], node.summed))
        elif node.operation == PRODUCT_OF_QUERIES or (node.operation in MATRIX_PRODUCTS and len(data) >= 2):
            found.append((node, data[0], data[0].shape[-1]))
    return found


def list_logit_scalings(product: Node) -> list[Node]:
    """Attention's product of queries and keys, and what multiplies these before it, or the logits after it."""
    found = [product]
    for node in product.inputs:
        while before := find_source(node):
            found.append(node)
            node = before
    node = product
    while len(node.readers) == 1 and product.operation != PRODUCT_OF_QUERIES:  # which puts out no logits
        node = node.readers[0]
        if find_source(node) is None:
            break
        found.append(node)
    return found


def find_queries(nodes: list[Node], wide: list[Node]) -> tuple[list[tuple[str, str]], int | None, set[Node]]:
    """(queries' slots, head dim at the base, what scales its logits) where the head dim grows with width; ([], None)
    where it does not.

    Raises ModelError where it grows and no module puts out the queries, or logits are scaled otherwise than by the root
    of the head dim, or by a number that is not known."""
    slots, head_dim, scalings = [], None, set[Node]()
    pairs = zip(find_attention_products(nodes), find_attention_products(wide), strict=True)
    for (product, queries, size), (_, _, wider) in pairs:
        if wider == size:
            continue
        node = queries
        while not node.emitted_by or node.operation == ATTENTION:
            before = find_source(node)
            if before is None:
                raise ModelError(
                    f"head dim grows with width ({size} to {wider}) in {queries.module}, and no module puts out the "
                    "queries alone: keep the head dim and let the number of heads grow, or send them through a "
                    "torch.nn.Identity"
                )
            node = before
        chain = list_logit_scalings(product)
        own, of_wider = (
            math.prod(factor or math.nan for factor in factors)
            for factors in ([each.factor for each in chain], [each.wide_factor for each in chain])
        )
        if not math.isclose(own / of_wider, math.sqrt(wider / size), rel_tol=1e-3):
            by = "a number that is not known" if math.isnan(own / of_wider) else f"{own:.3g} and {of_wider:.3g}"
            raise ModelError(
                f"head dim grows with width ({size} to {wider}) in {product.module}, and products of queries and keys "
                f"are multiplied by {by}, not by 1 / sqrt(head dim): do that, or {BY_HAND}"
            )
        slots.append((node.emitted_by[-1], node.emitted_by[-1]))
        head_dim = size
        scalings.update(chain)
    return slots, head_dim, scalings
