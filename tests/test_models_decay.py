"""What a weight loses in a step, measured on the weights themselves, for every optimizer, alone and in a pack."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.build import build
from models.config import ConvResNetConfig, OptimizerConfig, ParameterizationConfig, VisionTransformerConfig
from models.optimizer import build_optimizer, parameter_groups
from models.parameterization import Role
from train.config import RunConfig, from_plain
from train.replicas import Replicas
from train.schedule import schedule, set_learning_rate

DIGITS = {"num_classes": 10, "image_size": 8, "in_channels": 1}
CONV_RESNET = ConvResNetConfig(width=16, depth=6, base_width=8, base_depth=3, **DIGITS)
VIT = VisionTransformerConfig(width=16, depth=2, base_width=8, base_depth=1, head_dim=8, patch_size=4, **DIGITS)
RATE, DECAY = 2.0**-3, 2.0**-6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "momentum": 0.0},
    "sgd with momentum": {"name": "sgd", "momentum": 0.9},
    "sgd with Nesterov's momentum": {"name": "sgd", "momentum": 0.9, "nesterov": True},
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon", "momentum": 0.95},
}
DECAYING = (Role.INPUT, Role.BRANCH_HIDDEN, Role.HIDDEN, Role.READOUT)


def optimizer_config(name: str, **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": RATE, "weight_decay": DECAY, **OPTIMIZERS[name], **settings})


def without_gradient(config: OptimizerConfig, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Weights before and after `steps` steps in which every gradient is zero, so that decay alone moves them, and the
    names of those that decay."""
    model = VIT if config.name == "muon" else CONV_RESNET
    scaled = build(model, ParameterizationConfig(), seed=0)
    optimizer = build_optimizer(parameter_groups(scaled.network, scaled.rules, scaled.scale, config), config)
    before = {name: parameter.detach().clone() for name, parameter in scaled.network.named_parameters()}
    for step in range(steps):
        set_learning_rate(optimizer, config.lr, 1 / (step + 1))
        for parameter in scaled.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in scaled.network.named_parameters()}
    decaying = {name for name, rule in scaled.rules.items() if rule.role in DECAYING}
    return before, after, decaying


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_independent_decay_takes_exactly_what_is_stated_off_a_weight(name: str) -> None:
    """Whatever the optimizer, its momentum, the learning rate and the weight's role: the schedule alone shapes it."""
    expected = (1 - DECAY) * (1 - DECAY / 2) * (1 - DECAY / 3)
    for rate in (RATE, RATE / 64):
        before, after, decaying = without_gradient(optimizer_config(name, lr=rate), 3)
        for parameter in before:
            left = expected if parameter in decaying else 1.0
            torch.testing.assert_close(after[parameter], before[parameter] * left, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_independent_decay_moves_a_weight_beside_its_gradient_and_leaves_no_trace_in_the_momentum(name: str) -> None:
    """A weight that gets a gradient in the first step alone goes on as one that never decayed, but shrunk."""

    def train(decay: float) -> tuple[list[Tensor], list[Tensor]]:
        config = optimizer_config(name, weight_decay=decay)
        model = VIT if config.name == "muon" else CONV_RESNET
        scaled = build(model, ParameterizationConfig(), seed=0)
        network = scaled.network.double()
        optimizer = build_optimizer(parameter_groups(network, scaled.rules, scaled.scale, config), config)
        generator = torch.Generator().manual_seed(0)
        gradient = {p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network.parameters()}
        weights = [p.detach().clone() for p in network.parameters()]
        moved = []
        for step in range(3):
            for parameter in network.parameters():
                parameter.grad = gradient[parameter] * (step == 0)
            optimizer.step()
            moved.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        return weights, moved

    (initial, free), (_, shrunk) = train(0.0), train(DECAY)
    scaled = build(VIT if name == "muon" else CONV_RESNET, ParameterizationConfig(), seed=0)
    roles = [scaled.rules[n].role for n, _ in scaled.network.named_parameters()]
    left = torch.cat(
        [torch.full_like(w.flatten(), 1 - DECAY * (r in DECAYING)) for w, r in zip(initial, roles, strict=True)]
    )
    weight = last = torch.cat([w.flatten() for w in initial])
    for with_decay, without in zip(shrunk, free, strict=True):
        weight, last = weight * left + (without - last), without
        torch.testing.assert_close(with_decay, weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_coupled_decay_is_torchs_own(name: str) -> None:
    config = optimizer_config(name, weight_decay_mode="coupled")
    _, after, _ = without_gradient(config, 3)
    scaled = build(CONV_RESNET, ParameterizationConfig(), seed=0)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config)
    settings = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    if config.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            settings, lr=RATE, momentum=config.momentum, nesterov=config.nesterov
        )
    else:
        optimizer = torch.optim.AdamW(settings, lr=RATE)
    for step in range(3):
        for mine, theirs in zip(groups, optimizer.param_groups, strict=True):
            theirs["lr"] = RATE * mine["lr_mult"] / (step + 1)
        for parameter in scaled.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for parameter, weight in scaled.network.named_parameters():
        torch.testing.assert_close(after[parameter], weight.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_a_replica_of_a_pack_loses_in_each_step_what_it_would_alone(
    name: str, run_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas of one pack with independent, coupled and no decay, and with different learning rates."""
    steps = 3
    run_settings["optimizer"] = {"lr": RATE, "weight_decay": DECAY, **OPTIMIZERS[name]}
    run_settings["train"]["samples"] = steps * run_settings["train"]["global_batch_size"]
    changes: list[dict[str, Any]] = [
        {},
        {"weight_decay_mode": "coupled"},
        {"weight_decay": 0.0},
        {"lr": RATE / 64, "weight_decay": 2 * DECAY},
    ]
    configs = [
        from_plain(RunConfig, {**run_settings, "optimizer": {**run_settings["optimizer"], **change}}, "test")
        for change in changes
    ]
    replicas = Replicas(configs, torch.device("cpu"))
    initial = [{key: value.clone() for key, value in replicas.weights(k).items()} for k in range(len(configs))]
    zeros = [torch.zeros_like(group.values) for group in replicas.groups]
    for _ in range(steps):
        replicas.gradients = [gradient.clone() for gradient in zeros]
        replicas.update()
    for number, config in enumerate(configs):
        network: nn.Module
        scaled = build(config.model, config.parameterization, config.seed)
        network = scaled.network
        network.load_state_dict(initial[number])
        groups = parameter_groups(network, scaled.rules, scaled.scale, config.optimizer)
        optimizer = build_optimizer(groups, config.optimizer)
        for step in range(steps):
            set_learning_rate(optimizer, config.optimizer.lr, schedule(config.schedule, step, steps))
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        for key, weight in network.named_parameters():
            torch.testing.assert_close(replicas.weights(number)[key], weight.detach(), rtol=1e-6, atol=0)
    shrunk = [replicas.weights(k)["fc.weight"].norm() / initial[k]["fc.weight"].norm() for k in range(len(configs))]
    factors = [schedule(configs[0].schedule, step, steps) for step in range(steps)]
    for number, decay in ((0, DECAY), (2, 0.0), (3, 2 * DECAY)):
        left = torch.tensor([1 - decay * factor for factor in factors]).prod()
        assert float(shrunk[number]) == pytest.approx(float(left), rel=1e-6)
