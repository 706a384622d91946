"""A joint search: suggestions are runs, nothing suggested is lost or trained twice, and the winners are run anew."""

import json
import math
import shutil
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from command_line import invoke
from depthmup.data.errors import UserError
from depthmup.launch.chain import finish_study
from depthmup.launch.jobs import states
from depthmup.launch.reading import read_run
from depthmup.launch.report.hyperparameters import Hyperparameter, describe_edge
from depthmup.launch.report.record import read_record
from depthmup.launch.report.results import format_document
from depthmup.launch.report.search import Winner, collect_search, describe_search
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.space import find_fraction
from depthmup.launch.transfer import Launched, wait
from depthmup.launch.values import Range
from depthmup.train.owner import describe_owner, fingerprint_code
from depthmup.train.rundir import PRUNED
from planned_runs import finish, open_as

SPACE: dict[str, Any] = {
    "optimizer.lr": {"first": "2**-10", "last": "2**-2"},
    "schedule.warmup": {"first": 0, "last": 0.5, "scale": "linear"},
    "train.label_smoothing": [0, 0.1],
}
LONG = pytest.mark.long


@pytest.fixture
def tune_file(run_settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes the configuration of a search, with changes of its section `tune`."""

    def write(name: str = "search", **tune: Any) -> Path:
        settings = {"space": SPACE, "trials": 16, "batch": 4, "rerun": 2, "rerun_seeds": 2, **tune}
        content = {**run_settings, "study": {"name": name, "directory": str(tmp_path / "runs")}, "tune": settings}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


open_search = partial(open_as, Search)


def bowl(run: PlannedRun) -> float:
    """A loss whose best learning rate is 2^-6; seeds differ a little, and what is far off does not learn."""
    loss = 0.5 + 0.1 * (math.log2(run.config.optimizer.lr) + 6) ** 2 + 0.01 * run.seed
    return loss if loss < 1.5 else math.inf


def walk(file: Path, stop_after: int = 10**6) -> list[str]:
    """The runs in their order, each step by a launcher of its own; `stop_after` runs are trained."""
    trained: list[str] = []
    while True:
        search = open_search(file)
        if not search.pending() and not search.plan_next_batch()[0]:
            return trained
        for run in search.pending():
            if len(trained) == stop_after:
                return trained
            trained.append(run.directory.path.name)
            finish(run, bowl(run))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("stop_after", [2, 4, 15, 17])
def test_a_search_that_was_stopped_anywhere_goes_on_as_if_it_had_not(
    tune_file: Callable[..., Path], sampler: str, stop_after: int
) -> None:
    whole = walk(tune_file("whole", sampler=sampler))
    file = tune_file("stopped", sampler=sampler)
    first = walk(file, stop_after)
    assert len(first) == stop_after
    assert [*first, *walk(file)] == whole
    assert len(whole) == len(set(whole)) == 16 + 2 * 2
    assert walk(file) == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_launcher_suggests_what_launchers_of_one_batch_each_do(
    tune_file: Callable[..., Path], sampler: str
) -> None:
    """It keeps what the sampler works on, which the others make anew; runs that are pruned, and that fail, included."""

    def end(run: PlannedRun) -> None:
        if run.config.schedule.warmup > 0.4:
            run.directory.path.mkdir(parents=True, exist_ok=True)
            run.directory.write_done(
                {"outcome": PRUNED, "step": 1, "seconds": 1.0, "code": fingerprint_code(), **describe_owner(run.config)}
            )
        else:
            finish(run, bowl(run))

    settings = {"sampler": sampler, "prune": [0.5], "trials": 24}
    one = open_search(tune_file("one", **settings))
    while one.plan_next_batch()[0]:
        for run in one.pending():
            end(run)
    while (other := open_search(tune_file("other", **settings))).plan_next_batch()[0]:
        for run in other.pending():
            end(run)
    suggested = [[(trial.params, trial.state) for trial in each.trials()] for each in (one, other)]
    assert suggested[0] == suggested[1]
    assert len({state for _, state in suggested[0]}) > 1  # some were pruned


def test_who_waits_for_a_search_is_told_of_all_of_its_runs(
    tune_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of those alone that have been suggested so far: of 16 suggestions, and of two winners with two new seeds."""
    search = open_search(tune_file())
    said = []
    while search.plan_next_batch()[0]:
        for run in search.pending():
            finish(run, bowl(run))
        wait(search, Launched([], [], []), Console(width=200))
        said.append(capsys.readouterr().out.split(",")[0].strip())
    assert said == [f"runs {done / 20:4.0%}  {done} of 20 done" for done in (4, 8, 12, 16, 20)]


@pytest.mark.parametrize("batch", [4, 8])
def test_the_first_suggestions_are_spread_evenly_over_the_space(tune_file: Callable[..., Path], batch: int) -> None:
    """Each quarter of a range has two of the first eight, or one of the first four where a batch has no more; one of
    them is the file's own values instead."""
    file = tune_file(trials=batch, batch=batch)
    search = open_search(file)
    search.plan_next_batch()
    tried = [trial.params for trial in search.trials()]
    assert tried[0] == search.own_values()
    for key in ("optimizer.lr", "schedule.warmup"):
        dimension = search.settings.space[key]
        assert isinstance(dimension, Range)
        quarters = sorted(int(4 * find_fraction(dimension, params[key])) for params in tried[1:])
        most = batch // 4
        assert all(most - 1 <= quarters.count(quarter) <= most for quarter in range(4)), (key, quarters)


def test_a_batch_of_any_size_begins_without_a_warning(tune_file: Callable[..., Path]) -> None:
    """SciPy has one for a number of Sobol points that is no power of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert open_search(tune_file(batch=6)).plan_next_batch() == (6, "suggestions 1 to 6 of 16")


def test_a_batch_of_one_is_chosen_by_the_sampler_after_four(tune_file: Callable[..., Path]) -> None:
    """The fifth suggestion hangs on what the first four lost; the fourth does not."""
    tried = []
    for name, sign in (("up", 1), ("down", -1)):
        file = tune_file(name, trials=6, batch=1)
        for number in range(5):
            search = open_search(file)
            assert search.plan_next_batch() == (1, f"suggestion {number + 1} of 6")
            for run in search.pending():
                finish(run, 1 + sign * 0.1 * math.log2(run.config.optimizer.lr))
        tried.append([trial.params for trial in open_search(file).trials()])
    assert tried[0][:4] == tried[1][:4]
    assert tried[0][4] != tried[1][4]


def test_one_process_on_a_cpu_is_given_one_suggestion_at_a_time_and_a_search_keeps_what_it_began_with(
    tune_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file states no batch: what is suggested must not hang on the machine on which a search goes on."""

    def at_once(*overrides: str) -> int:
        return open_search(file, *overrides).plan_next_batch()[0]

    def finish_all() -> None:
        for run in open_search(file).pending():
            finish(run, bowl(run))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elsewhere = [("launch.slots=2",), ("launch.cluster=slurm",), ("launch.slots=1", "train.pack=2")]
    for number, overrides in enumerate(elsewhere):
        file = tune_file(f"elsewhere-{number}", batch=None)
        assert "8 suggestions at once" in invoke("plan", file, *overrides).output
        assert at_once(*overrides) == 8
    for number, one in enumerate(("launch.slots=1", "launch.cluster=debug")):
        file = tune_file(f"here-{number}", batch=None, trials=2000)
        assert "one at a time, since one process trains them on a CPU" in invoke("plan", file, one).output
        assert at_once(one) == 1
        finish_all()
        assert at_once("launch.slots=2") == 1
        finish_all()
        assert at_once("launch.slots=2", "tune.batch=4") == 4 - 2  # a stated one counts, from where its batches begin
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    file = tune_file("gpu", batch=None)
    assert at_once("launch.slots=1") == 8


def test_a_search_of_before_batches_of_one_goes_on_with_eight(tune_file: Callable[..., Path]) -> None:
    """Its journal does not say of how many its batches are."""
    file = tune_file(batch=8)
    open_search(file).plan_next_batch()
    for run in open_search(file).pending():
        finish(run, bowl(run))
    file = tune_file(batch=None)
    assert open_search(file, "launch.cluster=debug").plan_next_batch()[0] == 8


def test_suggestions_of_a_launcher_that_was_killed_before_it_trained_them_are_trained(
    tune_file: Callable[..., Path],
) -> None:
    file = tune_file()
    suggested, _ = open_search(file).plan_next_batch()
    assert suggested == 4
    assert [trial.number for trial in open_search(file).trials()] == [0, 1, 2, 3]
    assert len(open_search(file).pending()) == 4


@pytest.mark.parametrize("trained", [9, pytest.param(20, marks=LONG)])
def test_a_journal_that_was_cut_anywhere_is_written_again_as_it_was_and_nothing_is_trained_twice(
    tune_file: Callable[..., Path], trained: int
) -> None:
    """A full disk or a dying node may leave any part of it. 20 runs are all, 9 are in the middle of a batch."""
    whole = walk(tune_file("whole"))
    suggested = [trial.params for trial in open_search(tune_file("whole")).trials()]
    file = tune_file("cut")
    first = walk(file, trained)
    journal = open_search(file).journal.path
    content = journal.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    middle = [(one + other) // 2 for one, other in pairwise(ends)]
    shutil.copytree(journal.parent, kept := journal.parent.with_name("kept"))
    for cut in [0, *middle[1 :: len(middle) // 4], ends[-6], len(content) - 1, -1]:
        shutil.rmtree(journal.parent)
        shutil.copytree(kept, journal.parent)
        journal.write_bytes(content[:cut]) if cut >= 0 else journal.unlink()
        assert sorted([*first, *walk(file)]) == sorted(whole), cut
        assert [trial.params for trial in open_search(file).trials()] == suggested, cut
        assert collect_search(open_search(file)).winners[0].trial in open_search(file).winners()


def test_a_search_that_is_made_longer_goes_on_and_chooses_its_winners_anew(tune_file: Callable[..., Path]) -> None:
    walk(tune_file(trials=8))
    first = open_search(tune_file(trials=8)).winners()
    assert len(walk(tune_file(trials=16))) >= 8
    search = open_search(tune_file(trials=16))
    losses = {trial.number: trial.value for trial in search.trials()}
    assert search.winners() == sorted(losses, key=lambda number: losses[number] or math.inf)[:2]
    assert len(first) == 2


# ---------------------------------------------------------------- budgets and early ends


def flops_of_a_run(file: Path) -> int:
    return open_search(file).flops


def test_a_budget_in_flops_pays_for_the_suggestions_and_for_the_winners_new_seeds(
    tune_file: Callable[..., Path],
) -> None:
    each = flops_of_a_run(tune_file("any"))
    file = tune_file(trials=None, flops=(13 + 4) * each + each / 2, seeds=[0])
    assert "13 suggestions (0 made" in invoke("plan", file).output
    assert len(walk(file)) == 13 + 2 * 2  # the winners, two of them with two seeds
    assert open_search(file).expected == 13


def test_a_budget_that_pays_for_nothing_and_two_budgets_are_refused(tune_file: Callable[..., Path]) -> None:
    each = flops_of_a_run(tune_file("any"))
    with pytest.raises(UserError, match=r"tune.flops .* pays for no suggestion: .*raise it, or lower tune.rerun") as no:
        open_search(tune_file(trials=None, flops=4.5 * each))
    least = float(str(no.value).rpartition("(")[2].split()[0])
    assert open_search(tune_file(trials=None, flops=least)).expected == 1
    with pytest.raises(UserError, match="trials and flops are two budgets: state one of them"):
        open_search(tune_file(trials=8, flops=1e12))


def train_with_limits(run: PlannedRun) -> bool:
    """What a run with limits leaves behind, without training it; tells whether it was ended early. On the way its loss
    is a little above its last one, the earlier the more."""
    directory, last = run.directory, run.config.train.num_steps
    for step, limit in sorted(directory.limits().steps.items()):
        loss = min(bowl(run), 2.0) + 0.1 * (1 - step / last)
        with open(directory.metrics, "a") as file:
            file.write(json.dumps({"step": step, "minival_loss": loss}) + "\n")
        if limit is not None and loss > limit:
            result = {"outcome": PRUNED, "step": step, "seconds": 1.0, "code": fingerprint_code()}
            directory.write_done(result | describe_owner(run.config))
            return True
    finish(run, bowl(run))
    return False


def walk_with_limits(file: Path, stop_after: int = 10**6) -> tuple[list[str], list[str]]:
    """(names of the runs, names of those that were ended early)."""
    trained: list[str] = []
    pruned: list[str] = []
    while True:
        search = open_search(file)
        if not search.pending() and not search.plan_next_batch()[0]:
            return trained, pruned
        search.write()  # as every launch does
        for run in search.pending():
            if len(trained) == stop_after:
                return trained, pruned
            trained.append(run.directory.path.name)
            if train_with_limits(run):
                pruned.append(trained[-1])


def test_runs_that_are_ended_early_are_neither_winners_nor_averaged_nor_failures(
    tune_file: Callable[..., Path],
) -> None:
    file = tune_file(trials=32, prune=[0.25, 0.5], sampler="random")
    _, pruned = walk_with_limits(file)
    search = open_search(file)
    found = collect_search(search)
    assert 0 < len(pruned) < 20
    assert found.pruned == len(pruned)
    assert len(found.trials) == 32 - len(pruned)
    of_pruned = {t.number for t in search.trials() if any(run.is_pruned() for run in search.plan_trial_runs(t))}
    assert not of_pruned & {trial for trial, _, _ in found.trials}
    assert not of_pruned & set(search.winners())
    assert all(number >= 8 for number in of_pruned)  # the first batches have nothing to be worse than
    assert any(f"Ended early by tune.prune: {len(pruned)} suggestions" in said for said in describe_search(found))
    counts = states.take_snapshot(search).counts()
    assert (counts["pruned"], counts["done"]) == (
        len(pruned),
        len(search.runs) - len(pruned) - counts.get("diverged", 0),
    )
    shown = invoke("status", search.file.directory)
    assert f"{len(pruned)} pruned" in shown.output
    assert "failed" not in shown.output
    run = next(run for run in search.runs if run.is_pruned())
    with pytest.raises(UserError, match="a search ended this run early"):
        run.loss("minival_loss")


@pytest.mark.parametrize("stop_after", [13, pytest.param(18, marks=LONG), pytest.param(30, marks=LONG)])
def test_a_search_with_early_ends_that_was_stopped_ends_the_same_runs(
    tune_file: Callable[..., Path], stop_after: int
) -> None:
    settings: dict[str, Any] = {"trials": 24, "prune": [0.5], "sampler": "random"}
    whole = walk_with_limits(tune_file("whole", **settings))
    file = tune_file("stopped", **settings)
    first, second = walk_with_limits(file, stop_after), walk_with_limits(file)
    assert ([*first[0], *second[0]], [*first[1], *second[1]]) == whole
    assert whole[1]


def test_what_early_ends_save_pays_for_more_suggestions(tune_file: Callable[..., Path]) -> None:
    each = flops_of_a_run(tune_file("any"))
    budget: dict[str, Any] = {"trials": None, "flops": (32 + 4) * each}
    walk_with_limits(tune_file("plain", **budget))
    walk_with_limits(tune_file("early", prune=[0.25], sampler="random", **budget))
    plain, early = (
        open_search(tune_file(name, **budget, **more))
        for name, more in (("plain", {}), ("early", {"prune": [0.25], "sampler": "random"}))
    )
    assert len(plain.trials()) == 32
    assert len(early.trials()) > 34
    spent = sum(run.share_trained() for run in early.runs)
    assert spent <= 36


def test_early_ends_are_refused_where_no_loss_is_looked_at(tune_file: Callable[..., Path]) -> None:
    file = tune_file(prune=[0.5])
    refused = invoke("tune", file, "train.evaluate=[]")
    assert "tune.prune looks at minival_loss" in str(refused.exception)


def test_what_optuna_cannot_say_of_importance_is_said_in_the_report(tune_file: Callable[..., Path]) -> None:
    """Of one finished suggestion alone."""
    file = tune_file(trials=1, batch=1)
    walk(file)
    found = collect_search(open_search(file))
    assert found.no_importance
    assert any(said == f"No importance: {found.no_importance}" for said in describe_search(found))


def test_a_plan_names_what_keeps_suggestions_out_of_one_pack(tune_file: Callable[..., Path]) -> None:
    space = {"optimizer.nesterov": [False, True], "optimizer.lr": SPACE["optimizer.lr"], "train.drop_path": [0, 0.1]}
    file = tune_file(space=space)
    assert "runs that differ in optimizer.nesterov share no pack" in invoke("plan", file, "train.pack=4").output
    assert "share no pack" not in invoke("plan", tune_file("alike"), "train.pack=4").output
    said = invoke("plan", tune_file("alike"), "train.pack=4", "train.compile=block").output
    assert "no packs: packs do not know train.compile" in said


def test_the_sampler_learns_and_the_winners_are_judged_by_new_seeds_alone(tune_file: Callable[..., Path]) -> None:
    file = tune_file(trials=32, seeds=[0, 1])
    walk(file)
    found = collect_search(open_search(file))
    assert len(found.trials) == 32
    early, late = ([loss for number, _, loss in found.trials if (number >= 16) is half] for half in (False, True))
    assert statistics.median(late) < statistics.median(early)
    assert abs(math.log2(found.winners[0].values["optimizer.lr"]) + 6) < 1
    for winner in found.winners:
        expected = 0.5 + 0.1 * (math.log2(winner.values["optimizer.lr"]) + 6) ** 2
        assert winner.searched == pytest.approx(expected + 0.005)  # the mean of seeds 0 and 1
        assert winner.losses == pytest.approx([expected + 0.02, expected + 0.03])  # seeds 2 and 3
    known = {each.key: each for each in found.dimensions}
    assert known["optimizer.lr"].identified
    assert known["optimizer.lr"].importance == max(each.importance or 0 for each in found.dimensions)
    assert not known["train.label_smoothing"].identified
    assert any("Not identified: " in said and "train.label_smoothing" in said for said in describe_search(found))


def test_the_winners_within_noise_are_listed(tune_file: Callable[..., Path]) -> None:
    file = tune_file(trials=8)
    walk(file)
    found = collect_search(open_search(file))
    winners = [Winner(trial, found.winners[0].values, 0.5, [0.5, 0.6]) for trial in (2, 7, 4, 9)]
    for count, listed in ((2, "trial 7"), (3, "trials 7 and 4"), (4, "trials 7, 4 and 9")):
        assert f"Within noise of it: {listed}." in describe_search(replace(found, winners=winners[:count]))


DECAY = "optimizer.weight_decay"
LOW, HIGH = "is on the low edge of its range", "is on the high edge of its range"


@pytest.mark.parametrize(
    ("best", "optimum", "identified", "said"),
    [
        (1e-4, 1e-6, True, f"the surrogate's optimum of weight_decay, 1e-06, {LOW}"),
        (1e-4, 1e-6, False, ""),  # it may lie all over the range
        (1e-2, 1e-2, True, f"the surrogate's optimum of weight_decay, 0.01, {HIGH}"),
        (1e-2, 1e-4, True, f"the best trial's weight_decay, 0.01, {HIGH}"),
        (1e-6, None, False, f"the best trial's weight_decay, 1e-06, {LOW}"),
        (1e-2, 1e-6, True, f"the surrogate's optimum of weight_decay, 1e-06, {LOW} and the best trial's weight_decay, "
         f"0.01, {HIGH}"),
        (1e-4, 1e-4, True, ""),
    ],
)  # fmt: skip
def test_the_value_on_an_edge_is_named_with_the_side(
    tune_file: Callable[..., Path], best: float, optimum: float | None, identified: bool, said: str
) -> None:
    """Of the pair, too: an edge of the surrogate's optimum is none of the best trial's value."""
    decay = Hyperparameter(DECAY, best, 0.5, optimum, identified=identified)
    rate = Hyperparameter("optimizer.lr", 2**-6, 0.5, 2**-6, identified=True)
    range_ = Range(first=1e-6, last=1e-2)
    assert describe_edge(range_, decay) == said
    file = tune_file(space={"optimizer.lr": SPACE["optimizer.lr"], DECAY: {"first": 1e-6, "last": 1e-2}}, trials=8)
    walk(file)
    sentences = describe_search(replace(collect_search(open_search(file)), dimensions=[rate, decay]))
    widen = f"{said[:1].upper()}{said[1:]}: widen tune.space there, under another study.name."
    assert (widen in sentences) is bool(said)
    (pair,) = [sentence for sentence in sentences if "the pair" in sentence.lower()]
    if said:
        assert pair == f"No interior optimum of the pair lr and weight_decay: {said}."
    else:
        assert pair.startswith("The pair" if identified else "No interior optimum")
        assert "edge" not in pair


def test_a_finished_search_is_reported_published_and_a_row_of_the_results(
    tune_file: Callable[..., Path], tmp_path: Path
) -> None:
    file, folder = tune_file("found", trials=8), tmp_path / "results"
    walk(file)
    told = invoke("report", file, "--publish", folder)
    assert told.exit_code == 0, told.exception
    assert "Best: trial" in told.output
    assert {path.name for path in folder.iterdir()} == {"found.json"}
    record = read_record(folder / "found.json")
    search = open_search(file)
    assert record["flops"] == (8 + 2 * 2) * search.flops
    text, best = format_document([record], folder), record["winners"][0]
    (row,) = [line for line in text.splitlines() if line.startswith("| found |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["conv_resnet 8 x 3", "8 (tpe)"]
    assert cells[6:8] == [f"{best['search']:.4g}", f"{best['mean']:.4g} +- {best['half_width']:.2g} (2)"]
    assert f"optimizer.lr {best['values']['optimizer.lr']:.3g}" in cells[8]


def test_a_search_begins_with_the_files_own_values_and_says_what_they_gave(tune_file: Callable[..., Path]) -> None:
    file = tune_file()
    walk(file)
    search = open_search(file)
    own = search.file.optimizer.lr, search.file.schedule.warmup, search.file.train.label_smoothing
    first = search.points[0].config
    assert (first.optimizer.lr, first.schedule.warmup, first.train.label_smoothing) == own
    assert collect_search(search).baseline == pytest.approx(bowl(search.points[0]))


def test_where_nothing_learns_no_value_is_called_best(tune_file: Callable[..., Path]) -> None:
    file = tune_file(space={"optimizer.lr": {"first": "2**0", "last": "2**4"}}, trials=4)
    said = r"none of 4 suggestions learned anything \(4 finished\): move tune.space"
    with pytest.raises(UserError, match=said):
        walk(file)
    with pytest.raises(UserError, match=said):  # and not that it has not ended
        collect_search(open_search(file))


def test_of_many_guesses_the_one_that_is_best_by_noise_is_no_winner(tune_file: Callable[..., Path]) -> None:
    search = open_search(file := tune_file(trials=4))
    search.plan_next_batch()
    for number, run in enumerate(search.pending()):
        finish(run, search.chance * (1 - 0.0009 * number))
    with pytest.raises(UserError, match=r"none of 4 suggestions learned anything \(4 finished\): move tune.space"):
        open_search(file).plan_next_batch()


def test_where_all_are_ended_early_the_line_says_so_and_how_to_go_on(tune_file: Callable[..., Path]) -> None:
    file = tune_file(trials=4)
    search = open_search(file)
    search.plan_next_batch()
    for run in search.pending():
        run.directory.path.mkdir(parents=True)
        ended = {"outcome": PRUNED, "step": 3, "seconds": 1.0, "loss": 2.0, "limit": 1.0, "code": fingerprint_code()}
        run.directory.write_done(ended | describe_owner(run.config))
    with pytest.raises(
        UserError, match=r"\(0 finished, 4 ended early\): leave tune.prune out, or give it later shares"
    ):
        open_search(file).plan_next_batch()


def test_a_journal_of_another_space_is_refused(tune_file: Callable[..., Path]) -> None:
    open_search(tune_file()).plan_next_batch()
    changed = tune_file(space={"optimizer.lr": {"first": "2**-10", "last": "2**-1"}})
    with pytest.raises(UserError, match="another space: choose another"):
        open_search(changed).plan_next_batch()


def test_two_launchers_do_not_suggest_at_the_same_time(tune_file: Callable[..., Path]) -> None:
    first, second = open_search(tune_file()), open_search(tune_file())
    with first._alone(), pytest.raises(UserError, match="another process is continuing this search"):
        second.plan_next_batch()


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"model.width": [8, 16]}, "a key of the model changes the network"),
        ({"train.samples": [320, 640]}, "cannot be tuned: the horizon is the proxy's"),
        ({"train.log_every": [1, 2]}, "changes how a run is trained, not what it learns"),
        ({"train.ema": [0.9, 0.99]}, "the metric is that of the weights, not of their average"),
        ({"optimizer.lr": {"first": 0.1, "last": 0.01}}, "last 0.01 must be above first 0.1"),
        ({"optimizer.lr": {"first": 0, "last": 0.01}}, "use scale: linear"),
        ({"optimizer.betas": [[0.9, 0.99], [0.8, 0.99]]}, "would do nothing: sgd has none"),
        ({"optimizer.momemtum": [0.8, 0.9]}, "did you mean 'optimizer.momentum'"),
        ({"schedule.warmup": {"first": 0.1, "last": 1.5}}, "1.5"),
        ({"schedule.name": ["cosine", "linear"]}, "'linear'"),
        ({"lr": [0.1, 0.2]}, "a space has optimizer.KEY"),
        ({"data.validation_share": [0.1, 0.2]}, "losses on other images are not comparable"),
        ({"optimizer.role_lr": [{"router": 2}, {"readout": 2}]}, "optimizer.role_lr.router would do nothing"),
        ({"data.backend": ["fast", "nvjpeg"]}, "data.backend nvjpeg decodes on a GPU"),
        ({"optimizer.lr": [0.1]}, "at least 2"),
        ({"optimizer.lr": 0.1}, "state a range, as {first: 2**-12, last: 2**-5}, or a list of values (got 0.1)"),
        ({"optimizer.nesterov": [True, "x"]}, "nesterov"),
        ({}, "at least 1"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_anything_runs(
    tune_file: Callable[..., Path], tmp_path: Path, space: dict[str, Any], said: str
) -> None:
    file = tune_file(space=space)
    for verb in ("plan", "tune"):
        refused = invoke(verb, file)
        assert isinstance(refused.exception, UserError), (verb, refused.output, refused.exception)
        assert said in str(refused.exception), verb
    assert not (tmp_path / "runs").exists()


def test_values_that_do_not_go_together_are_left_out_and_counted(tune_file: Callable[..., Path]) -> None:
    space = {
        "schedule.name": ["wsd", "cosine"],
        "schedule.warmup": {"first": 0.05, "last": 0.95, "scale": "linear"},
        "optimizer.lr": SPACE["optimizer.lr"],
    }
    file = tune_file(space=space, trials=24)
    walk(file)
    found = collect_search(open_search(file))
    assert found.failed > 0  # wsd with a warm-up that leaves no room for its decay
    assert found.failed + len(found.trials) == 24
    assert any(said.startswith("Refused, as values do not go together: ") for said in describe_search(found))


def test_a_search_is_trained_by_the_real_launcher_and_its_best_file_is_a_run(
    tune_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = tune_file(trials=4, batch=2)
    planned = invoke("plan", file)
    assert planned.exit_code == 0, planned.exception
    assert "8 runs of" in planned.output
    assert not (tmp_path / "runs").exists()
    interrupted = invoke("launch", file, "launch.cluster=debug")  # the first batch alone, as of a launcher that went
    assert interrupted.exit_code == 0, interrupted.exception
    assert len(list((tmp_path / "runs" / "search" / "runs").glob("*/done.json"))) == 2
    assert isinstance(invoke("report", file).exception, UserError)
    tuned = invoke("tune", file, "launch.cluster=debug")
    assert tuned.exit_code == 0, tuned.exception
    assert "Best: trial" in tuned.output
    root = tmp_path / "runs" / "search"
    record = json.loads((root / "search.json").read_text())
    assert len(record["trials"]) == 4
    assert 1 <= len(record["winners"]) <= 2  # of four runs of 12 steps, not all learn
    count = 4 + 2 * len(record["winners"])
    assert len(list(root.glob("runs/*/done.json"))) == count
    assert (root / "search.png").stat().st_size > 10_000
    best = read_run(root / "best.yaml")
    values = record["winners"][0]["values"]
    assert (best.optimizer.lr, best.schedule.warmup) == (values["optimizer.lr"], values["schedule.warmup"])
    again = invoke("tune", root)  # by its folder, and nothing is left to do
    assert again.exit_code == 0, again.exception
    assert again.output.splitlines()[:3] == tuned.output[tuned.output.index("trial") :].splitlines()[:3]
    assert f"{count} done" in invoke("status", root).output


# ---------------------------------------------------------------- spaces and journals that cannot be


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.lr": [0.125, "2**-3"]}, "a value occurs twice"),
        ({"optimizer.eps": [1e-8, 1e-6]}, "eps would do nothing: sgd has none"),  # the first is the default
        ({"parameterization.alpha": {"first": 0.5, "last": 1}}, "would do nothing at width 8, depth 3, the base's"),
        ({"optimizer.batch_ratio": [1, 2]}, "batch_ratio: cannot be tuned: it says how the batch differs"),
        (
            {"optimizer.tau_ema": {"first": 0.5, "last": 2}, "optimizer.weight_decay": {"first": 1e-4, "last": 1e-2}},
            "weight_decay and tau_ema set the same thing.*the same for each of 50 draws",
        ),
    ],
)
def test_a_space_in_which_nothing_is_to_be_found_is_refused_before_anything_is_written(
    tune_file: Callable[..., Path], space: dict[str, Any], message: str
) -> None:
    file = tune_file(space=space)
    with pytest.raises(UserError, match=message):
        open_search(file)
    assert not (file.parent / "runs").exists()


def test_early_ends_that_could_not_come_are_refused(tune_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"tune.prune would do nothing: it begins after 8 suggestions, and there are 8"):
        open_search(tune_file(trials=8, prune=[0.5]))
    open_search(tune_file(trials=9, prune=[0.5]))


def test_no_more_winners_are_planned_than_there_are_suggestions(tune_file: Callable[..., Path]) -> None:
    assert "the best 2 again" in invoke("plan", tune_file(trials=2, rerun=9)).output


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"op_code": 99, "worker_id": "x"}', b"\xff\x00"])
def test_a_journal_that_is_damaged_before_its_end_is_named_with_the_mend(
    tune_file: Callable[..., Path], line: bytes
) -> None:
    file = tune_file(trials=4)
    first = walk(file)
    journal = open_search(file).journal.path
    journal.write_bytes(line + b"\n" + journal.read_bytes())
    with pytest.raises(UserError, match=r"search.journal: damaged .*move this file away") as error:
        walk(file)
    assert "\n" not in str(error.value)
    journal.unlink()
    assert sorted([*first, *walk(file)]) == sorted(first)  # as the line says


def test_a_key_that_does_nothing_is_refused_as_that_where_a_value_is_none_too(tune_file: Callable[..., Path]) -> None:
    """A factor of two about a momentum of 0.9 reaches 1.8, which no optimizer takes, and AdamW has none."""
    file = tune_file(space={"optimizer.momentum": {"first": 0.45, "last": 1.8}})
    assert "Input should be less than 1 (got 1.8)" in str(invoke("plan", file, "optimizer.name=sgd").exception)
    assert "momentum would do nothing: adamw has none" in str(invoke("plan", file, "optimizer.name=adamw").exception)


def test_a_key_of_the_space_is_changed_on_the_command_line(tune_file: Callable[..., Path]) -> None:
    said = invoke(
        "plan", tune_file(), "tune.space.optimizer.lr.first=2**-9", "tune.space.train.label_smoothing=[0, 0.3]"
    )
    assert said.exit_code == 0, said.exception
    assert "2^-9 to 0.25 (log)" in said.output
    assert "0, 0.3" in said.output


def test_a_plan_says_where_no_sampler_will_choose(tune_file: Callable[..., Path]) -> None:
    said = "so few are spread evenly over the space: tpe would choose from suggestion 5 on"
    assert said in invoke("plan", tune_file("few", trials=4)).output
    assert "so few" not in invoke("plan", tune_file("enough", trials=5)).output
    assert "so few" not in invoke("plan", tune_file("random", trials=4, sampler="random")).output


def test_runs_that_have_ended_are_read_once_however_many_batches_follow(
    tune_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else each of thousands of batches would look at all runs before it."""
    search, looks = open_search(tune_file(trials=12, batch=1, rerun=1), "launch.cluster=debug"), Counter[str]()

    def train(packs: list[list[PlannedRun]], *_: Any) -> None:
        for pack in packs:
            for run in pack:
                finish(run, bowl(run))

    def stat(path: Path, *arguments: Any, **options: Any) -> Any:
        found = original(path, *arguments, **options)
        looks[path.parent.name] += path.name == "done.json"
        return found

    original = Path.stat
    monkeypatch.setattr("depthmup.launch.jobs.submit.run_here", train)
    monkeypatch.setattr("depthmup.launch.transfer.time.sleep", lambda seconds: None)
    monkeypatch.setattr("depthmup.launch.chain.prepare_data", lambda *_: None)
    monkeypatch.setattr(Path, "stat", stat)
    finish_study(search, Console(quiet=True))
    tried = [run.directory.path.name for trial in search.trials() for run in search.plan_trial_runs(trial)]
    assert [looks[name] for name in tried] == 12 * [1]
