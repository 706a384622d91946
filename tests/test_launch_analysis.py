"""Optimum, drift, regret and verdict, on curves whose answers are known."""

import math

import numpy as np
import pytest
from launch.optimum import excess_interval, fit_optimum

from launch.analysis import Result, analyse, curves, seeds_wanted
from launch.config import Size
from launch.tables import number

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


def surface(
    generator: np.random.Generator, size: Size, optimum: float, seeds: int, noise: float = 0.02, shift: float = 0.1
) -> list[Result]:
    """Runs over GRID whose lowest point is at `optimum` on average; every seed moves and lifts it a little."""
    found = []
    for seed in range(seeds):
        centre, lift = optimum + shift * generator.standard_normal(), 0.02 * generator.standard_normal()
        loss = 0.5 + lift + 0.05 * (GRID - centre) ** 2 + noise * generator.standard_normal(len(GRID))
        found += [Result("p", size, 2.0**x, seed, float(y)) for x, y in zip(GRID, loss, strict=True)]
    return found


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_nine_of_ten_intervals_hold_the_true_optimum_and_the_true_drift(seeds: int) -> None:
    generator, repeats = np.random.default_rng(seeds), 400
    held = np.zeros(2)
    for _ in range(repeats):
        optimum, drift = generator.uniform(-7, -4), generator.uniform(-1, 1)
        found = analyse(
            [*surface(generator, BASE, optimum, seeds), *surface(generator, DEEP, optimum + drift, seeds)], BASE, 1.0
        )
        for i, (interval, true) in enumerate(
            ((found.curves[0].interval, optimum), (found.comparisons[1].interval, drift))
        ):
            assert interval is not None
            held[i] += interval[0] <= true <= interval[1]
    share = held / repeats  # its standard error is 0.015
    assert 0.86 <= share[0] <= 0.95
    assert 0.86 <= share[1] <= 0.98  # Welch's interval is on the wide side with two seeds


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = analyse([r for r in [*results(BASE, -4.0), *results(DEEP, -8.0)] if r.seed == 0], BASE, 1.0)
    assert [c.interval for c in found.comparisons] == [None, None]
    assert found.judgements[0].verdict == "inconclusive"
    assert "one seed" in found.judgements[0].reason


def test_an_interval_wider_than_twice_the_tolerance_is_no_transfer() -> None:
    generator = np.random.default_rng(0)
    noisy = [*surface(generator, BASE, -5.0, 2, shift=1.0), *surface(generator, DEEP, -5.0, 2, shift=1.0)]
    name, reason = verdict(noisy)
    assert name == "inconclusive"
    assert "only" in reason


def test_a_loss_of_a_guess_is_no_optimum() -> None:
    guess = [Result("p", DEEP, 2.0**x, seed, 2.30 + 0.001 * abs(x + 5)) for seed in range(3) for x in GRID]
    found = analyse([*results(BASE, -4.0), *guess], BASE, 1.0, chance=math.log(10))
    assert found.curves[1].optimum.x is None
    assert not found.curves[1].trains
    assert found.judgements[0].verdict == "does not transfer"
    assert "does not train" in found.judgements[0].reason
    assert analyse(guess, DEEP, 1.0, chance=math.log(10)).judgements[0].verdict == "inconclusive"


def test_a_censored_optimum_is_known_from_one_side_only() -> None:
    found = analyse([*results(BASE, -4.0), *results(DEEP, -12.0)], BASE, 1.0)
    low, high = found.comparisons[1].interval or (0.0, 0.0)
    assert low == -math.inf
    assert -6.0 <= high <= -4.9  # the grid ends 6 octaves below, and its step is 1
    assert found.judgements[0].verdict == "does not transfer"


def test_a_seed_that_ran_near_the_optimum_only_does_not_bend_the_curve() -> None:
    whole = results(BASE, -4.3, noise=0.0)
    lucky = [
        Result("p", BASE, r.value, 7, r.metric - 0.2) for r in whole if r.seed == 0 and abs(math.log2(r.value) + 4) <= 2
    ]
    curve = analyse([*whole, *lucky], BASE, 1.0).curves[0]
    assert curve.optimum.x == pytest.approx(-4.3, abs=0.1)
    assert np.isfinite(curve.mean).all()


