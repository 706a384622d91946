"""Submission to a real Slurm: nothing twice, nothing half, whatever happens to the launcher. The jobs are held."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from depthmup.launch import transfer
from depthmup.launch.jobs import slurm
from depthmup.launch.jobs.submission import load_all
from depthmup.launch.jobs.submit import START as GO_ON
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from slurm_cluster import Cluster, start, wait_for
from train_processes import ROOT as REPOSITORY
from train_processes import START

SBATCH = """#!/bin/sh
case $WHEN in
before) kill -9 $PPID; exit 1;;
during) kill -9 $PPID; sleep 1; exec {sbatch} "$@";;
after) {sbatch} "$@"; kill -9 $PPID; exit 0;;
lost) {sbatch} "$@" >/dev/null; echo "Socket timed out on send/recv operation" >&2; exit 1;;
gone) {sbatch} "$@"; code=$?; while kill $CONTROLLER; do sleep 0.2; done 2>/dev/null; exit $code;;
esac
"""


@pytest.fixture
def held(cluster: Cluster, study_file: Path) -> Iterator[Path]:
    """A study of twelve runs whose jobs wait for ever."""
    content = yaml.safe_load(study_file.read_text())
    content["launch"] = {"cluster": "slurm", "runs_per_job": 2, "max_running": 3, "sbatch": {"hold": True}}
    study_file.write_text(yaml.safe_dump(content))
    cluster.empty_the_queue()  # a job of the test before may still be ending, and the tests count what is queued
    yield study_file
    cluster.empty_the_queue()


def write_sbatch(cluster: Cluster, folder: Path) -> str:
    """A PATH on which sbatch is SBATCH, written into `folder`."""
    fake = folder / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(SBATCH.format(sbatch=cluster.call("which", "sbatch")))
    fake.chmod(0o755)
    return f"{fake.parent}:{cluster.environment['PATH']}"


@pytest.fixture
def path(cluster: Cluster, tmp_path: Path) -> str:
    return write_sbatch(cluster, tmp_path)


def test_nothing_is_submitted_twice_when_the_launcher_is_killed_at_any_point(
    cluster: Cluster, held: Path, path: str
) -> None:
    for when in ("before", "during", "after"):
        study = [held, f"study.name={when}"]
        killed = cluster.depthmup("launch", *study, env={"PATH": path, "WHEN": when})
        assert killed.returncode == -9
        again = cluster.depthmup("launch", *study)
        assert again.returncode == 0, again.stderr
        assert len(cluster.queued(f"-{when}-")) == 6, when
        assert cluster.depthmup("status", *study).stdout.splitlines()[-1] == "12 waiting"
    answer_lost = cluster.depthmup("launch", held, "study.name=lost", env={"PATH": path, "WHEN": "lost"})
    assert answer_lost.returncode == 0, answer_lost.stderr
    assert len(cluster.queued("-lost-")) == 6

    cancelled = cluster.depthmup("cancel", held, "study.name=after")
    assert cancelled.stdout.startswith("Stopped: job ")
    assert cluster.queued("-after-") == []

    cluster.stop_controller()
    launched = cluster.depthmup("launch", held, "study.name=before", env=cluster.hasty)
    status = cluster.depthmup("status", held, "study.name=before", env=cluster.hasty)
    cluster.start_controller()
    assert launched.returncode == 2
    assert "Slurm does not answer" in launched.stderr
    assert "Traceback" not in launched.stderr
    assert "Slurm does not answer" in status.stdout
    assert "Nothing to submit" in cluster.depthmup("launch", held, "study.name=before").stdout
    assert len(cluster.queued("-before-")) == 6


def test_what_was_submitted_is_said_when_the_controller_goes_away_right_after_the_first_array(
    cluster: Cluster, held: Path, path: str
) -> None:
    def without_controller(*command: str) -> subprocess.CompletedProcess[str]:
        controller = (cluster.directory / "run" / "slurmctld.pid").read_text()
        gone = {"PATH": path, "WHEN": "gone", "CONTROLLER": controller}
        said = cluster.depthmup(*command, env={**cluster.hasty, **gone})
        cluster.start_controller()
        assert said.returncode == 2, said.stderr
        assert len(said.stderr.strip().splitlines()) == 1, said.stderr
        return said

    two_arrays = (str(held), "launch.runs_per_job=1")  # of 6 each
    stopped = without_controller("launch", *two_arrays)
    (job,) = {element.split("_")[0] for element in cluster.queued()}
    assert f"6 of 12 runs were submitted as jobs {job}" in stopped.stderr
    assert "6 runs submitted" in cluster.depthmup("launch", *two_arrays).stdout
    assert len(cluster.queued()) == 12

    detached = (str(held), "study.name=detached", "--detach")
    stopped = without_controller("transfer", *detached)
    (job,) = {element.split("_")[0] for element in cluster.queued("-detached-then-")}
    assert "Nothing was submitted" in stopped.stderr
    assert f"Job {job} waits, and goes on by itself" in stopped.stderr
    said = cluster.depthmup("transfer", *detached).stdout
    assert "12 runs submitted" in said
    assert f"Job {job} goes on after " in said
    (after,) = cluster.call("squeue", "--noheader", f"--job={job}", "--format=%E").splitlines()
    assert "afterany" in after
    assert len(cluster.queued("-detached-")) == 7


def test_a_cancelled_study_stays_so_though_a_transfer_waits_for_it(cluster: Cluster, held: Path) -> None:
    command = [sys.executable, "-c", START, "transfer", str(held)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=cluster.environment, stdout=pipe, stderr=pipe, text=True) as waiting:
        wait_for(lambda: len(cluster.queued("-tiny-")) == 6 or waiting.poll() is not None)
        assert cluster.depthmup("cancel", held).returncode == 0
        _, said = waiting.communicate(timeout=300)
    assert waiting.returncode == 2
    assert "cancelled: 12 of 12 runs are left" in said
    assert cluster.queued("-tiny-") == []
    assert cluster.depthmup("launch", held).returncode == 0
    assert len(cluster.queued("-tiny-")) == 6  # the user's word counts


def test_the_job_after_the_runs_waits_for_a_slurm_that_does_not_answer_and_then_goes_on(
    cluster: Cluster, held: Path
) -> None:
    content = yaml.safe_load(held.read_text())
    content["study"]["name"] = "silent"  # jobs just cancelled may come back with a controller that is killed
    held.write_text(yaml.safe_dump(content))
    study = Study(held, read_study(held))
    study.write()
    cluster.stop_controller()
    command = [sys.executable, "-c", GO_ON, str(REPOSITORY), str(study.file.directory)]
    environment = {**cluster.environment, **cluster.hasty}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        first = job.stdout.readline()
        cluster.start_controller()
        said, _ = job.communicate(timeout=300)
    assert "Slurm does not answer" in first
    assert "Next try in 5 s" in first
    assert job.returncode == 0, said
    assert "12 runs submitted" in said
    assert len(cluster.queued("-silent-")) == 6 + 1
    assert len(cluster.queued("-silent-then-")) == 1


def test_an_array_larger_than_the_cluster_allows_is_cut(cluster: Cluster, held: Path) -> None:
    launched = cluster.depthmup("launch", held, "launch.runs_per_job=1", "launch.max_running=6")
    assert launched.returncode == 0, launched.stderr
    arrays = cluster.call("squeue", "--noheader", "--format=%i").splitlines()  # MaxArraySize is 8 (tests/slurm/up.sh)
    assert [name.split("_")[1] for name in arrays] == ["[0-5%3]", "[0-5%3]"]
    assert cluster.depthmup("status", held).stdout.splitlines()[-1] == "12 waiting"


def test_of_a_study_larger_than_the_limit_on_submitted_jobs_what_has_place_is_submitted_and_nothing_twice(
    cluster: Cluster, held: Path
) -> None:
    user = cluster.call("id", "-un")
    cluster.call("sacctmgr", "-Q", "-i", "add", "account", "few", "MaxSubmitJobs=5", root=True)
    cluster.call("sacctmgr", "-Q", "-i", "add", "user", user, "account=few", root=True)
    study = (held, "launch.account=few", "launch.runs_per_job=1")

    def jobs_of_runs() -> list[str]:
        lines = cluster.call("squeue", "-h", "-r", "-A", "few", "-o", "%i %j").splitlines()
        assert len(lines) <= 5
        return [line for line in lines if "-then-" not in line]

    assert "3 runs submitted" in (said := cluster.depthmup("launch", *study)).stdout, said.stderr
    assert "9 more when Slurm has place for them" in said.stdout  # half of the places, or more
    assert len(jobs_of_runs()) == 3
    assert cluster.depthmup("status", held).stdout.splitlines()[-1] == "3 waiting, 9 new"
    while "has no place for 7 runs" not in cluster.depthmup("launch", *study).stdout:
        assert 3 < len(jobs_of_runs()) <= 5
    submissions = load_all(held.parent / "runs" / "tiny" / "jobs")
    names = [name for submission in submissions for task in submission.tasks for name in task]
    assert len(names) == len(set(names)) == 5  # nothing twice, and no trace of what was refused
    cluster.empty_the_queue()

    cluster.call(
        "sacctmgr", "-Q", "-i", "modify", "user", user, "where", "account=few", "set", "MaxSubmitJobs=1", root=True
    )
    refused = cluster.depthmup("transfer", *study, "study.name=one", "--detach")
    assert refused.returncode == 2
    assert "AssocMaxSubmitJobLimit" in refused.stderr
    assert "--detach; or wait for them: " in refused.stderr
    assert jobs_of_runs() == []
    assert "1 run submitted" in cluster.depthmup("launch", *study, "study.name=one").stdout
    assert len(jobs_of_runs()) == 1


TRAIN = """
import json, os, sys
from pathlib import Path
submission = Path(sys.argv[-1])
for name in json.loads(submission.read_text())["tasks"][int(os.environ["SLURM_ARRAY_TASK_ID"])]:
    run = submission.parents[2] / "runs" / name
    with open(run / "times_trained", "a") as file:
        file.write("x")
    done = run / ".done.json"  # renamed once it is whole, as the worker does: others look at any time
    done.write_text(json.dumps({"outcome": "completed", "step": 12, "minival_loss": 2, "seconds": 1}))
    done.rename(run / "done.json")
