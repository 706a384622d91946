"""Stochastic depth (Huang et al., arXiv 1603.09382) for every family: hooks on the ends of branches.

Which images a branch is dropped for depends on the seed, the step, the branch and the image's place in the global batch
alone: neither on how the batch is spread over processes and micro-batches, nor on the device, nor on a restart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthmup.models.init import make_generator


def draw_uniform(seed: int, step: int, num_branches: int, global_batch_size: int, places: np.ndarray) -> Tensor:
    """(branches, images) uniform numbers of a step, on the CPU. `places`: of this process's images in the global batch,
    in the order in which they are taken."""
    generator = make_generator(seed, f"stochastic depth, step {step}")
    return torch.rand(num_branches, global_batch_size, generator=generator)[:, torch.from_numpy(places)]


class Draws:
    """What the hooks of one network look at: `now` (branches, images), the uniform numbers of the present micro-batch,
    None outside of a run, where torch's own generator draws; `keeps` (branches,), the share of the images that each
    branch is kept for."""

    def __init__(self) -> None:
        self.depths: list[float] = []  # of each branch: 0 is the first block, 1 the last
        self.now: Tensor | None = None
        self.keeps: Sequence[float] | Tensor = []

    @property
    def num_branches(self) -> int:
        return len(self.depths)

    def keeps_at(self, rate: float) -> list[float]:
        """`keeps` where the last block is dropped for a share `rate`."""
        return [1 - rate * depth for depth in self.depths]


class DropBranch:
    """Forward hook: in training, zeroes the branch for a share of the images and scales the rest up."""

    def __init__(self, depth: float, draws: Draws) -> None:
        self.draws, self.number = draws, draws.num_branches
        draws.depths.append(depth)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep, drawn = self.draws.keeps[self.number], self.draws.now
        uniform = torch.rand(len(output), device=output.device) if drawn is None else drawn[self.number]
        kept = ((uniform < keep) / keep).to(output.dtype)  # (images,)
        return output * kept.view(-1, *[1] * (output.ndim - 1))


def install_stochastic_depth(network: nn.Module, branches: list[str], blocks: list[str], rate: float) -> Draws:
    """Rate 0 in the first block, rising linearly to `rate` in the last. `branches`: names of the ends of branches."""
    draws = Draws()
    for number, block in enumerate(blocks):
        for name in branches:
            if rate and number and name.startswith(block + "."):
                network.get_submodule(name).register_forward_hook(DropBranch(number / (len(blocks) - 1), draws))
    draws.keeps = draws.keeps_at(rate)
    return draws
