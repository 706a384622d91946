"""The optimum of a search's surrogate: where it lies, how sure that is, and what bounds of losses say."""

import math

import numpy as np
import pytest
from scipy.stats import qmc

from depthmup.launch.findings.surrogate import (
    LEAST_MEASURED,
    MOST_FITTED,
    Located,
    Surrogate,
    locate_optimum,
    select_fitted,
)

BEST = 0.4


def sobol(count: int, dimensions: int) -> np.ndarray:
    return qmc.Sobol(dimensions, seed=1).random(count)


def bowl(points: np.ndarray, noise: float = 0.01, seed: int = 0) -> np.ndarray:
    """Losses whose optimum is BEST on the first dimension; the others do nothing."""
    logs = 2 * (points[:, 0] - BEST) ** 2 + noise * np.random.default_rng(seed).standard_normal(len(points))
    return np.exp(logs)


def locate(points: np.ndarray, losses: np.ndarray, *choices: int) -> list[Located]:
    return locate_optimum(points, losses, choices or (0,) * points.shape[1])


def test_the_interval_holds_the_optimum_and_is_most_of_the_range_where_a_value_does_nothing() -> None:
    known, idle = locate(points := sobol(32, 2), bowl(points))
    low, high = known.interval
    assert low <= BEST <= high
    assert high - low < 0.3
    assert low <= known.best <= high
    assert idle.interval[1] - idle.interval[0] > 0.5


def test_less_noise_and_more_runs_make_it_narrower() -> None:
    def width(count: int, noise: float) -> float:
        low, high = locate(points := sobol(count, 2), bowl(points, noise))[0].interval
        return high - low

    assert width(64, 0.002) < width(64, 0.05)
    assert width(64, 0.02) < width(8, 0.02)


def test_the_same_runs_in_another_order_say_the_same() -> None:
    points = sobol(16, 2)
    losses, order = bowl(points), np.random.default_rng(0).permutation(16)
    for first, second in zip(locate(points, losses), locate(points[order], losses[order]), strict=True):
        assert first.interval == pytest.approx(second.interval)
        assert first.best == pytest.approx(second.best)


def test_a_choice_has_the_share_of_the_draws_that_find_their_optimum_there() -> None:
    points = sobol(32, 2)
    points[:, 1] = np.floor(3 * points[:, 1])
    losses = bowl(points) * np.where(points[:, 1] == 2, 0.8, 1.0)
    _, choice = locate(points, losses, 0, 3)
    assert choice.best == 2
    assert sum(choice.shares) == pytest.approx(1)
    assert choice.list_likely(0.9) == [2]
    _, idle = locate(points, bowl(points), 0, 3)
    assert len(idle.list_likely(0.9)) > 1


def test_the_likely_choices_are_the_fewest_that_hold_the_share() -> None:
    found = Located(1.0, (0.0, 2.0), (0.3, 0.65, 0.05))
    assert found.list_likely(0.9) == [0, 1]
    assert found.list_likely(0.6) == [1]
    assert found.list_likely(1.0) == [0, 1, 2]


def test_a_run_without_a_loss_is_at_least_as_bad_as_the_median() -> None:
    """Runs that ended early on one side of the bowl: at the median itself they would flatten it there."""
    points = sobol(64, 1)
    losses = bowl(points, 0.001)
    ended = (losses > np.median(losses)) & (points[:, 0] > BEST)
    logs = np.log(losses[~ended])
    values = Surrogate(points, np.where(ended, math.inf, losses)).process.y_train_
    middle = (np.median(logs) - logs.mean()) / logs.std()
    assert ended.sum() > 10
    assert values[ended].min() > middle
    assert values[ended].max() > middle + 0.5
    (found,) = locate(points, np.where(ended, math.inf, losses))
    assert found.interval[0] <= BEST <= found.interval[1]


def test_where_runs_diverged_no_optimum_is_sought() -> None:
    points = sobol(32, 2)
    losses = np.exp(-0.5 * points[:, 0])  # better and better, up to a cliff at 0.6
    diverged = points[:, 0] > 0.6
    found, _ = locate(points, np.where(diverged, math.inf, losses))
    assert 0.3 < found.best < 0.6
    assert found.interval[1] < 0.7
    left_out, _ = locate(points[~diverged], losses[~diverged])
    assert left_out.best > 0.9  # what knows of no divergence seeks it there


def test_too_few_losses_have_no_surrogate() -> None:
    points = sobol(8, 2)
    losses = np.where(np.arange(8) < LEAST_MEASURED, bowl(points), math.inf)
    assert locate(points, losses)
    losses[0] = math.inf
    assert locate(points, losses) == []


def test_of_many_losses_the_best_and_some_of_all_ranks_are_fitted() -> None:
    losses = np.random.default_rng(0).permutation(2000).astype(float)
    chosen = np.sort(losses[select_fitted(losses)])
    assert len(set(chosen)) == MOST_FITTED
    assert chosen[: MOST_FITTED // 2].tolist() == list(range(MOST_FITTED // 2))
    assert chosen[-1] == 1999
    assert np.diff(chosen[MOST_FITTED // 2 :]).max() < 20
    assert select_fitted(losses[:100]).tolist() == np.argsort(losses[:100]).tolist()


def test_equal_losses_leave_everything_open() -> None:
    (found,) = locate(sobol(16, 1), np.ones(16))
    assert found.interval[1] - found.interval[0] > 0.7
