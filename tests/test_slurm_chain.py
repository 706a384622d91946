"""The main path on a real Slurm while nobody waits: proxy study, scale, target, report; several runs in one job; in a
folder whose name has to be quoted."""

import json
from pathlib import Path
from typing import Any

import yaml

from depthmup.launch.jobs.submission import load_all
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from slurm_cluster import Cluster, wait_for
from test_launch_scale import finish


def attempts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "attempts.jsonl").read_text().splitlines()]


def test_the_path_goes_on_to_the_target_after_the_user_has_logged_out_or_stops_with_the_reason(
    cluster: Cluster, study_file: Path
) -> None:
    content = yaml.safe_load(study_file.read_text())
    values = {"first": "2**-8", "last": "2**-1"}
    content["study"] |= {"parameterizations": ["depth_mup"], "values": values, "design": "grid", "seeds": [0, 1]}
    content["study"]["directory"] = str(study_file.parent / "the job it's")
    content["launch"] = {"cluster": "slurm", "gpus_per_node": 1, "runs_per_job": 4, "runs_per_gpu": 2}
    content["launch"]["setup"] = ["set -euo pipefail"]
    study_file.write_text(yaml.safe_dump(content))
    study = Study(study_file, read_study(study_file))
    finish(study, best=-4.8)  # runs as short as a test's have no optimum
    left_to_train = [run.directory.path for run in study.runs if run.value == 2**-1]
    for path in left_to_train:
        (path / "done.json").unlink()
    target = study_file.parent / "large.yaml"
    single = {"runs_per_job": 1, "runs_per_gpu": 1}
    target.write_text(yaml.safe_dump({"model": {"width": 16}, "train": {"samples": 640}, "launch": single}))
    open_ended = (
        "study.name=open",
        "study.values=[2**-6, 2**-5, 2**-4]",
        "study.sizes=[{width: 8, depth: 3}]",
        "study.seeds=[0]",
        "launch.runs_per_gpu=1",
    )

    with cluster.nothing_begins():
        for overrides in ((), open_ended):
            left = cluster.depthmup("transfer", study_file, *overrides, "--target", target, "--detach")
            assert left.returncode == 0, left.stderr
        again = cluster.depthmup("transfer", study_file, "--target", target, "--detach")
        assert "goes on after" in again.stdout, again.stdout + again.stderr
        assert len(cluster.queued("-tiny-then-")) == 1  # not a second one
        folder = study_file.parent / "the job it's" / "tiny"
        assert "then: job" in cluster.depthmup("status", folder).stdout

    stopped = folder.with_name("open")
    wait_for(lambda: (stopped / "report.md").exists() and not cluster.queued("-open-"), 240)
    assert "this study does not say which value to use" in cluster.depthmup("status", stopped).stdout
    assert not (stopped / "open_target.yaml").exists()

    report = folder / "report.md"
    wait_for(lambda: report.exists() and "Target of width 16, depth 3" in report.read_text(), 240)
    wait_for(lambda: not cluster.queued("-then-"))
    assert "after the runs: Target of width 16, depth 3" in cluster.depthmup("status", folder).stdout
    (done,) = folder.parent.glob("tiny_target/runs/*/done.json")
    assert json.loads(done.read_text())["samples"] == 640
    for submission in load_all(folder / "jobs"):
        assert submission.log(0).exists(), list(submission.path.iterdir())

    jobs: dict[str, list[int]] = {}
    for path in left_to_train:
        (begun,) = attempts(path)
        jobs.setdefault(begun["job"], []).append(begun["pid"])
    assert list(map(len, jobs.values())) == [4]
    assert all(len(set(pids)) == 2 for pids in jobs.values())  # two processes share a job's runs

    small = target.with_name("small.yaml")
    small.write_text(target.read_text())
    with cluster.nothing_begins():
        both = cluster.depthmup("transfer", study_file, "--target", target, "--target", small, "--detach")
        assert both.returncode == 0, both.stderr
        (of_target,) = {element.split("_")[0] for element in cluster.queued("-tiny_target_small-")}
        (then,) = {element.split("_")[0] for element in cluster.queued("-tiny-then-")}
        cancelled = cluster.depthmup("cancel", folder)
        assert cancelled.stdout.splitlines() == [
            f"Stopped: job {then}, which was to go on after the runs",
            f"Stopped, of the target {folder}_target_small: job {of_target}",
        ]
        wait_for(lambda: not cluster.queued("-tiny"))
        shown = cluster.depthmup("status", folder).stdout
        assert shown.splitlines()[-1] == "1 cancelled"  # the last of the path
