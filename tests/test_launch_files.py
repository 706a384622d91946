"""Files that a command cannot read, and folders that it cannot write: one line says which, and nothing starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from depthmup.launch.cli import main
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from test_launch_scale import finish, two_seeds
from train_processes import START

ATTEMPT = '{"time": 1.0}\n'
DAMAGED = {  # paths in the study's folder, RUN for the first run's: what another version, or a full disk, left there
    "RUN/done.json": '{"minival_loss": 0.3}',
    "RUN/failed.json": "",
    "RUN/attempts.jsonl": ATTEMPT,
    "RUN/metrics.jsonl": '{"loss": 0.3}\n',
    "jobs/depthmup-tiny-0/submission.json": '{"tasks": [["abc"]]}',
    "jobs/depthmup-tiny-0/job.json": '{"id": 7}',
    "jobs/depthmup-tiny-0/stopped.jsonl": '{"job": "7_0"}\n',
    "local/local-0/submission.json": "[]",
    "added_values.json": '{"depth_mup": [0.5]}',
    "added_seeds.json": '[[{"parameterization": "sp", "width": 8, "depth": 3, "values": [0.5]}]]',
}


def said(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends 2."""
    monkeypatch.setattr(sys, "argv", ["depthmup", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("place", DAMAGED)
def test_a_damaged_file_or_one_of_another_version_is_named_and_nothing_starts(
    study_file: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    run = study.runs[0].directory
    if place.endswith("metrics.jsonl"):  # status reads it of runs that failed, too
        run.write_failed({"error": "mended"})
    file = study.file.directory / place.replace("RUN", f"runs/{run.path.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.parent.parent.name == "jobs":  # status reads what lies beside a submission of a run that is not done
        (file.parent / "submission.json").write_text(json.dumps({"tasks": [[run.path.name]], "details": {}}))
        monkeypatch.setattr("depthmup.launch.jobs.slurm.read_queue", lambda ids, names: [])
    file.write_text(DAMAGED[place])
    before = sorted(study.file.directory.rglob("*"))
    assert f"{file}: damaged, or written by another version" in said(["status", str(study_file)], monkeypatch, capsys)
    assert sorted(study.file.directory.rglob("*")) == before


def test_where_nothing_can_be_written_the_command_says_so_and_a_report_is_printed_all_the_same(
    study_file: Path, tmp_path: Path
) -> None:
    two_seeds(study_file)
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5.5)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    as_a_user = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # root may write anywhere

    def refused(*command: object) -> subprocess.CompletedProcess[str]:
        whole = [*as_a_user, sys.executable, "-c", START, *map(str, command)]
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "Permission denied: use another file or folder" in done.stderr
        return done

    for command in (("scale", study_file, "--out", locked / "large.yaml"), ("report", study_file, "--publish", locked)):
        assert str(locked) in refused(*command).stderr
    study.file.directory.chmod(0o555)
    assert "depth_mup: transfers" in refused("report", study_file).stdout
