"""What `depthmup status` says on a real Slurm while a node fails, a job is requeued, and a study is cancelled."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from depthmup.launch.jobs.cancel import cancel
from depthmup.launch.jobs.states import RunState, take_snapshot
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from depthmup.train import lock
from slurm_cluster import Cluster
from test_slurm_survival import NODE, events, slow_down

# Processes load for three seconds longer. One that is silent for 6 s is taken for dead, as after 60 s elsewhere.
SLOW_TO_BEGIN = """
import sys
from depthmup.train import lock
lock.BEAT, lock.SILENCE = 1.0, 6.0
if os.path.exists(slow) and "--ended" not in sys.argv:
    time.sleep(8)
"""


@pytest.fixture
def study(cluster: Cluster, study_file: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """One run that lasts for minutes. This process is on the cluster, too."""
    slow_down(study_file.parent, 0.3, SLOW_TO_BEGIN)
    content = yaml.safe_load(study_file.read_text())
    content["study"] |= {"parameterizations": ["depth_mup"], "values": [2**-6], "sizes": [{"width": 8, "depth": 3}]}
    content["train"] |= {"samples": 32 * 2000, "checkpoint_every": 5}
    setup = [f"export PYTHONPATH={study_file.parent}"]
    content["launch"] = {"cluster": "slurm", "cpus_per_task": NODE, "setup": setup}
    study_file.write_text(yaml.safe_dump(content))
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(lock, "SILENCE", 6.0)
    cluster.empty_the_queue()
    return Study(study_file, read_study(study_file))


def watch(study: Study, until: Callable[[RunState], bool]) -> list[tuple[int, RunState]]:
    """(how often the run had begun, where it stood) again and again until `until`, each only once in a row. It had
    begun so often before status looked and after it."""
    (run,) = study.runs
    found: list[tuple[int, RunState]] = []
    end = time.monotonic() + 180

    def begun() -> int:
        return len(events(run.directory.path).get("started", []))

    while not (found and until(found[-1][1])):
        assert time.monotonic() < end, found
        before, (now,) = begun(), take_snapshot(study).runs
        if before == begun() and (not found or found[-1][1] != now):
            found.append((before, now))
        time.sleep(0.1)
    return found


def is_running(found: RunState) -> bool:
    return found.state == "running"


@pytest.mark.long
def test_a_run_is_called_running_only_while_its_process_has_begun_and_may_live(cluster: Cluster, study: Study) -> None:
    launched = cluster.depthmup("launch", study.path)
    assert launched.returncode == 0, launched.stderr
    first = watch(study, is_running)
    assert [found.state for _, found in first] == [*dict.fromkeys(found.state for _, found in first)]
    assert {found.state for begun, found in first if not begun} <= {"waiting", "starting"}
    assert "starting" in {found.state for _, found in first}

    (run,) = study.runs
    watch(study, lambda found: bool(run.directory.list_checkpoint_steps()))
    (task,) = take_snapshot(study).queue
    node = cluster.node_of(task.element)
    cluster.node("crash", node)
    crashed = watch(study, is_running)
    cluster.node("start", node)
    assert {found.state for begun, found in crashed if begun == 1} <= {"ending", "waiting", "starting"}
    assert any("has begun, requeued (node failed or killed), waits for process" in found.remark for _, found in crashed)
    assert crashed[-1][0] == 2
    assert crashed[-1][1].remark == "began again (node failed or killed)"

    cluster.call("scontrol", "requeue", task.element)
    watch(study, lambda found: not is_running(found))  # it saves first
    requeued = watch(study, is_running)
    assert {found.state for begun, found in requeued if begun == 2} <= {"ending", "waiting", "starting"}
    assert requeued[-1][0] == 3

    cancel(study)
    cancelled = watch(study, lambda found: found.state == "cancelled")
    assert {found.state for _, found in cancelled} <= {"ending", "cancelled"}
    assert json.loads((run.directory.path.parents[1] / "asked.json").read_text())["command"] == "cancel"
