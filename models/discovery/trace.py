"""A forward pass as a graph of tensors: which operation made each one, from which, with which parameters."""

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
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
PRODUCT_OF_QUERIES = "scaled_dot_product_attention"
MULTIPLICATIONS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
DIVISIONS = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"}
SCALINGS = MULTIPLICATIONS | DIVISIONS
RANDOM = {"rand", "randn", "randint", "bernoulli", "normal", "uniform", "multinomial", "rand_like", "randn_like"}
OF_SHAPE = {
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
}  # nothing of a tensor's numbers
DIMS_AT = {"sum": 1, "mean": 1, "softmax": 1, "norm": 2, "vector_norm": 2, "linalg_vector_norm": 2, "normalize": 2}


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
    data: bool = False  # depends on the network's input
    summed: int | None = None  # of an einsum or torch's attention: the size of what it sums over, or one head's
    emitted_by: list[str] = field(default_factory=list)  # modules whose (first) output it is, inner ones first
    readers: list["Node"] = field(default_factory=list)  # operations that take it
    over: tuple[int, ...] = ()  # dimensions of its input that a sum, mean, norm or softmax goes over
    factor: float | None = 1.0  # the number that the operation multiplies by; None for a learned one
    grows: tuple[bool, ...] = ()  # for each dimension, whether it grows with the network's width
    wide_factor: float | None = 1.0  # `factor` in the wide network


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


def find_factor(operation: str, args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """What the operation multiplies its result, or its second addend, by; None for one number that is not known."""
    if operation == PRODUCT_OF_QUERIES:
        scale: float | None = kwargs.get("scale")
        return (kwargs["query"] if "query" in kwargs else args[0]).shape[-1] ** -0.5 if scale is None else scale
    if "alpha" in kwargs:
        return float(kwargs["alpha"])
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor | int | float)]
    numbers = [each for each in given if isinstance(each, int | float)]
    if operation not in SCALINGS or not numbers:
        unknown = operation in SCALINGS and any(each.numel() == 1 for each in given if isinstance(each, Tensor))
        return None if unknown else 1.0
    return float(numbers[0]) if operation in MULTIPLICATIONS else 1 / numbers[0] if numbers[0] else math.inf


def find_dims(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The dimensions that a sum, mean, norm or softmax goes over."""
    if operation not in DIMS_AT:
        return ()
    given, place = args[0] if args else kwargs["input"], DIMS_AT[operation]
    default = 1 if operation == "normalize" else None
    dims = kwargs.get("dim", args[place] if len(args) > place else default)
    count = given.dim()
    if dims is None or dims == ():
        return tuple(range(count))
    return tuple(dim % count for dim in (dims if isinstance(dims, tuple | list) else [dims]) if count)


class Constants(TorchFunctionMode):
    """Keeps the values of tensors of one number that depend on constants alone, which a meta tensor has not."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a tensor, kept so that its id stays its own, and it
        self.moved: dict[int, tuple[Tensor, Tensor]] = {}  # with its value; what is not on meta, and it there

    def note(self, tensor: Tensor, value: Tensor) -> None:
        if value.numel() == 1 and not value.is_complex():
            self.values[id(tensor)] = tensor, value

    def value_of(self, leaf: Any) -> Any:
        """A constant of one number with its value; everything else as it is."""
        return self.values[id(leaf)][1] if id(leaf) in self.values else leaf

    def to_meta(self, leaf: Any) -> Any:
        """What a network keeps outside of its parameters and buffers goes to meta when it is used."""
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return leaf
        if id(leaf) not in self.moved:
            self.moved[id(leaf)] = leaf, leaf.to("meta")
            self.note(self.moved[id(leaf)][1], leaf)
        return self.moved[id(leaf)][1]

    def evaluate(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keeps the value of a result of one number, where all that it is made of is known."""
        random = getattr(func, "__name__", "").strip("_") in RANDOM
        if random or not isinstance(result, Tensor) or result.numel() != 1 or not result.is_meta:
            return
        args, kwargs = tree_map(self.value_of, (args, {key: kwargs[key] for key in kwargs if key != "device"}))
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            with torch.device("cpu"):
                self.note(result, func(*args, **kwargs))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.evaluate(func, args, kwargs or {}, result)
        return result


class Recorder(Constants):
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
        summed: int | None = None,
    ) -> Node:
        data = operation == "input" or (operation not in OF_SHAPE and any(node.data for node in inputs))
        sources, place = (tuple(inputs), tuple(parameters)), self.running[-1]
        node = Node(len(self.nodes), operation, tensor.shape, *sources, place, grouped, data, summed)
        for each in inputs:
            each.readers.append(node)
        self.nodes.append(node)
        self.of[id(tensor)] = tensor, node
        return node

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(leaf.is_meta for leaf in given):
            args, kwargs = tree_map(self.to_meta, (args, kwargs))
            given = [self.to_meta(leaf) for leaf in given]
        inputs = list(dict.fromkeys(node for leaf in given if (node := self.node_of(leaf))))
        parameters = [self.names[id(leaf)] for leaf in given if id(leaf) in self.names]
        result = func(*args, **kwargs)
        if not inputs and not parameters:
            self.evaluate(func, args, kwargs, result)
            return result
        name = getattr(func, "__name__", str(func))
        groups = kwargs.get("groups", args[6] if name.startswith("conv") and len(args) > 6 else 1)
        changed = [args[0]] if name == "__setitem__" else tree_leaves(result)
        known = [float(value) if (value := self.value_of(arg)) is not arg else arg for arg in args]
        for leaf in changed:
            if isinstance(leaf, Tensor) and id(leaf) not in self.names:
                node = self.add(leaf, name, inputs, parameters, groups != 1, count_summands(name, args, kwargs))
                node.factor, node.over = find_factor(name, known, kwargs), find_dims(name, args, kwargs)
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


def trace(network: nn.Module, inputs: tuple[Any, ...], constants: Constants | None = None) -> list[Node]:
    """The tensors of `network(*inputs)` in order, computed on the meta device: shapes alone.

    constants: what is known of those of a network that was built on meta. Raises ModelError where the pass fails there,
    as one whose control flow depends on the data does.
    """
    values = {name: buffer for name, buffer in network.named_buffers() if not buffer.is_meta}
    network = network.to("meta")
    recorder = Recorder(network)
    recorder.values |= constants.values if constants else {}
    for name, buffer in network.named_buffers():
        if name in values:
            recorder.note(buffer, values[name])
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


def compare_widths(nodes: Sequence[Node], wide: Sequence[Node]) -> None:
    """Notes in `nodes` what grows in those of a wider network. Raises ModelError where that does something else."""
    for node, wider in zip_longest(nodes, wide):
        if node is None or wider is None or node.operation != wider.operation or len(node.shape) != len(wider.shape):
            place = next((each.module for each in (node, wider) if each and each.module), "the network itself")
            raise ModelError(
                f"in {place} the forward pass does not do the same each time, or at another width: let what it does "
                "depend on the depth alone, and drop blocks at random within a module that scales its input"
            )
        node.grows = tuple(own != other for own, other in zip(node.shape, wider.shape, strict=True))
        node.wide_factor = wider.factor


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
