"""The model of a study's curves: its parts against closed forms and integrals, its intervals on simulated curves."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import polygamma

from depthmup.launch.findings.curve_model import (
    DRAWS,
    average_seeds,
    compute_integrated_noise,
    fit_curves,
    select_fitted_values,
)
from depthmup.launch.findings.intervals import bound_regret, compute_interval
from depthmup.launch.findings.value_effects import estimate_effects, estimate_prior, invert_trigamma

GRID = np.arange(-9.0, 0.0)
CURVATURE = 0.1


def log_losses(
    optimum: float, generator: np.random.Generator, seeds: int = 3, noise: float = 0.02, skew: float = 0.0
) -> np.ndarray:
    """(seeds, values) over GRID; every seed lifts its curve a little."""
    d = GRID - optimum
    curve = CURVATURE * (d**2 / 2 + skew * d**3 / 6)
    offsets = 0.02 * generator.standard_normal((seeds, 1))
    return np.asarray(curve + offsets + noise * generator.standard_normal((seeds, len(GRID))))


def test_the_covariance_of_integrated_noise_is_that_of_its_integral() -> None:
    points = np.array([0.0, 0.3, 1.0, 2.5, 6.0])
    expected = [
        [quad(lambda u, a=a, b=b: (a - u) ** 3 * (b - u) ** 3 / 36, 0, min(a, b))[0] for b in points] for a in points
    ]
    assert compute_integrated_noise(points, points) == pytest.approx(np.array(expected), rel=1e-9)


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 30.0])
def test_the_inverse_of_trigamma_is_one(value: float) -> None:
    assert polygamma(1, invert_trigamma(value)) == pytest.approx(value, rel=1e-6)


def test_variances_of_curves_with_one_noise_are_pooled() -> None:
    generator, freedoms = np.random.default_rng(0), np.full(500, 6.0)
    freedom, variance = estimate_prior(0.04 * generator.chisquare(6, 500) / 6, freedoms)
    assert variance == pytest.approx(0.04, rel=0.05)
    assert freedom > 60  # ten times what one curve knows
    assert estimate_prior(np.full(4, 0.04), np.full(4, 6.0))[0] == 24  # equal ones: all their freedom


def test_variances_that_scatter_are_moderated_as_smyth_has_it() -> None:
    """Variances are drawn from his model: s0^2 times F with the freedoms of the curve and of the prior."""
    generator, prior = np.random.default_rng(1), 5.0
    freedoms = generator.integers(4, 20, 4000).astype(float)
    freedom, variance = estimate_prior(0.01 * generator.f(freedoms, prior), freedoms)
    assert freedom == pytest.approx(prior, rel=0.1)
    assert variance == pytest.approx(0.01, rel=0.05)


def test_value_effects_of_a_balanced_design_are_plain_means() -> None:
    y = log_losses(-4.3, np.random.default_rng(0))
    effects = estimate_effects(GRID, y)
    assert effects.mean == pytest.approx(y.mean(axis=0))
    assert effects.covariance == pytest.approx(np.eye(len(GRID)) / 3, abs=1e-9)
    assert effects.freedom == 2 * 8  # (seeds - 1) (values - 1)
    left = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    assert effects.residual == pytest.approx((left**2).sum())


def test_value_effects_of_an_unbalanced_design_are_free_of_the_seeds_offsets() -> None:
    curve, offsets = CURVATURE * (GRID + 4.3) ** 2 / 2, np.array([[0.3], [-0.1], [-0.2]])
    y = curve + offsets
    y[0, :4] = y[2, 6:] = math.nan  # the seeds of the highest and the lowest offset ran on one side only
    effects = estimate_effects(GRID, y)
    assert effects.mean == pytest.approx(curve)
    assert effects.residual == pytest.approx(0, abs=1e-12)
    assert np.abs(np.nanmean(y, axis=0) - curve).max() > 0.1  # plain means are not


def test_seeds_that_ran_at_no_common_value_say_nothing_of_the_difference_between_their_values() -> None:
    curve = CURVATURE * (GRID + 5) ** 2 / 2
    y = np.vstack([curve] * 6) + np.random.default_rng(0).normal(0, 0.002, (6, 9))
    inner, outer = np.array([3, 4, 5]), np.array([1, 2, 6, 7])
    y[:3, np.setdiff1d(np.arange(9), inner)] = math.nan
    y[3:, np.setdiff1d(np.arange(9), outer)] = math.nan
    effects = estimate_effects(GRID, y + 0.1 * np.array([[1, 1, 1, -1, -1, -1]]).T)
    within = effects.covariance[4, 4] + effects.covariance[3, 3] - 2 * effects.covariance[3, 4]
    across = effects.covariance[4, 4] + effects.covariance[2, 2] - 2 * effects.covariance[2, 4]
    assert within == pytest.approx(2 / 3)
    assert across > 1e6
    assert effects.mean[[3, 5]] - effects.mean[4] == pytest.approx(curve[[3, 5]] - curve[4], abs=0.01)


def test_a_seed_that_ran_near_the_optimum_only_does_not_bend_the_curve() -> None:
    y = np.vstack([log_losses(-4.3, np.random.default_rng(0), noise=0.001), np.full(len(GRID), math.nan)])
    y[3, 3:7] = y[:3, 3:7].mean(axis=0) - 0.2
    (lucky,), (alone,) = fit_curves([(GRID, y)]), fit_curves([(GRID, y[:3])])
    assert lucky
    assert alone
    assert np.median(lucky.optima) == pytest.approx(np.median(alone.optima), abs=0.01)
    assert average_seeds(y)[3] - average_seeds(y)[2] == pytest.approx(
        average_seeds(y[:3])[3] - average_seeds(y[:3])[2], abs=0.01
    )


def test_a_curve_is_fitted_about_its_lowest_value_without_a_gap() -> None:
    mean = np.array([0.9, 0.1, math.inf, 0.6, 0.3, 0.0, 0.1, 2.0, 3.0])
    assert list(select_fitted_values(GRID, mean)) == [3, 4, 5, 6, 7]  # to the failed value; two a side, however high
    assert list(select_fitted_values(GRID[:2], np.array([math.inf, 0.0]))) == [1]


@pytest.mark.parametrize("skew", [0.0, 0.3])
@pytest.mark.parametrize("optimum", [-6.5, -5.0, -4.3, -2.2])
def test_an_optimum_between_grid_points_is_found_also_where_one_side_is_steeper(optimum: float, skew: float) -> None:
    generator = np.random.default_rng(0)
    (found,) = fit_curves([(GRID, log_losses(optimum, generator, noise=0.001, skew=skew))])
    assert found
    low, high = compute_interval(found.optima)
    assert np.median(found.optima) == pytest.approx(optimum, abs=0.05)
    assert low - 0.02 < optimum < high + 0.02


def test_an_interval_is_not_far_narrower_than_that_of_a_parabola_whose_noise_is_known() -> None:
    """Nothing but a wrong model could know more than half of its width."""
    generator, noise = np.random.default_rng(0), 0.02
    for seeds in (2, 3, 5) * 8:
        y = log_losses(generator.uniform(-6, -3), generator, seeds, noise)
        (found,) = fit_curves([(GRID, y)])
        assert found
        kept = select_fitted_values(GRID, average_seeds(y))
        x = GRID[kept] - GRID[kept].mean()
        design = x[:, None] ** np.arange(3)
        _, slope, bend = np.linalg.lstsq(design, y[:, kept].mean(axis=0), rcond=None)[0]
        gradient = np.array([0.0, -1 / (2 * bend), slope / (2 * bend**2)])  # of the lowest point, -slope / (2 bend)
        variance = gradient @ np.linalg.inv(design.T @ design) @ gradient * noise**2 / seeds
        low, high = compute_interval(found.optima)
        assert high - low > 2 * 1.645 * math.sqrt(variance) / 2


def test_more_noise_and_fewer_seeds_widen_an_interval() -> None:
    def width(seeds: int, noise: float) -> float:
        (found,) = fit_curves([(GRID, log_losses(-4.3, np.random.default_rng(0), seeds, noise))])
        assert found
        low, high = compute_interval(found.optima)
        return high - low

    assert width(16, 0.01) < width(16, 0.04)
    assert width(16, 0.02) < width(2, 0.02)


def test_the_optimum_may_lie_anywhere_up_to_a_value_that_fails() -> None:
    y = log_losses(-3.2, np.random.default_rng(0), noise=0.005)
    y[:, GRID > -3.5] = math.inf
    (found,) = fit_curves([(GRID, y)])
    assert found
    assert found.grid[-1] == -3.0
    low, high = compute_interval(found.optima)
    assert low < -3.2 <= high
    assert high - low > 0.1  # no run beyond the optimum says where it is


def test_a_regret_is_zero_at_the_optimum_and_its_interval_starts_there() -> None:
    (found,) = fit_curves([(GRID, log_losses(-4.3, np.random.default_rng(0)))])
    assert found
    middle = float(np.median(found.optima))
    assert (found.regrets(middle) >= 0).all()
    low, high = bound_regret(found.optima, found.regrets(middle), middle)
    assert low == 0.0
    assert 0 < high < 0.02
    low, high = bound_regret(found.optima, found.regrets(-5.8), -5.8)
    assert low < CURVATURE * 1.5**2 / 2 < high
    assert np.isnan(found.regrets(-9.5)).all()  # beyond what was run nothing is known


def test_without_two_seeds_the_misfit_of_parabolas_stands_for_the_noise() -> None:
    generator, held = np.random.default_rng(0), 0
    optima = (-4.3, -5.1)
    for _ in range(30):
        for found, true in zip(
            fit_curves([(GRID, log_losses(x, generator, seeds=1)) for x in optima]), optima, strict=True
        ):
            assert found
            low, high = compute_interval(found.optima)
            held += low < true < high
    assert 50 <= held <= 59  # of 60
    few = (GRID[4:7], log_losses(-4.0, generator, seeds=1)[:, 4:7])
    assert fit_curves([few]) == [None]  # a parabola goes through any three points


def draws_of_a_study() -> str:
    generator = np.random.default_rng(0)
    found = fit_curves([(GRID, log_losses(optimum, generator)) for optimum in (-4.3, -5.1)])
    return hashlib.sha256(b"".join(each.draws.tobytes() for each in found if each)).hexdigest()


def test_draws_are_the_same_in_every_process() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {Path(__file__).stem} as m; print(m.draws_of_a_study())"
    mine = draws_of_a_study()
    assert mine == draws_of_a_study()
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == mine + "\n"
    )
    (found,) = fit_curves([(GRID, log_losses(-4.3, np.random.default_rng(0)))])
    assert found
    assert found.draws.shape == (DRAWS, len(found.grid))