"""


@pytest.fixture
def quick(cluster: Cluster, study_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of twelve runs for users who may submit four jobs. Its jobs run TRAIN instead of the worker. This process
    is on the cluster, too."""
    cluster.empty_the_queue()
    cluster.call("sacctmgr", "-Q", "-i", "add", "account", "waves", "MaxSubmitJobs=4", root=True)
    cluster.call("sacctmgr", "-Q", "-i", "add", "user", cluster.call("id", "-un"), "account=waves", root=True)
    trainer = study_file.with_name("train.py")
    trainer.write_text(TRAIN)
    content = yaml.safe_load(study_file.read_text())
    python = f"{sys.executable} -S {shlex.quote(str(trainer))}"
    content["launch"] = {"cluster": "slurm", "account": "waves", "python": python}
    study_file.write_text(yaml.safe_dump(content))
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    return study_file


def test_a_study_larger_than_the_limit_is_trained_in_waves_by_who_waits_and_by_the_job_after_the_runs(
    cluster: Cluster, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "SLURM_POLL_SECONDS", 0.2)

    def waves(study: Study) -> list[int]:
        """Runs of each submission; all are done, each was trained once."""
        assert [(run.directory.path / "times_trained").read_text() for run in study.runs] == ["x"] * 12
        submissions = load_all(study.file.directory / "jobs")
        return [sum(map(len, submission.tasks)) for submission in submissions if not submission.goes_on]

    study = Study(quick, read_study(quick, ("study.name=waited",)))
    transfer.wait(study, transfer.launch(study), Console(quiet=True))
    trained = waves(study)
    assert sum(trained) == 12
    assert max(trained) <= 4
    assert len(trained) >= 3

    detached = (quick, "study.name=detached", "launch.runs_per_job=3")  # four jobs, and the one that goes on
    said = cluster.depthmup("transfer", *detached, "--detach")
    assert "more when Slurm has place for them" in said.stdout, said.stderr
    study = Study(quick, read_study(quick, tuple(map(str, detached[1:]))))
    wait_for(lambda: not study.pending() and not cluster.queued("-detached-"))
    trained = waves(study)
    assert sum(trained) == 12
    assert len(trained) >= 2
    assert (study.file.directory / "report.md").exists()


