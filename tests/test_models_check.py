"""The coordinate check passes what is right, and fails each rule of the table when it alone is broken."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from depthmup.launch.check import add_parameterization, format_table, suggest_remedy
from depthmup.launch.cli import cli
from depthmup.models import coordinate_check
from depthmup.models import parameterization as rules
from depthmup.models.build import ScaledModel
from depthmup.models.check_targets import Target
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import AXES, Axis, Batch, Line, Measured, Settings, check, select_positions
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role, Scale
from depthmup.models.parameterization_config import ParameterizationConfig

CONV_RESNET = ConvResNetConfig(
    width=32, depth=3, base_width=32, base_depth=3, num_classes=10, image_size=8, in_channels=1
)
VIT = VisionTransformerConfig(
    **{"width": 32, "depth": 3, "base_width": 32, "base_depth": 3, "num_heads": 4, "patch_size": 4},
    **{"num_classes": 10, "image_size": 8, "in_channels": 1},
)
NARROW_CONV = replace(CONV_RESNET, width=8, base_width=8)
NARROW_VIT = replace(VIT, width=16, base_width=16, num_heads=2)  # Muon takes long over wide matrices
QK_VIT = replace(VIT, num_heads=None, head_dim=8, qk_norm=True)
TIMM_RESNET = ResNetConfig(
    **{"width": 16, "depth": 4, "base_width": 16, "base_depth": 4, "norm": "none"},
    **{"num_classes": 10, "image_size": 32, "in_channels": 1},
)
SGD, ADAMW = OptimizerConfig(name="sgd", lr=0.03), OptimizerConfig(name="adamw", lr=1e-3)
MUON = replace(ADAMW, name="muon")
SMALL = Settings(factors=(1, 4), steps=2, num_seeds=3)


@pytest.fixture(autouse=True, scope="module")
def train_each_network_once() -> Iterator[None]:
    """A network is not trained again where nothing that the rules change is different: as the base, which no planted
    fault changes, since every factor is 1 there."""
    build, measure = coordinate_check.build, coordinate_check.measure
    measured: dict[object, Measured] = {}

    def build_and_note(config: AnyModelConfig, parameterization: ParameterizationConfig, seed: int) -> ScaledModel:
        scaled = build(config, parameterization, seed)
        scaled.network.origin = config, seed  # type: ignore[assignment]
        return scaled

    def measure_once(
        scaled: ScaledModel, batch: Batch, optimizer: OptimizerConfig, steps: int, targets: dict[str, Target]
    ) -> Measured:
        factors = scaled.scale.all_factors(optimizer.name)
        key: Any = scaled.network.origin, factors, optimizer, steps, batch[0].shape
        if key not in measured:
            measured[key] = measure(scaled, batch, optimizer, steps, targets)
        return measured[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinate_check, "build", build_and_note)
        patch.setattr(coordinate_check, "measure", measure_once)
        yield


def failures(
    config: AnyModelConfig, optimizer: OptimizerConfig, name: str = "depth_mup", axes: tuple[Axis, ...] = AXES
) -> list[Line]:
    # beta: the paper's 1 / sqrt(depth) at the base
    parameterization = ParameterizationConfig(name=name, beta=config.base_depth**-0.5)
    lines = check(config, parameterization, optimizer, SMALL, axes)
    assert {line.axis for line in lines} == set(axes)
    return [line for line in lines if line.verdict == "off"]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=lambda o: o.name)
@pytest.mark.parametrize("config", [CONV_RESNET, VIT], ids=lambda c: c.family)
def test_depth_mup_passes_and_sp_and_mup_fail(config: AnyModelConfig, optimizer: OptimizerConfig) -> None:
    assert not failures(config, optimizer)
    sp, mup = failures(config, optimizer, "sp"), failures(config, optimizer, "mup")
    assert {line.axis for line in sp} == {"width", "depth"}
    assert {line.axis for line in mup} == {"depth"}


def test_completep_and_muon_pass_too() -> None:
    assert not failures(CONV_RESNET, ADAMW, "completep")
    assert not failures(NARROW_VIT, MUON)
    assert not failures(NARROW_CONV, MUON)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=lambda o: o.name)
def test_depth_mup_passes_on_the_networks_that_have_the_other_roles(optimizer: OptimizerConfig) -> None:
    assert not failures(QK_VIT, optimizer)
    assert not failures(TIMM_RESNET, optimizer, axes=("width",))


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
    (Role.BRANCH_HIDDEN, "lr_muon", "without N", NARROW_VIT, MUON),
    (Role.BRANCH_HIDDEN, "lr_muon", "without L", NARROW_VIT, MUON),
    (Role.BRANCH_HIDDEN, "lr_muon", "without N", NARROW_CONV, MUON),
    (Role.BRANCH_HIDDEN, "lr_muon", "without L", NARROW_CONV, MUON),
    (Role.HIDDEN, "init_variance", "without N", TIMM_RESNET, ADAMW),
    (Role.HIDDEN, "lr_sgd", "times N", TIMM_RESNET, SGD),
    (Role.HIDDEN, "lr_adam", "without N", TIMM_RESNET, ADAMW),
    (Role.BRANCH_SCALAR, "lr_sgd", "times N", QK_VIT, SGD),
    (Role.BRANCH_SCALAR, "lr_sgd", "times 1/L", QK_VIT, SGD),
    (Role.BRANCH_SCALAR, "lr_adam", "times N", QK_VIT, ADAMW),
    (Role.BRANCH_SCALAR, "lr_adam", "without L", QK_VIT, ADAMW),
    (Role.BRANCH_VECTOR, "lr_sgd", "without N", VIT, SGD),
    (Role.BRANCH_VECTOR, "lr_sgd", "times 1/L", VIT, SGD),
    (Role.BRANCH_VECTOR, "lr_adam", "without L", VIT, ADAMW),
    (Role.BRANCH_VECTOR, "lr_adam", "times 1/N", VIT, ADAMW),
    (Role.VECTOR, "lr_sgd", "without N", VIT, SGD),
    (Role.VECTOR, "lr_adam", "times 1/N", VIT, ADAMW),
    (Role.SCALAR, "lr_sgd", "times N", CONV_RESNET, SGD),
    (Role.SCALAR, "lr_adam", "times 1/N", CONV_RESNET, ADAMW),
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
    axes: tuple[Axis, ...] = ("depth",) if "L" in change else ("width",)
    assert failures(config, optimizer, axes=axes), f"{role.value} {column} {change}"


@pytest.mark.parametrize(
    ("multiplier", "config", "axis"),
    [
        ("branch_multiplier", CONV_RESNET, "depth"),
        ("branch_multiplier", VIT, "depth"),
        ("readout_multiplier", CONV_RESNET, "width"),
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
    arguments = ["check", str(study_file), "model.base_width=32", "parameterization.beta=0.577", "--factors", "1,2,4"]
    arguments += ["--steps", "2"]
    good = CliRunner().invoke(cli, [*arguments, "--plot", str(plot)])
    assert good.exit_code == 0, good.output
    assert "passed" in good.output
    assert plot.stat().st_size > 10_000
    assert all(len(line) <= 80 for line in good.output.splitlines() if line.startswith(("slope", "branch", "stream")))
    bad = CliRunner().invoke(cli, [*arguments, "parameterization.name=sp", "--axis", "depth", "--seeds", "2"])
    assert bad.exit_code == 1
    assert "slopes are off" in bad.output
    assert "slope over width" not in bad.output
    default = tmp_path / "runs" / "tiny" / "check_sp.png"
    assert default.exists()
    assert f"plot: {default}" in bad.output


@pytest.mark.parametrize(
    ("listed", "stated", "checked"),
    [
        (["sp", "mup", "completep"], {}, {"name": "completep"}),
        (["sp", {"name": "mup", "eps_scaling": "table"}], {}, {"name": "mup", "eps_scaling": "table"}),
        (["sp", {"name": "depth_mup", "beta": 0.5}], {"gamma0": 2}, {"name": "depth_mup", "beta": 0.5, "gamma0": 2}),
        (["sp", "completep"], {"name": "sp"}, {"name": "sp"}),
        (["sp"], {}, {"name": "sp"}),
    ],
)
def test_a_studys_check_is_of_the_parameterization_that_it_is_about(
    listed: list[Any], stated: dict[str, Any], checked: dict[str, Any]
) -> None:
    raw = {"study": {"parameterizations": listed}, "parameterization": stated}
    assert add_parameterization(raw)["parameterization"] == checked
    assert add_parameterization({"model": {}}) == {"model": {}}  # one run's


def line(slope: float, error: float) -> Line:
    return Line("depth", "stream", 1, (1, 4), (1.0, 1.0), slope, error, (-0.5, 0.0))


def test_a_slope_is_judged_by_the_band_and_its_standard_error() -> None:
    assert line(0.2, 0.1).verdict == "ok"
    assert line(-0.75, 0.0).verdict == "ok"
    assert line(0.46, 0.1).verdict == "off"
    assert line(-1.0, 0.1).verdict == "off"
    assert line(0.3, 0.1).verdict == "unclear"  # outside by less than two errors
    assert line(0.0, 0.2).verdict == "unclear"  # an exponent that is wrong by 1/2 could look like this


def test_positions_of_a_deeper_network_lie_at_the_same_relative_depth() -> None:
    values = [float(i) for i in range(6)]
    assert select_positions(values, 3, "stream") == [1, 3, 5]  # after a third, two thirds and all of the blocks
    assert select_positions(values, 3, "branch") == [0, 2, 4]  # a block's input: at none, one and two thirds


def test_unit_branches_in_a_deep_base_are_told_to_try_the_papers_beta() -> None:
    def advice(slope: float, blocks: int, parameterization: ParameterizationConfig) -> str | None:
        return suggest_remedy([line(slope, 0.1)], lambda: blocks, parameterization)

    def build_nothing() -> int:
        raise AssertionError("no network is built for what is not said")

    depth_mup, sp = ParameterizationConfig(), ParameterizationConfig(name="sp")
    assert "parameterization.beta=0.25" in str(advice(1.0, 16, depth_mup))
    assert advice(1.0, 16, replace(depth_mup, beta=0.25)) is None
    assert "parameterization.beta=0.111" in str(advice(1.0, 9, ParameterizationConfig(name="completep")))
    for slope, parameterization in ((1.0, sp), (0.0, depth_mup)):
        assert suggest_remedy([line(slope, 0.1)], build_nothing, parameterization) is None


def test_the_table_keeps_its_columns_apart_when_a_run_explodes() -> None:
    exploded = Line("depth", "stream", 1, (1, 4), (1.0, 1.0), 13.21, 1.43, (-0.0, -0.0))
    assert format_table("depth", [exploded])[1].split() == ["stream", "+13±1.43!", "0"]
