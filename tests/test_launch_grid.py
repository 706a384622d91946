"""Rates at which networks on a grid of widths and depths approach a known limit: planted ones are found."""

import math

import numpy as np
import pytest

from depthmup.launch.findings.convergence import Law
from depthmup.launch.findings.grid import GridRate, extrapolate_width, fit_grid, list_points

WIDTHS, DEPTHS = (32, 64, 128, 256, 512), (3, 4, 6, 8, 12, 24)
OVER_WIDTH, SCATTER, OVER_DEPTH = Law("width", "mean", 1.0), Law("width", "scatter", 0.5), Law("depth", "mean", 1.0)


def planted(
    width_exponent: float = 1.0,
    scatter_exponent: float = 0.5,
    depth_exponent: float = 1.0,
    next_order: float = 0.0,
    limit_noise: float = 0.0,
    seed: int = 0,
    seeds: int = 48,
) -> tuple[dict[tuple[int, int], np.ndarray], dict[float, np.ndarray]]:
    """(values, limits) of networks whose means are off by 10 width^-p (1 + c / width) and 2 depth^-q, and which
    scatter by 2 width^-r."""
    rng = np.random.default_rng(seed)
    limit, along_width, along_depth = (rng.standard_normal(30) for _ in range(3))

    def infinite_width(depth: float) -> np.ndarray:
        return limit + 2 * along_depth * (0.0 if math.isinf(depth) else depth**-depth_exponent)

    def networks(width: int, depth: int) -> np.ndarray:
        bias = 10 * width**-width_exponent * math.exp(next_order / width)
        noise = 2 * width**-scatter_exponent * rng.standard_normal((seeds, 30))
        return infinite_width(depth) + bias * along_width + noise

    noise = {depth: limit_noise * rng.standard_normal((2, 30)) for depth in (*DEPTHS, math.inf)}
    limits = {depth: infinite_width(depth) + noise[depth] for depth in (*DEPTHS, math.inf)}
    return {(width, depth): networks(width, depth) for width in WIDTHS for depth in DEPTHS}, limits


def rate(law: Law, **planting: float) -> GridRate:
    return fit_grid(law, list_points(law, *planted(**planting)))


def holds(found: GridRate, exponent: float) -> bool:
    assert found.interval, found.remark
    return found.interval[0] <= exponent <= found.interval[1]


@pytest.mark.parametrize(("law", "name"), [(OVER_WIDTH, "width"), (SCATTER, "scatter"), (OVER_DEPTH, "depth")])
def test_intervals_hold_the_planted_exponent_as_often_as_they_say(law: Law, name: str) -> None:
    """90 % of 20 draws: at least 15, and fewer than that hold one that is off by two half widths of an interval."""
    found = [rate(law, seed=seed) for seed in range(20)]
    assert sum(holds(each, law.exponent) for each in found) >= 15
    half = np.mean([(each.interval[1] - each.interval[0]) / 2 for each in found if each.interval])
    assert sum(holds(each, law.exponent + 2 * half) for each in found) < 10


@pytest.mark.parametrize(
    ("law", "name", "exponent"),
    [(OVER_WIDTH, "width_exponent", 0.5), (SCATTER, "scatter_exponent", 0.25), (OVER_DEPTH, "depth_exponent", 0.5)],
)
def test_another_exponent_is_found_and_is_not_the_theorys(law: Law, name: str, exponent: float) -> None:
    found = [rate(law, seed=seed, **{name: exponent}) for seed in range(5)]
    assert sum(holds(each, exponent) for each in found) >= 3
    assert not any(holds(each, law.exponent) for each in found)


def test_the_next_order_is_told_from_the_exponent() -> None:
    """Without it these distances fall as width^-0.8 or so."""
    found = rate(OVER_WIDTH, next_order=-12.0)
    assert found.next_order is not None
    assert found.next_order == pytest.approx(-12, abs=8)
    assert holds(found, 1.0)


def test_the_error_of_the_limit_widens_the_interval() -> None:
    def width(noise: float) -> float:
        low, high = rate(OVER_DEPTH, limit_noise=noise).interval or (0.0, 0.0)
        return high - low

    assert width(0.02) > 1.1 * width(0.0) > 0


def test_what_is_lost_in_the_noise_is_said() -> None:
    values, limits = planted()
    rng = np.random.default_rng(1)
    pure_noise = {size: limits[size[1]][:1] + rng.standard_normal((48, 30)) for size in values}
    found = fit_grid(OVER_WIDTH, list_points(OVER_WIDTH, pure_noise, limits))
    assert (found.exponent, found.interval) == (None, None)
    assert "not resolved" in found.remark
    assert "lost in the noise" in found.remark


def test_too_few_seeds_are_said() -> None:
    found = rate(OVER_WIDTH, seeds=2)
    assert found.remark == "needs 3 seeds that train, found 2"
    assert fit_grid(OVER_WIDTH, []).remark == "needs 3 seeds that train, found 0"


def test_extrapolation_takes_an_error_of_one_over_width_away() -> None:
    rng = np.random.default_rng(0)
    limit, bias = rng.standard_normal((2, 5, 3))
    found = extrapolate_width({width: limit + bias / width for width in WIDTHS})
    assert found == pytest.approx(limit)
