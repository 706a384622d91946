"""What train.telemetry.RoleStatistics says of one network, for K networks side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from depthmup.train.packs.stacking import Group


@torch.no_grad()
def measure_roles(
    groups: Sequence[Group],
    roles: Mapping[str, str],
    gradients: Sequence[Tensor],
    before: Sequence[Tensor],
    alive: Tensor,
) -> list[dict[str, float]]:
    """For each replica what train.telemetry.RoleStatistics says of the last step; NaN for one that is not alive. Waits
    for the device.

    roles: parameter name -> its role; gradients, and before (the weights before the step): (K, weights) for each group;
    alive: (K, 1).
    """
    updates = [group.values - values for group, values in zip(groups, before, strict=True)]
    means = {
        f"{kind}_rms/{role}": value
        for kind, matrices in (("grad", gradients), ("update", updates), ("weight", before))
        for role, value in average_squares(groups, roles, matrices).items()
    }
    rows = torch.stack(list(means.values()), dim=1).sqrt().masked_fill(~alive, float("nan"))
    lines = [dict(zip(means, row, strict=True)) for row in rows.tolist()]
    for line in lines:
        for role in set(roles.values()):
            if weight := line[f"weight_rms/{role}"]:
                line[f"effective_lr/{role}"] = line[f"update_rms/{role}"] / weight
    return lines


def average_squares(groups: Sequence[Group], roles: Mapping[str, str], matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Role -> (K,), the mean square over the role's columns of `matrices`, which are laid out as the weights are."""
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for group, matrix in zip(groups, matrices, strict=True):
        for name, (first, shape) in group.slots.items():
            squares = torch.linalg.vector_norm(matrix[:, first : first + shape.numel()], dim=1).square()
            role = roles[name]
            sums[role] = sums[role] + squares if role in sums else squares
            counts[role] += shape.numel()
    return {role: total / counts[role] for role, total in sums.items()}
