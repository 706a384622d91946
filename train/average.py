"""An exponential moving average of the weights and of BatchNorm's statistics, in float32, sharded as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from depthmup.train.telemetry import local


class WeightAverage:
    """`weights` is the average by name, of parameters and of buffers of floats: BatchNorm's statistics belong to the
    weights that they were measured with. It starts as the initial weights and forgets them quickly, since the decay is
    at most (1 + step) / (10 + step) (as in TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.saved = set(network.state_dict())  # without what BatchNorm keeps of a single step
        self.weights = {name: tensor.detach().clone().float() for name, tensor in self.averaged()}

    def averaged(self) -> list[tuple[str, Tensor]]:
        """What of the network is averaged, by name."""
        buffers = self.network.named_buffers()
        statistics = [(name, buffer) for name, buffer in buffers if name in self.saved and buffer.is_floating_point()]
        return [*self.network.named_parameters(), *statistics]

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, weights): this process's shards, in the same order."""
        return [local(w) for w in self.weights.values()], [local(tensor.detach()) for _, tensor in self.averaged()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step` (from 0)."""
        averages, weights = self.pairs()
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network computes with the average while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for average, weight in zip(*self.pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
