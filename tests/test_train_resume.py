"""A run that is killed at any moment and started again ends bit for bit as one that never stopped."""

import json
import os
import pickle
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from depthmup.data.batch import to_float
from depthmup.data.errors import UserError
from depthmup.train import checkpoint, contents, loop, one_network, record
from depthmup.train import evaluate as evaluation
from depthmup.train.config import RunConfig
from depthmup.train.contents import CONTENTS, Reader, describe
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import run
from depthmup.train.metrics import MetricsWriter
from depthmup.train.rundir import RunDirectory
from train_configs import metrics, pack_digits, run_config, timeless_metrics

LONG = pytest.mark.long


def config_of(shards: Path, *overrides: str) -> RunConfig:
    """30 steps: AdamW, BatchNorm, stochastic depth and an average; metrics every 3 steps, a checkpoint every 4."""
    return run_config(
        shards,
        "model.norm=batch",
        "optimizer.name=adamw",
        "optimizer.lr=0.002",
        "train.drop_path=0.2",
        "train.ema=0.9",
        "train.clip_norm=1",
        "train.log_every=3",
        "train.checkpoint_every=4",
        "train.samples=960",
        *overrides,
    )


def assert_same_end(directory: Path, whole: Path) -> None:
    assert timeless_metrics(directory) == timeless_metrics(whole)
    for name in ("weights.safetensors", "weights_ema.safetensors"):
        assert (directory / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("resume") / "shards")


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stopped."""
    directory = tmp_path_factory.mktemp("resume") / "whole"
    run(config_of(shards), directory)
    return directory


def in_child(action: Callable[[], object]) -> bool:
    """Does `action` in a fork of this process; returns whether it came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def kill_at_call(module: Any, name: str, number: int) -> None:
    """SIGKILL at the `number`-th call of `module.name`, before it does anything."""
    function, calls = getattr(module, name), iter(range(1, 10**6))

    def dying(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)

    setattr(module, name, dying)


