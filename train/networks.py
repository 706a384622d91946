"""What one loop trains: K >= 1 networks of one shape that step together, behind one interface.

`train.one_network` has K = 1, a plain module and a plain optimizer in an engine; `train.packs.replicas` has any K, with
every weight stacked.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from depthmup.models.build import ScaledModel
from depthmup.models.flops import count_parameters
from depthmup.train.average import WeightAverage
from depthmup.train.batch_norm import Grouping
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.engines.base import TensorState


class Networks(Protocol):
    """Networks are numbered 0 to K - 1. The seeds of their runs, S of them, each have their own batches."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32
    channels_last: bool  # whether images are to lie so
    seeds: list[int]
    descriptions: list[str]  # of each network, for its log
    num_drop_branches: int  # that stochastic depth draws numbers for
    grouping: Grouping | None  # of BatchNorm's statistics; None without BatchNorm
    average: WeightAverage | None  # of the weights of all networks

    def step(self, images: Tensor, targets: Tensor, uniform: Tensor | None = None, measure: bool = False) -> Tensor:
        """One update of all networks; returns the losses (K,) of this process's share. Waits for no device.

        images: (S, batch, channels, size, size) float; targets: (S, batch) classes or (S, batch, classes)
        probabilities; uniform: (S, branches, batch) numbers for stochastic depth, None: nothing is dropped;
        measure: whether `measurements` will be asked for.
        """

    def measurements(self) -> list[dict[str, float]]:
        """For each network what a metrics line says of the last step. Every process calls it; waits for the device."""

    def logits(self, images: Tensor) -> Tensor:
        """(batch, channels, size, size) -> (K, batch, classes) float32, in evaluation."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode while the block runs."""

    def state(self, number: int) -> TensorState:
        """Everything that a checkpoint holds of one network, by qualified name, the same for every K. Its tensors may
        be the network's own: writing into them, then `load`, restores it."""

    def load(self, number: int, state: TensorState, step: int) -> None:
        """Puts back what `state` gave after `step` steps, or what was written into it."""

    def keep(self, numbers: Sequence[int]) -> None:
        """Leaves out the networks that are not among `numbers`, of which there is at least one; the others are numbered
        anew, in the order of `numbers`. What they learn is what they would have learnt, on a CPU to the last bit."""

    def full_weights(self, number: int) -> dict[str, Tensor]:
        """Parameters and buffers, whole, on rank 0's CPU, perhaps the network's own; other ranks get an empty dict."""


def describe(config: RunConfig, scaled: ScaledModel, groups: list[dict[str, Any]], place: str) -> str:
    """What a run is, for its log: never leaves open which parameterization and base it has."""
    model, p = config.model, scaled.scale.parameterization
    larger = " (larger than this model)" if model.base_width > model.width or model.base_depth > model.depth else ""
    lines = [
        f"run {run_hash(config)}: {model.title} width {model.width} depth {model.depth}, "
        f"{count_parameters(scaled.network):,} parameters, {place}",
        f"parameterization {p.name}, base width {model.base_width} depth {model.base_depth}{larger}, "
        f"branch multiplier {scaled.scale.branch_multiplier():.4g}, "
        f"readout multiplier {scaled.scale.readout_multiplier():.4g}",
    ]
    lines += [
        f"group {g['name']}: {len(g['params'])} tensors, lr {g['lr']:.4g} (x {g['lr_mult']:.4g}), "
        f"weight decay {g['weight_decay']:.4g}" + (f", eps {g['eps']:.4g}" if "eps" in g else "")
        for g in groups
    ]
    return "\n".join(lines)
