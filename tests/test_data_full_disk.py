"""On a full disk nothing half-written counts as whole, nothing is left lying about, and the message names the file."""

import io
import json
import os
import resource
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from depthmup.data.files import write_atomically
from depthmup.data.index import Index
from depthmup.data.pack import pack
from depthmup.data.scan import index_shards
from depthmup.launch.cli import main
from depthmup.launch.jobs.attempts import note_attempt, read_attempts
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from depthmup.train.__main__ import train
from depthmup.train.record import save_weights
from depthmup.train.rundir import EXIT_USER_ERROR, RunDirectory, add_line, parse_lines
from image_sets import make_folder


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: a write then writes what still fits, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def said(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int) -> str:
    """The one line of a command that has no room for files beyond `size` bytes, and ends 2."""
    monkeypatch.setattr(sys, "argv", ["depthmup", *command])
    with room(size), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def whole_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [0, 100, 3000, 20_000])
def test_a_pack_names_the_file_leaves_none_half_written_and_goes_on_later(tmp_path, monkeypatch, capsys, size):
    source, out = make_folder(tmp_path / "images", samples=30, size=(16, 16)), tmp_path / "shards"
    line = said(["pack", str(source), str(out)], monkeypatch, capsys, size)
    assert line.startswith(f"depthmup: {out}/")
    assert line.endswith(": File too large: free some space there")
    assert not [path for path in out.glob("*") if ".tmp" in path.name or path.suffix == ".tar"]
    index, _ = pack(str(source), out)
    assert index.describe() == "30 samples in 1 shard"
    pack(str(source), tmp_path / "other")
    assert whole_files(out).items() - {("pack.json", b"")} >= {
        (name, content) for name, content in whole_files(tmp_path / "other").items() if name != "pack.json"
    }


def test_an_archive_that_cannot_be_unpacked_names_the_folder_and_not_the_archive(tmp_path, monkeypatch, capsys):
    source = make_folder(tmp_path / "images", samples=30, size=(16, 16))
    with tarfile.open(tmp_path / "images.tgz", "w:gz") as archive:
        archive.add(source, "images")
    out = tmp_path / "shards"
    line = said(["pack", str(tmp_path / "images.tgz"), str(out)], monkeypatch, capsys, 5000)
    assert line == f"depthmup: {out}/.source.tar.tmp: File too large: free some space there"
    assert not out.exists()


def test_an_index_that_does_not_fit_is_none(tmp_path, monkeypatch, capsys):
    root = tmp_path / "shards"
    pack(str(make_folder(tmp_path / "images", samples=30)), root)
    for path in [*root.glob("*.npz"), *root.glob("*.json")]:
        path.unlink()
    for size in (100, 500):
        line = said(["index", str(root), "--processes", "1"], monkeypatch, capsys, size)
        assert "File too large" in line
        assert str(root) in line
        assert not list(root.glob("*index.json"))
        assert not list(root.glob(".*.tmp"))
    assert index_shards(str(root), processes=1) == Index.load(root)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with room(1000), pytest.raises(OSError, match="File too large") as refused:
        write_atomically(path, b"x" * 5000)
    assert refused.value.filename == str(path)
    assert whole_files(tmp_path) == {"file": b"before"}


def test_weights_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"a": torch.zeros(10)})
    with room(1000), pytest.raises(OSError, match="File too large") as refused:
        save_weights(path, {"a": torch.ones(5000)})
    assert refused.value.filename == str(path)
    assert list(whole_files(tmp_path)) == [path.name]
    assert torch.equal(load_file(path)["a"], torch.zeros(10))


def test_a_runs_configuration_is_whole_or_as_it_was(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file))
    study.write()
    for run in study.runs:
        run.directory.config.write_text("model: {}")
    with room(100), pytest.raises(Exception, match="File too large"):
        study.write()
    assert {run.directory.config.read_text() for run in study.runs} == {"model: {}"}


def test_half_a_line_is_taken_off_before_the_next_one_and_a_study_stays_readable(tmp_path):
    directory = RunDirectory(tmp_path)
    note_attempt(directory, "started", step=0)
    written = (tmp_path / "attempts.jsonl").stat().st_size
    with room(written + 10), pytest.raises(OSError, match="File too large") as refused:
        note_attempt(directory, "interrupted")
    assert refused.value.filename == str(tmp_path / "attempts.jsonl")
    assert (tmp_path / "attempts.jsonl").stat().st_size == written + 10  # half a line
    assert [line["event"] for line in read_attempts(directory)] == ["started"]
    note_attempt(directory, "started", step=4)
    assert [line["event"] for line in read_attempts(directory)] == ["started", "started"]


def test_the_last_line_of_metrics_is_found_however_long_it_is(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_last_metrics() is None
    for step, length in ((1, 10), (2, 30_000), (3, 5000), (4, 1)):
        line = {"step": step, "bad_samples/" + "x" * length: 1}
        add_line(directory.metrics, line)
        assert directory.read_last_metrics() == line
    with open(directory.metrics, "a") as file:
        file.write(json.dumps({"step": 5})[:-3])
    assert directory.read_last_metrics() == line
    assert len(parse_lines(directory.metrics, "step")) == 4


@pytest.mark.parametrize("file", ["", "/runs/x/config.yaml"])
def test_a_run_without_room_ends_in_one_line_that_names_the_place(run_config, tmp_path, monkeypatch, capsys, file):
    def run(*arguments):
        raise OSError(28, "No space left on device", *([file] if file else []))

    monkeypatch.setattr("depthmup.train.loop.run", run)
    assert train(run_config, RunDirectory(tmp_path / "run")) == EXIT_USER_ERROR
    place = file or tmp_path / "run"
    assert capsys.readouterr().err == f"error: {place}: No space left on device: free some space there\n"


def test_output_that_nobody_can_take_is_said_without_a_traceback(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["depthmup", "--help"])
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "depthmup: standard output: No space left on device: free some space there\n"


def test_a_closed_output_is_no_reason_to_fail(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["depthmup", "inspect", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no index.json" in capsys.readouterr().err
    sys.stdout.close()


def test_a_name_that_the_outputs_encoding_lacks_is_written_all_the_same(monkeypatch, tmp_path):
    make_folder(tmp_path / "images", samples=4, classes=1)
    os.rename(tmp_path / "images" / "class0", os.fsencode(tmp_path) + "/images/café".encode())
    output = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["depthmup", "pack", str(tmp_path / "images"), str(tmp_path / "shards")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert (ended.value.code, "train has 1 class: caf\\xe9 4" in output.getvalue().decode()) == (0, True)


def test_a_terminal_without_columns_gets_the_output(monkeypatch, capsys, tmp_path):
    make_folder(tmp_path / "images", samples=4, classes=1)
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys, "argv", ["depthmup", "pack", str(tmp_path / "images"), str(tmp_path / "shards")])
    with pytest.raises(SystemExit):
        main()
    assert "train: 4 images in 1 shard" in capsys.readouterr().out


def test_an_empty_path_is_refused(monkeypatch, capsys, tmp_path):
    """A variable that is not set, in quotes: it would be the working folder."""
    for command in (["pack", str(tmp_path), ""], ["pack", "", str(tmp_path / "out")], ["index", ""], ["plan", ""]):
        monkeypatch.setattr(sys, "argv", ["depthmup", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("depthmup: an argument is empty")
