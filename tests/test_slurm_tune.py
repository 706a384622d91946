"""A search on a real Slurm that loses its launcher, a worker, a node, the end of its journal, or the job that goes on
with it, and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.opened import open_planned
from depthmup.launch.runs.search import Search
from slurm_cluster import Cluster, wait_for
from test_slurm_launch import write_sbatch
from test_slurm_survival import BATCH, NODE, Job, events, slow_down, steps
from train_processes import START

STEPS, TRIALS = 20, 4  # each step takes a second at first: what befalls the runs has the time for it


def search_in(place: Path) -> Search:
    """The search of a folder or of a file."""
    search = open_planned(place, read_study_or_run(place))
    assert isinstance(search, Search)
    return search


def write_search(settings: dict[str, Any], folder: Path) -> Path:
    """Its file; its jobs have `folder` on PYTHONPATH."""
    content = {
        **settings,
        "data": {**settings["data"], "num_streams": BATCH},
        "train": {
            **settings["train"],
            **{"samples": BATCH * STEPS, "global_batch_size": BATCH},
            **{"log_every": 1, "checkpoint_every": 2},
        },
        "study": {"name": "search", "directory": str(folder / "runs")},
        "tune": {
            "space": {"optimizer.lr": {"first": "2**-9", "last": "2**-4"}},
            **{"trials": TRIALS, "batch": 3, "rerun": 1, "rerun_seeds": 2},
        },
        "launch": {"cluster": "slurm", "cpus_per_task": NODE, "setup": [f"export PYTHONPATH={folder}"]},
    }
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def first_job(cluster: Cluster, file: Path, folder: Path) -> Job:
    """The array of the search's first batch."""
    (submission,) = (path for path in folder.glob("jobs/*/submission.json") if "-then-" not in str(path))
    job_id = json.loads((submission.parent / "job.json").read_text())["job_id"]
    tasks = json.loads(submission.read_text())["tasks"]
    return Job(cluster, file, job_id, [folder / "runs" / names[0] for names in tasks])


def check_all_is_trained_once(search: Search, folder: Path) -> None:
    assert len(search.trials()) == TRIALS
    assert {run.directory.path for run in search.runs} == set(folder.glob("runs/*"))
    assert len(search.runs) == TRIALS + 2  # and the winner with two new seeds
    for run in search.runs:
        done = run.done()
        assert done is not None
        assert done["step"] == STEPS or done["outcome"] == "diverged"
        trained = steps(run.directory.path)
        assert trained == sorted(set(trained)), run


def test_no_suggestion_is_lost_or_trained_twice_whatever_dies(
    cluster: Cluster, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    slow = slow_down(tmp_path, 1)
    file, folder = write_search(run_settings, tmp_path), tmp_path / "runs" / "search"

    with open(tmp_path / "launcher.log", "wb") as log:
        command = [sys.executable, "-c", START, "tune", str(file)]
        launcher = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
    wait_for(lambda: len(list(folder.glob("jobs/*/job.json"))) == 1)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    first = [trial.params for trial in search_in(folder).trials()]
    assert len(first) == 3

    job = first_job(cluster, file, folder)
    wait_for(lambda: all(list(run.glob("checkpoints/step-*")) for run in job.runs))
    node = cluster.node_of(job.element(0))
    cluster.node("crash", node)
    cluster.node("start", node)
    os.kill(job.worker(1), signal.SIGKILL)
    journal = folder / "search.journal"
    os.truncate(journal, journal.stat().st_size - 40)  # within its last suggestion
    wait_for(lambda: len(events(job.runs[0])["started"]) > 1)
    slow.unlink()

    wait_for(lambda: not cluster.queued("-search-"))
    left = cluster.depthmup("tune", file, "--detach")  # the killed worker's run goes again
    assert left.returncode == 0, left.stderr
    wait_for(lambda: (folder / "best.yaml").exists() and not cluster.queued("-search-"), 600)

    search = search_in(folder)
    assert [trial.params for trial in search.trials()][:3] == first
    check_all_is_trained_once(search, folder)
    assert len(events(job.runs[0])["started"]) == len(events(job.runs[1])["started"]) == 2
    assert len(events(job.runs[2])["started"]) == 1
    assert "after the runs: Written: " in cluster.depthmup("status", folder).stdout


@pytest.mark.long
def test_a_search_that_nobody_waits_for_goes_on_though_its_launcher_and_the_job_that_goes_on_were_killed(
    cluster: Cluster, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    slow = slow_down(tmp_path, 1)
    file, folder = write_search(run_settings, tmp_path), tmp_path / "runs" / "search"
    killed = cluster.depthmup("tune", file, "--detach", env={"PATH": write_sbatch(cluster, tmp_path), "WHEN": "after"})
    assert killed.returncode == -9
    assert [name.split()[1] for name in cluster.queued("-search-")] == ["PENDING"]  # the job that goes on, alone
    first = [trial.params for trial in search_in(file).trials()]  # its folder does not know it yet
    assert len(first) == 3
    again = cluster.depthmup("tune", file, "--detach")
    assert again.returncode == 0, again.stderr
    (follower,) = {element.split("_")[0] for element in cluster.queued("-search-then-")}

    job = first_job(cluster, file, folder)
    wait_for(lambda: all(list(run.glob("checkpoints/step-*")) for run in job.runs))
    cluster.call("scontrol", "requeue", job.element(0))
    cluster.call("scancel", follower)
    wait_for(lambda: not cluster.queued("-search-then-"))
    shown = cluster.depthmup("status", folder).stdout
    (line,) = (line for line in shown.splitlines() if f"job {follower} has gone without a word: " in line)
    wait_for(lambda: len(events(job.runs[0])["started"]) > 1)
    printed = cluster.depthmup(*shlex.split(line.rpartition(": ")[2])[1:])
    assert printed.returncode == 0, printed.stderr
    slow.unlink()
    wait_for(lambda: (folder / "best.yaml").exists() and not cluster.queued("-search-"), 600)

    search = search_in(folder)
    assert [trial.params for trial in search.trials()][:3] == first
    check_all_is_trained_once(search, folder)
    assert "after the runs: Written: " in cluster.depthmup("status", folder).stdout
