"""Rates at which networks approach a limit: on laws that are known, on noise, and on runs of a real study."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import invoke, output_of
from conftest import settings_on
from depthmup.launch.findings.convergence import LAWS, Law, Rate, fit_rate, measure_squared_distance
from depthmup.launch.reading import read_study
from depthmup.launch.report.converge import compute_kernel, probe_images, read_losses
from depthmup.launch.report.record import read_record
from depthmup.launch.report.results import format_document
from depthmup.launch.runs.study import Study
from planned_runs import train_depths

DEPTHS = (3, 6, 12, 24)
MEAN, SCATTER = Law("depth", "mean", 1.0), Law("width", "scatter", 0.5)


def approaching(
    exponent: float, seed: int = 0, seeds: int = 8, noise: float = 0.0, scatter: float = 0.0
) -> dict[int, np.ndarray]:
    """Vectors of 40 entries whose mean is off by size^-exponent, with noise that does not fall with the size and
    scatter that falls as its root."""
    generator = np.random.default_rng(seed)
    limit, shift = 2 + generator.standard_normal(40), generator.standard_normal(40)

    def values(size: int) -> np.ndarray:
        spread = noise + scatter * size**-0.5
        return limit + shift * size**-exponent + spread * generator.standard_normal((seeds, 40))

    return {size: values(size) for size in DEPTHS}


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0, 2.0])
def test_an_exponent_without_noise_is_found_exactly(exponent: float) -> None:
    rate = fit_rate(MEAN, approaching(exponent))
    assert rate.exponent == pytest.approx(exponent, abs=1e-3)
    assert rate.interval == pytest.approx((exponent, exponent), abs=1e-2)


def held(law: Law, exponent: float, **noise: float) -> tuple[int, int]:
    """(intervals that hold the exponent, intervals) of 60 studies."""
    found = [fit_rate(law, approaching(1.0, seed, **noise)).interval for seed in range(60)]
    known = [interval for interval in found if interval]
    return sum(low <= exponent <= high for low, high in known), len(known)


@pytest.mark.parametrize(("law", "exponent", "noise"), [(MEAN, 1.0, {"noise": 0.02}), (SCATTER, 0.5, {"scatter": 0.5})])
def test_about_nine_of_ten_intervals_hold_the_exponent(law: Law, exponent: float, noise: dict[str, float]) -> None:
    inside, known = held(law, exponent, **noise)
    assert known > 54
    assert 0.8 * known < inside < known


def test_about_nine_of_ten_error_bars_hold_the_distance() -> None:
    inside = known = 0
    for seed in range(50):
        rate, true = (fit_rate(MEAN, approaching(1.0, seed, noise=noise)) for noise in (0.02, 0.0))
        inside += int((abs(rate.distance - true.distance) <= rate.error).sum())
        known += int(np.isfinite(rate.error).sum())
    assert known > 135
    assert 0.8 * known < inside < known


def test_the_noise_of_the_seeds_is_not_taken_for_distance() -> None:
    """Squared distances of means that are equal are 0 on average, where noise alone would give 2 / 8."""
    generator = np.random.default_rng(0)
    squared = [
        measure_squared_distance(*(1 + generator.standard_normal((8, 40)) for _ in range(2)), "mean")[0]
        for _ in range(200)
    ]
    assert abs(np.mean(squared)) < 0.03


def test_noise_alone_has_no_rate() -> None:
    """Sizes that are all alike: what seeds make of it is not taken for an approach."""
    generator = np.random.default_rng(0)
    fitted = 0
    for _ in range(100):
        rate = fit_rate(MEAN, {size: 2 + generator.standard_normal((8, 40)) for size in DEPTHS})
        fitted += rate.exponent is not None
        assert rate.exponent is not None or rate.remark
    assert fitted <= 5


def test_what_grows_without_a_limit_is_no_power_law() -> None:
    rate = fit_rate(MEAN, {size: np.full((4, 5), math.log(size)) + np.arange(4)[:, None] * 1e-9 for size in DEPTHS})
    assert (rate.exponent, rate.remark) == (None, "does not fall as a power of the size")


@pytest.mark.parametrize(("sizes", "seeds"), [(DEPTHS[:2], 8), (DEPTHS, 2)])
def test_too_few_sizes_or_seeds_are_said(sizes: tuple[int, ...], seeds: int) -> None:
    values = approaching(1.0, seeds=seeds)
    rate = fit_rate(MEAN, {size: values[size] for size in sizes})
    assert rate.exponent is None
    assert f"needs 3 sizes and 3 seeds that train, found {len(sizes)} and {seeds}" in rate.remark


def noisy_rate(seeds: int) -> Rate:
    return fit_rate(MEAN, approaching(1.0, 3, seeds=seeds, noise=0.05))


def test_more_seeds_make_the_interval_narrower() -> None:
    few, many = noisy_rate(6).interval, noisy_rate(96).interval
    assert few
    assert many
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one rate, three depths and three seeds, all of whose runs are done."""
    settings = settings_on(digits)
    settings["train"] |= {"samples": 1280, "log_every": 1, "checkpoint_every": 1000}
    return train_depths(settings, tmp_path_factory.mktemp("trained"), lr=0.125, seeds=3)


