"""What a weight loses in a step, measured on the weights themselves, for every optimizer, alone and in a pack."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.models.build import build
from depthmup.models.config import ConvResNetConfig, VisionTransformerConfig
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, ScheduleConfig, run_hash
from depthmup.train.loop import run
from depthmup.train.packs.pack import run_pack
from depthmup.train.packs.replicas import Replicas
from depthmup.train.reading import from_plain
from depthmup.train.schedule import schedule, set_learning_rate

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
    decaying = {name for name, rule in scaled.rules.items() if rule.role in DECAYING and rule.decays}
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
    rules = [scaled.rules[n] for n, _ in scaled.network.named_parameters()]
    shares = [1 - DECAY * (rule.role in DECAYING and rule.decays) for rule in rules]
    left = torch.cat([torch.full_like(w.flatten(), share) for w, share in zip(initial, shares, strict=True)])
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


def recipe(samples: int, **settings: object) -> RunConfig:
    """A recipe's rate and decay, written for torch's AdamW."""
    raw = {
        "model": {"family": "conv_resnet", "width": 8, "depth": 3, "base_width": 8, "base_depth": 3, **DIGITS},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.05, **settings},
        "data": {"name": "x", "root": "x", "num_streams": 1},
        "train": {"samples": samples, "global_batch_size": 1},
    }
    return from_plain(RunConfig, raw, "test")


def test_a_recipes_decay_in_the_default_mode_is_warned_of_in_a_short_run_and_refused_in_a_long_one() -> None:
    cure = r"means optimizer.weight_decay_mode=coupled; the same in this mode is optimizer.weight_decay=5e-05"
    warning = recipe(200).decay_warning
    assert warning
    assert re.search(rf"a step takes up to 0.05 of every weight, and 200 steps leave e\^-5 of it.* {cure}$", warning)
    with pytest.raises(UserError, match=rf"^test: .*10000 steps leave e\^-250 of it.* {cure}$"):
        recipe(10_000)
    assert recipe(10_000, weight_decay_mode="coupled").decay_warning is None


def test_decays_that_make_sense_are_left_alone() -> None:
    for samples, decay in ((100, 0.05), (200, 0.02), (1000, 2**-8), (10_000, 5e-3), (1_000_000, 3e-4)):
        assert recipe(samples, weight_decay=decay).decay_warning is None


def test_the_warning_is_in_the_logs_of_a_run_alone_and_in_a_pack_and_is_printed_by_plan(
    run_settings: dict[str, Any], study_file: Path, tmp_path: Path
) -> None:
    much = {"weight_decay": 0.9}  # 12 steps
    settings = {key: value for key, value in run_settings.items() if key != "study"}  # which study_file put in
    config = from_plain(RunConfig, {**settings, "optimizer": {**settings["optimizer"], **much}}, "test")
    run(config, tmp_path / "alone")
    run_pack([config, replace(config, seed=1)], [tmp_path / "one", tmp_path / "two"])
    for name in ("alone", "one", "two"):
        assert "warning: optimizer.weight_decay 0.9 does not" in (tmp_path / name / "log-0.txt").read_text()
    plan = CliRunner().invoke(cli, ["plan", str(study_file), "optimizer.weight_decay=0.9"])
    assert (plan.exit_code, "warning: optimizer.weight_decay 0.9" in plan.stderr) == (0, True)


@pytest.mark.parametrize("warmup", [0.1, 0.25])
@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_a_schedules_mean_is_that_of_its_steps(name: str, warmup: float) -> None:
    shape = ScheduleConfig(name=name, warmup=warmup)
    factors = [schedule(shape, step, 4000) for step in range(4000)]
    assert shape.mean == pytest.approx(sum(factors) / 4000, rel=1e-3)


@pytest.mark.parametrize("mode", ["independent", "coupled"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_tau_ema_is_the_share_of_the_run_that_hidden_weights_remember_at_any_rate_batch_and_length(
    name: str, mode: str, run_settings: dict[str, Any]
) -> None:
    """1 / (lr * decay * steps), of the very settings that the optimizer gets. Coupled: at the base, as the table lets
    lr * decay of deeper branches fall."""
    model = vars(VIT if mode == "independent" else replace(VIT, width=8, depth=1))
    for lr, batch, samples in ((0.01, 32, 12 * 32), (0.002, 64, 40 * 64)):
        ratios = {"batch_ratio": batch / 32, "samples_ratio": samples / (12 * 32)}
        optimizer = {"name": name, "lr": lr, "tau_ema": 0.4, "weight_decay_mode": mode, **ratios}
        length = {**run_settings["train"], "global_batch_size": batch, "samples": samples}
        one = from_plain(RunConfig, {**run_settings, "model": model, "optimizer": optimizer, "train": length}, "test")
        scaled = build(one.model, one.parameterization, seed=0)
        groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, one.resolved_optimizer)
        (hidden,) = [group for group in groups if "branch_hidden" in group["name"]]
        assert 1 / (hidden["lr"] * hidden["weight_decay"] * one.train.num_steps) == pytest.approx(0.4)


def test_a_run_that_states_tau_ema_trains_as_one_that_states_the_decay(
    run_settings: dict[str, Any], tmp_path: Path
) -> None:
    """12 steps and tau_ema 0.5: a step takes 1/6 off a weight. Alone, and in a pack."""
    by_tau = from_plain(RunConfig, {**run_settings, "optimizer": {"name": "sgd", "lr": 0.01, "tau_ema": 0.5}}, "test")
    decay = {"name": "sgd", "lr": 0.01, "weight_decay": 1 / 6}
    by_decay = from_plain(RunConfig, {**run_settings, "optimizer": decay}, "test")
    assert run_hash(by_tau) != run_hash(by_decay)
    losses = [run(config, tmp_path / str(number))["minival_loss"] for number, config in enumerate((by_tau, by_decay))]
    assert losses[0] == losses[1]
    packed = run_pack([by_tau, replace(by_tau, seed=1)], [tmp_path / "a", tmp_path / "b"])
    assert packed[0]["minival_loss"] == pytest.approx(losses[0], rel=1e-3)


def test_tau_ema_beside_weight_decay_and_one_that_leaves_nothing_are_refused(run_settings: dict[str, Any]) -> None:
    for optimizer, message in (
        ({"weight_decay": 0.1, "tau_ema": 0.5}, "weight_decay and tau_ema set the same thing: leave one of them out"),
        ({"tau_ema": 0.01}, "which leave e"),
    ):
        with pytest.raises(UserError, match=message):
            from_plain(RunConfig, {**run_settings, "optimizer": {"name": "sgd", "lr": 0.01, **optimizer}}, "test")
