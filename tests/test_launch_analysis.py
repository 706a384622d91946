"""Optimum, drift, regret and verdict, on curves whose answers are known."""

import math

import numpy as np
import pytest

from launch.analysis import Result, analyse, fit_optimum
from launch.config import Size

BASE, DEEP = Size(width=16, depth=3), Size(width=16, depth=27)
GRID = np.arange(-10.0, 1.0)


def parabola(optimum: float, seed: int = 0, noise: float = 0.0, best: float = 0.3) -> np.ndarray:
    """Loss over GRID with its minimum `best` at x = optimum."""
    return best + 0.05 * (GRID - optimum) ** 2 + noise * np.random.default_rng(seed).standard_normal(len(GRID))


def results(size: Size, optimum: float, noise: float = 0.01, diverged_above: float = math.inf) -> list[Result]:
    return [
        Result("p", size, 2.0**x, seed, math.inf if x > diverged_above else loss)
        for seed in range(3)
        for x, loss in zip(GRID, parabola(optimum, seed, noise), strict=True)
    ]


@pytest.mark.parametrize("optimum", [-7.5, -5.0, -4.3, -3.8])
def test_the_fit_finds_an_optimum_between_grid_points(optimum: float) -> None:
    assert fit_optimum(GRID, parabola(optimum)).x == pytest.approx(optimum, abs=0.15)


def test_values_next_to_the_optimum_may_diverge() -> None:
    y = parabola(-4.2)
    y[GRID > -4] = math.inf
    fitted = fit_optimum(GRID, y)
    assert fitted.censored is None
    assert fitted.x == pytest.approx(-4.2, abs=0.2)


@pytest.mark.parametrize(("optimum", "edge"), [(-12.0, "low"), (3.0, "high")])
def test_an_optimum_on_the_edge_of_the_grid_is_censored(optimum: float, edge: str) -> None:
    assert fit_optimum(GRID, parabola(optimum)).censored == edge


def test_a_curve_of_diverged_runs_has_no_optimum() -> None:
    assert fit_optimum(GRID, np.full(len(GRID), math.inf)).x is None


def verdict(*groups: list[Result]) -> tuple[str, str]:
    judgement = analyse([r for group in groups for r in group], BASE, tolerance=1.0).judgements[0]
    return judgement.verdict, judgement.reason


def test_a_steady_optimum_transfers() -> None:
    assert verdict(results(BASE, -4.0), results(DEEP, -4.4))[0] == "transfers"


def test_a_moved_optimum_does_not_transfer_and_drift_and_regret_say_by_how_much() -> None:
    found = [*results(BASE, -3.0), *results(DEEP, -7.0)]
    assert verdict(found)[0] == "does not transfer"
    deep = analyse(found, BASE, 1.0).comparisons[1]
    assert deep.drift == pytest.approx(-4.0, abs=0.3)
    assert deep.interval is not None
    assert deep.interval[0] <= deep.drift <= deep.interval[1]
    assert deep.regret == pytest.approx(0.05 * 4**2, abs=0.05)


def test_divergence_at_the_base_optimum_does_not_transfer_however_small_the_drift() -> None:
    name, reason = verdict(results(BASE, -3.0), results(DEEP, -3.9, diverged_above=-4.0))
    assert name == "does not transfer"
    assert "diverges" in reason


def test_divergence_everywhere_does_not_transfer() -> None:
    assert verdict(results(BASE, -3.0), results(DEEP, -3.0, diverged_above=-99))[0] == "does not transfer"


def test_a_censored_optimum_near_the_base_is_inconclusive() -> None:
    assert verdict(results(BASE, -9.4), results(DEEP, -11.0))[0] == "inconclusive"


def test_a_base_that_diverges_everywhere_is_inconclusive() -> None:
    assert verdict(results(BASE, -3.0, diverged_above=-99), results(DEEP, -3.0))[0] == "inconclusive"


def test_a_drift_that_noise_alone_could_make_is_inconclusive() -> None:
    flat = [
        Result("p", size, 2.0**x, seed, 0.3 + 0.002 * (x - optimum - 3 * seed) ** 2)
        for size, optimum in ((BASE, -8.0), (DEEP, -6.6))
        for seed in range(3)
        for x in GRID
    ]
    assert verdict(flat)[0] == "inconclusive"


def test_diverged_runs_count_in_the_curve_and_are_not_dropped() -> None:
    curve = analyse(results(BASE, -4.0, diverged_above=-3.0), BASE, 1.0).curves[0]
    assert np.isinf(curve.metric).sum() == 3 * 3  # three seeds at x = -2, -1, 0
    assert len(curve.x) == len(GRID)
