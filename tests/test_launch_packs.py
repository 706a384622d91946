"""`launch` trains runs of a study in packs, and nothing else than the time it takes tells of it."""

import csv
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthmup.data.errors import UserError
from depthmup.launch.config import LaunchConfig
from depthmup.launch.jobs.attempts import read_attempts
from depthmup.launch.jobs.submission import Submission
from depthmup.launch.jobs.worker import main as work_in_a_job
from depthmup.launch.jobs.worker import train_packs
from depthmup.launch.reading import read_study
from depthmup.launch.runs.grouping import check_packable, group_packs, group_runs
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.train.config import RunConfig
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import run
from depthmup.train.packs.pack import find_newest_whole_step, run_pack
from depthmup.train.reading import from_plain, to_yaml
from depthmup.train.rundir import EXIT_REQUEUE, RunDirectory
from train_configs import After
from train_processes import START, Process, depthmup


def table(study_file: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((study_file.parent / "runs" / name / "report.csv").open()))


def packs_in_logs(runs: Path) -> list[int]:
    """For each run, the size of the pack that it was last trained in; 1 when it was alone."""
    found = []
    for log in sorted(runs.glob("*/log-0.txt")):
        line = [line for line in log.read_text().splitlines() if line.startswith("run ")][-1]
        found.append(int(line.split("pack of ")[1].split()[0]) if "pack of" in line else 1)
    return sorted(found)