@pytest.fixture
def grown(trained: Path, tmp_path: Path) -> Path:
    """Its folder, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "grown"))


def test_a_study_gives_rates_figures_and_a_section_of_the_results(grown: Path) -> None:
    said = output_of("converge", grown)
    for quantity in ("loss curve", "feature kernel"):
        assert f"depth_mup, {quantity} over depth (mean, 3 seeds):" in said
    assert max(map(len, said.split("Written")[0].splitlines())) <= 80
    record = read_record(grown / "convergence.json")
    assert [(r["sizes"], r["largest"]) for r in record["rates"]] == [([3, 6], 12)] * 2
    assert {law.axis for law in LAWS} == {"width", "depth"}  # width is not varied here, and so has no line

    folder = grown.parent / "docs"
    output_of("report", grown, "--publish", folder)
    assert (folder / "grown-convergence.png").read_bytes().startswith(b"\x89PNG")
    text = format_document([read_record(folder / "grown.json")], folder)
    assert "| depth_mup | feature kernel | mean | depth |" in text
    assert "![grown-convergence-loss](results/grown-convergence-loss.png)" in text
    assert "inconclusive" not in text  # one value has no optimum, and is no failed transfer
    assert "the study has one value only" in (grown / "report.md").read_text()


def test_a_kernel_is_that_of_what_the_readout_gets_before_multipliers(grown: Path) -> None:
    study = Study(grown, read_study(grown))
    images = probe_images(study.runs[0].config)
    planned = study.runs[-1]
    kernel = compute_kernel(planned, images)
    assert kernel.shape == (len(images), len(images))
    assert np.allclose(kernel, kernel.T)
    assert np.linalg.eigvalsh(kernel).min() > -1e-6
    scaled = replace(planned.config, parameterization=replace(planned.config.parameterization, gamma0=2.0))
    assert np.array_equal(compute_kernel(replace(planned, config=scaled), images), kernel)  # readout multiplier 1/2
    weights = load_file(planned.directory.weights)
    weights["fc.weight"] = weights["fc.weight"] * 3
    weights["fc.bias"] = weights["fc.bias"] + 1
    save_file(weights, planned.directory.weights)
    assert np.array_equal(compute_kernel(planned, images), kernel)  # the readout itself is no part of it
    name = next(name for name in weights if name != "fc.weight" and name.endswith("weight"))
    save_file(weights | {name: torch.zeros_like(weights[name])}, planned.directory.weights)
    assert not np.allclose(compute_kernel(planned, images), kernel)


def test_a_size_that_diverges_is_left_out_and_said(grown: Path) -> None:
    study = Study(grown, read_study(grown))
    deepest = study.runs[-1].directory
    deepest.write_done({"outcome": "diverged", "step": 3, "seconds": 1.0})
    assert "left out: depth 12 (diverged)" in output_of("converge", grown)


def test_lost_files_and_unfit_studies_are_refused_with_the_remedy(grown: Path, study_file: Path) -> None:
    steps, losses = read_losses(Study(grown, read_study(grown)).runs[0].directory)
    assert list(steps) == list(range(1, 41))
    assert np.isfinite(losses).all()
    Study(grown, read_study(grown)).runs[0].directory.weights.unlink()
    refused = invoke("converge", grown)
    assert "no weights.safetensors there: delete the folder to train it again" in str(refused.exception)
    refused = invoke("converge", study_file)
    assert "3 finished sizes along width or depth" in str(refused.exception)


def test_a_number_of_seeds_means_that_many(study_file: Path) -> None:
    assert read_study(study_file, ("study.seeds=4",)).study.seeds == (0, 1, 2, 3)
    assert read_study(study_file, ("study.seeds=[4]",)).study.seeds == (4,)
    assert json.dumps(read_study(study_file, ("study.seeds=[2, 5]",)).study.seeds) == "[2, 5]"
