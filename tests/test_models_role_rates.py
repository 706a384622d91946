"""A learning rate per role: what a weight moves in a step, in a network alone and in a pack; part of a run's identity;
swept as any value is."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from depthmup.data.errors import UserError
from depthmup.launch.config import StudyFile
from depthmup.launch.runs.study import Study
from depthmup.models.build import build
from depthmup.models.config import ConvResNetConfig, VisionTransformerConfig
from depthmup.models.errors import ModelError
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig, RoleRates
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import run_hash
from depthmup.train.loop import run
from depthmup.train.packs.packing import group_alike, list_obstacles
from depthmup.train.packs.stacking import list_parameter_settings
from depthmup.train.reading import from_plain, to_plain
from train_configs import metrics, pack_digits, run_config

DIGITS: dict[str, Any] = {"num_classes": 10, "image_size": 8, "in_channels": 1}
VIT = VisionTransformerConfig(width=16, depth=2, base_width=8, base_depth=1, num_heads=2, patch_size=4, **DIGITS)
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", lr=0.1),
    "adamw": OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.01),
    "muon": OptimizerConfig(name="muon", lr=0.01, momentum=0.95),
}


def moved(config: OptimizerConfig) -> tuple[dict[str, Tensor], dict[str, Role]]:
    """What a step with gradients of noise adds to each weight, without what decay takes off."""
    scaled = build(VIT, ParameterizationConfig(), seed=0)
    optimizer = build_optimizer(parameter_groups(scaled.network, scaled.rules, scaled.scale, config), config)
    generator = torch.Generator().manual_seed(0)
    before = {name: parameter.detach().double().clone() for name, parameter in scaled.network.named_parameters()}
    shrinks = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shrinks[id(parameter)] = 1 - group["lr"] * group["weight_decay"]
    for _, parameter in scaled.network.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    steps = {
        name: parameter.detach().double() - before[name] * shrinks[id(parameter)]
        for name, parameter in scaled.network.named_parameters()
    }
    return steps, {name: rule.role for name, rule in scaled.rules.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("role", ["input", "branch_hidden", "vector", "readout"])
def test_the_weights_of_a_role_move_so_many_times_as_far_and_no_others(name: str, role: str) -> None:
    config = OPTIMIZERS[name]
    plain, roles = moved(config)
    faster, _ = moved(replace(config, role_lr=RoleRates(**{role: 4.0})))
    assert any(each.value == role for each in roles.values())
    for parameter, step in plain.items():
        factor = 4.0 if roles[parameter].value == role else 1.0
        torch.testing.assert_close(faster[parameter], factor * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["independent", "coupled"])
def test_independent_decay_does_not_see_the_rate_of_a_role(mode: str) -> None:
    plain = OptimizerConfig(lr=0.01, weight_decay=0.01, weight_decay_mode=mode)  # type: ignore[arg-type]

    def taken_off(config: OptimizerConfig) -> float:
        scaled = build(VIT, ParameterizationConfig(), seed=0)
        groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config)
        return next(group["lr"] * group["weight_decay"] for group in groups if "readout" in group["name"])

    ratio = taken_off(replace(plain, role_lr=RoleRates(readout=4.0))) / taken_off(plain)
    assert ratio == pytest.approx(1 if mode == "independent" else 4)


def test_every_role_has_a_rate() -> None:
    assert {each.name for each in fields(RoleRates)} == {role.value for role in Role}


def test_rates_are_part_of_a_runs_identity_and_of_a_pack() -> None:
    plain = run_config("x")
    faster, stated = run_config("x", "optimizer.role_lr.input=4"), run_config("x", "optimizer.role_lr={input: 1}")
    assert run_hash(faster) != run_hash(plain) == run_hash(stated)
    assert from_plain(type(faster), to_plain(faster), "again") == faster
    assert list_obstacles(plain, faster) == []
    assert group_alike([plain, faster]) == [[0, 1]]
    scaled = build(faster.model, faster.parameterization, seed=0)
    for name, settings in list_parameter_settings(scaled, faster).items():
        rates = dict(settings)["lr"] / dict(list_parameter_settings(scaled, plain)[name])["lr"]
        assert rates == pytest.approx(4 if scaled.rules[name].role is Role.INPUT else 1)


def test_an_unknown_role_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optimizer\.role_lr\.readuot: unknown key; did you mean .*role_lr\.readout"):
        run_config("x", "optimizer.role_lr={readuot: 4}")


def test_a_role_that_the_network_lacks_is_refused() -> None:
    model = ConvResNetConfig(width=8, depth=3, base_width=8, base_depth=3, **DIGITS)
    scaled = build(model, ParameterizationConfig(), seed=0)
    config = OptimizerConfig(lr=0.1, role_lr=RoleRates(branch_scalar=2.0))
    with pytest.raises(ModelError, match=r"role_lr\.branch_scalar would do nothing"):
        parameter_groups(scaled.network, scaled.rules, scaled.scale, config)


def test_the_rate_of_a_role_is_swept() -> None:
    raw = to_plain(run_config("x"))
    study: dict[str, Any] = {"name": "rates", "metric": "train_loss", "sizes": [{"width": 8, "depth": 6}]}
    raw |= {
        "study": {
            **study,
            "parameterizations": ["depth_mup"],
            "hyperparameter": "optimizer.role_lr.input",
            "values": [1, 2, 4],
        }
    }
    runs = list(Study(Path("study.yaml"), from_plain(StudyFile, raw, "study")).runs)
    assert [run.config.optimizer.role_lr.input for run in runs] == [1, 2, 4]
    assert len({run.directory.path for run in runs}) == 3


def test_metrics_have_the_weights_and_the_effective_rate_of_each_role(tmp_path: Path) -> None:
    model: dict[str, Any] = {"family": "conv_resnet", "width": 4, "depth": 3, "base_width": 4, "base_depth": 3}
    config = run_config(pack_digits(tmp_path / "digits"), "train.samples=64", model=model)
    run(config, tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    weights = build(config.model, config.parameterization, config.seed).network
    assert first["weight_rms/readout"] == pytest.approx(float(weights.fc.weight.detach().square().mean().sqrt()))
    assert first["effective_lr/readout"] == pytest.approx(first["update_rms/readout"] / first["weight_rms/readout"])
    assert "effective_lr/scalar" not in first  # its bias starts at zero
    assert second["effective_lr/scalar"] == pytest.approx(second["update_rms/scalar"] / second["weight_rms/scalar"])
