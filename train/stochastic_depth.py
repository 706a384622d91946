"""Stochastic depth (Huang et al., arXiv 1603.09382) for every family: hooks on the ends of branches.

Which images a branch is dropped for depends on the seed, the step, the branch and the image's place in the global batch
alone: neither on how the batch is spread over processes and micro-batches, nor on the device, nor on a restart.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthmup.models.init import generator_for


class Draws:
    """Uniform numbers, one for each branch and image: `now` (branches, images) has those of the present micro-batch,
    None outside of a run, where torch's own generator draws."""

    def __init__(self) -> None:
        self.num_branches = 0
        self.now: Tensor | None = None
        self.of_step = torch.empty(0)

    def start_step(
        self, seed: int, step: int, global_batch_size: int, places: np.ndarray, device: torch.device
    ) -> None:
        """`places`: of this process's images in the global batch, in the order in which they are taken."""
        if self.num_branches:
            generator = generator_for(seed, f"stochastic depth, step {step}")
            drawn = torch.rand(self.num_branches, global_batch_size, generator=generator)  # on the CPU, for any device
            self.of_step = drawn[:, torch.from_numpy(places)].to(device)

    def start_micro_batch(self, number: int, micro_batches: int) -> None:
        if self.num_branches:
            self.now = self.of_step.chunk(micro_batches, dim=1)[number]


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