def kill_after_steps(number: int, part: float) -> None:
    """SIGKILL once the `number`-th step begins and `part` of what the time between two took is over: so it comes within
    the run on a busy machine, too."""
    take_step, began = one_network.take_step, [time.monotonic()]

    def timed(*arguments: Any, **settings: Any) -> Any:
        began.append(time.monotonic())
        if len(began) == number + 1:
            threading.Timer(part * (began[-1] - began[-2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return take_step(*arguments, **settings)

    one_network.take_step = timed  # type: ignore[assignment]


def test_killed_again_and_again_where_a_run_is_between_two_things_and_resumed(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    """One run, which is killed at six places, each further on than the last; none is inside a checkpoint's write."""
    for module, name, number in (
        (one_network, "take_step", 3),  # no checkpoint is there, and no metrics line
        (MetricsWriter, "write", 3),  # the lines of steps 3 and 6 are there, that of step 9 is not
        (loop.Loop, "save", 3),  # the metrics line of a step is there, and its checkpoint is not
        (loop, "evaluate_splits", 1),  # every step is done
        (record, "save_weights", 2),  # the weights are written, their average is not
        (RunDirectory, "write_done", 1),  # all but the marker
    ):

        def killed(module: Any = module, name: str = name, number: int = number) -> None:
            kill_at_call(module, name, number)
            run(config_of(shards), tmp_path)

        assert not in_child(killed), name
    run(config_of(shards), tmp_path)
    assert (tmp_path / "log-0.txt").read_text().count("resumed from") == 5
    assert_same_end(tmp_path, whole)


@LONG
def test_killed_at_20_random_points_and_resumed(shards: Path, whole: Path, tmp_path: Path) -> None:
    generator, kills, attempt = random.Random(0), 0, 0

    def killed() -> None:
        kill_after_steps(*place)
        run(config_of(shards), directory)

    while kills < 20:
        attempt += 1
        directory = tmp_path / f"attempt-{attempt}"
        while True:
            place = generator.randint(1, 30), generator.uniform(0, 3)
            if in_child(killed):
                break
            kills += 1
        assert_same_end(directory, whole)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        pytest.param(checkpoint.dcp, "save", 2, marks=LONG),  # inside a checkpoint write, before the tensors
        pytest.param(checkpoint, "checksum", 3, marks=LONG),  # after them
        pytest.param(checkpoint, "fsync", 5, marks=LONG),  # not durable yet
        (os, "rename", 5),  # between tmp and rename
        (checkpoint, "complete", 3),  # between rename and the removal of older ones
        (checkpoint.shutil, "rmtree", 4),
    ],
)
def test_killed_inside_a_checkpoint_write(
    shards: Path, whole: Path, tmp_path: Path, module: Any, name: str, number: int
) -> None:
    def killed() -> None:
        kill_at_call(module, name, number)
        run(config_of(shards), tmp_path)

    assert not in_child(killed)
    run(config_of(shards), tmp_path)
    assert_same_end(tmp_path, whole)


def test_a_stop_between_two_checkpoints_loses_nothing_and_the_next_save_removes_what_a_killed_one_left(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    """The losses of steps that no metrics line holds yet come back with the checkpoint."""
    interrupt = Interrupt()

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == 9:
            threading.Timer(0.0, interrupt.request).start()

    with pytest.raises(Interrupted, match="stopped after step"):
        run(config_of(shards), tmp_path, interrupt=interrupt, watch=watch)
    left = tmp_path / "checkpoints" / "tmp-step-7"  # of a step that is not saved again
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half of it")
    run(config_of(shards), tmp_path)
    assert not left.exists()
    assert_same_end(tmp_path, whole)


def test_a_full_disk_leaves_the_older_checkpoint_and_the_run_goes_on(shards: Path, whole: Path, tmp_path: Path) -> None:
    """The limit on a file's size makes the kernel refuse the write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == 9:  # step 8 is saved, step 12 cannot be
            while not (tmp_path / "checkpoints" / "step-8").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        if line["step"] == 15:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        run(config_of(shards, "train.keep_last=100"), tmp_path, watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log = (tmp_path / "log-0.txt").read_text()
    assert "warning: no checkpoint of step 12, the older ones stay" in log
    kept = {path.name for path in checkpoint.complete(tmp_path / "checkpoints")}
    assert "step-8" in kept
    assert "step-12" not in kept
    assert_same_end(tmp_path, whole)


def test_on_a_full_disk_metrics_lines_wait_until_there_is_room(
    shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics and log can grow no more from step 9 to step 15."""
    limits, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "metrics.jsonl"

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
        if line["step"] == 15:
            assert file.read_text().count("\n") == 3  # of steps 3, 6 and 9
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        run(config_of(shards), tmp_path, watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "lines from step 12 on wait until they can be written" in capsys.readouterr().err
    assert_same_end(tmp_path, whole)


def test_no_step_is_saved_whose_metrics_are_not_on_the_disk(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resume from it would leave their lines out for ever."""
    flush, answers = MetricsWriter.flush, iter([None, None, OSError("no space left")])  # at steps 4, 8 and 12
    monkeypatch.setattr(MetricsWriter, "flush", lambda self: next(answers, None) or flush(self))
    run(config_of(shards, "train.keep_last=100"), tmp_path)
    steps = {path.name for path in checkpoint.complete(tmp_path / "checkpoints")}
    assert {"step-8", "step-16"} <= steps
    assert "step-12" not in steps
    assert_same_end(tmp_path, whole)


def test_a_stop_at_a_saved_step_does_not_save_it_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep_last=1 the one checkpoint that there is would be replaced, in the seconds before the job is killed."""
    interrupt, saved = Interrupt(), []
    save = checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *given, **more: saved.append(1) or save(*given, **more))

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == 12:
            interrupt.request()

    with pytest.raises(Interrupted):
        run(config_of(shards, "train.keep_last=1"), tmp_path, interrupt=interrupt, watch=watch)
    assert len(saved) == 3  # steps 4, 8 and 12


def test_a_stop_in_the_last_evaluation_is_obeyed_and_only_the_evaluation_is_done_again(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    interrupt = Interrupt()

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == 30:
            interrupt.request()

    with pytest.raises(Interrupted, match="after step 30 of 30"):
        run(config_of(shards), tmp_path, interrupt=interrupt, watch=watch)
    run(config_of(shards), tmp_path, watch=lambda line: pytest.fail(f"trained again: {line}"))
    assert_same_end(tmp_path, whole)


def test_a_stop_in_an_evaluation_on_the_way_is_obeyed_after_the_batch(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt, batches = Interrupt(), []

    def evaluating(*given: Any) -> Any:
        batches.append(given)
        interrupt.request()
        return to_float(*given)

    monkeypatch.setattr(evaluation, "to_float", evaluating)
    with pytest.raises(Interrupted, match="after step 6 of 30"):
        run(config_of(shards, "train.evaluate_every=6"), tmp_path, interrupt=interrupt)
    monkeypatch.undo()
    assert len(batches) == 1
    run(config_of(shards), tmp_path)
    assert_same_end(tmp_path, whole)


def test_evaluations_and_kept_checkpoints_have_their_steps_whatever_the_other_steps_are(
    shards: Path, tmp_path: Path
) -> None:
    """Metrics every 3 steps, a checkpoint every 4."""
    run(config_of(shards, "train.samples=960", "train.evaluate_every=7", "train.keep_every=10"), tmp_path)
    lines = timeless_metrics(tmp_path)
    assert [line["step"] for line in lines if "val_loss" in line] == [7, 14, 21, 28]
    assert [line["step"] for line in lines if line["step"] % 7] == [3, 6, 9, 12, 15, 18, 24, 27, 30]
    kept = {path.name for path in checkpoint.complete(tmp_path / "checkpoints")}
    assert kept == {"step-10", "step-20", "step-24", "step-28"}


def test_the_time_of_an_evaluation_is_no_time_of_training(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monotonic, evaluated = time.monotonic, []

    def evaluating(*given: Any) -> list[dict[str, float]]:
        evaluated.append(1000)  # seconds
        return [{}]

    monkeypatch.setattr(loop, "evaluate_splits", evaluating)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(evaluated))
    run(config_of(shards, "train.samples=320", "train.evaluate_every=3"), tmp_path)
    assert evaluated
    assert all(line["images_per_second"] > 3 * 32 / 1000 for line in metrics(tmp_path))


def test_a_corrupt_newer_checkpoint_does_not_push_out_those_after_the_resume(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    def stop_at(step: int) -> None:
        interrupt = Interrupt()
        with pytest.raises(Interrupted):
            run(
                config_of(shards, "train.keep_last=1"),
                tmp_path,
                interrupt=interrupt,
                watch=lambda line: interrupt.request() if line["step"] == step else None,
            )

    stop_at(9)
    copytree(tmp_path / "checkpoints" / "step-9", tmp_path / "step-9")
    stop_at(24)
    copytree(tmp_path / "step-9", tmp_path / "checkpoints" / "step-9")
    (tmp_path / "checkpoints" / "step-24" / "state.json").write_text("{")
    stop_at(12)
    assert (tmp_path / "checkpoints" / "step-12").exists()
    run(config_of(shards), tmp_path)
    assert_same_end(tmp_path, whole)


def test_a_corrupt_checkpoint_is_passed_over_for_an_older_one(
    shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards)

    def killed() -> None:
        kill_at_call(checkpoint.Checkpoints, "save", 4)
        run(config, tmp_path)

    assert not in_child(killed)
    newest, older = checkpoint.complete(tmp_path / "checkpoints")[:2]
    tensors = bytearray((newest / "__0_0.distcp").read_bytes())
    tensors[len(tensors) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(tensors)
    run(config, tmp_path)
    log = (tmp_path / "log-0.txt").read_text()
    warning = f"warning: {newest.name} is corrupt ("
    assert warning in log
    assert warning in capsys.readouterr().err
    assert f"resumed from {older.name}" in log
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: [],
        lambda content: "x",
        *(
            lambda content, key=key: {k: v for k, v in content.items() if k != key}
            for key in ("identity", "step", "data", "losses", "seconds", "files")
        ),
        *(lambda content, key=key: {**content, key: None} for key in ("identity", "data", "files")),
    ],
)
def test_a_state_file_that_is_none_is_a_fault_of_the_checkpoint(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """Whatever JSON is there: a process that fails on it alone would leave the others waiting."""
    step = checkpoint.complete(whole / "checkpoints")[0]
    assert checkpoint.find_fault(step, 0, 1) is None
    content = json.loads((step / "state.json").read_text())
    copytree(step, tmp_path / "changed")
    (tmp_path / "changed" / "state.json").write_text(json.dumps(change(content)))
    assert checkpoint.find_fault(tmp_path / "changed", 0, 1)


def test_the_time_of_earlier_starts_is_in_the_done_marker(shards: Path, whole: Path, tmp_path: Path) -> None:
    """Else the cost in a study's report would be that of each run's last start."""
    copytree(whole / "checkpoints", tmp_path / "checkpoints")
    newest = checkpoint.complete(tmp_path / "checkpoints")[0]
    state = json.loads((newest / "state.json").read_text())
    assert 0 < state["seconds"] < json.loads((whole / "done.json").read_text())["seconds"]
    (newest / "state.json").write_text(json.dumps(state | {"seconds": 1000.0}))
    start = time.monotonic()
    done = run(config_of(shards), tmp_path)
    assert 1000 < done["seconds"] < 1000 + time.monotonic() - start


def test_a_checkpoint_of_another_model_is_refused_with_the_diff(shards: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(whole / "checkpoints")
    with pytest.raises(
        UserError, match=r"another run \(model.depth: 6 there, 9 here; parameterization.name: depth_mup"
    ):
        run(config_of(shards, "model.depth=9", "parameterization.name=sp"), tmp_path)


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class AttributeAttack:
    """Unpickled, it takes an attribute of a class that a checkpoint may name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (Metadata, "__init__")


def update_checksums(step: Path) -> None:
    state = json.loads((step / "state.json").read_text())
    names = (path.name for path in step.iterdir() if path.name != "state.json")
    state["files"] = {name: checkpoint.compute_checksum(step / name) for name in names}
    (step / "state.json").write_text(json.dumps(state))


class PicklerOfPython3112(pickle.Pickler):
    """Python 3.11.0 to 3.11.3 pickle the member of an enum as a call of getattr."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def pickle_contents(
    step: Path,
    change: Callable[[Metadata], object] = lambda metadata: metadata,
    pickler: type[pickle.Pickler] = pickle.Pickler,
) -> None:
    """Gives a checkpoint the table of contents of older versions, with checksums that fit."""
    metadata = Reader(step).read_metadata()
    with open(step / ".metadata", "wb") as file:
        pickler(file).dump(change(metadata))
    (step / CONTENTS).unlink()
    update_checksums(step)


@pytest.mark.parametrize("pickler", [pickle.Pickler, PicklerOfPython3112])
def test_a_checkpoint_of_an_older_version_is_resumed(
    shards: Path, whole: Path, tmp_path: Path, pickler: type[pickle.Pickler]
) -> None:
    copytree(whole / "checkpoints", tmp_path / "checkpoints")
    newest = checkpoint.complete(tmp_path / "checkpoints")[0]
    pickle_contents(newest, pickler=pickler)
    run(config_of(shards), tmp_path)
    assert f"resumed from {newest.name}" in (tmp_path / "log-0.txt").read_text()
    weights = "weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_checkpoint_holds_no_pickled_table_of_contents(whole: Path) -> None:
    step = checkpoint.complete(whole / "checkpoints")[0]
    names = {path.name for path in step.iterdir()}
    assert CONTENTS in names
    assert ".metadata" not in names
    assert describe(Reader(step).read_metadata()) == json.loads((step / CONTENTS).read_text())


def test_what_this_version_cannot_read_is_not_called_corrupt_and_nothing_is_to_be_deleted(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Nor is it passed over for an older one, which would be trained over it."""
    copytree(whole / "checkpoints", tmp_path / "checkpoints")
    step = checkpoint.complete(tmp_path / "checkpoints")[0]
    tensors = json.loads((step / CONTENTS).read_text())
    next(iter(tensors.values()))["dtype"] = "float3_of_a_later_version"
    (step / CONTENTS).write_text(json.dumps(tensors))
    update_checksums(step)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(UserError) as raised:
        run(config_of(shards), tmp_path)
    message = str(raised.value)
    assert "as it was written" in message
    assert "float3_of_a_later_version" in message
    assert "corrupt" not in message
    assert "delete" not in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert "passed over" not in (tmp_path / "log-0.txt").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {**content, "data": {**content["data"], "of_a_later_version": 1}},
        lambda content: {key: value for key, value in content.items() if key != "losses"},
    ],
)
def test_the_state_of_another_version_is_not_passed_over(
    shards: Path, whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    copytree(whole / "checkpoints", tmp_path / "checkpoints")
    state = checkpoint.complete(tmp_path / "checkpoints")[0] / "state.json"
    state.write_text(json.dumps(change(json.loads(state.read_text()))))
    with pytest.raises(UserError, match="as it was written"):
        run(config_of(shards), tmp_path)


def test_what_the_user_may_not_read_is_no_damage(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[int]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "compute_checksum", refuse)
    found = checkpoint.find_fault(checkpoint.complete(whole / "checkpoints")[0], 0, 1)
    assert found is not None
    assert not found.damaged


@pytest.mark.parametrize("planner", ["ours", "torch's"])
def test_no_code_in_a_checkpoint_is_run(
    shards: Path, whole: Path, tmp_path: Path, planner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a pickled table of contents, by name or by attribute, nor in an item that says it is no tensor; each
    of two doors to the latter is shut alone."""
    copytree(whole / "checkpoints", tmp_path / "checkpoints")
    newest, *others = checkpoint.complete(tmp_path / "checkpoints")
    attacks = (Attack(tmp_path / "attacked"), AttributeAttack())
    for step, attack in zip(others, attacks, strict=False):
        pickle_contents(step, lambda metadata, attack=attack: attack)

    def with_bytes(metadata: Metadata) -> Metadata:
        index = next(index for index in metadata.storage_data if index.fqn.startswith("model."))
        metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        stored = metadata.storage_data.pop(index)
        file = newest / stored.relative_path
        torch.save(Attack(tmp_path / "attacked"), tmp_path / "item")
        item = (tmp_path / "item").read_bytes()
        metadata.storage_data[MetadataIndex(index.fqn)] = replace(stored, offset=file.stat().st_size, length=len(item))
        file.write_bytes(file.read_bytes() + item)
        return metadata

    pickle_contents(newest, with_bytes)
    if planner == "ours":
        allowed = ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata")
        monkeypatch.setattr(contents, "ALLOWED", {*contents.ALLOWED, allowed})
    else:
        monkeypatch.setattr(checkpoint, "TensorPlanner", checkpoint.dcp.DefaultLoadPlanner)
    for step, said in ((newest, ""), (others[0], "posix.mkdir "), *((other, "") for other in others[1:])):
        with pytest.raises(UserError, match=f"{step.name} .*{said}has no place in a checkpoint"):
            run(config_of(shards), tmp_path)
        rmtree(step)
    assert not (tmp_path / "attacked").exists()


def test_whoever_may_see_a_run_may_read_its_weights(whole: Path) -> None:
    for name in ("weights.safetensors", "weights_ema.safetensors"):
        assert (whole / name).stat().st_mode & 0o777 == whole.stat().st_mode & 0o666


def test_keep_last_and_keep_every(shards: Path, tmp_path: Path) -> None:
    run(config_of(shards, "train.keep_last=1", "train.keep_every=8"), tmp_path)
    kept = {p.name for p in checkpoint.complete(tmp_path / "checkpoints")}
    assert kept == {"step-8", "step-16", "step-24", "step-28"}
