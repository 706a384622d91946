"""The main job, as a user runs it: the installed command, real submitit processes, real shards."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.launch import chain
from depthmup.launch.config import LaunchConfig
from depthmup.launch.jobs.slurm import Silent, SlurmError, describe_refusal
from depthmup.launch.jobs.states import RunState, Snapshot
from depthmup.launch.jobs.submission import Submission, load_all, note_command
from depthmup.launch.jobs.submit import submit_continuation, write_dry_run_script
from depthmup.launch.reading import read_study
from depthmup.launch.runs.grouping import assign_gpus
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import select_resubmittable
from test_launch_scale import finish
from train_processes import START, Process, depthmup

# A shell starts what it puts in the background with Ctrl-C ignored, and that is inherited: not here.
HEARS_CTRL_C = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {START}"


def run_directories(study_file: Path) -> list[Path]:
    return sorted((study_file.parent / "runs" / "tiny" / "runs").iterdir())


def slots_of(study_file: Path) -> list[str]:
    """Command lines of the processes that train this study's runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue  # it has ended
        if "launch.jobs.worker" in command and str(study_file.parent) in command:
            found.append(command)
    return found


def test_a_study_runs_to_its_report_and_a_second_call_only_reports(study_file: Path) -> None:
    first = depthmup("transfer", study_file, "launch.slots=1")
    assert first.returncode == 0, first.stderr
    assert "12 of 12 done" in first.stdout
    for name in ("sp", "depth_mup"):
        assert f"\n{name}: " in first.stdout
    directories = run_directories(study_file)
    assert len(directories) == 12
    finished = {path: (path / "done.json").stat().st_mtime_ns for path in directories}

    second = depthmup("transfer", study_file)
    assert second.returncode == 0
    assert "Report: " in second.stdout
    assert {path: (path / "done.json").stat().st_mtime_ns for path in run_directories(study_file)} == finished

    root = directories[0].parent.parent
    report = json.loads((root / "report.json").read_text())
    assert len(report["points"]) == 16
    assert {row["depth"] for row in csv.DictReader((root / "report.csv").open())} == {"3", "6"}
    page = (root / "report.html").read_text().partition("<script")[0]  # without plotly, whose text has addresses
    assert "<svg" in page
    assert 'src="http' not in page
    assert 'href="http' not in page

    # At the base size every parameterization is the same ordinary model: one run serves both.
    base = {(run["parameterization"], run["value"]): run["metric"] for run in report["points"] if run["depth"] == 3}
    for value in {value for _, value in base}:
        assert base["sp", value] == base["depth_mup", value]

    status = depthmup("status", study_file)
    assert status.stdout.strip() == "12 done"
    assert depthmup("launch", study_file).stdout.strip() == "All 12 runs are done."


def test_an_interrupted_study_continues_where_it_was(study_file: Path) -> None:
    longer = ("train.samples=400", "train.global_batch_size=4", "data.num_streams=4")  # a run is left at the signal
    three = ("study.sizes=[{width: 8, depth: 3}]", "study.values=[2**-6, 2**-5, 2**-4]", *longer)
    arguments = ["-c", HEARS_CTRL_C, "transfer", str(study_file), "launch.slots=1", *three]
    process = Process(arguments, dict(os.environ))
    runs = study_file.parent / "runs" / "tiny" / "runs"
    deadline = time.monotonic() + 300

    def one_is_done_and_another_trains() -> bool:  # between two runs there is none to interrupt
        trains = (path for path in runs.glob("*/metrics.jsonl") if path.stat().st_size)
        return any(runs.glob("*/done.json")) and any(not (path.parent / "done.json").exists() for path in trains)

    while not one_is_done_and_another_trains():
        assert process.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert re.fullmatch(
        r"Interrupted: \d of 3 runs are done, \w{12} saved at step \d+; the same command continues.",
        output.splitlines()[-1],
    )
    assert "Traceback" not in output
    assert not slots_of(study_file)  # the workers have saved and ended before the command has
    status = depthmup("status", study_file, *three).stdout
    assert "1 interrupted" in status
    assert "lost" not in status
    done = {path: path.stat().st_mtime_ns for path in runs.glob("*/done.json")}
    assert 0 < len(done) < 3

    again = depthmup("transfer", study_file, "launch.cluster=debug", *three)
    assert again.returncode == 0, again.stderr
    assert len(list(runs.glob("*/done.json"))) == 3
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_ctrl_c_in_the_foreground_saves_says_where_the_runs_stand_and_ends_130(study_file: Path) -> None:
    place = ("--cluster", "debug", "train.samples=640000", "train.pack=1")  # longer than this test
    process = Process(["-c", HEARS_CTRL_C, "launch", str(study_file), *place], dict(os.environ))
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in study_file.parent.glob("runs/tiny/runs/*/metrics.jsonl")):
        assert process.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    said = output.splitlines()[-1]
    stand = r"Interrupted: 0 of 12 runs are done, (\w{12}) saved at step \d+; the same command continues."
    assert (name := re.fullmatch(stand, said)), output
    assert "Traceback" not in output
    assert list(study_file.parent.glob(f"runs/tiny/runs/{name[1]}/checkpoints/step-*"))
    assert f"interrupted, {name[1]}: stopped, and saved" in depthmup("status", study_file, *place).stdout


