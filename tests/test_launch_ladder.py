"""A ladder of horizons from one run: branches are the runs that they would be from nothing, for their decay alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.jobs.worker import train_packs
from depthmup.launch.reading import read_study
from depthmup.launch.runs.grouping import group_runs
from depthmup.launch.runs.study import Study
from depthmup.train.branch import begin_branch
from depthmup.train.config import RunConfig
from depthmup.train.interrupt import Interrupted
from depthmup.train.loop import run
from depthmup.train.packs.pack import run_pack
from depthmup.train.reading import from_plain, read_yaml, to_plain
from depthmup.train.rundir import RunDirectory
from depthmup.train.schedule import schedule
from depthmup.train.trunk import waits_for_trunk
from train_configs import After, timeless_metrics

BASE = {"width": 8, "depth": 3}
HORIZONS = [BASE, {**BASE, "samples": 640}, {**BASE, "samples": 1280}]  # 12, 20 and 40 steps of 32 images


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def ladder(study_file: Path, values: int = 1, **settings: dict[str, Any]) -> Study:
    raw = yaml.safe_load(study_file.read_text())
    raw |= {"schedule": {"name": "wsd", "warmup": 0.25, "decay": 0.25}}
    raw["study"] |= {"parameterizations": ["depth_mup"], "sizes": HORIZONS, "ladder": True}
    raw["study"] |= {"values": [2.0**-5, 2.0**-4, 2.0**-3][:values]}
    for section, given in settings.items():
        raw[section] = {**raw.get(section, {}), **given}
    study_file.write_text(yaml.safe_dump(raw))
    return Study(study_file, read_study(study_file))


def test_horizons_have_the_same_rate_until_the_shorter_one_decays(study_file: Path) -> None:
    study = ladder(study_file, train={"keep_steps": [6]})
    configs = {run.config.train.num_steps: run.config for run in study.runs}
    assert sorted(configs) == [12, 20, 40]
    rates = {n: [schedule(config.schedule, step, n) for step in range(n)] for n, config in configs.items()}
    trunk = next(run for run in study.runs if run.config.train.num_steps == 40)
    branches = {run.config.train.num_steps: run.trunk for run in study.runs if run.trunk}
    assert {n: found.step for n, found in branches.items()} == {12: 9, 20: 15}  # the last quarter decays
    assert trunk.config.train.keep_steps == (6, 9, 15)
    for n, found in branches.items():
        assert rates[n][: found.step + 1] == rates[40][: found.step + 1]
        assert rates[n][found.step + 1] < rates[40][found.step + 1]
        assert found.run == trunk.directory.path.name


def test_a_branch_is_bit_for_bit_the_run_of_that_horizon_begun_from_nothing(study_file: Path, tmp_path: Path) -> None:
    study = ladder(study_file, train={"ema": 0.9}, optimizer={"momentum": 0.9, "weight_decay": 1e-3})
    said = invoke("transfer", study_file, "launch.cluster=debug")
    assert "Report:" in said
    for planned in study.runs:
        alone = tmp_path / "alone" / planned.directory.path.name
        result = run(planned.config, alone)
        done = planned.done()
        assert done
        assert {key: done[key] for key in result if key != "seconds"} == {
            key: value for key, value in result.items() if key != "seconds"
        }
        assert timeless_metrics(planned.directory.path) == timeless_metrics(alone)
        for name in ("weights.safetensors", "weights_ema.safetensors"):
            ladders, its = load_file(planned.directory.path / name), load_file(alone / name)
            assert all(torch.equal(ladders[key], its[key]) for key in its)
        if planned.trunk:
            assert done["trunk"] == {"run": planned.trunk.run, "step": planned.trunk.step}
            log = planned.directory.log.read_text()
            assert f"resumed from step-{planned.trunk.step}" in log  # it trained its decay alone


def test_the_plan_counts_of_a_branch_its_decay_alone(study_file: Path) -> None:
    study = ladder(study_file)
    shares = {run.config.train.num_steps: run.share for run in study.runs}
    assert shares == {12: 0.25, 20: 0.25, 40: 1}
    said = " ".join(invoke("plan", study_file).split())
    assert "a ladder: 2 of the runs branch off longer ones and train their decay alone" in said
    assert "1.2 times the cost of one run of the largest of these sizes" in said  # (12 / 4 + 20 / 4 + 40) / 40


def test_packs_hold_the_trunks_and_then_the_branches_of_one_horizon(study_file: Path) -> None:
    study = ladder(study_file, values=3, train={"pack": 4})
    study.write()
    (pack,) = group_runs(study.runs, study.file.launch, on_gpu=False, slots=1)
    assert [run.config.train.num_steps for run in pack] == [40] * 3 + [12] * 3 + [20] * 3
    branches = [run.directory for run in pack if run.trunk]
    assert all(map(waits_for_trunk, branches))  # none begins from nothing while its trunk may come
    assert train_packs([branches]) == 0
    assert not any(branch.list_checkpoint_steps() for branch in branches)
    assert train_packs([[run.directory for run in pack]]) == 0
    assert all(run.done() for run in pack)
    for branch in pack:
        if branch.trunk:
            assert "replica" in branch.directory.log.read_text()
            assert f"resumed from step-{branch.trunk.step}" in branch.directory.log.read_text()


def test_a_branch_that_is_stopped_goes_on_from_its_own_checkpoint(study_file: Path, tmp_path: Path) -> None:
    study = ladder(study_file)
    study.write()
    trunk = next(run for run in study.runs if not run.trunk)
    branch = next(run for run in study.runs if run.trunk and run.config.train.num_steps == 20)
    run_pack([trunk.config], [trunk.directory.path])
    with pytest.raises(Interrupted):
        run_pack([branch.config], [branch.directory.path], After(2))
    assert max(branch.directory.list_checkpoint_steps()) == 17  # two steps after the trunk's
    run_pack([branch.config], [branch.directory.path])
    run(branch.config, tmp_path / "alone")
    assert timeless_metrics(branch.directory.path) == timeless_metrics(tmp_path / "alone")


def test_a_branch_that_begins_has_its_trunks_metrics_up_to_the_step_where_it_branches_off(study_file: Path) -> None:
    """Those of later steps would show it beyond its own end: a share of its steps above one."""
    study = ladder(study_file)
    study.write()
    trunk = next(run for run in study.runs if not run.trunk)
    run_pack([trunk.config], [trunk.directory.path])
    assert (trunk.directory.read_last_metrics() or {})["step"] == 40
    for branch in study.runs:
        if branch.trunk:
            begin_branch(branch.directory, branch.config)
            last = branch.directory.read_last_metrics()
            assert last
            assert 0 < last["step"] <= branch.trunk.step < branch.config.train.num_steps


def test_a_branch_whose_trunk_kept_no_checkpoint_begins_from_nothing_and_says_so(study_file: Path) -> None:
    study = ladder(study_file)
    study.write()
    trunk = next(run for run in study.runs if not run.trunk)
    trunk.directory.write_done({"outcome": "completed", "step": 40, "minival_loss": 1.0, "train_loss": 1.0})
    branch = next(run for run in study.runs if run.trunk)
    assert train_packs([[branch.directory]]) == 0
    done = branch.done()
    assert done
    assert "trunk" not in done
    assert "has no checkpoint of step 9: begins from nothing" in branch.directory.log.read_text()


def test_a_checkpoint_of_another_run_is_no_trunk(study_file: Path) -> None:
    study = ladder(study_file)
    study.write()
    trunk = next(run for run in study.runs if not run.trunk)
    assert train_packs([[trunk.directory]]) == 0
    branch = next(run for run in study.runs if run.trunk)
    state = trunk.directory.checkpoints / "step-9" / "state.json"
    content = json.loads(state.read_text())
    content["identity"]["optimizer.lr"] = 0.5
    state.write_text(json.dumps(content))
    assert train_packs([[branch.directory]]) == 1
    assert "is not of the same run at another length (optimizer.lr: 0.5 there, 0.03125 here)" in str(branch.failed())


def test_a_run_directory_of_a_branch_holds_an_ordinary_configuration(study_file: Path) -> None:
    study = ladder(study_file)
    study.write()
    for planned in study.runs:
        stored = from_plain(RunConfig, read_yaml(RunDirectory(planned.directory.path).config), "stored")
        assert to_plain(stored) == to_plain(planned.config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": {"name": "cosine", "decay": 0.2}},
            r"branches where wsd begins to decay, and schedule\.name is cosine: use wsd",
        ),
        ({"study": {"sizes": [BASE]}}, "study.ladder would do nothing: no two of study.sizes differ in samples"),
        ({"optimizer": {"tau_ema": 0.5}}, "study.ladder: optimizer.tau_ema would make another run of every horizon"),
        ({"study": {"parameterizations": [{"samples_lr": -0.5}]}}, "study.ladder: samples_lr would make"),
        (
            {"study": {"values": {"first": 0.01, "last": 1}}},
            "ladder needs every value at every horizon: use design grid",
        ),
        ({"launch": {"cluster": "slurm", "nodes": 2}}, "a job of 2 processes trains one run, and study.ladder needs"),
    ],
    ids=["schedule", "idle", "tau", "exponent", "design", "processes"],
)
def test_what_keeps_horizons_from_sharing_a_trunk_is_refused_by_name(
    settings: dict[str, dict[str, Any]], message: str, study_file: Path
) -> None:
    def plan() -> None:
        ladder(study_file, **settings)
        invoke("plan", study_file)

    with pytest.raises(UserError, match=message) as error:
        plan()
    assert "\n" not in str(error.value)
