"""A forward pass as a graph of tensors: which operation made each one, from which, with which parameters."""

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from depthmup.models.errors import ModelError

ATTENTION = "multi_head_attention_forward"  # torch's, which takes its own weights
ATTENTIONS_SIZES = (("query", 0), ("num_heads", 4))  # its arguments, and their places


@dataclass(eq=False)
class Node:
    """One tensor of a forward pass."""

    number: int  # in the order of the pass, so that inputs have smaller numbers
    operation: str  # the torch function that made it, as "linear" or "__add__"; "input" for what the network is given
    shape: torch.Size
    inputs: tuple["Node", ...]
    parameters: tuple[str, ...]  # that the operation itself takes
    module: str  # the innermost one that was running
    grouped: bool = False  # a convolution in groups
    parameter_last: bool = False  # it is the last operand: of a matrix product, the one whose rows are summed over
    data: bool = False  # depends on the network's input
    summed: int | None = None  # of an einsum or torch's attention: the size of what it sums over, or one head's
    emitted_by: list[str] = field(default_factory=list)  # modules whose (first) output it is, inner ones first
    readers: int = 0  # operations that take it
    reduced: str = ""  # "sum" or "mean", where one takes its last dimension away
    factor: float | None = 1.0  # the number that the operation multiplies by; None where it is a tensor


def count_summands(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many numbers each entry of the result sums over, where no shape of a result tells: of an einsum of two
    tensors; of torch's attention, which computes its queries itself, a head's. None for every other operation."""
    if operation == ATTENTION:
        query, heads = (kwargs[key] if key in kwargs else args[at] for key, at in ATTENTIONS_SIZES)
        return int(query.shape[-1] // heads)
    if operation == "einsum" and isinstance(args[0], str):
        operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
        terms, _, result = args[0].replace(" ", "").replace("...", "").partition("->")
        if len(operands) == 2:
            first, second = terms.split(",")
            sizes = dict(zip(reversed(first), reversed(operands[0].shape), strict=False))  # "..." may stand before
            return prod(size for letter, size in sizes.items() if letter in second and letter not in result)
    return None


def find_factor(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """What the operation multiplies its result by; None where that is a tensor."""
    if operation == "scaled_dot_product_attention":
        scale: float | None = kwargs.get("scale")
        return (kwargs["query"] if "query" in kwargs else args[0]).shape[-1] ** -0.5 if scale is None else scale
    kind = operation.strip("_").removeprefix("i").removeprefix("r").removeprefix("true")
    numbers = [number for number in (*args, *kwargs.values()) if isinstance(number, int | float)]
    if kind not in ("mul", "div") or not numbers:
        return None if kind in ("mul", "div") else 1.0
    return float(numbers[0]) if kind == "mul" else 1 / numbers[0]


def reduces_last(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it sums or averages over the last dimension of what it is given, that one among others."""
    if operation not in ("sum", "mean"):
        return False
    given = args[0] if args else kwargs["input"]
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or dims == ():
        return True
    return any(dim % given.dim() == given.dim() - 1 for dim in (dims if isinstance(dims, tuple | list) else [dims]))


class Recorder(TorchFunctionMode):
    """Makes a Node of every tensor that a torch function returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.nodes: list[Node] = []
        self.of: dict[int, tuple[Tensor, Node]] = {}  # by id; the tensor is kept, so that its id stays its own
        self.running = [""]

    def node_of(self, tensor: Any) -> Node | None:
        found = self.of.get(id(tensor))
        return found[1] if found else None

    def add(
        self,
        tensor: Tensor,
        operation: str,
        inputs: list[Node],
        parameters: list[str],
        grouped: bool = False,
        parameter_last: bool = False,
        summed: int | None = None,
    ) -> Node:
        data = operation == "input" or any(node.data for node in inputs)
        sources, place = (tuple(inputs), tuple(parameters)), self.running[-1]
        node = Node(len(self.nodes), operation, tensor.shape, *sources, place, grouped, parameter_last, data, summed)
        for each in inputs:
            each.readers += 1
        self.nodes.append(node)
        self.of[id(tensor)] = tensor, node
        return node

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = list(dict.fromkeys(node for leaf in given if (node := self.node_of(leaf))))
        parameters = [self.names[id(leaf)] for leaf in given if id(leaf) in self.names]
        result = func(*args, **kwargs)
        if inputs or parameters:
            name = getattr(func, "__name__", str(func))
            groups = kwargs.get("groups", args[6] if name.startswith("conv") and len(args) > 6 else 1)
            changed = [args[0]] if name == "__setitem__" else tree_leaves(result)
            if inputs and reduces_last(name, args, kwargs):
                inputs[0].reduced = name
            is_last, summed = id(given[-1]) in self.names, count_summands(name, args, kwargs)
            for leaf in changed:
                if isinstance(leaf, Tensor) and id(leaf) not in self.names:
                    node = self.add(leaf, name, inputs, parameters, groups != 1, is_last, summed)
                    node.factor = find_factor(name, args, kwargs)
        return result

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Notes which module runs, and what each puts out."""

        def enter(name: str) -> Any:
            return lambda module, inputs: self.running.append(name)

        def leave(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self.running.pop()
                first = output[0] if isinstance(output, tuple | list) and output else output
                if isinstance(first, Tensor) and (node := self.node_of(first)):
                    node.emitted_by.append(name)

            return hook

        handles: list[Any] = []
        for name, module in network.named_modules():
            if name:
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def own_linear() -> Iterator[None]:
    """torch's linear in the place of another one: DeepSpeed's ZeRO 3 leaves its own in torch.nn.functional, for the
    whole process, which hides from a trace what it does with the weight."""
    replaced = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


def trace(network: nn.Module, inputs: tuple[Any, ...]) -> list[Node]:
    """The tensors of `network(*inputs)` in order, computed on the meta device: shapes alone.

    Raises ModelError where the pass fails there, as one whose control flow depends on the data does.
    """
    network = network.to("meta")
    recorder = Recorder(network)
    given = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    for leaf in tree_leaves(given):
        if isinstance(leaf, Tensor):
            recorder.add(leaf, "input", [], [])
    try:
        with torch.device("meta"), torch.no_grad(), own_linear(), recorder.watching(network):
            network(*given)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = f", in {recorder.running[-1]}" if recorder.running[-1] else ""
        raise ModelError(
            f"{type(network).__name__} cannot be traced without data{place}, as where its control flow depends on it "
            f"({reason}): write its Roles by hand, see docs/your-model.md"
        ) from error
    return recorder.nodes


@dataclass(frozen=True)
class Fork:
    """How two tensors came from what they have in common."""

    common: set[Node]  # that both depend on; one of the two itself, where the other depends on it
    left: set[Node]  # that the left one alone depends on, itself included
    right: set[Node]


def find_fork(left: Node, right: Node) -> Fork:
    """Walks back from both tensors, the later nodes first, until all that is left to walk is common to them."""
    sides = {left: 1, right: 2}  # bit 1: the left one depends on it; bit 2: the right one
    heap = [(-node.number, node) for node in sides]
    heapq.heapify(heap)
    found: dict[int, set[Node]] = {1: set(), 2: set(), 3: set()}
    while any(sides[node] != 3 for _, node in heap):
        _, node = heapq.heappop(heap)
        found[sides[node]].add(node)
        for each in node.inputs:
            if each not in sides:
                heapq.heappush(heap, (-each.number, each))
            sides[each] = sides.get(each, 0) | sides[node]
    found[3].update(node for _, node in heap)
    return Fork(found[3], found[1], found[2])