def test_a_second_launch_starts_nothing_twice_and_cancel_stops_slots_that_have_no_run_yet(study_file: Path) -> None:
    settings = ("launch.slots=2", "train.samples=640000")  # longer than this test
    first = depthmup("launch", study_file, *settings)
    assert first.returncode == 0, first.stderr
    second = depthmup("launch", study_file, *settings)
    live = len(slots_of(study_file))
    cancelled = depthmup("cancel", study_file, *settings)
    assert second.stdout.startswith("Nothing to submit: "), second.stdout + second.stderr
    assert "new" not in second.stdout
    assert live == 2
    assert cancelled.stdout.count("process ") == 2
    deadline = time.monotonic() + 300
    while slots_of(study_file):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status = depthmup("status", study_file, *settings).stdout.splitlines()[-1]
    assert "waiting" not in status
    assert "running" not in status


def test_what_goes_on_by_itself_keeps_to_the_users_last_command_and_to_max_attempts_of_each_run(
    study_file: Path,
) -> None:
    study = Study(study_file, read_study(study_file, ("launch.max_attempts=2",)))
    root = study.file.directory
    lost = [RunState(run, "lost") for run in study.runs[:2]]
    names = [found.run.directory.path.name for found in lost]

    def going_again() -> list[str]:
        snapshot = Snapshot(lost, load_all(root / "jobs"), [], [])
        return [run.directory.path.name for run in select_resubmittable(study, snapshot, ("lost",))]

    root.mkdir(parents=True)
    for tasks in ([names], [names[:1]]):
        Submission.create(root / "jobs", "taken", tasks, {}).write_job_id("1")
    Submission.create(root / "jobs", "refused", [names], {})  # no job: no attempt
    assert going_again() == names[1:]  # one that has had its attempts does not hold up the other
    note_command(root, "launch")
    assert going_again() == names
    note_command(root, "cancel")
    assert going_again() == []
    (root / "asked.json").write_text("{}")  # nobody knows what was asked for: nothing goes by itself
    with pytest.raises(UserError, match=r"asked\.json: damaged"):
        going_again()


def test_what_goes_on_by_itself_gives_up_with_the_reason_when_slurm_stays_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain, "PAUSE_SECONDS", 0.01)
    tries: list[int] = []

    def unanswered() -> None:
        tries.append(1)
        raise Silent("Slurm does not answer: no route")

    with pytest.raises(UserError, match=r"Slurm does not answer: no route \(waited"):
        chain.repeat_while_silent(unanswered, Console(), patience=0.05)
    assert capsys.readouterr().out.count("Next try in") == len(tries) - 1 > 0


def test_cancel_and_retry_of_a_study_that_never_ran_leave_no_folder(study_file: Path) -> None:
    assert depthmup("cancel", study_file).stdout.strip() == "Nothing waits or runs."
    assert depthmup("retry", study_file).stdout.strip() == "Nothing to submit: 12 new."
    assert not (study_file.parent / "runs").exists()


