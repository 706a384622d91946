"""The coordinate check passes what is right, and fails each rule of the table when it alone is broken."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import cli
from models import parameterization as rules
from models.config import (
    AnyModelConfig,
    ConvResNetConfig,
    OptimizerConfig,
    ParameterizationConfig,
    VisionTransformerConfig,
)
from models.coordinate_check import Line, Settings, check
from models.parameterization import Role, Scale

CONV_RESNET = ConvResNetConfig(
    width=32, depth=3, base_width=32, base_depth=3, num_classes=10, image_size=8, in_channels=1
)
VIT = VisionTransformerConfig(
    **{"width": 32, "depth": 3, "base_width": 32, "base_depth": 3, "num_heads": 4, "patch_size": 4},
    **{"num_classes": 10, "image_size": 16, "in_channels": 1},
)
SGD, ADAMW = OptimizerConfig(name="sgd", lr=0.03), OptimizerConfig(name="adamw", lr=1e-3)
SMALL = Settings(factors=(1, 4), steps=2, num_seeds=2)


def failures(
    config: AnyModelConfig, optimizer: OptimizerConfig, name: str = "depth_mup", settings: Settings = SMALL
) -> list[Line]:
    beta = 3**-0.5 if config.family == "conv_resnet" else 1.0  # the paper's 1 / sqrt(depth) at base depth 3
    lines = check(config, ParameterizationConfig(name=name, beta=beta), optimizer, settings)
    assert {line.axis for line in lines} == {"width", "depth"}
    return [line for line in lines if not line.passed]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=lambda o: o.name)
@pytest.mark.parametrize("config", [CONV_RESNET, VIT], ids=lambda c: c.family)
def test_depth_mup_passes_and_sp_and_mup_fail(config: AnyModelConfig, optimizer: OptimizerConfig) -> None:
    assert not failures(config, optimizer)
    sp, mup = failures(config, optimizer, "sp"), failures(config, optimizer, "mup")
    assert {line.axis for line in sp} == {"width", "depth"}
    assert {line.axis for line in mup} == {"depth"}


def test_completep_and_muon_pass_too() -> None:
    assert not failures(CONV_RESNET, ADAMW, "completep")
    assert not failures(VIT, replace(ADAMW, name="muon"))


FAULTS = [
    # role, column, what is left out of the formula or put into it, model, optimizer
    (Role.INPUT, "lr_sgd", "without N", CONV_RESNET, SGD),
    (Role.INPUT, "lr_adam", "times 1/N", CONV_RESNET, ADAMW),
    (Role.INPUT, "init_variance", "times 1/N", CONV_RESNET, ADAMW),
    (Role.BRANCH_HIDDEN, "init_variance", "without N", CONV_RESNET, ADAMW),
    (Role.BRANCH_HIDDEN, "lr_sgd", "times 1/N", CONV_RESNET, SGD),
    (Role.BRANCH_HIDDEN, "lr_sgd", "times 1/L", CONV_RESNET, SGD),
    (Role.BRANCH_HIDDEN, "lr_adam", "without N", CONV_RESNET, ADAMW),
    (Role.BRANCH_HIDDEN, "lr_adam", "without L", CONV_RESNET, ADAMW),
    (Role.BRANCH_VECTOR, "lr_sgd", "without N", VIT, SGD),
    (Role.BRANCH_VECTOR, "lr_sgd", "times 1/L", VIT, SGD),
    (Role.BRANCH_VECTOR, "lr_adam", "without L", VIT, ADAMW),
    (Role.BRANCH_VECTOR, "lr_adam", "times 1/N", VIT, ADAMW),
    (Role.VECTOR, "lr_sgd", "without N", VIT, SGD),
    (Role.VECTOR, "lr_adam", "times 1/N", VIT, ADAMW),
    (Role.SCALAR, "lr_sgd", "times N", CONV_RESNET, SGD),
    (Role.SCALAR, "lr_adam", "times 1/N", CONV_RESNET, ADAMW),
    (Role.READOUT, "multiplier", "without N", CONV_RESNET, ADAMW),
    (Role.READOUT, "init_variance", "times 1/N", CONV_RESNET, ADAMW),
    (Role.READOUT, "lr_sgd", "without N", CONV_RESNET, SGD),
    (Role.READOUT, "lr_adam", "times 1/N", CONV_RESNET, ADAMW),
]
CHANGES = {
    "without N": lambda formula: lambda N, L, a: formula(1.0, L, a),
    "without L": lambda formula: lambda N, L, a: formula(N, 1.0, a),
    "times N": lambda formula: lambda N, L, a: formula(N, L, a) * N,
    "times 1/N": lambda formula: lambda N, L, a: formula(N, L, a) / N,
    "times 1/L": lambda formula: lambda N, L, a: formula(N, L, a) / L,
}


@pytest.mark.parametrize(
    ("role", "column", "change", "config", "optimizer"), FAULTS, ids=lambda value: str(getattr(value, "value", ""))
)
def test_each_broken_rule_of_the_table_is_caught(
    role: Role,
    column: str,
    change: str,
    config: AnyModelConfig,
    optimizer: OptimizerConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = rules.TABLE[role]
    monkeypatch.setitem(rules.TABLE, role, replace(row, **{column: CHANGES[change](getattr(row, column))}))
    assert failures(config, optimizer), f"{role.value} {column} {change}"


@pytest.mark.parametrize(
    ("multiplier", "config", "axis"),
    [
        ("branch_multiplier", CONV_RESNET, "depth"),
        ("branch_multiplier", VIT, "depth"),
        ("readout_multiplier", VIT, "width"),
        ("attention_multiplier", VIT, "width"),
    ],
)
def test_each_missing_multiplier_is_caught(
    multiplier: str, config: AnyModelConfig, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scale, multiplier, lambda self: 1.0)
    assert axis in {line.axis for line in failures(config, ADAMW)}


def test_a_diverged_run_fails_the_check() -> None:
    assert any(math.isnan(line.slope) for line in failures(CONV_RESNET, replace(SGD, lr=1e30)))


def test_the_command_ends_0_or_1_and_writes_the_plot(tmp_path: Path, study_file: Path) -> None:
    plot = tmp_path / "check.png"
    arguments = ["check", str(study_file), "model.base_width=16", "--plot", str(plot)]
    good = CliRunner().invoke(cli, [*arguments, "parameterization.name=depth_mup"])
    assert good.exit_code == 0, good.output
    assert "passed" in good.output
    assert plot.stat().st_size > 10_000
    bad = CliRunner().invoke(cli, [*arguments, "parameterization.name=sp"])
    assert bad.exit_code == 1
    assert "slopes are off" in bad.output
