"""Forecasts of the largest model's loss, on laws that are known, on noise, and on laws that are not the fitted one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.forecast import Forecast, calibration, forecasts, predict, targets
from depthmup.launch.findings.verdict import analyse

DEPTHS = [Size(width=16, depth=depth) for depth in (3, 6, 12, 24)]
BOTH = [*DEPTHS, *(Size(width=width, depth=3) for width in (32, 64, 128))]
GRID = [2.0**x for x in range(-8, 0)]


def law(size: Size) -> float:
    return 0.8 + 0.9 / math.sqrt(size.width) + 0.6 / size.depth


def seeds(generator: np.random.Generator, mean: float, count: int = 3, noise: float = 0.01) -> np.ndarray:
    return mean * (1 + noise * generator.standard_normal(count))


def test_a_law_without_noise_is_continued_exactly() -> None:
    target = Size(width=256, depth=48)
    _, predicted, interval, _ = predict({size: np.full(3, law(size)) for size in BOTH}, target)
    assert predicted == pytest.approx(law(target), rel=1e-6)
    assert interval == pytest.approx((predicted, predicted), rel=1e-3)


@pytest.mark.parametrize(("sizes", "count"), [(DEPTHS[:3], 3), (DEPTHS[:3], 1), (BOTH, 2)])
def test_nine_of_ten_intervals_hold_the_largest_models_loss(sizes: list[Size], count: int) -> None:
    target, generator, held = (
        Size(width=16, depth=24) if sizes != BOTH else Size(width=256, depth=48),
        np.random.default_rng(0),
        0,
    )
    for _ in range(600):
        known = {size: seeds(generator, law(size), count) for size in sizes}
        interval = predict(known, target, count)[2]
        assert interval is not None
        held += interval[0] <= seeds(generator, law(target), count).mean() <= interval[1]
    assert 0.86 <= held / 600 <= 0.95  # its standard error is 0.012


def test_a_law_with_other_exponents_is_noticed_and_its_interval_is_wider() -> None:
    generator = np.random.default_rng(0)
    steep = {size: seeds(generator, 0.5 + 2.0 * size.depth**-3.0, noise=0.001) for size in DEPTHS[:3]}
    _, _, wide, remark = predict(steep, DEPTHS[3], 3)
    _, _, narrow, fits = predict({s: seeds(generator, law(s), noise=0.001) for s in DEPTHS[:3]}, DEPTHS[3], 3)
    assert "does not fit" in remark
    assert not fits
    assert wide
    assert narrow
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(
    ("sizes", "target", "message"),
    [
        (DEPTHS[:2], DEPTHS[2], "too few sizes: the law needs 3"),
        (DEPTHS[:3], Size(width=64, depth=24), "do not differ in width"),
    ],
)
def test_where_nothing_can_be_foretold_it_says_so(sizes: list[Size], target: Size, message: str) -> None:
    _, predicted, interval, remark = predict({size: np.full(3, law(size)) for size in sizes}, target)
    assert predicted is None
    assert interval is None
    assert message in remark


def test_a_smaller_size_whose_runs_fail_at_the_transferred_value_ends_the_forecast() -> None:
    known = {size: np.full(3, law(size)) for size in DEPTHS[:3]}
    known[DEPTHS[1]][0] = math.inf
    assert "runs at the transferred value fail at width 16, depth 6" in predict(known, DEPTHS[3])[3]


def test_the_targets_are_the_largest_sizes_along_each_axis_and_of_all() -> None:
    assert targets(BOTH, BOTH[0]) == [Size(width=128, depth=3), Size(width=16, depth=24)]
    corner = Size(width=128, depth=24)
    assert targets([*BOTH, corner], BOTH[0])[-1] == corner
    assert targets(DEPTHS, DEPTHS[0]) == [DEPTHS[3]]


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
    (found,) = forecasts(analyse(results, DEPTHS[0]), DEPTHS)
    assert (found.target, found.fitted, found.law) == (DEPTHS[3], 3, "floor + b / depth")
    assert found.seen == pytest.approx(law(DEPTHS[3]), rel=0.01)
    assert found.inside is True
    assert calibration([found]).startswith("1 of 1")
    (untrained,) = forecasts(analyse([r for r in results if r.size != DEPTHS[3]], DEPTHS[0]), DEPTHS)
    assert untrained.predicted == pytest.approx(found.predicted)
    assert untrained.seen is None
    assert untrained.inside is None


def test_a_forecast_that_parameterizations_share_counts_once() -> None:
    shared = Forecast("sp", DEPTHS[3], 3, "floor + b / depth", 1.9, (1.8, 2.0), 1.95, "")
    own = replace(shared, parameterization="depth_mup", predicted=1.8, interval=(1.7, 1.9))
    assert calibration([shared, replace(shared, parameterization="mup"), own]).startswith("1 of 2 forecasts")
