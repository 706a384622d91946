"""Where residual branches end: at each sum, the addend that is not the residual stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depthmup.models.discovery.trace import SCALINGS, Node, find_fork
from depthmup.models.errors import ModelError

SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MOVES = {  # put the same numbers elsewhere, or leave some of them out
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "contiguous", "clone"),
    *("squeeze", "unsqueeze", "expand", "roll", "to", "type", "type_as", "float", "bfloat16", "half", "__get__", "cat"),
    *("dropout", "dropout1d", "dropout2d", "pad", "identity", "t", "rearrange"),
}
PARTS = {"__getitem__", "narrow", "select"}  # of what a module puts out
PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d"}  # with a weight (out, in, *kernel)
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}  # with a weight (in, out, *kernel)
NORMS = {"layer_norm", "batch_norm", "group_norm", "rms_norm", "instance_norm"}
POOLS = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "max", "amax", "mean", "interpolate"}
STACKS = {"stack", "sum", "mean"}
LINEAR = SUMS | MOVES | SCALINGS | PRODUCTS | TRANSPOSED | NORMS | POOLS  # what a projection of the stream is made of


@dataclass(frozen=True)
class Branch:
    """One residual branch."""

    end: Node  # the addend
    total: Node  # stream + branch
    nodes: frozenset[Node]  # of the branch alone


def find_source(node: Node) -> Node | None:
    """The one tensor of the network's data that `node` moves or multiplies; None where it does something else."""
    before = [each for each in node.inputs if each.data]
    return before[0] if node.operation in MOVES | SCALINGS and len(before) == 1 else None


def carries_on(tensor: Node, common: set[Node]) -> bool:
    """Whether sums, moves and parts alone lead back from `tensor` to what it has in common with the other addend."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        node = waiting.pop()
        if node in common:
            return True
        if node.operation in SUMS | MOVES | PARTS:
            new = [each for each in node.inputs if each.data and each not in seen]
            seen.update(new)
            waiting += new
    return False


def is_projection(nodes: set[Node]) -> bool:
    """Whether nothing but linear maps and norms lies between the stream and a tensor."""
    return all(node.operation in LINEAR for node in nodes if node.data)


def find_branch(total: Node) -> Branch | None:
    """The branch that ends at a sum; None where the sum has no two addends of one shape that depend on the input.

    Raises ModelError where neither addend, or both, can be the stream.
    """
    addends = [node for node in total.inputs if node.data and node.shape == total.shape]
    if total.operation not in SUMS or len(addends) != 2:
        return None
    left, right = addends
    fork = find_fork(left, right)
    tests = (
        (left in fork.common, right in fork.common),
        (carries_on(left, fork.common), carries_on(right, fork.common)),
        (is_projection(fork.left), is_projection(fork.right)),
    )
    for streams in tests:
        if streams == (True, False):
            return Branch(right, total, frozenset(fork.right))
        if streams == (False, True):
            return Branch(left, total, frozenset(fork.left))
        if all(streams):
            break
    else:
        streams = (False, False)
    if streams == (True, True) and all(is_projection(nodes) for nodes in (fork.left, fork.right)):
        return None  # two linear maps of one tensor, and so one
    raise ModelError(
        f"two tensors are added in {total.module or 'the network itself'} (shape {tuple(total.shape)}), and neither "
        "addend alone is the residual stream: write the network's Roles by hand, see docs/your-model.md"
    )


def find_stream(nodes: Sequence[Node], branches: Sequence[Branch]) -> tuple[list[Node], list[Node]]:
    """(what depends on the network's input, is read, and lies in no branch; what of branches is read outside of them
    before they end)"""
    ends = {branch.end: branch.total for branch in branches}
    inside = set[Node]().union(*(branch.nodes for branch in branches))
    outside = [node for node in nodes if node.data and node.readers and node not in inside]
    leaks = [each for node in outside for each in node.inputs if each in inside and ends.get(each) is not node]
    return outside, leaks


def find_branches(nodes: Sequence[Node], repeats: Callable[[str], bool]) -> list[Branch]:
    """The residual branches of the main stream, of which a deeper network has more, in order; what is added within one
    is a part of it. One of a fixed number, as class attention or a shortcut around all blocks, has no factor of depth:
    to the rules what is in it lies outside of branches, but for branches of its own.

    repeats: whether there are more of a module in a deeper network. Raises ModelError where a sum of the main stream is
    not clear.
    """
    found: list[Branch] = []
    fixed = set[Node]()
    unclear: list[tuple[Node, ModelError]] = []
    for node in nodes:
        try:
            branch = find_branch(node)
        except ModelError as error:
            unclear.append((node, error))
        else:
            if branch and any(map(repeats, (node.module, branch.end.module, *branch.end.emitted_by))):
                found.append(branch)
            elif branch:
                fixed |= branch.nodes
    inside = set[Node]().union(*(branch.nodes for branch in found))
    if errors := [
        error for node, error in unclear if node not in inside and (node not in fixed or repeats(node.module))
    ]:
        raise errors[0]
    return [branch for branch in found if branch.total not in inside]
