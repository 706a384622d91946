"""torch's SGD and AdamW in all replicas at once, in place: a copy of the weights beside the moments would be a fifth of
a pack's memory at a small batch.

In both, `gradient` and a group's values are (K, weights); the other tensors are (K, 1), and `lr` is 0 for a run that
has stopped.
"""

from collections.abc import Sequence

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
