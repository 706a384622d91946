"""K networks' parameters, settings and multipliers, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthmup.models.build import ScaledModel
from depthmup.models.multiplier import OutputMultiplier, scale_input, scale_output
from depthmup.models.optimizer import Algorithm, parameter_groups
from depthmup.train.config import RunConfig

# torch's names of the moments, by the algorithm that trains a group
MOMENTS: dict[Algorithm, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}
SETTINGS = ("lr", "weight_decay", "eps")  # of an optimizer's group, that may differ between replicas


@dataclass
class Group:
    """Parameters with the same settings in every replica's optimizer, side by side in one matrix.

    values and moments: (K, number of weights); lr (peak), weight_decay, eps: (K, 1).
    """

    algorithm: Algorithm
    slots: dict[str, tuple[int, torch.Size]]  # parameter name -> first column, shape
    values: Tensor
    moments: dict[str, Tensor]
    settings: dict[str, Tensor]

    def parameters(self) -> dict[str, Tensor]:
        """Parameter name -> (K, *shape), views of `values` that autograd follows."""
        pieces = self.values.split([shape.numel() for _, shape in self.slots.values()], dim=1)
        return {
            name: piece.unflatten(1, shape) if shape else piece.squeeze(1)
            for (name, (_, shape)), piece in zip(self.slots.items(), pieces, strict=True)
        }

    def keep(self, rows: Tensor) -> None:
        """Leaves out the replicas that are not among `rows`."""
        self.values = self.values.detach()[rows].requires_grad_()
        for tensors in (self.moments, self.settings):
            tensors.update({name: tensor[rows] for name, tensor in tensors.items()})

    def replica(self, matrix: Tensor, replica: int) -> dict[str, Tensor]:
        """Parameter name -> its part of `matrix` (values or a moment) in one replica, a view."""
        row = matrix.detach()[replica]
        return {name: row[first : first + shape.numel()].view(shape) for name, (first, shape) in self.slots.items()}


def list_parameter_settings(scaled: ScaledModel, config: RunConfig) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Parameter name -> what the run's own optimizer has for it: algorithm, peak lr, weight decay and, for AdamW,
    eps."""
    names = {id(parameter): name for name, parameter in scaled.network.named_parameters()}
    return {
        names[id(parameter)]: tuple((key, group[key]) for key in ("algorithm", *SETTINGS) if key in group)
        for group in parameter_groups(scaled.network, scaled.rules, scaled.scale, config.resolved_optimizer)
        for parameter in group["params"]
    }


def group_parameters(scaled: Sequence[ScaledModel], configs: Sequence[RunConfig], device: torch.device) -> list[Group]:
    """One group for each combination of settings over the replicas: at most one per role."""
    by_settings: dict[tuple[Any, ...], dict[str, torch.Size]] = {}
    settings_of = [list_parameter_settings(s, c) for s, c in zip(scaled, configs, strict=True)]
    for name, parameter in scaled[0].network.named_parameters():
        by_settings.setdefault(tuple(settings[name] for settings in settings_of), {})[name] = parameter.shape
    groups = []
    for settings, shapes in by_settings.items():
        slots, first = {}, 0
        for name, shape in shapes.items():
            slots[name] = (first, shape)
            first += shape.numel()
        values = torch.empty(len(configs), first, device=device)
        rows = [dict(row) for row in settings]
        algorithm = rows[0]["algorithm"]  # of a parameter's role, and so of all replicas
        columns = {key: make_column([row[key] for row in rows], device) for key in SETTINGS if key in rows[0]}
        moments = {name: torch.zeros_like(values) for name in MOMENTS[algorithm]}
        groups.append(Group(algorithm, slots, values.requires_grad_(), moments, columns))
    return groups


def make_column(values: Sequence[float], device: torch.device) -> Tensor:
    """(K, 1), float64: rounded to float32 only where it meets a weight, as a Python number is."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def stack_multipliers(scaled: Sequence[ScaledModel], device: torch.device) -> dict[str, Tensor]:
    """Puts every replica's multipliers on the first one's network; returns those that differ, (K,) by module name."""
    first, different = scaled[0], {}
    for name in sorted({name for s in scaled for name in s.multipliers}):
        values = [s.multipliers[name].value if name in s.multipliers else 1.0 for s in scaled]
        if name not in first.multipliers:
            other = next(s.multipliers[name] for s in scaled if name in s.multipliers)
            install = scale_output if isinstance(other, OutputMultiplier) else scale_input
            if installed := install(first.network, name, other.value):
                first.multipliers[name] = installed
        if len(set(values)) > 1:
            different[name] = torch.tensor(values, device=device)
    return different
