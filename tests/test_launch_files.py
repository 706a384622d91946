"""Files that a command cannot read, and folders that it cannot write: one line says which, and nothing starts."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import output_of
from depthmup.data.errors import UserError
from depthmup.data.files import describe_full_disk
from depthmup.launch.cli import main
from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.launch.jobs.states import read_last_words
from depthmup.launch.jobs.submission import Submission, recover_ids, stop_causes
from depthmup.launch.reading import read_study
from depthmup.launch.report.converge import read_losses
from depthmup.launch.runs.study import Study
from depthmup.train.metrics import average_loss, truncate_after
from depthmup.train.rundir import RunDirectory
from test_launch_scale import finish, two_seeds

ATTEMPT = '{"time": 1.0}\n'
DAMAGED = {  # paths in the study's folder, RUN for the first run's: what another version, or a full disk, left there
    "RUN/done.json": '{"minival_loss": 0.3}',
    "RUN/failed.json": "",
    "RUN/attempts.jsonl": ATTEMPT,
    "RUN/metrics.jsonl": '{"loss": 0.3}\n',
    "jobs/depthmup-tiny-0/submission.json": '{"tasks": [["abc"]]}',
    "jobs/depthmup-tiny-0/job.json": '{"id": 7}',
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


@pytest.mark.parametrize("half", ["", '{"job": "7_0", "rest', '{"job": "7_0"}', "\x00\x00"])
def test_half_a_line_that_a_batch_script_left_on_a_full_disk_hides_neither_the_study_nor_later_lines(
    study_file: Path, half: str
) -> None:
    script = output_of("launch", study_file, "--cluster", "slurm", "--dry-run")
    (note,) = re.findall(r"printf '.*' \S+ \$restart \"\$cause\" >> \S+", script)
    stopped = study_file.parent / "stopped.jsonl"
    stopped.write_text(half)
    note = note.replace(note.split(">> ")[1], shlex.quote(str(stopped)))
    job = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "cause": "time limit"}
    for restart in ("2", "3"):
        subprocess.run(["bash", "-c", note], env={**os.environ, **job, "restart": restart}, check=True)
    stopped.write_text(stopped.read_text() + '{"job": "7_1", "rest')  # being written now
    assert stop_causes([Submission(study_file.parent, [], {})]) == {("7_1", 2): "time limit", ("7_1", 3): "time limit"}


HALF, WHOLE = '{"step": 4, "lo', '{"step": 2, "loss": 1.5}\n'


def test_half_a_line_at_the_end_of_metrics_is_read_over_and_one_before_it_is_named(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    readers: list[Callable[[], Any]] = [
        lambda: read_losses(directory)[1].tolist(),
        lambda: [average_loss(directory.metrics, 0)],
        lambda: [directory.read_last_metrics()["loss"]],  # type: ignore[index]
        lambda: truncate_after(directory.metrics, 10) or read_losses(directory)[1].tolist(),
    ]
    for read in readers:
        directory.metrics.write_text(WHOLE + HALF)
        assert read() == [1.5]
    assert directory.metrics.read_text() == WHOLE
    for damage in (HALF.encode() + b"\n", b"\xff\xfe\n", b"\x00\x00\n"):
        directory.metrics.write_bytes(damage + WHOLE.encode())
        for read in (readers[0], readers[1], readers[3]):
            with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
                read()


def test_a_copy_for_which_there_is_no_room_names_where_it_was_to_go() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "models/vit.py", None, "/scratch/code/vit.py")
    assert describe_full_disk(error, "x") == "/scratch/code/vit.py: No space left on device: free some space there"


@pytest.mark.parametrize("free", [0, 20_000, 1 << 30])
def test_a_job_that_could_not_even_print_is_told_from_a_full_disk(
    tmp_path: Path, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = Submission.create(tmp_path, "local", [["run"]], {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    full = f"; {submission.path}: No space left on device: free some space there"
    assert read_last_words((submission, 0)) == f"its job ended without a word{full if free < 1 << 20 else ''}"


def test_a_colleague_who_looks_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = Submission.create(tmp_path, "job", [["run"]], {})
    queue = [QueuedTask("7", 0, "PENDING", "Priority", submission.name)]
    with monkeypatch.context() as colleague:
        colleague.setattr(os, "access", lambda path, mode: False)
        recover_ids([submission], queue)
        assert submission.job_id is None
    recover_ids([submission], queue)
    assert submission.job_id == "7"


ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from depthmup.launch.cli import main
for command in json.load(sys.stdin):
    sys.argv, said, mistake = ["depthmup", *command], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(mistake):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, said.getvalue(), mistake.getvalue()]))
"""


def run_as_a_user(*commands: list[object]) -> list[tuple[int, str, str]]:
    """Code, output and errors of commands by somebody who, other than root, may not write everywhere."""
    as_a_user = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*as_a_user, sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps(commands, default=str),
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_folder_that_cannot_be_made_is_named_in_one_line(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_seeds(study_file)
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5.5)
    for words in (
        ["report", "--out", "/proc/none"],
        ["report", "--publish", "/proc/none"],
        ["scale", "--out", "/proc/none/large.yaml"],
        ["launch", "study.directory=/proc/none"],
        ["check", "--plot", "/proc/none/check.png", "--factors", "1,2", "--steps", "1", "--seeds", "2"],
    ):
        line = said([words[0], str(study_file), *words[1:]], monkeypatch, capsys)
        assert re.fullmatch(r"depthmup: .*/proc/none.*(No such file or directory|is not writable).*", line), line


def test_where_nothing_can_be_written_the_command_says_so_and_a_report_is_printed_all_the_same(
    study_file: Path, tmp_path: Path
) -> None:
    two_seeds(study_file)
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5.5)
    root, own, locked = study.file.directory, tmp_path / "own", tmp_path / "locked"
    locked.mkdir(mode=0o555)
    root.chmod(0o555)  # as a colleague's
    large, kept = locked / "large.yaml", own / "kept"
    (_, printed, told), written, *refused = run_as_a_user(
        ["report", study_file],
        ["report", study_file, "--out", own, "--publish", kept],
        ["report", study_file, "--out", own, "--publish", locked],
        ["transfer", study_file],
        ["scale", study_file, "--out", large],
        ["scale", study_file, "model.width=32", "--force"],
        ["check", study_file, "--factors", "1,2", "--steps", "1", "--seeds", "2"],
    )
    assert "depth_mup: transfers" in printed
    cure = f"To have it written to a folder of yours: depthmup report {root} --out FOLDER"
    assert told == f"depthmup: {root}/curves.png: Permission denied. {cure}\n"
    page = own / "tiny" / "report.html"
    assert (written[0], f"Report: {page}" in written[1]) == (0, True), written
    assert "<svg" in page.read_text()
    assert {path.name for path in kept.iterdir()} == {"tiny.json", "tiny-curves.png", "tiny-drift.png"}
    assert [(code, mistake) for code, _, mistake in refused] == [
        (2, f"depthmup: {locked}/tiny-curves.png: Permission denied: use another file or folder\n"),
        (2, told),
        (2, f"depthmup: {large}: {locked} is not writable: --out FILE names another file\n"),
        (2, f"depthmup: {root}/tiny_target.yaml: {root} is not writable: --out FILE names another file\n"),
        (2, f"depthmup: {root}/check_depth_mup.png: {root} is not writable: --plot FILE names another file\n"),
    ]
    assert not list(root.glob(".*.tmp"))
