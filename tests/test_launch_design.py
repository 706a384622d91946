"""The sequential design: which runs a study asks for next, and when it has ended. Simulated studies and a real one."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.launch.chain import transfer
from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.design import estimate_cost, plan_round, say_reasons
from depthmup.launch.findings.points import Design, Point, Round
from depthmup.launch.findings.precision import Aim
from depthmup.launch.findings.price import Outlook
from depthmup.launch.findings.verdict import Limits
from depthmup.launch.reading import read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.report.record import make_record, make_round_records
from depthmup.launch.runs.design import build_design
from depthmup.launch.runs.study import Study
from depthmup.launch.scale import scale

SIZES = tuple(Size(width=16, depth=depth) for depth in (3, 6, 12))
FLOPS = {size: float(size.depth) for size in SIZES}
GUESS = math.log(10)
GRID_COST = 9 * 3 * sum(FLOPS.values())
DESIGN = Design(("p",), SIZES, FLOPS, -9.0, -1.0, (0, 1, 2), GRID_COST, Limits(), GUESS)
Loss = Callable[[Size, float, int], float]


def valley(*optima: float, noise: float = 0.005, curvature: float = 0.05) -> Loss:
    """Log loss: a parabola about each size's optimum. The noise of a run depends on the run alone."""

    def loss(size: Size, x: float, seed: int) -> float:
        error = np.random.default_rng([size.depth, round(1000 * (x + 20)), seed]).standard_normal()
        distance = x - optima[SIZES.index(size)]
        return min(0.8 * math.exp(curvature / 2 * distance**2 + noise * error), GUESS)

    return loss


def train(wanted: Round, loss: Loss) -> list[Result]:
    return [Result(p.parameterization, p.size, 2.0**p.x, p.seed, loss(p.size, p.x, p.seed)) for p in wanted.points]


def walk(loss: Loss, design: Design = DESIGN) -> tuple[list[Round], list[Result]]:
    """All rounds, the last of them empty, and all results."""
    rounds, results = [], list[Result]()
    while not rounds or rounds[-1].points:
        assert len(rounds) < 40
        rounds.append(plan_round(design, results))
        results += train(rounds[-1], loss)
    return rounds, results


def verdict(results: list[Result], design: Design = DESIGN) -> str:
    return design.analyse(results).judgements[0].verdict


def points(rounds: list[Round]) -> list[Point]:
    return [point for each in rounds for point in each.points]


def cost(results: list[Result]) -> float:
    return sum(FLOPS[result.size] for result in results)


STAYS, MOVES = valley(-4.0, -4.1, -4.1), valley(-4.0, -5.5, -7.0)
CLIFF: Loss = lambda size, x, seed: math.inf if x > -3.6 else STAYS(size, x, seed)  # noqa: E731
FAILS_DEEP: Loss = lambda size, x, seed: math.inf if size != SIZES[0] and x > -6 else STAYS(size, x, seed)  # noqa: E731
NOISY = valley(-4.0, -4.2, -4.3, noise=0.02)
STUDIES = {"stays": STAYS, "moves": MOVES, "cliff": CLIFF, "fails": FAILS_DEEP, "noisy": NOISY}


@pytest.mark.parametrize("name", STUDIES)
def test_no_run_is_asked_for_twice_and_none_costs_more_than_the_budget(name: str) -> None:
    for budget in (GRID_COST, 40.0):
        rounds, results = walk(STUDIES[name], replace(DESIGN, budget=budget))
        asked = points(rounds)
        assert len(set(asked)) == len(asked)
        assert cost(results) <= budget
        assert all(each.reason for each in rounds)


@pytest.mark.parametrize("name", STUDIES)
def test_a_value_at_which_runs_fail_is_never_tried_again(name: str) -> None:
    bad: set[tuple[Size, float]] = set()
    for wanted in walk(STUDIES[name])[0]:
        assert not bad & {(point.size, point.x) for point in wanted.points}
        bad |= {(p.size, p.x) for p in wanted.points if math.isinf(STUDIES[name](p.size, p.x, p.seed))}