@pytest.mark.parametrize(
    ("override", "words", "key"),
    [
        ("launch.partition=nowhere", "invalid partition", "launch.partition"),
        ("launch.memory_gb=9999", "", "memory_gb"),
        ("launch.gpus_per_node=99", "", "gpus_per_node"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words_with_the_key_and_leaves_nothing(
    cluster: Cluster, held: Path, override: str, words: str, key: str
) -> None:
    held_jobs_are_not_checked = "launch.sbatch={}"
    refused = cluster.depthmup("launch", held, override, held_jobs_are_not_checked)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert words in refused.stderr
    assert key in refused.stderr
    assert cluster.queued() == []
    assert list(held.parent.glob("runs/tiny/jobs/*")) == []


def test_where_slurm_refuses_the_job_after_the_runs_nothing_is_submitted_and_what_to_type_is_said(
    cluster: Cluster, held: Path
) -> None:
    there_is_none = "launch.continuation={partition: nowhere}"
    refused = cluster.depthmup("transfer", held, "--detach", there_is_none)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "invalid partition" in refused.stderr
    assert "none of them was submitted" in refused.stderr
    assert "--detach; or wait for them: " in refused.stderr
    assert cluster.queued() == []
    assert "nothing goes on by itself" in cluster.depthmup("status", held).stdout
    assert "12 runs submitted" in cluster.depthmup("transfer", held, "--detach").stdout
    assert len(cluster.queued()) == 6 + 1


def test_the_dry_run_prints_the_script_that_slurm_takes(cluster: Cluster, held: Path, tmp_path: Path) -> None:
    script = cluster.depthmup("launch", held, "--dry-run").stdout
    assert "#SBATCH --array=0-5%3" in script
    assert not (held.parent / "runs").exists()
    file = tmp_path / "job.sh"
    file.write_text(script)
    checked = subprocess.run(["sbatch", "--test-only", file], env=cluster.environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_probe_proposes_a_profile_that_launch_takes(cluster: Cluster, held: Path) -> None:
    proposed = cluster.depthmup("cluster", "probe").stdout
    profile = yaml.safe_load(proposed)
    assert profile["gpus_per_node"] == 1
    assert profile["partition"] == "main"
    folder = held.parent / "cluster"
    folder.mkdir()
    (folder / "mine.yaml").write_text(proposed)
    content = yaml.safe_load(held.read_text())
    content["launch"] = {"sbatch": {"hold": True}}
    content["train"]["pack"] = None
    held.write_text(yaml.safe_dump(content))
    launched = cluster.depthmup("launch", held, "--cluster", "mine")
    assert launched.returncode == 0, launched.stderr
    assert len(cluster.queued("tiny")) == 2  # twelve runs: on a GPU a job is a pack, here one of each depth
    unknown = cluster.depthmup("launch", held, "--cluster", "other")
    assert unknown.returncode == 2
    assert "mine" in unknown.stderr


@pytest.mark.parametrize("sudo", [None, "exit 1"])
def test_a_user_without_sudo_has_these_tests_skipped_with_the_reason_unless_they_must_run(
    sudo: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sudo:
        (tmp_path / "sudo").write_text(f"#!/bin/sh\n{sudo}\n")
        (tmp_path / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("DEPTHMUP_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Slurm here: needs root or sudo without a password"):
        next(start())
    monkeypatch.setenv("DEPTHMUP_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="must run here: needs root or sudo without a password"):
        next(start())


def test_without_sbatch_on_path_one_line_says_so(study_file: Path) -> None:
    cluster = Cluster(Path("/nowhere"))
    environment = {"PATH": os.path.dirname(os.sys.executable)}
    refused = cluster.depthmup("launch", study_file, "--cluster", "slurm", env=environment)
    assert refused.returncode == 2
    assert "on PATH" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (study_file.parent / "runs" / "tiny" / "runs").exists()


def test_jobs_that_slurm_has_forgotten_are_no_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster.environment[key])
    assert slurm.read_queue(["999999"]) == []
    assert slurm.read_queue(["999998", "999999"], ["depthmup-nowhere-1", "depthmup-nowhere-2"]) == []


def test_a_launch_of_another_user_finds_the_jobs_and_waits_its_turn(cluster: Cluster, held: Path) -> None:
    limit = "launch.max_running=2"
    assert "8 runs submitted" in cluster.depthmup("launch", held, limit, "study.parameterizations=[sp]").stdout
    second = cluster.depthmup("launch", held, limit, env={"USER": "somebody", "LOGNAME": "somebody"})
    assert "4 runs submitted" in second.stdout, second.stderr
    assert len(cluster.queued("-tiny-")) == 6
    waits = cluster.call("squeue", "--noheader", "--format=%i %E").splitlines()
    assert sum("afterany" in line for line in waits) == 1