def test_the_main_path_goes_from_a_proxy_to_a_target_and_its_line_in_the_report(study_file: Path) -> None:
    target = study_file.parent / "large.yaml"
    target.write_text("model: {width: 16, depth: 6}\ntrain: {samples: 640}\n")
    values = "study.values={first: 2**-8, last: 2**-2}"
    overrides = (values, "study.design=grid", "study.parameterizations=[depth_mup]", "study.seeds=2")
    overrides += ("launch.cluster=debug",)
    study = Study(study_file, read_study(study_file, overrides))
    finish(study, best=-4.8)  # runs as short as a test's have no optimum
    (study.runs[0].directory.path / "done.json").unlink()  # but one is left to train
    proxy = ["transfer", study_file, *overrides]
    refused = depthmup(*proxy, "study.regret_limit=1e-9", "--target", target)
    assert refused.returncode == 2
    assert "this study does not say which value to use: depth_mup" in refused.stderr
    folder = study_file.parent / "runs" / "tiny"
    assert f"all the same: depthmup scale {folder} --target {target} --force" in refused.stderr
    deeper = target.with_name("deeper.yaml")
    deeper.write_text("model: {width: 8, depth: 9}\n")
    walked = depthmup(*proxy, "--target", target, "--target", deeper)
    assert walked.returncode == 0, walked.stderr
    for words in ("Target of width 16, depth 6 at optimizer.lr", "Target of width 8, depth 9 at optimizer.lr"):
        assert words in walked.stdout.splitlines()[-1]
        assert words in (folder / "report.html").read_text()
    (done,) = folder.parent.glob("tiny_target/runs/*/done.json")
    assert json.loads(done.read_text())["samples"] == 640
    assert list(folder.parent.glob("tiny_target_deeper/runs/*/done.json"))
    alike = deeper.parent / "other" / "deeper.yaml"
    alike.parent.mkdir()
    alike.write_text(deeper.read_text())
    refused = depthmup(*proxy, "--target", target, "--target", deeper, "--target", alike)
    assert refused.returncode == 2
    assert "two targets have the same name" in refused.stderr
    alone = depthmup(*proxy)
    assert "1 run" not in alone.stdout  # nothing is left to do
    assert f"depthmup scale {folder}" in alone.stdout


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("Requested time limit is invalid (missing or exceeds some limit)", "launch.timeout_min"),
        ("QOSMaxWallDurationPerJobLimit", "launch.timeout_min"),
        ("QOSMaxGRESPerUser", "launch.nodes, gpus_per_node"),
        ("", "launch.qos or launch.account"),
    ],
)
def test_what_slurm_refuses_is_said_with_the_key_to_change(words: str, key: str) -> None:
    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    said = str(describe_refusal(SlurmError(words if words.startswith("Requested") else f"{words}; {policy}")))
    assert f"(change {key}" in said


def test_a_failed_run_is_named_and_the_others_finish(study_file: Path) -> None:
    few = ("study.values=[2**-6, 2**-5, 2**-4]", "study.sizes=[{width: 8, depth: 3}]")
    depthmup("transfer", study_file, "launch.cluster=debug", *few)
    broken, *others = run_directories(study_file)
    (broken / "done.json").unlink()
    (others[0] / "done.json").unlink()  # this one goes on in the same call
    (broken / "weights.safetensors").unlink()
    (broken / "weights.safetensors").mkdir()  # the run cannot write its weights
    report = broken.parents[1] / "report.html"
    report.unlink()
    failed = depthmup("transfer", study_file, "launch.slots=1", *few)
    assert failed.returncode == 2
    assert broken.name in failed.stderr
    assert broken.name in report.read_text()  # it is of what is done, and says what is not
    assert "failed" in depthmup("status", study_file, *few).stdout
    assert all((path / "done.json").exists() for path in others)
    failed = depthmup("retry", study_file, *few, "--cluster", "debug")  # in the foreground: it says how that ended
    assert failed.returncode == 2
    assert broken.name in failed.stderr
    (broken / "weights.safetensors").rmdir()
    assert "1 runs trained" in depthmup("retry", study_file, *few, "--cluster", "debug").stdout


def test_plan_prints_every_run_with_its_cost_and_launches_nothing(study_file: Path) -> None:
    planned = depthmup("plan", study_file)
    assert planned.returncode == 0
    assert "12 runs (0 done)" in planned.stdout
    runs = planned.stdout.partition("\n\n")[0]
    assert runs.count("depth_mup") == 4
    assert "4 more points" in planned.stdout
    assert "is larger than" not in planned.stdout
    smaller = depthmup("plan", study_file, "study.sizes=[{width: 8, depth: 3}, {width: 4, depth: 3}]")
    assert "base width 8, depth 3 is larger than width 4, depth 3: factors scale down" in smaller.stdout
    grows = depthmup("plan", study_file, "study.extend=2", "study.more_seeds=2").stdout
    assert "study.extend" in grows
    assert max(map(len, grows.splitlines())) <= 80
    assert not (study_file.parent / "runs").exists()