def test_a_single_dead_run_at_the_carried_value_is_tried_again_with_other_seeds() -> None:
    """At the deepest size the first seed dies at every value above -4.5, by bad luck: no other one does."""
    unlucky: Loss = lambda size, x, seed: GUESS if (size, seed) == (SIZES[2], 0) and x == -4.0 else STAYS(size, x, seed)  # noqa: E731
    rounds, results = walk(unlucky)
    again = next(each for each in rounds if "fail by bad luck" in each.reason)
    assert {(point.size, point.x) for point in again.points} == {(SIZES[2], -4.0)}
    assert verdict(results) == "transfers"
    always: Loss = lambda size, x, seed: GUESS if size == SIZES[2] and x == -4.0 else STAYS(size, x, seed)  # noqa: E731
    assert verdict(walk(always)[1]) == "does not transfer"


def test_what_stays_put_transfers_for_less_than_two_fifths_of_the_grid() -> None:
    rounds, results = walk(STAYS)
    assert verdict(results) == "transfers"
    assert "settled" in rounds[-1].reason
    assert cost(results) <= 0.4 * GRID_COST
    assert not plan_round(DESIGN, results).points


def test_what_moves_does_not_transfer_for_less_than_two_fifths_of_the_grid() -> None:
    results = walk(MOVES)[1]
    assert verdict(results) == "does not transfer"
    assert cost(results) <= 0.4 * GRID_COST


def test_the_value_that_is_carried_over_was_run_at_every_size() -> None:
    results = walk(STAYS)[1]
    comparisons = DESIGN.analyse(results).comparisons
    assert {each.curve.size for each in comparisons} == set(SIZES)
    assert all(each.measured for each in comparisons)
    carried = comparisons[0].carried
    assert carried is not None
    assert abs(carried + 4.0) <= 0.5


def test_rounds_are_the_same_when_resumed_at_any_of_them_and_in_whatever_order_runs_end() -> None:
    rounds, _ = walk(NOISY)
    results: list[Result] = []
    for expected in rounds:
        assert plan_round(DESIGN, results[::-1]) == expected
        results += train(expected, NOISY)


def test_the_first_round_is_a_coarse_pass_at_the_base() -> None:
    first = plan_round(DESIGN, [])
    assert [(point.size, point.x, point.seed) for point in first.points] == [(SIZES[0], x, 0) for x in range(-9, 0, 2)]


def test_an_optimum_on_the_edge_widens_the_search_at_the_base_and_at_a_size() -> None:
    rounds, results = walk(valley(0.5, 0.5, 0.5))
    assert max(point.x for point in points(rounds)) > -1.0
    assert verdict(results) == "transfers"
    moved = valley(-4.0, -4.0, -5.6, curvature=0.02)
    assert min(p.x for p in points(walk(moved)[0]) if p.size == SIZES[2]) < -5.0


def test_other_sizes_begin_once_the_bases_optimum_is_known() -> None:
    rounds, _ = walk(STAYS)
    begun = next(i for i, each in enumerate(rounds) if any(point.size != SIZES[0] for point in each.points))
    results = [result for each in rounds[:begun] for result in train(each, STAYS)]
    low, high = DESIGN.analyse(results).curves[0].optimum.interval or (-math.inf, math.inf)
    assert (high - low) / 2 <= 0.25
    assert {point.size for point in rounds[begun].points} >= set(SIZES[1:])  # all of them: arrays stay full


def test_parameterizations_with_the_same_runs_share_them() -> None:
    owners = {(name, size): "a" if size == SIZES[0] else name for name in ("a", "b") for size in SIZES}
    design = replace(DESIGN, parameterizations=("a", "b"), alike=owners, budget=2 * GRID_COST)
    results: list[Result] = []
    while (wanted := plan_round(design, results)).points:
        assert {p.parameterization for p in wanted.points if p.size == SIZES[0]} <= {"a"}
        for result in train(wanted, STAYS):
            shared = ("a", "b") if result.size == SIZES[0] else (result.parameterization,)
            results += [replace(result, parameterization=name) for name in shared]
    assert [each.verdict for each in design.analyse(results).judgements] == ["transfers", "transfers"]


