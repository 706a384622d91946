"""The whole path in one command: tune at the base, confirm over sizes, scale, train the target, judge the forecast."""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from command_line import invoke
from depthmup.data.errors import UserError
from depthmup.launch import chain
from depthmup.launch.reading import read_run, read_study
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import apply_tuned, keep_study, search_of
from depthmup.launch.transfer import Launched
from planned_runs import finish, open_as
from train_processes import Process

SPACE = {
    "optimizer.momentum": [0.8, 0.9],
    "schedule.warmup": {"first": 0, "last": 0.5, "scale": "linear"},
    "parameterization.beta": {"first": 0.5, "last": 2},
}


@pytest.fixture
def path_file(run_settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a study over sizes with a section `tune`."""

    def write(name: str = "whole", **changes: Any) -> Path:
        study = {
            "name": name,
            "directory": str(tmp_path / "runs"),
            "parameterizations": ["depth_mup", "mup"],
            "sizes": [{"width": 8, "depth": 3}, {"width": 12, "depth": 3}],
            "values": [2**-9, 2**-6, 2**-3],
            "seeds": [0, 1],
            "design": "grid",
            "extend": 0,
            "more_seeds": 0,
            "regret_limit": 1,
            "cost_limit": 2,
        }
        tune = {"space": SPACE, "trials": 3, "batch": 2, "rerun": 1, "rerun_seeds": 2}
        content = {**run_settings, "study": study, "tune": tune, **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "large.yaml"
    path.write_text("model: {width: 16}\n")
    return path


def markers(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.glob("**/done.json")}


def valley(run: PlannedRun) -> float:
    """Losses whose best learning rate is 2^-6 at every size, and whose best warm-up is 0.3; larger networks are better.
    The three swept rates alone cannot tell noise, seeds can."""
    config = run.config
    rate, warmup = math.log2(config.optimizer.lr) + 6, config.schedule.warmup - 0.3
    return 0.6 + 0.01 * rate**2 + warmup**2 - 0.01 * config.model.width / 8 + 0.001 * config.seed


loss_of: Callable[[PlannedRun], float] = valley  # of what a launcher that trains nothing finishes


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A launcher that trains nothing: its runs have the losses of `valley`. (study, number of runs) of each launch."""
    launched: list[tuple[str, int]] = []

    def train(study: Study, *given: Any, **options: Any) -> Launched:
        study.write()
        launched.append((study.file.study.name, len(study.pending())))
        for run in study.pending():
            finish(run, loss_of(run))
        return Launched(study.runs, ["1"], [])

    monkeypatch.setattr(chain, "launch", train)
    return launched


def test_one_command_goes_from_the_search_to_the_judged_target_and_goes_on_where_it_was_stopped(
    path_file: Callable[..., Path],
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, int]],
) -> None:
    file, root = path_file(), tmp_path / "runs"
    command = ("transfer", file, "--tune", "--target", target, "launch.cluster=debug")
    train = chain.launch

    def stops_in_its_second_batch(study: Study, *given: Any, **options: Any) -> Launched:
        if launches:
            raise KeyboardInterrupt
        return train(study, *given, **options)

    monkeypatch.setattr(chain, "launch", stops_in_its_second_batch)
    assert invoke(*command).exit_code == 130
    monkeypatch.setattr(chain, "launch", train)
    assert launches == [("whole_tune", 2)]
    first = markers(root)

    ended = invoke(*command)
    assert ended.exit_code == 0, ended.exception
    assert launches == [("whole_tune", 2), ("whole_tune", 1), ("whole_tune", 2), ("whole", 12), ("whole_target", 1)]
    after = markers(root)
    assert first.items() <= after.items()
    best = json.loads((root / "whole_tune" / "search.json").read_text())["winners"][0]["values"]
    study = read_study(root / "whole")
    assert (study.optimizer.momentum, study.schedule.warmup) == (best["optimizer.momentum"], best["schedule.warmup"])
    assert {preset.beta for preset in study.study.parameterizations} == {best["parameterization.beta"]}
    assert (study.tune, len(study.study.sizes)) == (None, 2)
    large = read_run(root / "whole" / "whole_target.yaml")
    assert (large.model.width, large.optimizer.lr) == (16, pytest.approx(2**-6, rel=0.1))
    assert (large.schedule.warmup, large.parameterization.beta) == (
        study.schedule.warmup,
        best["parameterization.beta"],
    )
    assert "Target of width 16, depth 3 at optimizer.lr" in " ".join(ended.output.split())

    again = invoke(*command)
    assert again.exit_code == 0, again.exception
    assert len(launches) == 5
    assert markers(root) == after
    shown = invoke("status", file).output
    assert f"Study: {root / 'whole'}" in shown
    assert f"Target: {root / 'whole_target'}" in shown


