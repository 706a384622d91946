"""A verification: perturbed runs say how good the transferred values are, for a cost that is stated beforehand."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import invoke
from depthmup.data.errors import UserError
from depthmup.launch.findings.share import Share
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.report.record import read_record
from depthmup.launch.report.results import format_document
from depthmup.launch.report.verification import Verified, collect_verification, describe_verification
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.verification import Verification
from planned_runs import finish, open_as

SPACE: dict[str, Any] = {
    "optimizer.lr": 4,
    "schedule.warmup": {"first": 0, "last": 0.4, "scale": "linear"},
    "train.label_smoothing": [0, 0.1],
}


@pytest.fixture
def verify_file(run_settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes the configuration of a verification, with changes of its section `verify`."""

    def write(changes: dict[str, Any] | None = None, **verify: Any) -> Path:
        content = {
            **run_settings,
            "optimizer": {"name": "sgd", "lr": 2**-6, "momentum": 0.9},
            "study": {"name": "checked", "directory": str(tmp_path / "runs")},
            "verify": {"space": SPACE, "budget": 100, **verify},
            **(changes or {}),
        }
        path = tmp_path / "large.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


open_verification = partial(open_as, Verification)


def judge(file: Path, loss: Callable[[PlannedRun], float]) -> Verified:
    """The verification whose runs have these losses."""
    verification = open_verification(file)
    for run in verification.points:
        finish(run, loss(run))
    return collect_verification(verification)


def bowl(best: float) -> Callable[[PlannedRun], float]:
    """Losses whose best learning rate is 2^best; seeds differ a little."""
    return lambda run: 0.5 + 0.1 * (math.log2(run.config.optimizer.lr) - best) ** 2 + 0.0001 * run.seed


# ---------------------------------------------------------------- the bound


def test_59_runs_none_of_which_is_better_are_what_95_percent_confidence_in_the_top_5_percent_takes() -> None:
    """0.95^59 = 0.0485: a point outside of the top 5 % would show a better run among 59 in more than 95 of 100."""
    assert Share(0, 59).high == pytest.approx(1 - 0.05 ** (1 / 59))
    assert Share(0, 59).judge(0.05) == "among the best"
    assert Share(0, 58).judge(0.05) == "undecided"
    assert Share(1, 59).judge(0.05) == "undecided"


@pytest.mark.parametrize(("better", "runs"), [(3, 59), (20, 59), (58, 59)])
def test_the_bounds_are_the_shares_at_which_so_few_or_so_many_come_with_5_percent(better: int, runs: int) -> None:
    """By hand, from the binomial sums themselves."""

    def at_most(count: int, share: float) -> float:
        return sum(math.comb(runs, k) * share**k * (1 - share) ** (runs - k) for k in range(count + 1))

    found = Share(better, runs)
    assert at_most(better, found.high) == pytest.approx(0.05)
    assert 1 - at_most(better - 1, found.low) == pytest.approx(0.05)


def test_a_bound_from_all_better_or_from_none_is_open_on_that_side() -> None:
    assert (Share(0, 10).low, Share(10, 10).high) == (0, 1)
    assert Share(10, 10).judge(0.05) == "not among the best"


# ---------------------------------------------------------------- verdicts


def test_values_at_the_optimum_are_among_the_best(verify_file: Callable[..., Path]) -> None:
    found = judge(verify_file(), bowl(-6))
    assert len(found.losses) == 59
    assert found.count_better_by(found.margin).better == 0
    said = " ".join(describe_verification(found))
    assert said.startswith("Among the best 5.0 %: with 95% confidence, at most 5.0 % of the space is better")
    assert not any(shift.moved for shift in found.shifts)


def test_a_value_that_is_not_at_the_optimum_is_seen_and_named_with_its_side(verify_file: Callable[..., Path]) -> None:
    """The optimum is three octaves above the transferred rate, beyond what is perturbed."""
    found = judge(verify_file(), bowl(-3))
    share = found.count_better_by(found.margin)
    assert share.judge(0.05) == "not among the best"
    assert share.low < share.better / 59 < share.high
    assert [shift.key for shift in found.shifts if shift.moved] == ["optimizer.lr"]
    assert "optimizer.lr: the best quarter lies above the transferred value." in describe_verification(found)