def test_in_a_container_the_workers_run_and_the_job_after_the_runs_does_not(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ("launch.container_image=image.sqsh", "launch.python=python")
    study = Study(study_file, read_study(study_file, ("launch.cluster=slurm", *place)))
    workers = [line for line in write_dry_run_script(study).splitlines() if "launch.jobs.worker" in line]
    assert len(workers) == 2  # it trains, and it records how that ended
    assert all("srun" in line and "--container-image=image.sqsh" in line for line in workers)

    monkeypatch.setattr(
        "depthmup.launch.jobs.submit.submit_arrays", lambda submissions, *rest: submissions[0].write_job_id("7")
    )
    assert submit_continuation(study, [], after=False, lock=0).job_id == "7"
    (script,) = study.file.directory.glob("jobs/*-then-*/job.sh")
    assert sys.executable in script.read_text()
    assert "image.sqsh" not in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.wdth=3"], "did you mean 'model.width'"),
        (["study.sizes=[{width: 8, depth: 3}, {width: 8, depth: 4}]"], "multiple of num_stages"),
        (["study.values=[0, 1, 2]"], "greater than 0"),
        (["study.hyperparameter=optimizer.momentum", "study.values=[]"], "study.values: needs 3 values or more"),
        (["study.values=[]"], "study.values: needs 3 values or more (1 for a study without an optimum), found 0"),
        (["study.values={first: 1, last: 2}"], "without an optimum), found 2"),
        (["study.name=../elsewhere"], "study.name: must be letters, digits"),
        (["study.name=a/b"], "study.name: must be letters, digits"),
        (["data.root=nowhere"], "depthmup pack"),
        (["data.root=nowhere", "data.source=nothing/there"], "no such folder or tar"),
        (["data.root=nowhere", "data.source=empty"], "no images"),
        (["study.directory=/proc/nowhere"], "set study.directory to a folder that is"),
        (["model.num_classes=7"], "has 10 classes, but model.num_classes is 7: set model.num_classes=10"),
    ],
)
def test_a_users_mistake_is_one_line_exit_2_and_starts_nothing(
    study_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    failed = depthmup("transfer", study_file, *arguments, cwd=tmp_path)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_one_run_alone_packs_its_source_first_too(study_file: Path, tmp_path: Path) -> None:
    source = ["data.root=packed", "data.source=sklearn:digits", "data.validation_share=0.2"]
    trained = depthmup("train", study_file, *source, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "completed" in trained.stdout
    assert list((tmp_path / "packed").glob("val-*.tar"))


def test_a_missing_shard_is_named(study_file: Path, digits: Path) -> None:
    shard = next(digits.glob("train-*.tar"))
    hidden = shard.rename(shard.with_suffix(".hidden"))
    try:
        failed = depthmup("transfer", study_file)
    finally:
        hidden.rename(shard)
    assert failed.returncode == 2
    assert shard.name in failed.stderr


def test_help_has_an_example_and_imports_nothing_slow() -> None:
    for name in ("transfer", "plan", "launch", "status", "report", "train", "pack"):
        shown = depthmup(name, "--help")
        assert shown.returncode == 0
        assert f"depthmup {name}" in shown.stdout
    code = "import sys; sys.argv = ['depthmup', '--help']\n"
    code += "from depthmup.launch.cli import cli; cli(standalone_mode=False)\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)\n"  # they are slow to import
    code += "import depthmup.launch.jobs.worker, depthmup.launch.report.results\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("visible", "slots", "expected"),
    [
        ("0,1,2,3", 0, ["0", "1", "2", "3"]),  # one run per GPU
        ("2,5", 3, ["2", "5", "2"]),
        ("", 2, [None, None]),  # hidden GPUs are not used
        ("-1", 2, [None, None]),
        ("NoDevFiles", 2, [None, None]),
        ("none", 1, [None]),
        ("0,0", 1, [None]),
        (" 1, 0 ", 0, ["1", "0"]),
        ("3,-1,1", 0, ["3"]),  # what follows is hidden
        ("2,,1", 0, ["2"]),
        ("GPU-8932f937-d72c,GPU-1f", 0, ["GPU-8932f937-d72c", "GPU-1f"]),
        ("MIG-GPU-8932f937/1/0,MIG-3b", 0, ["MIG-GPU-8932f937/1/0", "MIG-3b"]),
        ("", 0, [None] * len(os.sched_getaffinity(0))),  # one run per core
    ],
)
def test_every_slot_has_its_own_gpu_or_core(
    monkeypatch: pytest.MonkeyPatch, visible: str, slots: int, expected: list[str | None]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert assign_gpus(LaunchConfig(slots=slots)) == expected
