"""Optimizer settings per role: few groups, each with the factors of the table multiplied in."""

from typing import Any

import torch
from torch import nn

from models.config import OptimizerConfig
from models.family import ParameterRule
from models.parameterization import Factors, Role, Scale


def group_settings(factors: Factors, config: OptimizerConfig) -> dict[str, float]:
    """lr_mult, peak lr, eps and weight decay of the parameters that have these factors."""
    lr = config.lr * factors.lr
    if factors.weight_decay == 0:
        weight_decay = 0.0
    elif config.weight_decay_mode == "independent":
        weight_decay = config.weight_decay / lr  # torch multiplies by the learning rate, which cancels
    else:
        weight_decay = config.weight_decay * factors.weight_decay
    settings = {"lr": lr, "lr_mult": factors.lr, "weight_decay": weight_decay}
    if config.name == "adamw":
        settings["eps"] = config.eps * factors.eps
    return settings


def parameter_groups(
    model: nn.Module, rules: dict[str, ParameterRule], scale: Scale, config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer; roles with equal settings share one, so there are at most six.

    Each group has `name` (its roles), `params`, `lr` (peak), `lr_mult`, `weight_decay` and, for AdamW, `eps`.
    """
    merged: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        role: Role = rules[name].role
        settings = group_settings(scale.factors(role, config.name), config)
        group = merged.setdefault(tuple(settings.items()), {"roles": [], "params": [], **settings})
        group["params"].append(parameter)
        if role.value not in group["roles"]:
            group["roles"].append(role.value)
    return [{"name": "+".join(sorted(group.pop("roles"))), **group} for group in merged.values()]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own optimizer over `groups`, fused where the parameters' device has it."""
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