def test_where_the_values_do_not_matter_none_is_called_better_and_none_moved(verify_file: Callable[..., Path]) -> None:
    found = judge(verify_file(), lambda run: 0.5 + 1e-4 * math.sin(int(run.directory.path.name, 16)))
    assert found.count_better_by(0).better > 10
    assert found.count_better_by(found.margin).better == 0


def test_transferred_values_that_diverge_are_the_worst_and_perturbed_ones_that_do_are_not_better(
    verify_file: Callable[..., Path],
) -> None:
    own = 2**-6
    found = judge(verify_file(), lambda run: math.inf if run.config.optimizer.lr == own else 1.0)
    assert found.count_better_by(found.margin).better == 59
    other = judge(verify_file({"study": {"name": "other", "directory": str(found.verification.file.directory.parent)}}),
                  lambda run: 1.0 if run.config.optimizer.lr == own else math.inf)  # fmt: skip
    assert other.count_better_by(0).better == 0


def test_noise_between_seeds_above_the_margin_is_said(verify_file: Callable[..., Path]) -> None:
    found = judge(verify_file(), lambda run: bowl(-6)(run) + 0.02 * run.seed)
    assert any("Seeds differ by" in sentence for sentence in describe_verification(found))


def test_there_is_no_bound_before_all_runs_are_done(verify_file: Callable[..., Path]) -> None:
    """What ends first is no random sample: those that diverge end early."""
    verification = open_verification(verify_file())
    for run in verification.points[:-1]:
        finish(run, 1.0)
    with pytest.raises(UserError, match=r"has not ended \(1 of 62 runs are not done\)"):
        collect_verification(verification)


# ---------------------------------------------------------------- what is run


def test_perturbations_fill_the_space_and_a_longer_verification_has_those_of_a_shorter_one(
    verify_file: Callable[..., Path],
) -> None:
    verification = open_verification(verify_file(runs=400, budget=500))
    octaves = [math.log2(values["optimizer.lr"]) + 6 for values, _ in verification.perturbed]
    assert -2 <= min(octaves) < -1.9
    assert 1.9 < max(octaves) <= 2
    assert abs(sum(octaves) / 400) < 0.2
    smoothed = sum(values["train.label_smoothing"] == 0.1 for values, _ in verification.perturbed)
    assert 150 < smoothed < 250
    fewer = open_verification(verify_file(runs=7))
    assert [values for values, _ in fewer.perturbed] == [values for values, _ in verification.perturbed[:7]]


def test_at_a_middle_size_the_runs_have_that_size_and_the_files_other_settings(
    verify_file: Callable[..., Path], run_settings: dict[str, Any]
) -> None:
    model = {**run_settings["model"], "width": 32}
    verification = open_verification(verify_file({"model": model}, width=16, runs=3))
    assert {run.config.model.width for run in verification.points} == {16}
    assert {run.config.model.depth for run in verification.points} == {run_settings["model"]["depth"]}
    assert verification.transferred[0].config.optimizer.lr == 2**-6


def test_what_costs_more_than_its_budget_is_refused_with_its_cost(verify_file: Callable[..., Path]) -> None:
    file = verify_file(budget=1)
    for verb in ("plan", "verify", "launch", "status"):
        refused = invoke(verb, file)
        assert isinstance(refused.exception, UserError), verb
        assert "62 runs at" in str(refused.exception)
        assert "62 times one run of this file, and verify.budget is 1" in str(refused.exception)
        assert "set verify.budget=62" in str(refused.exception)
    assert invoke("plan", file, "verify.budget=62").exit_code == 0
    assert not (file.parent / "runs").exists()


def test_a_size_or_space_that_is_no_run_is_refused_with_the_reason(verify_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"multiple of num_stages 3: use 3 or 6; .* say width 8, depth 4"):
        open_verification(verify_file(depth=4))
    space = {
        "schedule.warmup": {"first": 0.6, "last": 0.75, "scale": "linear"},
        "schedule.decay": {"first": 0.5, "last": 0.85, "scale": "linear"},
    }
    with pytest.raises(UserError, match=r"more than the whole run together \(the same for each of 50 draws"):
        _ = open_verification(verify_file({"schedule": {"name": "wsd"}}, space=space)).perturbed


