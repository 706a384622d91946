"""An exponential moving average of weights and of BatchNorm's statistics, in float32, sharded as they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from depthmup.train.tensors import take_local


def average_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What of a network is averaged: its parameters, and the buffers of floats that are saved, as BatchNorm's
    statistics belong to the weights that they were measured with."""
    saved = network.state_dict().keys()  # without what BatchNorm keeps of a single step
    statistics = {n: b for n, b in network.named_buffers() if n in saved and b.is_floating_point()}
    return dict(network.named_parameters()) | statistics


class WeightAverage:
    """`weights` is the average of `tensors`, by name. It starts as they are and forgets that quickly, since the decay
    is at most (1 + step) / (10 + step) (as in TensorFlow's ExponentialMovingAverage). Where `decay` is a tensor (K,),
    the tensors lie side by side on a leading axis (K, ...), and each has its own."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float | Tensor) -> None:
        self.tensors, self.decay = tensors, decay
        self.weights = {name: tensor.detach().clone().float() for name, tensor in tensors.items()}

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, tensors): this process's shards, in the same order."""
        tensors = [take_local(tensor.detach()) for tensor in self.tensors.values()]
        return [take_local(average) for average in self.weights.values()], tensors

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step` (from 0)."""
        averages, tensors = self.pairs()
        most = (1 + step) / (10 + step)
        if not isinstance(self.decay, Tensor):
            torch._foreach_lerp_(averages, tensors, 1 - min(self.decay, most))
            return
        weight = (1 - self.decay.clamp(max=most)).float()
        for average, tensor in zip(averages, tensors, strict=True):
            average.lerp_(tensor, weight.view(-1, *[1] * (tensor.ndim - 1)))

    def keep(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Of tensors that lie side by side leaves out those that are not among `rows`; `tensors` are the others."""
        self.tensors = tensors
        self.weights = {name: weights[rows] for name, weights in self.weights.items()}
        if isinstance(self.decay, Tensor):
            self.decay = self.decay[rows]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The tensors hold the average while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for average, tensor in zip(*self.pairs(), strict=True):
            kept = tensor.clone()
            tensor.copy_(average)
            average.copy_(kept)
