"""Optimizer settings per role: few groups, each with the factors of the table multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from depthmup.models.errors import ModelError
from depthmup.models.family import ParameterRule
from depthmup.models.optimizer_config import OptimizerConfig, refuse_idle
from depthmup.models.parameterization import TABLE, Factors, Role, Scale
from depthmup.models.training_scale import TrainingFactors, compute_training_factors

Algorithm = Literal["sgd", "adamw", "muon"]


def group_settings(
    factors: Factors,
    training: TrainingFactors,
    config: OptimizerConfig,
    algorithm: Algorithm,
    decays: bool,
    role_lr: float,
) -> dict[str, Any]:
    """lr_mult, peak lr, weight decay (if it `decays`) and AdamW's eps of the parameters that have these factors.
    role_lr: what the user multiplies the learning rate of their role by."""
    lr_mult = factors.lr * training.lr * role_lr
    lr = config.lr * lr_mult
    if factors.weight_decay == 0 or not decays:
        weight_decay = 0.0
    elif config.weight_decay_mode == "independent":
        # the optimizer multiplies by the learning rate, which cancels; a step takes off lr * decay, hence the ratio
        weight_decay = config.weight_decay * training.decay / lr
    else:
        weight_decay = config.weight_decay * factors.weight_decay * training.decay / training.lr
    settings: dict[str, Any] = {"lr": lr, "lr_mult": lr_mult, "weight_decay": weight_decay}
    if algorithm == "adamw":
        settings["eps"] = config.eps * factors.eps * training.eps
    return settings


def trained_by_muon(role: Role, parameter: Tensor) -> bool:
    """Muon orthogonalises matrices whose rows and columns both grow, a convolution's weight as (out, in * kernel)."""
    return TABLE[role].lr_muon is not None


def parameter_groups(
    model: nn.Module, rules: dict[str, ParameterRule], scale: Scale, config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer; roles with equal settings share one, so there are at most eight.

    Each group has `name` (its roles), `algorithm`, `params`, `lr` (peak), `lr_mult`, `weight_decay` and, for AdamW,
    `eps`. Raises ModelError when muon would find no matrix to train, or a setting would do nothing.
    """
    refuse_idle(scale.parameterization, config)
    if config.tau_ema is not None:
        raise ModelError(
            "optimizer.tau_ema needs the number of steps: give the optimizer's config with_decay(num_steps)"
        )
    roles = {rule.role.value for rule in rules.values()}
    if idle := sorted(role for role, rate in vars(config.role_lr).items() if rate != 1 and role not in roles):
        raise ModelError(
            f"optimizer.role_lr.{idle[0]} would do nothing: {type(model).__name__} has no parameter of that role; it "
            f"has {', '.join(sorted(roles))}"
        )
    training = compute_training_factors(scale.parameterization, config.name, config.batch_ratio, config.samples_ratio)
    merged: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        role, decays = rules[name].role, rules[name].decays
        algorithm: Algorithm = config.name
        if algorithm == "muon" and not trained_by_muon(role, parameter):
            algorithm = "adamw"
        role_lr = getattr(config.role_lr, role.value)
        settings = group_settings(scale.factors(role, algorithm), training, config, algorithm, decays, role_lr)
        settings["algorithm"] = algorithm
        group = merged.setdefault(tuple(settings.items()), {"roles": [], "params": [], **settings})
        group["params"].append(parameter)
        if role.value not in group["roles"]:
            group["roles"].append(role.value)
    groups = [{"name": "+".join(sorted(group.pop("roles"))), **group} for group in merged.values()]
    if config.name == "muon" and all(group["algorithm"] == "adamw" for group in groups):
        raise ModelError(
            f"optimizer.name muon has no rule for {type(model).__name__}: it trains matrices, and this network has "
            "none that grows on both sides; use adamw or sgd"
        )
    return groups


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD with the decay kept out of the gradient (SGDW, arXiv 1711.05101): a step takes lr * weight_decay off
    a weight, as AdamW's and Muon's does. torch adds the decay to the gradient, so that momentum repeats it, and what a
    step takes off grows to lr * weight_decay / (1 - momentum)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            if decay and (trained := [parameter for parameter in group["params"] if parameter.grad is not None]):
                torch._foreach_mul_(trained, 1 - group["lr"] * decay)
            group["weight_decay"] = 0.0  # for torch's step
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups whose `algorithm` is muon, torch's AdamW for the others, as one optimizer: one list
    of groups, one state, one checkpoint. Convolutions are flattened to matrices, as in Scion (2502.07529)."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool | None) -> None:
        super().__init__(groups, {"lr": config.lr})
        muon = [group for group in self.param_groups if group["algorithm"] == "muon"]
        adamw = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        as_matrices = [group | {"params": [view_as_matrix(p) for p in group["params"]]} for group in muon]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(as_matrices, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adamw, lr=config.lr, betas=config.scaled_betas, fused=fused),
        ]
        for group, filled in zip(muon, as_matrices, strict=True):  # torch adds its settings to what it is given
            group |= {key: value for key, value in filled.items() if key != "params"}
        self.share()

    def share(self) -> None:
        """Lets the parts work on this optimizer's own groups and state."""
        for part, algorithm in zip(self.parts, ("muon", "adamw"), strict=True):
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict ends here, with new groups and a new state
        self.share()

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        with self.convolutions_as_matrices():
            for part in self.parts:
                part.step()
        return loss

    @contextmanager
    @torch.no_grad()
    def convolutions_as_matrices(self) -> Iterator[None]:
        """torch's Muon takes matrices alone. Here as there, a convolution's state has the weight's own shape."""
        swapped = []
        for group in self.parts[0].param_groups:
            swapped.append((group, group["params"]))
            group["params"] = [view_as_matrix(parameter) for parameter in group["params"]]
            for matrix, parameter in zip(group["params"], swapped[-1][1], strict=True):
                if matrix is not parameter and parameter in self.state:
                    state = self.state.pop(parameter)
                    self.state[matrix] = {key: tensor.flatten(1) for key, tensor in state.items()}
        yield
        for group, parameters in swapped:
            for matrix, parameter in zip(group["params"], parameters, strict=True):
                if matrix is not parameter and matrix in self.state:
                    if not parameter.is_contiguous():  # channels last, of which flattening makes a copy
                        parameter.copy_(matrix.view(parameter.shape))
                    state = self.state.pop(matrix)
                    self.state[parameter] = {key: tensor.view(parameter.shape) for key, tensor in state.items()}
            group["params"] = parameters


def view_as_matrix(parameter: Tensor) -> Tensor:
    """The parameter itself, or a convolution's weight with its gradient as (out, in * kernel)."""
    if parameter.ndim == 2:
        return parameter
    matrix = parameter.detach().flatten(1)
    if parameter.grad is not None:
        matrix.grad = parameter.grad.flatten(1)
    return matrix


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's optimizer over `groups`, fused where the parameters' device has it. Where decay is independent of the
    learning rate, it is independent of momentum, too."""
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    if config.name == "sgd":
        kind = torch.optim.SGD if config.weight_decay_mode == "coupled" else DecoupledSGD
        return kind(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.name == "muon":
        return MuonWithAdamW(groups, config, fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.scaled_betas, fused=fused)