def test_seeds_are_wanted_near_the_optimum_of_the_sizes_in_doubt_and_nowhere_else() -> None:
    wide = Size(width=64, depth=3)
    one = [r for r in [*results(BASE, -4.0), *results(DEEP, -4.0)] if r.seed == 0]
    wanted = seeds_wanted(analyse(one, BASE, 1.0), BASE)
    assert set(wanted) == {("p", BASE), ("p", DEEP)}
    assert wanted["p", BASE] == [2.0**x for x in range(-6, -1)]

    flat = [Result("p", DEEP, 2.0**x, s, 0.3 + 0.002 * (x + 5 - 3 * s) ** 2) for s in range(3) for x in GRID]
    doubtful = analyse([*results(BASE, -4.0), *results(wide, -4.0), *flat], BASE, 1.0)
    assert doubtful.judgements[0].verdict == "inconclusive"
    assert set(seeds_wanted(doubtful, BASE)) == {("p", BASE), ("p", DEEP)}

    for settled in ([*results(BASE, -4.0), *results(DEEP, -4.2)], [*results(BASE, -3.0), *results(DEEP, -8.0)]):
        assert not seeds_wanted(analyse(settled, BASE, 1.0), BASE)
    edge = analyse([*results(BASE, -4.0), *results(DEEP, -10.4)], BASE, 9.0)
    assert edge.judgements[0].verdict == "inconclusive"
    assert not seeds_wanted(edge, BASE)  # it wants values


def test_octaves_of_momentum_are_those_of_one_minus_it() -> None:
    steps = 1 - 2.0 ** np.arange(-7.0, 0.0)
    found = [
        Result("p", size, float(m), seed, 0.3 + 0.05 * (math.log2(1 - m) + 3.2) ** 2 + 0.001 * seed)
        for size in (BASE, DEEP)
        for seed in range(2)
        for m in steps
    ]
    curve = analyse(found, BASE, 1.0, octaves=lambda m: math.log2(1 - m)).curves[0]
    assert curve.optimum.x == pytest.approx(-3.2, abs=0.1)
    assert (np.diff(curve.x) > 0).all()


def test_an_optimum_whose_neighbours_diverge_is_known_to_a_grid_step_however_well_the_seeds_agree() -> None:
    cliff = results(DEEP, -4.0, noise=1e-6, diverged_above=-4.0)
    alone = [r for r in cliff if math.log2(r.value) >= -5]  # two points near: no parabola goes through them
    found = analyse([*results(BASE, -4.0), *alone, Result("p", DEEP, 2.0**-6, 0, math.inf)], BASE, 1.0)
    curve = found.curves[1]
    assert (curve.optimum.x, curve.optimum.censored) == (-4.0, None)
    assert curve.interval == pytest.approx((-5.0, -3.0))
    low, high = found.comparisons[1].interval or (0.0, 0.0)
    assert high - low >= 2.0


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_nine_of_ten_intervals_hold_the_true_regret(seeds: int) -> None:
    generator, repeats, held = np.random.default_rng(seeds), 400, 0
    for _ in range(repeats):
        optimum, at = generator.uniform(-7, -4), int(generator.integers(2, 8))
        true = (0.05 * (GRID - optimum) ** 2)[[at]] - (0.05 * (GRID - optimum) ** 2).min()
        curve = curves(surface(generator, DEEP, optimum, seeds))[0]
        low, high = excess_interval(curve.metric, at) or (math.nan, math.nan)
        held += bool(low <= true <= high)
    assert 0.86 <= held / repeats <= 0.98  # its standard error is 0.015


def test_regret_is_not_known_to_be_zero_because_the_best_of_few_seeds_lies_at_the_bases_optimum() -> None:
    comparison = analyse([*results(BASE, -4.0), *results(DEEP, -4.0, noise=0.05)], BASE, 1.0).comparisons[1]
    assert comparison.regret == 0.0
    assert comparison.regret_interval is not None
    assert comparison.regret_interval[0] == 0.0 < comparison.regret_interval[1]
    lost = analyse([*results(BASE, -4.0), *results(DEEP, -4.0, diverged_above=-4.5)], BASE, 1.0).comparisons[1]
    assert (lost.regret, lost.regret_interval) == (math.inf, None)


def test_where_the_base_learns_nothing_there_is_no_regret_and_nothing_diverged() -> None:
    guess = [Result("p", BASE, 2.0**x, seed, 2.30) for seed in range(2) for x in GRID]
    deep = analyse([*guess, *results(DEEP, -4.0)], BASE, 1.0, chance=math.log(10)).comparisons[1]
    assert (number(deep.regret), number(deep.at_base_optimum)) == ("", "")
    assert deep.curve.trains
