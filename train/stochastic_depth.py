"""Stochastic depth (Huang et al., arXiv 1603.09382) for every family: hooks on the ends of branches.

Which images a branch is dropped for depends on the seed, the step, the branch and the image's place in the global batch
alone: neither on how the batch is spread over processes and micro-batches, nor on the device, nor on a restart.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthmup.models.init import generator_for


def draw_uniform(seed: int, step: int, num_branches: int, global_batch_size: int, places: np.ndarray) -> Tensor:
    """(branches, images) uniform numbers of a step, on the CPU. `places`: of this process's images in the global batch,
    in the order in which they are taken."""
    generator = generator_for(seed, f"stochastic depth, step {step}")
    return torch.rand(num_branches, global_batch_size, generator=generator)[:, torch.from_numpy(places)]


class Draws:
    """The uniform numbers that the hooks of one network look at: `now` (branches, images) has those of the present
    micro-batch, None outside of a run, where torch's own generator draws."""

    def __init__(self) -> None:
        self.num_branches = 0
        self.now: Tensor | None = None


class DropBranch:
    """Forward hook: in training, zeroes the branch for a share `rate` of the images and scales the rest up."""

    def __init__(self, rate: float, draws: Draws) -> None:
        self.rate, self.draws, self.number = rate, draws, draws.num_branches
        draws.num_branches += 1

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep, drawn = 1 - self.rate, self.draws.now
        uniform = torch.rand(len(output), device=output.device) if drawn is None else drawn[self.number]
        kept = (uniform < keep).to(output.dtype) / keep  # (images,)
        return output * kept.view(-1, *[1] * (output.ndim - 1))


def install_stochastic_depth(network: nn.Module, branches: list[str], blocks: list[str], rate: float) -> Draws:
    """Rate 0 in the first block, rising linearly to `rate` in the last. `branches`: names of the ends of branches."""
    draws = Draws()
    for number, block in enumerate(blocks):
        block_rate = rate * number / max(len(blocks) - 1, 1)
        for name in branches:
            if block_rate and name.startswith(block + "."):
                network.get_submodule(name).register_forward_hook(DropBranch(block_rate, draws))
    return draws