def test_every_parameterization_has_runs_at_every_size_before_the_budget_is_spent_on_seeds_of_one() -> None:
    """Five of them, so noisy that the first ones would spend all on seeds; the later ones are slower to find the base's
    optimum. Their shares of what is left are alike."""
    names = tuple("abcde")
    design = replace(DESIGN, parameterizations=names, budget=1.8 * GRID_COST)

    def loss(point: Point) -> float:
        number = names.index(point.parameterization)
        base = -4.0 if number < 2 else -0.2 + 0.1 * number  # beyond the edge of the range: more rounds at the base
        optima = (base, base - 0.3, base - 0.3)
        return valley(*optima, noise=0.03)(point.size, point.x, 100 * number + point.seed)

    results: list[Result] = []
    while (wanted := plan_round(design, results)).points:
        results += [Result(p.parameterization, p.size, 2.0**p.x, p.seed, loss(p)) for p in wanted.points]
        assert cost(results) <= design.budget
    runs = {
        (name, size): sum((r.parameterization, r.size) == (name, size) for r in results)
        for name in names
        for size in SIZES
    }
    assert min(runs.values()) >= 6
    spent = [cost([r for r in results if r.parameterization == name]) for name in names]
    assert max(spent) < 2 * min(spent)
    assert cost(results) > 0.9 * design.budget


def test_one_size_that_costs_decides_and_the_others_get_no_further_runs() -> None:
    """The value costs 1.4 % at the middle size, and about the limit at the deepest: this would stay open."""
    rounds, results = walk(valley(-4.0, -4.75, -4.45, noise=0.008))
    assert verdict(results) == "costs"
    first = max(number for number, each in enumerate(rounds) if "about the carried value" in each.reason)
    later = points(rounds[first + 2 :])  # after a round for the edges
    assert {point.size for point in later} == {SIZES[1]}


def test_a_further_seed_of_a_size_runs_at_four_values_which_tell_the_curvature_too() -> None:
    rounds, _ = walk(valley(-4.0, -4.2, -4.3, noise=0.008))
    later = [point for each in rounds if "the cost is known too roughly" in each.reason for point in each.points]
    curves = {(point.size, point.seed) for point in later}
    assert curves
    for size, seed in curves:
        row = sorted(point.x for point in later if (point.size, point.seed) == (size, seed))
        if seed >= 2:  # not one of those that the size began with
            assert len(row) == 4
            assert row[3] - row[0] >= 4
            assert row[2] - row[1] == pytest.approx(2, abs=1)


def test_a_verdict_that_would_be_too_dear_is_left_open_for_less_than_the_budget() -> None:
    """The cost is as large as the limit, and runs differ by six times it."""
    near = math.sqrt(2 * math.log1p(Limits().transfer) / 0.05)  # octaves
    rounds, results = walk(valley(-4.0, -4.0 - near, -4.0 - near, noise=0.03))
    assert verdict(results) == "inconclusive"
    assert "to settle it would cost" in rounds[-1].reason
    assert cost(results) < 0.6 * GRID_COST


def half_widths(results: list[Result]) -> list[float]:
    """Of the intervals of all drifts."""
    intervals = [each.interval for each in DESIGN.analyse(results).comparisons[1:]]
    return [(each[1] - each[0]) / 2 if each else math.inf for each in intervals]


