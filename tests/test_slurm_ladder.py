"""A ladder of horizons on a real Slurm: each job trains a trunk and then its branches, and is broken on the way."""

from pathlib import Path

import pytest

from depthmup.launch.jobs.submission import load_all
from depthmup.train.loop import run
from depthmup.train.trunk import read_trunk
from slurm_cluster import Cluster, wait_for
from test_launch_ladder import ladder
from test_slurm_survival import NODE, Job, done, events, slow_down, steps
from train_configs import timeless_metrics

SOON_TAKEN_FOR_DEAD = """
from depthmup.train import lock
lock.BEAT, lock.SILENCE = 1.0, 6.0
"""


@pytest.mark.long
def test_a_ladder_whose_jobs_are_requeued_and_killed_has_the_results_of_runs_begun_from_nothing(
    cluster: Cluster, study_file: Path, tmp_path: Path
) -> None:
    slow = slow_down(study_file.parent, 1, SOON_TAKEN_FOR_DEAD)
    place = {"cluster": "slurm", "cpus_per_task": NODE, "setup": [f"export PYTHONPATH={study_file.parent}"]}
    study = ladder(study_file, values=3, launch=place, train={"log_every": 1})
    launched = cluster.depthmup("launch", study_file)
    assert "9 runs submitted" in launched.stdout, launched.stderr
    (submission,) = load_all(study.file.directory / "jobs")
    runs = {each.directory.path.name: each for each in study.runs}
    assert [[runs[name].trunk is None for name in task] for task in submission.tasks] == [[True, False, False]] * 3

    assert submission.job_id
    trunks = [runs[task[0]].directory.path for task in submission.tasks]
    job = Job(cluster, study_file, submission.job_id, trunks)
    for trunk in trunks:
        wait_for(lambda trunk=trunk: list(trunk.glob("checkpoints/step-*")))
    cluster.call("scontrol", "requeue", job.element(0))  # in its trunk
    branches = [runs[name] for name in submission.tasks[1][1:]]
    branch = max(branches, key=lambda each: each.config.train.num_steps).directory.path
    wait_for(lambda: steps(branch))
    node = cluster.node_of(job.element(1))  # in a branch
    cluster.node("crash", node)
    cluster.node("start", node)
    wait_for(lambda: len(events(branch)["started"]) > 1)
    slow.unlink()
    wait_for(lambda: all(done(each.directory.path) for each in study.runs))
    wait_for(lambda: not cluster.queued())

    for planned in study.runs:
        alone = tmp_path / "alone" / planned.directory.path.name
        result, its = run(planned.config, alone), planned.done()
        assert its
        assert {key: its[key] for key in result if key != "seconds"} == {
            key: value for key, value in result.items() if key != "seconds"
        }
        assert timeless_metrics(planned.directory.path) == timeless_metrics(alone)
        taken = read_trunk(planned.directory)
        assert bool(taken and taken.taken) == (planned.trunk is not None)
    assert len(events(trunks[0])["started"]) == 2
    assert len(events(trunks[1])["started"]) == len(events(trunks[2])["started"]) == 1
