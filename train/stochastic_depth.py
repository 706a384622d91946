"""Stochastic depth (Huang et al., arXiv 1603.09382) for every family: hooks on the ends of branches."""

from typing import Any

import torch
from torch import Tensor, nn


class DropBranch:
    """Forward hook: in training, zeroes the branch for a share `rate` of the images and scales the rest up."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep = 1 - self.rate
        shape = (output.shape[0],) + (1,) * (output.ndim - 1)
        return output * (torch.rand(shape, device=output.device) < keep).to(output.dtype) / keep


def install_stochastic_depth(network: nn.Module, branches: list[str], blocks: list[str], rate: float) -> None:
    """Rate 0 in the first block, rising linearly to `rate` in the last. `branches`: names of the ends of branches."""
    for number, block in enumerate(blocks):
        block_rate = rate * number / max(len(blocks) - 1, 1)
        for name in branches:
            if block_rate and name.startswith(block + "."):
                network.get_submodule(name).register_forward_hook(DropBranch(block_rate))