def test_a_packed_study_has_the_table_of_an_unpacked_one_also_after_a_kill(study_file: Path) -> None:
    longer = (
        "train.samples=320",
        "train.global_batch_size=8",
        "data.num_streams=8",
        "train.checkpoint_every=8",
        "study.parameterizations=[sp]",
    )  # 40 steps: time for a kill
    alone = depthmup("transfer", study_file, "study.name=alone", *longer, "launch.cluster=debug")
    assert alone.returncode == 0, alone.stderr
    runs = study_file.parent / "runs"
    assert packs_in_logs(runs / "alone" / "runs") == [1] * 8

    packed = ["transfer", str(study_file), "study.name=packed", *longer, "train.pack=6", "launch.slots=1"]
    process = Process(["-c", START, *packed], dict(os.environ))
    deadline = time.monotonic() + 300
    while len(saved := list((runs / "packed" / "runs").glob("*/checkpoints/step-8"))) < 4:
        assert process.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(json.loads((saved[0].parents[1] / "lock").read_text())["pid"], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == 2  # runs are left over
    begun = [RunDirectory(log.parent) for log in (runs / "packed" / "runs").glob("*/log-0.txt")]
    steps = Counter(find_newest_whole_step(directory) for directory in begun)
    assert steps.total() == 4
    again = depthmup(*packed, "launch.cluster=debug")
    assert again.returncode == 0, again.stderr
    together = sorted(steps.elements(), key=steps.get)  # one step, unless the kill fell between two replicas' saves
    assert packs_in_logs(runs / "packed" / "runs") == [steps[step] for step in together] + [4] * 4
    assert any("resumed from" in log.read_text() for log in (runs / "packed" / "runs").glob("*/log-0.txt"))

    for one, other in zip(table(study_file, "alone"), table(study_file, "packed"), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            try:
                assert float(other[key]) == pytest.approx(float(value), rel=1e-4), key
            except ValueError:
                assert other[key] == value, key
    assert depthmup("status", study_file, "study.name=packed", *longer).stdout.strip() == "8 done"


@pytest.fixture
def runs(study_file: Path) -> Callable[..., list[PlannedRun]]:
    """`runs("key=value", ...)`: 16 runs of depth 6 (2 parameterizations, 4 rates, 2 seeds), and 8 of the base depth."""

    def planned(*overrides: str) -> list[PlannedRun]:
        return Study(study_file, read_study(study_file, ("study.seeds=[0, 1]", *overrides))).runs

    return planned


def sizes(packs: list[list[PlannedRun]]) -> list[int]:
    return [len(pack) for pack in packs]


def test_packs_are_as_large_as_allowed_while_every_process_has_one(runs: Callable[..., list[PlannedRun]]) -> None:
    local, large = LaunchConfig(), runs("train.pack=16")
    assert sizes(group_runs(large, local, on_gpu=False, slots=1)) == [8, 16]
    assert sizes(group_runs(large, local, on_gpu=False, slots=3)) == [8, 8, 8]
    assert sizes(group_runs(large, local, on_gpu=False, slots=99)) == [1] * 24
    assert sizes(group_runs(runs("train.pack=5"), local, on_gpu=False, slots=1)) == [4] * 6
    for found in group_runs(large, local, on_gpu=False, slots=3):
        assert len({run.config.model.depth for run in found}) == 1
    together = [{run.seed for run in found} for found in group_runs(large, local, on_gpu=False, slots=3)]
    assert together[1:] == [{0}, {1}]  # runs of one seed share their images
    for overrides, on_gpu, expected in (
        (["train.pack=null"], False, [8, 8, 8]),
        (["train.pack=null", "train.global_batch_size=256"], False, [8, 8, 8]),  # 8 x 256 x 64 pixels are 2^17 numbers
        (["train.pack=null", "train.global_batch_size=272"], False, [1] * 24),  # packs do not pay on a CPU
        (["train.pack=null"], True, [8, 16]),
        (["train.pack=0"], True, [1] * 24),
        (["train.pack=null", "train.compile=block"], True, [1] * 24),
    ):
        assert sizes(group_runs(runs(*overrides), local, on_gpu, slots=1)) == expected
    assert group_runs([], local, on_gpu=True, slots=1) == []


def test_a_job_of_slurm_is_a_pack_or_as_many_as_runs_per_job_holds(runs: Callable[..., list[PlannedRun]]) -> None:
    packs = group_runs(runs("train.pack=8"), LaunchConfig(cluster="slurm"), on_gpu=True, slots=1)
    assert [len(names) for names in group_packs(packs, 1)] == [8, 8, 8]
    assert [len(names) for names in group_packs(packs, 16)] == [16, 8]
    assert [len(names) for names in group_packs([[run] for run in runs()], 5)] == [5, 5, 5, 5, 4]


@pytest.mark.parametrize(
    ("override", "launch", "words"),
    [
        ("train.compile=block", {}, "packs do not know train.compile as set here"),
        ("seed=0", {"runs_per_gpu": 2}, "launch.runs_per_gpu is 2"),
        ("seed=0", {"cluster": "slurm", "nodes": 2}, "a job of 2 tasks trains one run"),
    ],
)
def test_packs_that_are_asked_for_but_cannot_be_are_refused_with_the_reason(
    runs: Callable[..., list[PlannedRun]], override: str, launch: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"train.pack is 4, but {words}"):
        group_runs(runs("train.pack=4", override), LaunchConfig(**launch), on_gpu=True, slots=1)


def test_what_jobs_ask_for_keeps_no_runs_of_this_machine_out_of_packs(
    runs: Callable[..., list[PlannedRun]],
) -> None:
    packs = group_runs(runs("train.pack=4"), LaunchConfig(nodes=2), on_gpu=True, slots=1)
    assert max(map(len, packs)) == 4


def test_a_study_of_which_no_two_runs_can_be_packed_is_refused_with_the_key(
    runs: Callable[..., list[PlannedRun]],
) -> None:
    one_of_each_size = ("study.seeds=[0]", "study.values=[0.1]", "study.parameterizations=[sp]")
    with pytest.raises(UserError, match=r"no two of the study's \d runs can be trained together: .* of model\.depth"):
        check_packable(runs("train.pack=4", *one_of_each_size))
    check_packable(runs(*one_of_each_size))
    check_packable(runs("train.pack=4"))
    check_packable(runs("train.pack=4", "train.compile=block"))  # refused where packs are formed, with another reason


# ---------------------------------------------------------------- the worker


@pytest.fixture
def written(run_settings: dict[str, Any], tmp_path: Path) -> Callable[[int], list[RunDirectory]]:
    """`written(k)`: k runs of 12 steps that can be packed, with their configurations in their directories."""

    def write(count: int) -> list[RunDirectory]:
        config = from_plain(RunConfig, run_settings, "test")
        config = replace(config, train=replace(config.train, pack=8))
        directories = []
        for number in range(count):
            one = replace(config, optimizer=replace(config.optimizer, lr=0.01 * (number + 1)))
            directory = RunDirectory(tmp_path / "study" / "runs" / str(number))
            directory.path.mkdir(parents=True)
            directory.config.write_text(to_yaml(one))
            directories.append(directory)
        return directories

    return write


def test_fresh_runs_do_not_join_those_that_are_far_ahead(written: Callable[[int], list[RunDirectory]]) -> None:
    directories = written(6)
    ahead = directories[1:3]
    configs = [from_plain(RunConfig, yaml.safe_load(d.config.read_text()), "test") for d in ahead]
    with pytest.raises(Interrupted):
        run_pack(configs, [d.path for d in ahead], After(9))
    assert [max(d.list_checkpoint_steps()) for d in ahead] == [9, 9]
    assert train_packs([directories]) == 0
    assert packs_in_logs(directories[0].path.parent) == [2, 2, 4, 4, 4, 4]
    assert "resumed from step-9" in directories[1].log.read_text()
    assert all(d.done() for d in directories)


def test_the_runs_of_a_pack_that_fails_go_on_one_by_one(written: Callable[[int], list[RunDirectory]]) -> None:
    directories = written(3)
    directories[1].metrics.mkdir()  # it cannot open its metrics
    assert train_packs([directories]) == 1
    assert [bool(d.done()) for d in directories] == [True, False, True]
    assert "IsADirectoryError" in (directories[1].failed() or {})["error"]
    for directory in directories:
        events = [line["event"] for line in read_attempts(directory)]
        assert events[:3] == ["started", "unpacked", "started"]


def test_an_interrupted_pack_notes_it_for_every_run_and_goes_on_without_those_that_are_done(
    written: Callable[[int], list[RunDirectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = written(3)
    monkeypatch.setattr(Interrupt, "on_signals", lambda: nullcontext(After(6)))
    assert train_packs([directories]) == EXIT_REQUEUE
    monkeypatch.undo()
    assert [read_attempts(d)[-1]["event"] for d in directories] == ["interrupted"] * 3
    run(from_plain(RunConfig, yaml.safe_load(directories[1].config.read_text()), "test"), directories[1].path)
    stamp = (directories[1].path / "done.json").stat().st_mtime_ns
    assert train_packs([directories]) == 0
    assert (directories[1].path / "done.json").stat().st_mtime_ns == stamp
    assert packs_in_logs(directories[0].path.parent) == [1, 2, 2]


def test_slots_that_share_a_list_do_not_halve_each_others_packs(
    written: Callable[[int], list[RunDirectory]],
) -> None:
    directories = written(16)  # packs of 8
    root = directories[0].path.parents[1]
    names = [d.path.name for d in directories]
    submission = Submission.create(root / "jobs", "local", [names[:8], names[8:]], {})
    command = ["-m", "depthmup.launch.jobs.worker", str(submission.file), "--local"]
    slots = [Process(command, dict(os.environ)) for _ in range(2)]
    for slot in slots:
        said, _ = slot.communicate(timeout=300)
        assert slot.returncode == 0, said
    assert packs_in_logs(directories[0].path.parent) == [8] * 16


def test_a_job_of_an_array_trains_its_list_as_a_pack(
    written: Callable[[int], list[RunDirectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = written(3)
    root = directories[0].path.parents[1]
    details = {"memory_gb": None, "runs_per_gpu": 1}
    submission = Submission.create(root / "jobs", "test", [["nothing"], [d.path.name for d in directories]], details)
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setattr(sys, "argv", ["worker", str(submission.file)])
    assert work_in_a_job() == 0
    assert packs_in_logs(directories[0].path.parent) == [3, 3, 3]
