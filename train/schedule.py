"""The learning rate as a pure function of the step: nothing is stored, so nothing can be restored wrongly."""

import math

import torch

from depthmup.train.config import ScheduleConfig


def schedule(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Factor on the peak learning rate for step 0 ... num_steps - 1; in (0, 1]."""
    warmup_steps = round(config.warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        progress = (step - warmup_steps) / (num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (num_steps - step) / (num_steps - config.decay_step(num_steps)))  # warm-up, stable, decay


def set_learning_rate(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """lr = base_lr * schedule * lr_mult, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * factor * group["lr_mult"]
