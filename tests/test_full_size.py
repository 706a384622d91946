"""Studies at full size are trained in pieces, on machines of which nothing stays but small files."""

import json
import sys
from pathlib import Path
from threading import Event, Thread

import pytest
from benchmarks import full_size
from benchmarks.full_size import Step, main, restore

from depthmup.data.errors import UserError


def call(monkeypatch: pytest.MonkeyPatch, steps: list[Step], archive: Path, folder: Path, minutes: float = 5) -> None:
    arguments = ["--minutes", str(minutes), "--archive", str(archive), "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["full_size", *arguments])
    main(steps)


@pytest.mark.long
def test_a_call_on_another_machine_goes_on_from_the_archive(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first call ends with one run under way: that run alone is trained anew."""
    archive, here, there = tmp_path / "kept.zip", tmp_path / "here", tmp_path / "there"
    few = (
        "study.parameterizations=[depth_mup]",
        "study.sizes=[{width: 8, depth: 3}]",
        "study.values=[0.01]",
        "study.seeds=[0,1]",
    )
    step = Step(study_file, few)
    call(monkeypatch, [step], archive, here)
    said = capfd.readouterr()
    assert "1 of 1 studies are finished" in said.out, said
    runs = sorted((here / "tiny" / "runs").iterdir())
    assert len(runs) == 2
    assert json.loads((here / "tiny" / "report.json").read_text())

    (runs[1] / "done.json").unlink()  # as a call leaves it that ends in the middle of this run
    full_size.save(here, archive)
    restore(archive, there)
    kept = there / "tiny" / "runs"
    assert [path.name for path in sorted(kept.iterdir())] == [runs[0].name]
    assert not list(there.rglob("*.safetensors"))

    call(monkeypatch, [step], archive, there)
    said = capfd.readouterr()
    assert "1 of 1 studies are finished" in said.out, said
    first = [(folder / runs[0].name / "done.json").read_bytes() for folder in (here / "tiny" / "runs", kept)]
    assert first[0] == first[1]
    assert (kept / runs[1].name / "done.json").exists()


def test_a_call_stops_its_study_at_the_end_of_its_time(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, folder = tmp_path / "kept.zip", tmp_path / "here"
    long = Step(study_file, ("train.samples=1_000_000_000",))
    monkeypatch.setattr(full_size, "SAVE_SECONDS", 0.2)
    call(monkeypatch, [long, long], archive, folder, minutes=0.1)
    assert "0 of 2 studies are finished" in capfd.readouterr().out
    assert archive.exists()


def test_what_a_run_writes_while_results_are_looked_for_does_not_matter(tmp_path: Path) -> None:
    runs = tmp_path / "study" / "runs"
    for name in ("ended", "running"):
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "metrics.jsonl").write_text("{}")
    (runs / "ended" / "done.json").write_text("{}")
    stop = Event()

    def write_checkpoints() -> None:
        while not stop.is_set():
            (runs / "running" / "checkpoints" / "tmp-step-1").mkdir()
            (runs / "running" / "checkpoints" / "tmp-step-1").rmdir()

    writer = Thread(target=write_checkpoints)
    writer.start()
    try:
        found = {tuple(full_size.find_results(tmp_path)) for _ in range(500)}
    finally:
        stop.set()
        writer.join()
    assert found == {(runs / "ended" / "done.json", runs / "ended" / "metrics.jsonl")}


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "kept.zip"
    archive.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"kept.zip: not an archive of studies .*name another --archive"):
        restore(archive, tmp_path)
