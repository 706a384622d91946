"""A step as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

EAGER_STEPS = 3  # before a CUDA graph is captured: libraries choose their kernels and workspaces in them


class GraphedStep:
    """A step function of fixed shapes as one CUDA graph: eager for the first steps, captured once, then replayed. It
    does not keep the function, whose object holds it: their memory is then free as soon as nobody has that object."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.calls = 0
        self.stream = torch.cuda.Stream()  # autograd's bookkeeping must not tie the capture to the default stream

    def __call__(self, function: Callable[..., None], *inputs: Tensor) -> None:
        """One step. `function` is the same in every call."""
        if not self.inputs:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        if self.graph is None and self.calls < EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.calls += 1
            return
        if self.graph is None:
            torch.cuda.empty_cache()  # a graph has memory of its own; leave it what the eager steps used
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": the loader's thread may allocate pinned memory meanwhile, which "global" takes for a fault
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                function(*self.inputs)
        self.graph.replay()