def test_of_several_parameterizations_none_may_cost_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single one may be a little dearer: nobody else needs the budget."""
    monkeypatch.setattr(Outlook, "find_price", lambda self, comparisons, carried: 1.2)
    loss, several = valley(-4.0, -4.3, -4.4, noise=0.03), replace(DESIGN, parameterizations=("p", "q"))
    alone = walk(loss)[0]
    assert any("known too roughly" in each.reason for each in alone)
    assert alone[-1].reason.endswith("the budget is spent")
    assert walk(loss, replace(several, budget=2 * GRID_COST))[0][-1].reason.startswith(
        "p, q: to settle it would cost 1.2"
    )


def test_a_study_may_go_on_until_its_drifts_are_known() -> None:
    wide = replace(DESIGN, limits=Limits(0.03, 0.3))  # settled before drifts are known
    loss = valley(-4.0, -4.2, -4.3, noise=0.01)
    plain, sharp = (walk(loss, replace(wide, drift_precision=most))[1] for most in (math.inf, 0.2))
    assert verdict(plain, wide) == verdict(sharp, wide) == "transfers"
    assert max(half_widths(plain)) > 0.2 >= max(half_widths(sharp))
    assert cost(sharp) < 2.5 * cost(plain)


def test_where_the_value_does_not_transfer_no_run_is_spent_on_its_drift() -> None:
    assert walk(MOVES, replace(DESIGN, drift_precision=0.01))[1] == walk(MOVES)[1]


def test_drifts_that_the_budget_leaves_unknown_are_said_to_be() -> None:
    rounds, results = walk(STAYS, replace(DESIGN, drift_precision=0.01))
    assert verdict(results) == "transfers"
    assert "settled, but no run that is left makes its drifts known to 0.01 octaves" in rounds[-1].reason


def test_what_the_budget_cannot_settle_ends_with_the_reason() -> None:
    rounds, results = walk(valley(-4.0, -4.3, -4.3, noise=0.06))
    assert verdict(results) == "inconclusive"
    assert "budget" in rounds[-1].reason
    assert "budget is spent" in walk(NOISY, replace(DESIGN, budget=30.0))[0][-1].reason


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda size, x, seed: GUESS * (1 + 1e-4 * seed), "nothing is learned at the base"),
        (lambda size, x, seed: math.inf, "nothing is learned at the base"),
    ],
)
def test_where_nothing_trains_at_the_base_no_other_size_runs(loss: Loss, words: str) -> None:
    rounds, results = walk(loss)
    assert words in rounds[-1].reason
    assert {result.size for result in results} == {SIZES[0]}


def test_a_loss_that_is_no_number_counts_as_a_failed_run() -> None:
    def loss(size: Size, x: float, seed: int) -> float:
        return math.nan if x > -3.6 else STAYS(size, x, seed)

    assert [each.points for each in walk(loss)[0]] == [each.points for each in walk(CLIFF)[0]]


def test_a_size_whose_runs_all_fail_does_not_take_the_value_and_ends_the_search() -> None:
    def loss(size: Size, x: float, seed: int) -> float:
        return math.inf if size == SIZES[2] else STAYS(size, x, seed)

    rounds, results = walk(loss)
    assert verdict(results) == "does not transfer"
    assert "settled" in rounds[-1].reason


def test_a_second_valley_in_which_no_larger_size_was_run_is_said_with_what_to_run() -> None:
    left, right = valley(-8.0, -8.0, -8.0, curvature=0.1), valley(-2.0, -2.0, -2.0, curvature=0.1)
    two: Loss = lambda size, x, seed: min(left(size, x, seed), 1.02 * right(size, x, seed))  # noqa: E731
    (judgement,) = DESIGN.analyse(walk(two)[1]).judgements
    assert "a second valley at 0." in judgement.reason
    assert "study.design=grid" in judgement.reason
    for loss in STUDIES.values():
        assert "valley" not in DESIGN.analyse(walk(loss)[1]).judgements[0].reason
    everywhere = [
        Result("p", size, 2.0**x, seed, two(size, x, seed)) for size in SIZES for x in range(-9, 0) for seed in (0, 1)
    ]
    assert "valley" not in DESIGN.analyse(everywhere).judgements[0].reason


def test_one_seed_is_a_beginning_and_further_ones_count_on() -> None:
    results = walk(NOISY, replace(DESIGN, seeds=(7,)))[1]
    seeds = {result.seed for result in results}
    assert seeds == set(range(7, 7 + len(seeds)))
    assert len(seeds) > 1


def test_the_expected_cost_is_known_beforehand_and_below_the_largest() -> None:
    expected, rounds = estimate_cost(DESIGN)
    assert 0 < expected < 0.5 * DESIGN.budget
    assert 2 < rounds < 10
    assert estimate_cost(DESIGN) == (expected, rounds)


def test_runs_beside_a_failing_value_teach_something_however_well_the_optimum_is_known() -> None:
    """The slope at the end of a curve is known worse than an optimum that failing values bound."""
    runs = tuple((x, seed) for x in (-5.0, -4.0, -3.75) for seed in (0, 1))
    aim = Aim(runs, -4.0, noise=0.005, curvature=0.07, distance=-0.23, deviation=0.03)
    assert aim.slope / aim.curvature > aim.deviation
    more = [*runs, *((x, seed) for x in (-5.0, -4.0, -3.75) for seed in range(2, 12))]
    assert replace(aim, runs=tuple(more)).slope / aim.curvature > aim.deviation
    assert aim.after(runs) == aim.deviation
    assert aim.after(more) < 0.8 * aim.deviation


# ---------------------------------------------------------------- studies with folders

RANGE = ("study.values={first: 2**-9, last: 2**-1}", "study.seeds=3")


def finish_round(study: Study, loss: Callable[[Size, float, int], float]) -> None:
    for run in study.pending():
        run.directory.path.mkdir(parents=True, exist_ok=True)
        x = math.log2(run.value)
        run.directory.write_done({"outcome": "completed", "minival_loss": loss(run.size, x, run.seed)})


def test_a_study_keeps_its_rounds_and_carries_the_very_value_that_was_run(study_file: Path) -> None:
    from depthmup.launch.transfer import grow

    def loss(size: Size, x: float, seed: int) -> float:
        error = np.random.default_rng([size.depth, round(1000 * (x + 20)), seed]).standard_normal()
        return 0.8 * math.exp(0.025 * (x + 4.2) ** 2 + 0.004 * error)

    overrides = (*RANGE, "study.parameterizations=[depth_mup]")
    study = Study(study_file, read_study(study_file, overrides))
    assert {run.size.depth for run in study.runs} == {3}
    added = 1
    while added:
        finish_round(study, loss)
        before = len(study.runs)
        added, why = grow(study)
        assert why
        assert len(study.runs) == before + added
        again = Study(study_file, read_study(study_file, overrides))  # another command sees the same runs
        assert [run.directory.path for run in again.runs] == [run.directory.path for run in study.runs]
    assert "settled" in why
    report = collect(study)
    assert report.analysis.judgements[0].verdict == "transfers"
    assert report.total_flops <= build_design(study).budget
    assert "ended: depth_mup: settled" in report.rounds
    rounds = make_round_records(report)
    assert [each["round"] for each in rounds] == list(range(1, len(study.rounds()) + 1))
    assert sum(each["runs"] for each in rounds) == sum(each["finished"] for each in rounds) == len(study.runs)
    assert sum(each["flops"] for each in rounds) == report.total_flops
    assert rounds[0]["verdicts"] == {"depth_mup": "inconclusive"}
    assert rounds[-1]["verdicts"] == {"depth_mup": "transfers"}
    assert [each["reason"] for each in rounds] == [each.reason for each in study.rounds()]
    assert report.ended == "depth_mup: settled"
    rate = scale(report, "large", {"model": {"width": 16}}).config["optimizer"]["lr"]
    ran = [{run.value for run in study.runs if run.size == size} for size in study.file.study.sizes]
    assert all(rate in values for values in ran)


def test_the_record_shares_runs_of_parameterizations_and_leaves_out_what_is_not_finished(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file, RANGE))  # both have the same runs at the base
    first, *_ = study.pending()
    first.directory.path.mkdir(parents=True)
    first.directory.write_done({"outcome": "completed", "minival_loss": 1.0})
    record = make_record(collect(study))
    (only,) = record["rounds"]
    assert (only["round"], only["finished"], only["flops"]) == (1, 1, collect(study).flops[first.size])
    assert only["verdicts"].keys() == {"sp", "depth_mup"}
    assert record["rounds_ended"] is None
    grid = Study(study_file, read_study(study_file))
    assert make_record(collect(grid))["rounds"] == []


def test_damaged_rounds_are_named(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file, RANGE))
    study.file.directory.mkdir(parents=True)
    (study.file.directory / "rounds.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"rounds\.json: damaged"):
        study.runs  # noqa: B018


def test_a_list_of_values_is_a_grid_and_so_is_what_says_so(study_file: Path) -> None:
    assert not read_study(study_file).study.adaptive
    assert read_study(study_file, RANGE).study.adaptive
    grid = Study(study_file, read_study(study_file, (*RANGE, "study.design=grid")))
    assert len(grid.points) == 2 * 2 * 9 * 3


def test_a_real_study_walks_its_rounds_to_the_report(study_file: Path) -> None:
    few = ("train.samples=96", "study.budget=0.5", "launch.cluster=debug")
    overrides = ("study.values={first: 2**-7, last: 2**-3}", "study.seeds=2", *few)
    study = Study(study_file, read_study(study_file, (*overrides, "study.parameterizations=[depth_mup]")))
    transfer(study, None, Console(quiet=True))
    assert len(study.rounds()) > 1
    assert not study.pending()
    page = (study.file.directory / "report.html").read_text()
    assert "Rounds" in page
    assert study.rounds()[-1].reason.split(": ")[0] in page


def test_what_holds_for_several_parameterizations_is_said_once() -> None:
    reasons = {"sp": "settled", "mup": "its optimum", "depth_mup": "settled"}
    assert say_reasons(reasons) == "sp, depth_mup: settled; mup: its optimum"
