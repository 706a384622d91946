"""Whose a result is: the identity of a run, of its code and of its images, and the markers that say it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic.dataclasses
import pytest

from depthmup.data.errors import UserError
from depthmup.data.fingerprint import fingerprint_shards
from depthmup.data.pack import pack
from depthmup.launch.config import LaunchConfig, Size, StudyConfig
from depthmup.launch.values import Octaves
from depthmup.models.errors import ModelError
from depthmup.train import __main__ as command
from depthmup.train import owner
from depthmup.train.config import (
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrackConfig,
    TrainConfig,
    find_identity,
    run_hash,
)
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import run
from depthmup.train.owner import fingerprint_code, list_differences
from depthmup.train.packs.pack import run_pack
from depthmup.train.rundir import EXIT_DONE, EXIT_USER_ERROR, RunDirectory
from train_configs import CONV_RESNET, VIT, pack_digits, run_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("identity") / "shards")


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identity") / "others"
    pack("sklearn:digits", root, validation_share=0.2, shard_samples=128, seed=1)
    return root


def short(shards: Path, *overrides: str) -> RunConfig:
    return run_config(shards, "train.samples=128", "train.checkpoint_every=1", *overrides)


def stopped(config: RunConfig, directory: Path) -> None:
    """Leaves the run after its first step."""
    interrupt = Interrupt()
    interrupt.requested = True
    with pytest.raises(Interrupted):
        run(config, directory, interrupt=interrupt)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# ---------------------------------------------------------------- new fields


def with_new_field(config: RunConfig, **stated: Any) -> RunConfig:
    """The run as a later version has it, whose section train and model have fields more."""

    @pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
    class LaterTrain(TrainConfig):
        new: float = 0.5

    @pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
    class LaterModel(type(config.model)):  # type: ignore[misc]
        news: tuple[int, ...] = (1, 2)

    return replace(
        config, train=LaterTrain(**vars(config.train), **stated), model=LaterModel(**vars(config.model))
    )  # fmt: skip


def test_a_new_field_at_its_default_leaves_every_run_what_it_was(shards: Path, tmp_path: Path) -> None:
    for model in (CONV_RESNET, VIT):
        config = run_config(shards, model=model)
        assert run_hash(with_new_field(config)) == run_hash(config)
        assert run_hash(with_new_field(config, new=0.6)) != run_hash(config)
    config = short(shards)
    stopped(config, tmp_path / "run")
    run(with_new_field(config), tmp_path / "run")
    assert "resumed from step-" in (tmp_path / "run" / "log-0.txt").read_text()
    done = owner.read_finished(RunDirectory(tmp_path / "run"), config)
    assert done is not None
    assert done["step"] == 4
    with pytest.raises(UserError, match=r"train.new: 0.5 there, 0.6 here"):
        owner.read_finished(RunDirectory(tmp_path / "run"), with_new_field(config, new=0.6))
    run(config, tmp_path / "older")
    with pytest.raises(UserError, match=r"train.new: not known there, 0.6 here"):
        owner.read_finished(RunDirectory(tmp_path / "older"), with_new_field(config, new=0.6))


@pytest.mark.parametrize("section", ["model", "optimizer", "schedule", "data", "train", "parallel", "track"])
def test_a_new_field_of_any_section_at_its_default_leaves_the_hash(shards: Path, section: str) -> None:
    config = replace(run_config(shards), schedule=ScheduleConfig(name="constant"))  # not a section's whole default
    kind = type(getattr(config, section))

    @pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(kind):  # type: ignore[misc, valid-type]
        new: float = 0.5

    def later(**stated: float) -> str:
        return run_hash(replace(config, **{section: Later(**vars(getattr(config, section)), **stated)}))

    assert later() == run_hash(config)
    assert (later(new=0.6) != run_hash(config)) == (section in find_identity(config))


def test_a_default_that_changed_makes_another_run(shards: Path) -> None:
    """The hash cannot see it, so the markers do."""
    config = run_config(shards)
    marker = owner.describe_owner(config)
    assert list_differences(marker, config) == []
    marker["identity"]["train.label_smoothing"] = 0.1
    assert list_differences(marker, config) == ["train.label_smoothing: 0.1 there, 0.0 here"]


def test_a_model_family_is_never_left_out_of_the_hash(shards: Path) -> None:
    """It has a default in each class: without it, two families with the same stated keys would be one run."""
    hashes = set()
    for model in (CONV_RESNET, {**CONV_RESNET, "family": "resnet", "depth": 4, "base_depth": 4, "width": 8}):
        config = run_config(shards, model={**model, "width": 8, "base_width": 8, "depth": 12, "base_depth": 12})
        hashes.add(run_hash(config))
    assert len(hashes) == 2


# ---------------------------------------------------------------- values from Python


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(samples=0, global_batch_size=8), "TrainConfig.samples: Input should be greater than 0"),
        (lambda: ScheduleConfig(warmup=1.5), "ScheduleConfig.warmup: Input should be less than 1"),
        (lambda: ParallelConfig(engine="dpp"), "ParallelConfig.engine: .*'ddp'.*'dpp'"),
        (lambda: TrackConfig(wanb="off"), "TrackConfig.wanb: unknown; known: wandb, tensorboard"),
        (lambda: LaunchConfig(cluster="slurm", nodes=2, runs_per_job=2), "a job of 2 tasks trains one run"),
        (lambda: Octaves(first=2, last=1), "last 1 is below first 2"),
        (lambda: Size(width=0, depth=1), "Size.width: Input should be greater than 0"),
        (
            lambda: StudyConfig(name="a/b", parameterizations=["sp"], sizes=[{"width": 1, "depth": 1}], values=[1]),
            "StudyConfig.name: must be letters",
        ),
    ],
    ids=range(8),
)
def test_python_code_is_refused_a_wrong_value_as_a_file_is(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_replace_checks_every_section(shards: Path) -> None:
    config = run_config(shards)
    with pytest.raises(UserError, match=r"clip_norm: .*greater than 0 \(got -1\); TrainConfig.precision: .*'fp8'"):
        replace(config.train, clip_norm=-1, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"DataConfig.mean: Input should be less than or equal to 1"):
        replace(config.data, mean=3)
    with pytest.raises(UserError, match=r"RunConfig.seed: Input should be greater than or equal to 0"):
        replace(config, seed=-1)
    with pytest.raises(UserError, match="num_streams 5 must divide"):
        replace(config, data=replace(config.data, num_streams=5))
    with pytest.raises(ModelError, match=r"OptimizerConfig.lr: Input should be greater than 0"):
        replace(config.optimizer, lr=0)
    assert replace(config, seed=3) == dataclasses.replace(config, seed=3)


# ---------------------------------------------------------------- markers


def test_a_directory_of_another_run_is_refused_and_left_as_it_is(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, begun = tmp_path / "finished", tmp_path / "begun"
    assert command.train(short(shards), RunDirectory(finished)) == EXIT_DONE
    stopped(short(shards), begun)
    capsys.readouterr()
    other = short(shards, "optimizer.lr=0.5", "model.depth=9")
    for directory in (finished, begun):
        before = contents(directory)
        assert command.train(other, RunDirectory(directory)) == EXIT_USER_ERROR
        said = capsys.readouterr().err
        assert "belongs to another run (model.depth: 6 there, 9 here; optimizer.lr: 0.05 there, 0.5 here)" in said
        assert said.count("\n") == 1
        assert contents(directory) == before
        with pytest.raises(UserError, match="belongs to another run"):
            run(other, directory)
    with pytest.raises(UserError, match="belongs to another run"):
        run_pack([other, replace(other, seed=1)], [finished, tmp_path / "new"])
    assert command.train(short(shards), RunDirectory(finished)) == EXIT_DONE  # its own, again


def test_a_marker_that_does_not_say_whose_it_is_counts_only_under_the_runs_own_hash(
    shards: Path, tmp_path: Path
) -> None:
    config = short(shards)
    for name in ("anywhere", run_hash(config)):
        directory = RunDirectory(tmp_path / name)
        directory.path.mkdir()
        directory.write_done({"outcome": "completed", "step": 4})
    assert run(config, tmp_path / run_hash(config))["step"] == 4
    with pytest.raises(
        UserError, match="does not say which run it belongs to: use another directory, or delete this one"
    ):
        run(config, tmp_path / "anywhere")


def test_other_shards_under_the_same_name_do_not_count_as_done(
    shards: Path, other_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = short(shards), short(other_shards)
    assert run_hash(one) == run_hash(other)
    run(one, tmp_path / "done")
    stopped(one, tmp_path / "begun")
    for directory in ("done", "begun"):
        with pytest.raises(UserError, match=r"trained on other images .* give the new images another data.name"):
            run(other, tmp_path / directory)
        assert command.train(other, RunDirectory(tmp_path / directory)) == EXIT_USER_ERROR
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    assert run(short(moved), tmp_path / "done")["step"] == 4  # where they lie does not matter


def test_a_fingerprint_of_shards_is_of_the_splits_that_a_run_uses(shards: Path, tmp_path: Path) -> None:
    moved = tmp_path / "shards"
    shutil.copytree(shards, moved)
    raw = json.loads((moved / "index.json").read_text())
    raw["splits"]["val"][0]["sha256"] = "0" * 64
    (moved / "index.json").write_text(json.dumps(raw))
    assert fingerprint_shards(str(moved), {"train"}) == fingerprint_shards(str(shards), {"train"})
    assert fingerprint_shards(str(moved), {"train", "val"}) != fingerprint_shards(str(shards), {"train", "val"})
    assert fingerprint_shards(str(tmp_path / "nowhere"), {"train"}) is None
    (moved / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json: not an index of shards"):
        fingerprint_shards(str(moved), {"train"})


# ---------------------------------------------------------------- code

SOURCE = '''"""What it does."""
import os


def f(x, y=1):
    """Doubles."""
    return x * 2 + y  # twice
'''


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (SOURCE.replace("# twice", "# two times"), True),
        (SOURCE.replace("Doubles.", "Twice x."), True),
        (SOURCE.replace('    """Doubles."""\n', ""), True),
        (SOURCE.replace("x * 2 + y", "(\n        x * 2\n        + y\n    )"), True),
        (SOURCE.replace("\n\n\n", "\n"), True),
        (SOURCE.replace("* 2", "* 3"), False),
        (SOURCE.replace("y=1", "y=2"), False),
        (SOURCE.replace("y=1", "y=None"), False),
        (SOURCE + "f.z = 1\n", False),
    ],
    ids=range(9),
)
def test_code_is_known_by_what_it_does_and_not_by_how_it_is_written(tmp_path: Path, changed: str, same: bool) -> None:
    found = []
    for name, text in (("before", SOURCE), ("after", changed)):
        for package in owner.PACKAGES:
            (tmp_path / name / package).mkdir(parents=True)
        (tmp_path / name / "models" / "file.py").write_text(text)
        found.append(fingerprint_code(tmp_path / name))
    assert (found[0] == found[1]) == same


def test_a_result_names_all_the_code_that_it_was_trained_by(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = short(shards), fingerprint_code()
    stopped(config, tmp_path / "run")
    run(config, tmp_path / "whole")
    monkeypatch.setattr(owner, "fingerprint_code", lambda: "0123456789ab")
    run(config, tmp_path / "run")
    names = [json.loads((tmp_path / name / "done.json").read_text())["code"] for name in ("whole", "run")]
    assert names == [now, f"{now}+0123456789ab"]