def walk_until(killed: tuple[str, int] | None, output: str, *command: str) -> None:
    """In a process of its own: `depthmup COMMAND` with a launcher that trains nothing, and writes down what it trained.
    killed: (study, number) of the run of which the process ends before it is trained, as by kill -9."""

    def train(study: Study, *given: Any, **options: Any) -> Launched:
        study.write()
        for run in study.pending():
            if killed == (study.file.study.name, len(markers(study.file.directory))):
                os.kill(os.getpid(), signal.SIGKILL)
            with open(run.directory.path / "trained", "a") as file:
                file.write("once\n")
            finish(run, valley(run))
        return Launched(study.runs, ["1"], [])

    chain.launch = train  # type: ignore[assignment]  # this process has nothing else to do
    ended = invoke(*command)
    Path(output).write_text(f"{ended.output}{ended.exception or ''}")
    sys.exit(ended.exit_code)


def test_the_whole_path_killed_in_its_search_and_in_its_study_goes_on_by_the_same_command(
    path_file: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    """Within a batch of the search, and within the study: to the target's line in the report."""
    file, root, output = path_file(), tmp_path / "runs", tmp_path / "output"
    command = ("transfer", str(file), "--tune", "--target", str(target), "launch.cluster=debug")

    def walk(killed: tuple[str, int] | None) -> int | None:
        program = f"import test_launch_tuned; test_launch_tuned.walk_until{(killed, str(output), *command)}"
        process = Process(["-c", program], dict(os.environ))
        process.communicate()
        return process.returncode

    def suggested() -> list[dict[str, Any]]:
        return [trial.params for trial in open_as(Search, file).trials()]

    assert walk(("whole_tune", 1)) == -signal.SIGKILL
    first, made = markers(root), suggested()
    assert (len(first), len(made)) == (1, 2)
    assert walk(("whole", 5)) == -signal.SIGKILL
    second = markers(root)
    assert len(second) == 3 + 2 + 5
    assert walk(None) == 0, output.read_text()
    ended = markers(root)
    assert first.items() <= second.items() <= ended.items()
    assert len(ended) == 3 + 2 + 12 + 1
    assert {(path.parent / "trained").read_text() for path in ended} == {"once\n"}
    assert suggested()[:2] == made
    assert len(suggested()) == 3
    assert "Target of width 16, depth 3 at optimizer.lr" in " ".join(output.read_text().split())
    assert "Target of width 16, depth 3" in (root / "whole" / "report.html").read_text()


def test_without_waiting_the_job_after_the_search_knows_that_a_study_follows_and_later_ones_go_on_with_that(
    path_file: Callable[..., Path],
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    launches: list[tuple[str, int]],
) -> None:
    """Every step is what the job of the step before was told to do, in its study's folder."""
    jobs: list[tuple[Path, bool]] = []

    @contextmanager
    def follower(study: Study, targets: Sequence[Path], after: bool, by_itself: bool) -> Iterator[Any]:
        assert list(targets) == [target]
        yield "2", lambda ids: None
        jobs.append((study.file.directory, after))

    class Taken:
        runs = (SimpleNamespace(task=SimpleNamespace(job_id="1")),)

    monkeypatch.setattr(chain, "submit_follower", follower)
    monkeypatch.setattr(chain, "take_after_submission", lambda study, ids: Taken)
    file = path_file(launch={"cluster": "debug"})
    study = chain.open_planned(file, read_study(file))
    assert isinstance(study, Search)
    keep_study(study, read_study(file))
    chain.advance_study(study, [target], Console(), after=True)
    for _ in range(4):
        folder, after = jobs[-1]
        chain.continue_path(folder, [target], after, Console())
    root = tmp_path / "runs"
    assert jobs == [*[(root / "whole_tune", True)] * 3, (root / "whole", False), (root / "whole", False)]
    assert [name for name, _ in launches] == [*["whole_tune"] * 3, "whole", "whole_target"]
    chain.continue_path(root / "whole", [target], False, Console())
    assert len(jobs) == 5  # the path has ended


def test_the_search_of_a_study_is_of_its_first_parameterization_at_its_base(path_file: Callable[..., Path]) -> None:
    file = read_study(path_file(), ("study.parameterizations=[mup,depth_mup]",))
    search = search_of(file)
    assert search.parameterization.name == "mup"
    assert (search.model.width, search.model.depth) == (8, 3)
    assert search.study.name == "whole_tune"
    assert search_of(search) == search


def test_tuned_values_are_those_of_all_that_are_compared(path_file: Callable[..., Path]) -> None:
    file = read_study(path_file())
    tuned = apply_tuned(file, {"optimizer.momentum": 0.8, "parameterization.beta": 0.7}, "test")
    assert tuned.optimizer.momentum == 0.8
    assert [preset.beta for preset in tuned.study.parameterizations] == [0.7, 0.7]
    assert (tuned.tune, tuned.study.values) == (None, file.study.values)


PAIR = {"optimizer.lr": {"first": 2**-9, "last": 2**-3}, "optimizer.tau_ema": {"first": 0.25, "last": 4}}


def pair_valley(best_tau: float) -> Callable[[PlannedRun], float]:
    """Losses whose best rate is 2^-6, and whose best tau_ema is `best_tau`, at every size."""

    def loss(run: PlannedRun) -> float:
        tau = run.config.optimizer.tau_ema
        assert tau
        return valley(run) + 0.05 * math.log2(tau / best_tau) ** 2

    return loss


@pytest.mark.parametrize(("best_tau", "inside"), [(1.0, True), (16.0, False)])
def test_a_pair_of_rate_and_tau_ema_is_searched_carried_and_verified(
    path_file: Callable[..., Path],
    target: Path,
    tmp_path: Path,
    launches: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    best_tau: float,
    inside: bool,
) -> None:
    """The search says whether both have an optimum inside of the space; the target has both; the verification perturbs
    both at once."""
    monkeypatch.setattr(sys.modules[__name__], "loss_of", pair_valley(best_tau))
    tune = {"space": PAIR, "trials": 32, "batch": 8, "rerun": 2, "rerun_seeds": 2}
    file = path_file("pair", tune=tune, optimizer={"name": "sgd", "lr": 2**-5, "tau_ema": 0.5})
    ended = invoke("transfer", file, "--tune", "--target", target, "launch.cluster=debug")
    assert ended.exit_code == 0, ended.exception
    root = tmp_path / "runs"
    best = json.loads((root / "pair_tune" / "search.json").read_text())["winners"][0]["values"]
    said = " ".join(ended.output.split())
    edge = r"he surrogate's optimum of tau_ema, [34][.\d]*, is on the high edge of its range"
    assert bool(re.search(f"T{edge}: widen tune.space there, under another study.name.", said)) is not inside
    assert ("The pair lr and tau_ema has an interior optimum" in said) is inside
    assert bool(re.search(f"No interior optimum of the pair lr and tau_ema: t{edge}\\.", said)) is not inside
    assert abs(math.log2(best["optimizer.tau_ema"] / min(best_tau, 4.0))) < 0.75
    large = read_run(root / "pair" / "pair_target.yaml")
    assert large.optimizer.tau_ema == best["optimizer.tau_ema"]
    assert large.optimizer.lr == pytest.approx(2**-6, rel=0.1)
    assert large.resolved_optimizer.weight_decay > 0
    space = "verify.space={optimizer.lr: 4, optimizer.tau_ema: 4}"
    verified = invoke(
        "verify",
        root / "pair" / "pair_target.yaml",
        space,
        "verify.width=12",
        "verify.budget=62",
        "launch.cluster=debug",
    )
    assert verified.exit_code == 0, verified.exception
    record = json.loads((root / "pair_target" / "verify.json").read_text())
    assert [each["key"] for each in record["hyperparameters"]] == ["optimizer.lr", "optimizer.tau_ema"]
    assert record["verdict"] == ("among the best" if inside else "not among the best")
    assert record["hyperparameters"][1]["moved"] is not inside


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({}, (), "has a section tune: add --tune, which tunes the base first"),
        ({"tune": None}, ("--tune",), "no section tune:, which says what --tune is to tune"),
        ({"study": None}, ("--tune",), "has no sizes to transfer over: add study.sizes and study.values"),
    ],
)
def test_what_cannot_be_walked_is_refused_before_anything_runs(
    path_file: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...], said: str
) -> None:
    file = path_file()
    content = {key: value for key, value in yaml.safe_load(file.read_text()).items() if changes.get(key, 1)}
    file.write_text(yaml.safe_dump(content))
    refused = invoke("transfer", file, *words, f"study.directory={tmp_path / 'runs'}", "study.name=whole")
    assert isinstance(refused.exception, UserError), refused.output
    assert said in str(refused.exception)
    assert not list((tmp_path).glob("runs/**/done.json"))
