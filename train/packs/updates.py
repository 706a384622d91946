"""torch's SGD, AdamW and Muon in all replicas at once, in place: a copy of the weights beside the moments would be a
fifth of a pack's memory at a small batch.

In all, `gradient` and a group's values are (K, weights); the other tensors are (K, 1), and `lr` is 0 for a run that
has stopped.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from depthmup.train.packs.stacking import Group


def update_sgd(
    group: Group, gradient: Tensor, lr: Tensor, *, momentum: Tensor, coupled: Tensor, nesterov: bool
) -> None:
    """torch's SGD with momentum. `coupled` is 1 where the weight decay is part of the gradient, else 0: then it is
    taken off beside the step.

    b <- momentum * b + g + decay * w;  w <- w - lr * b, by nesterov w - lr * (g + decay * w + momentum * b)
    """
    momentum, decay = momentum.float(), (group.settings["weight_decay"] * coupled).float()
    buffer = group.moments["momentum_buffer"].mul_(momentum).add_(gradient).addcmul_(group.values, decay)
    if nesterov:
        buffer = gradient.addcmul(group.values, decay).addcmul_(buffer, momentum)
    group.values.mul_((1 - lr * group.settings["weight_decay"] * (1 - coupled)).float())
    group.values.addcmul_(buffer, -lr.float())


def update_adamw(group: Group, gradient: Tensor, lr: Tensor, *, betas: Sequence[Tensor], steps_done: Tensor) -> None:
    """torch's AdamW (1711.05101). `steps_done` (1,), this step among them.

    w <- (1 - lr * decay) w - lr * m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + eps)
    """
    first, second = group.moments["exp_avg"], group.moments["exp_avg_sq"]
    corrections = [1 - beta**steps_done for beta in betas]
    group.values.mul_((1 - lr * group.settings["weight_decay"]).float())
    first.lerp_(gradient, (1 - betas[0]).float())
    second.lerp_(gradient.square(), (1 - betas[1]).float())
    denominator = second.sqrt().div_(corrections[1].sqrt().float()).add_(group.settings["eps"].float())
    quotient = torch.div(first, denominator, out=denominator)
    group.values.addcmul_(quotient, (-lr / corrections[0]).float())


def update_muon(group: Group, gradient: Tensor, lr: Tensor, *, momentum: Tensor) -> None:
    """torch's Muon with Nesterov's momentum and AdamW's size of an update (2502.16982). A convolution's weight is
    a matrix (out, in * kernel) here; matrices of one shape are orthogonalised together.

    b <- momentum * b + (1 - momentum) * g
    w <- (1 - lr * decay) w - 0.2 sqrt(max(rows, columns)) * lr * orthogonalized((1 - momentum) * g + momentum * b)
    """
    buffer = group.moments["momentum_buffer"].lerp_(gradient, (1 - momentum).float())
    direction = gradient.lerp(buffer, momentum.float())
    group.values.mul_((1 - lr * group.settings["weight_decay"]).float())
    places = [(shape.numel() // shape[0], shape[0], first) for first, shape in group.slots.values()]
    for (columns, rows), alike in groupby(sorted(places), key=lambda place: place[:2]):
        spans = [slice(first, first + rows * columns) for *_, first in alike]
        matrices = torch.stack([direction[:, span].unflatten(1, (rows, columns)) for span in spans], dim=1)
        step = -0.2 * math.sqrt(max(rows, columns)) * lr
        for span, matrix in zip(spans, orthogonalize(matrices).unbind(1), strict=True):
            group.values[:, span].addcmul_(matrix.flatten(1).float(), step.float())


def orthogonalize(matrices: Tensor) -> Tensor:
    """(..., rows, columns) -> bf16 of the same shape: about U V^T of each matrix U S V^T (singular values of 0.5 to
    1.5), by five Newton-Schulz steps with torch.optim.Muon's coefficients (kellerjordan.github.io/posts/muon)."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16().flatten(0, -3)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = x.unflatten(0, matrices.shape[:-2])
    return x.mT if is_tall else x
