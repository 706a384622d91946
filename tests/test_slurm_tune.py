"""A search on a real Slurm that loses its launcher, a worker, a node and the end of its journal, and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.opened import open_planned
from depthmup.launch.runs.search import Search
from slurm_cluster import Cluster, wait_for
from test_slurm_survival import NODE, Job, events, slow_down, steps
from train_processes import START

STEPS, LINE_EVERY, TRIALS = 100, 5, 4  # each line takes a second at first: what befalls the runs has the time for it


def search_in(folder: Path) -> Search:
    search = open_planned(folder, read_study_or_run(folder))
    assert isinstance(search, Search)
    return search


def test_no_suggestion_is_lost_or_trained_twice_whatever_dies(
    cluster: Cluster, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    slow = slow_down(tmp_path, 1)
    content = {
        **run_settings,
        "train": {**run_settings["train"], "samples": 32 * STEPS, "log_every": LINE_EVERY, "checkpoint_every": 10},
        "study": {"name": "search", "directory": str(tmp_path / "runs")},
        "tune": {
            "space": {"optimizer.lr": {"first": "2**-9", "last": "2**-4"}},
            **{"trials": TRIALS, "batch": 3, "rerun": 1, "rerun_seeds": 2},
        },
        "launch": {"cluster": "slurm", "cpus_per_task": NODE, "setup": [f"export PYTHONPATH={tmp_path}"]},
    }
    file, folder = tmp_path / "search.yaml", tmp_path / "runs" / "search"
    file.write_text(yaml.safe_dump(content))

    with open(tmp_path / "launcher.log", "wb") as log:
        command = [sys.executable, "-c", START, "tune", str(file)]
        launcher = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
    wait_for(lambda: len(list(folder.glob("jobs/*/job.json"))) == 1)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    first = [trial.params for trial in search_in(folder).trials()]
    assert len(first) == 3

    (submission,) = folder.glob("jobs/*/submission.json")
    job_id = json.loads((submission.parent / "job.json").read_text())["job_id"]
    tasks = json.loads(submission.read_text())["tasks"]
    job = Job(cluster, file, job_id, [folder / "runs" / names[0] for names in tasks])
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
    assert len(search.trials()) == TRIALS
    assert {run.directory.path for run in search.runs} == set(folder.glob("runs/*"))
    assert len(search.runs) == TRIALS + 2  # and the winner with two new seeds
    for run in search.runs:
        done = run.done()
        assert done is not None
        assert done["step"] == STEPS or done["outcome"] == "diverged"
        trained = steps(run.directory.path)
        assert trained == sorted(set(trained)), run
    assert len(events(job.runs[0])["started"]) == len(events(job.runs[1])["started"]) == 2
    assert len(events(job.runs[2])["started"]) == 1
    assert "after the runs: Written: " in cluster.depthmup("status", folder).stdout
