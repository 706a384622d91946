"""Exponents of trained weights over depth: planted ones are found, regimes are named, and a study's runs give them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import invoke, output_of
from conftest import settings_on
from depthmup.launch.findings.exponents import Slope, fit_slope, measure_weights, name_regime
from depthmup.launch.reading import read_study
from depthmup.launch.report.exponents import group_block_tensors, map_branch_factors, run_measures
from depthmup.launch.report.page import EXPONENTS_FILES
from depthmup.launch.report.record import read_record
from depthmup.launch.report.results import format_document
from depthmup.launch.runs.study import Study
from depthmup.models.build import build, build_meta
from depthmup.models.config import ConvResNetConfig
from depthmup.models.parameterization_config import ParameterizationConfig
from planned_runs import train_depths

DEPTHS = (8, 16, 32, 64, 128)


def slopes_of(weights: dict[int, list[np.ndarray]]) -> dict[str, Slope | None]:
    """weights: depth -> of every seed (blocks, entries)."""
    measured = {depth: [measure_weights([seed]) for seed in seeds] for depth, seeds in weights.items()}
    return {
        name: fit_slope({d: [m[name] for m in of] for d, of in measured.items()}) for name in measured[DEPTHS[0]][0]
    }


def independent(exponent: float) -> dict[int, list[np.ndarray]]:
    """Blocks that are independent, of size L^-exponent."""
    rng = np.random.default_rng(0)
    return {depth: [depth**-exponent * rng.standard_normal((depth, 300)) for _ in range(4)] for depth in DEPTHS}


def smooth(exponent: float) -> dict[int, list[np.ndarray]]:
    """Blocks on a smooth curve in k / L, of size L^-exponent."""
    rng = np.random.default_rng(0)

    def curve(depth: int) -> np.ndarray:
        tau = np.arange(1, depth + 1)[:, None] / depth
        first, second = rng.standard_normal((2, 300))
        return depth**-exponent * (first * np.cos(2 * tau) + second * (1 + tau))

    return {depth: [curve(depth) for _ in range(4)] for depth in DEPTHS}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_exponents_of_independent_blocks_are_the_planted_ones(exponent: float) -> None:
    slopes = slopes_of(independent(exponent))
    for name, planted in (("root sum of squares", 0.5 - exponent), ("quadratic variation", 1 - 2 * exponent)):
        assert (slope := slopes[name])
        assert slope.holds(planted)
        assert slope.high - slope.low < 0.1
    for name, planted in (("max norm", -exponent), ("increments", 0.0)):  # the largest of L draws grows a little with L
        assert (slope := slopes[name])
        assert slope.exponent == pytest.approx(planted, abs=0.05)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_exponents_of_smooth_blocks_are_the_planted_ones(exponent: float) -> None:
    slopes = slopes_of(smooth(exponent))
    for name, value in (("max norm", -exponent), ("increments", -1.0), ("quadratic variation", -2 * exponent - 1)):
        slope = slopes[name]
        assert slope
        assert slope.exponent == pytest.approx(value, abs=0.15)


def test_regimes_are_named() -> None:
    assert name_regime(slopes_of(independent(0.5))) == "noise of finite quadratic variation (SDE)"
    assert name_regime(slopes_of(independent(0.0))) == "neither: the quadratic variation grows"
    assert name_regime(slopes_of(independent(1.0))) == "neither: the quadratic variation vanishes"
    assert name_regime(slopes_of(smooth(1.0))) == "smooth: increments vanish (ODE)"
    wide = Slope(0.1, -2.0, 2.2)
    assert name_regime({"increments": wide, "quadratic variation": wide}) == "not resolved: the intervals are wide"
    assert name_regime({"increments": None, "quadratic variation": None}) == "not resolved: too few depths"


def test_intervals_hold_a_planted_slope_as_often_as_they_say() -> None:
    """90 % of 100 draws, and a slope that is off by two half widths seldom."""
    rng, right, wrong = np.random.default_rng(0), 0, 0
    for _ in range(100):
        slope = fit_slope({d: list(d**-0.7 * np.exp(0.1 * rng.standard_normal(4))) for d in DEPTHS})
        assert slope
        right += slope.holds(-0.7)
        wrong += slope.holds(-0.7 + slope.high - slope.low)
    assert right >= 85
    assert wrong <= 40


def test_what_is_no_power_of_depth_has_a_wide_interval() -> None:
    power, none = fit_slope({d: [float(d)] for d in DEPTHS}), fit_slope({d: [math.exp(d / 40)] for d in DEPTHS})
    assert power
    assert none
    assert power.high - power.low < 1e-6
    assert none.high - none.low > 1
    assert fit_slope({4: [1.0], 8: [2.0]}) is None


def test_increments_do_not_cross_stages() -> None:
    first, second = np.ones((3, 5)), 10 * np.ones((3, 5))
    assert measure_weights([first, second])["quadratic variation"] == 0
    assert measure_weights([np.concatenate([first, second])])["quadratic variation"] > 0
    assert math.isnan(measure_weights([first[:1], second[:1]])["increments"])


def network(**changes: object) -> ConvResNetConfig:
    size = {"width": 8, "depth": 6, "base_width": 8, "base_depth": 3, "num_classes": 10, "image_size": 8}
    return ConvResNetConfig(**size, **changes)


def test_the_branch_multiplier_belongs_to_the_last_weight_of_a_branch() -> None:
    scaled = build_meta(network(convs_per_branch=2), ParameterizationConfig(name="completep", beta=0.5))
    factors = map_branch_factors(scaled)
    assert set(factors.values()) == {0.25}  # beta times 2^-1
    assert len(factors) == 6
    assert all(name.endswith("convs.1") for name in factors)
    stages = group_block_tensors(scaled)
    assert set(stages) == {"convs.0.weight", "convs.1.weight"}
    assert [len(stage) for stage in stages["convs.1.weight"]] == [2, 2, 2]


def test_tanh_is_another_network_with_the_same_weights() -> None:
    images = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    relu, tanh = (build(network(activation=name), ParameterizationConfig(), 0).network for name in ("relu", "tanh"))
    assert all(torch.equal(a, b) for a, b in zip(relu.parameters(), tanh.parameters(), strict=True))
    assert not torch.allclose(relu(images), tanh(images))
    block = tanh.get_submodule("stages.0.0")
    x = torch.randn((1, 8, 4, 4), generator=torch.Generator().manual_seed(0))
    branch = block(x) - x
    assert torch.allclose(block(-x) + x, -branch, atol=1e-6)  # an odd function, as ReLU is not


@pytest.fixture(scope="module")
def trained_once(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one rate, three depths and two seeds, all of whose runs are done."""
    return train_depths(settings_on(digits), tmp_path_factory.mktemp("trained"), lr=0.0625, seeds=2)


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """Its folder, to be changed."""
    return Path(shutil.copytree(trained_once, tmp_path / "grown"))