def test_results_on_other_shards_count_where_the_study_pools_them(
    verify_file: Callable[..., Path], tmp_path: Path
) -> None:
    study = {"name": "checked", "directory": str(tmp_path / "runs"), "parameterizations": ["depth_mup"]}
    study |= {"sizes": [{"width": 8, "depth": 3}], "values": [2**-6]}
    refused, pooled = (
        open_verification(verify_file({"study": {**study, "pool_different": pool}}, runs=1)).points[0]
        for pool in ([], ["shards"])
    )
    finish(refused, 1.0)
    refused.directory.write_done({**(refused.directory.done() or {}), "shards": "of another set"})
    assert pooled.loss("minival_loss") == 1.0
    with pytest.raises(UserError, match="shards"):
        refused.loss("minival_loss")


def test_the_file_of_one_run_can_say_which_results_count_and_what_counts_as_better(
    verify_file: Callable[..., Path],
) -> None:
    """The line that refuses results of other code says to add the former; the file is no study for that."""
    words = ("study.pool_different=[code]", "study.regret_limit=0.02", "study.metric=train_loss")
    study = read_study_or_run(verify_file(), words).study
    assert (study.pool_different, study.regret_limit, study.metric) == (("code",), 0.02, "train_loss")
    assert len(study.sizes) == len(study.grid) == 1


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"train.label_smoothing": 2}, "verify.space.train.label_smoothing: 0.0 has no values a factor away"),
        ({"optimizer.tau_ema": 2}, "verify.space.optimizer.tau_ema: the run states no value of its own: state a range"),
        ({"optimizer.lr": 1}, "greater than 1"),
        ({"model.width": 2}, "verify.space.model.width: a key of the model changes the network"),
        ({"schedule.warmup": 16}, "1.6"),
        ({"seed": 2}, "verify.space.seed: not a hyperparameter of the run"),
        ({"optimizer.betas": [[0.9, 0.99], [0.8, 0.99]]}, "would do nothing: sgd has none"),
        ({}, "at least 1"),
    ],
)
def test_a_space_that_cannot_be_perturbed_is_refused(
    verify_file: Callable[..., Path], space: dict[str, Any], said: str
) -> None:
    refused = invoke("verify", verify_file(space=space))
    assert isinstance(refused.exception, UserError), refused.output
    assert said in str(refused.exception)


def test_a_file_without_the_section_is_refused_with_the_key_to_add(
    run_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(run_settings))
    refused = invoke("verify", tmp_path / "plain.yaml")
    assert "add 'verify.space={optimizer.lr: 4}'" in str(refused.exception)


def test_a_verification_is_trained_by_the_real_launcher_and_given_again_trains_nothing(
    verify_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = verify_file(runs=3, seeds=[0, 1])
    assert "5 runs at width" in invoke("plan", file).output
    first = invoke("verify", file, "launch.cluster=debug")
    assert first.exit_code == 0, first.exception
    root = tmp_path / "runs" / "checked"
    record = json.loads((root / "verify.json").read_text())
    assert len(record["perturbed"]) == record["runs"] == 3
    assert len(record["transferred"]) == 2
    before = {path: path.stat().st_mtime_ns for path in root.glob("runs/*/done.json")}
    assert len(before) == 5
    again = invoke("verify", root)  # by its folder
    assert again.exit_code == 0, again.exception
    assert again.output.splitlines()[:4] == first.output[first.output.index("hyperparameter") :].splitlines()[:4]
    assert {path: path.stat().st_mtime_ns for path in root.glob("runs/*/done.json")} == before
    assert "5 done" in invoke("status", root).output
    told = invoke("report", root, "--publish", tmp_path / "results")
    assert told.exit_code == 0, told.exception
    assert told.output.splitlines()[:4] == again.output.splitlines()[:4]
    published = read_record(tmp_path / "results" / "checked.json")
    row = next(line for line in format_document([published], tmp_path).splitlines() if line.startswith("| checked |"))
    assert f"| {record['better']} of 3 by 0.5 % |" in row
    assert f"{record['verdict']} " in row
    assert row.endswith(" 5 % |")
    for verb in ("transfer", "scale"):
        assert "section verify: and no sweep" in str(invoke(verb, root).exception), verb


def test_a_study_is_not_verified_in_its_own_folder_but_its_target_is_named(
    verify_file: Callable[..., Path], tmp_path: Path
) -> None:
    content = yaml.safe_load(verify_file().read_text())
    content["study"] |= {"parameterizations": ["depth_mup"], "values": [0.1, 0.2, 0.4]}
    content["study"] |= {"sizes": [{"width": content["model"]["width"], "depth": content["model"]["depth"]}]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"verify needs one run, and this is a study: give it the target's file"):
        open_verification(tmp_path / "study.yaml")
