"""Forecasts of the largest model's loss, on laws that are known, on noise, and on laws that are not the fitted one."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.forecast import (
    Forecast,
    choose_targets,
    describe_calibration,
    make_forecasts,
    predict_loss,
)
from depthmup.launch.findings.verdict import analyse

DEPTHS = [Size(width=16, depth=depth) for depth in (3, 6, 12, 24)]
BOTH = [*DEPTHS, *(Size(width=width, depth=3) for width in (32, 64, 128))]
GRID = [2.0**x for x in range(-8, 0)]


def law(size: Size) -> float:
    return 0.8 + 0.9 / math.sqrt(size.width) + 0.6 / size.depth


def seeds(generator: np.random.Generator, mean: float, count: int = 3, noise: float = 0.01) -> np.ndarray:
    return mean * (1 + noise * generator.standard_normal(count))


def test_a_law_without_noise_is_continued_closely() -> None:
    """The exponents are not known, and may not be those of the grid that is tried."""
    target = Size(width=256, depth=48)
    _, predicted, interval, _ = predict_loss({size: np.full(3, law(size)) for size in BOTH}, target)
    assert predicted == pytest.approx(law(target), rel=0.01)
    assert interval is not None
    assert interval[0] <= law(target) <= interval[1]


@pytest.mark.parametrize(("sizes", "count", "studies"), [(DEPTHS[:3], 3, 200), (BOTH, 2, 100)])
def test_nine_of_ten_intervals_hold_the_largest_models_loss(sizes: list[Size], count: int, studies: int) -> None:
    target = Size(width=16, depth=24) if sizes != BOTH else Size(width=256, depth=48)
    generator, held = np.random.default_rng(0), []
    for _ in range(studies):
        known = {size: seeds(generator, law(size), count) for size in sizes}
        if interval := predict_loss(known, target, count)[2]:
            held.append(interval[0] <= seeds(generator, law(target), count).mean() <= interval[1])
    assert len(held) > 0.9 * studies
    assert 0.84 <= np.mean(held) <= 0.97  # its standard error is 0.02 to 0.03


def refusal(losses: Sequence[float], target: Size = DEPTHS[3], noise: float = 0.001) -> str:
    """Why no number is given, from losses at the first depths."""
    generator = np.random.default_rng(0)
    sizes = [Size(width=16, depth=3 * 2**power) for power in range(len(losses))]
    known = {size: seeds(generator, loss, noise=noise) for size, loss in zip(sizes, losses, strict=True)}
    _, predicted, interval, remark = predict_loss(known, target)
    assert (predicted is None) == (interval is None) == bool(remark)
    return remark


def test_no_number_is_given_that_smaller_sizes_speak_against() -> None:
    assert not refusal([1.0, 0.9, 0.84])
    assert "no law fits" in refusal([1.0, 0.9, 0.95])


def test_where_depth_changes_nothing_the_next_smaller_size_mostly_foretells_as_well() -> None:
    generator, reasons = np.random.default_rng(0), []
    for _ in range(100):
        known = {Size(width=16, depth=3 * 2**power): seeds(generator, 1.0) for power in range(5)}
        reasons.append(predict_loss(known, Size(width=16, depth=96))[3])
    assert sum("as well as a law" in reason for reason in reasons) > 70


def test_a_target_is_refused_that_lies_further_beyond_the_sizes_than_these_span() -> None:
    assert not refusal([1.0, 0.9, 0.84], Size(width=16, depth=48))
    assert refusal([1.0, 0.9, 0.84], Size(width=16, depth=96)) == (
        "too far: 8 times the largest depth, and the sizes span 4"
    )


def test_one_seed_tells_too_little_to_try_a_law_on_three_sizes() -> None:
    known = {size: np.array([law(size)]) for size in DEPTHS[:3]}
    assert "no law can be tried" in predict_loss(known, DEPTHS[3])[3]


@pytest.mark.parametrize(
    ("sizes", "target", "message"),
    [
        (DEPTHS[:2], DEPTHS[2], "too few sizes: the law needs 3"),
        (DEPTHS[:3], Size(width=64, depth=24), "do not differ in width"),
    ],
)
def test_where_nothing_can_be_foretold_it_says_so(sizes: list[Size], target: Size, message: str) -> None:
    _, predicted, interval, remark = predict_loss({size: np.full(3, law(size)) for size in sizes}, target)
    assert predicted is None
    assert interval is None
    assert message in remark


def test_a_smaller_size_whose_runs_fail_at_the_transferred_value_ends_the_forecast() -> None:
    known = {size: np.full(3, law(size)) for size in DEPTHS[:3]}
    known[DEPTHS[1]][0] = math.inf
    assert "runs at the transferred value fail at width 16, depth 6" in predict_loss(known, DEPTHS[3])[3]


def test_the_targets_are_the_largest_sizes_along_each_axis_and_of_all() -> None:
    assert choose_targets(BOTH, BOTH[0]) == [Size(width=128, depth=3), Size(width=16, depth=24)]
    corner = Size(width=128, depth=24)
    assert choose_targets([*BOTH, corner], BOTH[0])[-1] == corner
    assert choose_targets(DEPTHS, DEPTHS[0]) == [DEPTHS[3]]


def test_a_studys_forecast_uses_the_loss_at_the_bases_optimum_and_is_compared_with_what_was_seen() -> None:
    generator = np.random.default_rng(1)
    results = [
        Result(
            "p",
            size,
            value,
            seed,
            law(size) * (1 + 0.002 * generator.standard_normal()) + 0.1 * (math.log2(value) + 4) ** 2,
        )
        for size in DEPTHS
        for value in GRID
        for seed in range(3)
    ]
    (found,) = make_forecasts(analyse(results, DEPTHS[0]), DEPTHS)
    assert (found.target, found.fitted, found.law) == (DEPTHS[3], 3, "floor + b / depth^q")
    assert found.seen == pytest.approx(law(DEPTHS[3]), rel=0.01)
    assert found.inside is True
    assert describe_calibration([found]).startswith("1 of 1")
    (untrained,) = make_forecasts(analyse([r for r in results if r.size != DEPTHS[3]], DEPTHS[0]), DEPTHS)
    assert untrained.predicted == pytest.approx(found.predicted, rel=1e-3)
    assert untrained.seen is None
    assert untrained.inside is None
    died = [replace(run, metric=math.inf) if (run.size, run.seed) == (DEPTHS[1], 1) else run for run in results]
    (refused,) = make_forecasts(analyse(died, DEPTHS[0]), DEPTHS)  # one of three seeds there trains at no value
    assert refused.remark == "runs at the transferred value fail at width 16, depth 6"


def test_a_forecast_that_parameterizations_share_counts_once() -> None:
    shared = Forecast("sp", DEPTHS[3], 3, "floor + b / depth^q", 1.9, (1.8, 2.0), 1.95, "")
    own = replace(shared, parameterization="depth_mup", predicted=1.8, interval=(1.7, 1.9))
    assert describe_calibration([shared, replace(shared, parameterization="mup"), own]).startswith("1 of 2 forecasts")