def test_a_studys_runs_give_exponents_a_table_and_a_figure(trained: Path) -> None:
    said = output_of("exponents", trained)
    assert "max norm" in said
    assert "depth_mup, convs.0.weight, start:" in said
    assert {path.name for path in trained.iterdir()} >= set(EXPONENTS_FILES)
    assert (trained / "exponents.png").read_bytes().startswith(b"\x89PNG")
    growths = json.loads((trained / "exponents.json").read_text())["growths"]
    assert [growth["subject"] for growth in growths] == ["start", "trained", "change"]
    start, after, change = (growth["slopes"] for growth in growths)
    # independent blocks times (L / L0)^-1/2: the norm falls so, up to the largest of a few draws
    assert start["max norm"]["exponent"] == pytest.approx(-0.5, abs=0.1)
    assert after["max norm"]["exponent"] == pytest.approx(-0.5, abs=0.1)
    assert change["max norm"]["exponent"] < -0.6  # towards L^-1

    study = Study(trained, read_study(trained))
    planned = study.runs[0]
    before = run_measures(planned)
    weights = load_file(planned.directory.weights)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, planned.directory.weights)
    doubled = run_measures(planned)
    assert doubled["convs.0.weight", "trained"]["max norm"] == pytest.approx(
        2 * before["convs.0.weight", "trained"]["max norm"]
    )
    assert doubled["convs.0.weight", "start"]["max norm"] == before["convs.0.weight", "start"]["max norm"]


def test_a_published_study_has_its_exponents_in_the_results(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    output_of("report", trained, "--publish", folder)
    assert "exponents" not in format_document([read_record(folder / "grown.json")], folder).split("## grown")[1]
    for flag in ([], ["--own"]):
        output_of("exponents", trained, *flag)
        output_of("report", trained, "--publish", folder)
        text = format_document([read_record(folder / "grown.json")], folder).split("## grown")[1]
        assert f"`depthmup {' '.join(['exponents', 'grown', *flag])}`" in text
        (slope,) = (
            growth["slopes"]["max norm"]
            for growth in read_record(folder / "grown-exponents.json")["growths"]
            if growth["subject"] == "trained"
        )
        cell = "{exponent:.2f} ({low:.2f} to {high:.2f})".format(**slope)
        assert f"| depth_mup | convs.0.weight | trained | {cell} |" in text
        assert "![grown-exponents](results/grown-exponents.png)" in text
        assert "`depth_mup`: depths 3, 6, 12." in text


def test_the_change_is_from_the_weights_that_training_began_with(trained: Path) -> None:
    planned = Study(trained, read_study(trained)).runs[-1]
    initial = build(planned.config.model, planned.config.parameterization, planned.config.seed).network
    save_file(
        {name: tensor.detach().clone() for name, tensor in initial.state_dict().items()}, planned.directory.weights
    )
    assert run_measures(planned)["convs.0.weight", "change"]["max norm"] == 0


def test_lost_files_and_unfit_studies_are_refused_with_the_remedy(trained: Path, study_file: Path) -> None:
    refused = invoke("exponents", study_file)
    assert "exponents need 3 finished depths at the base's width that train" in str(refused.exception)
    study = Study(trained, read_study(trained))
    study.runs[0].directory.write_done({"outcome": "diverged", "step": 3, "seconds": 1.0})
    refused = invoke("exponents", trained)
    assert "left out: depth_mup:" in str(refused.exception)
    study.runs[-1].directory.weights.unlink()
    refused = invoke("exponents", trained)
    assert "no weights.safetensors there: delete the folder to train it again" in str(refused.exception)
