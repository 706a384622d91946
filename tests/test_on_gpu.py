"""All that a GPU is to measure, in pieces: what has ended is not measured again, and what has not begins anew."""

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.on_gpu import Command, main


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


SAY = "import sys; print('said', sys.argv[1:])"


def call(monkeypatch: pytest.MonkeyPatch, out: Path, commands: tuple[Command, ...], *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--minutes", "1", "--out", str(out), *more])
    main(commands)


def test_each_command_has_a_file_and_a_later_call_runs_only_what_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = Command("a b", ("-c", SAY, "full"), ("-c", SAY, "toy"))
    failing = Command("fails", ("-c", "raise SystemExit(3)"), ())
    waits = "import time; print('begun', flush=True); time.sleep(60)"
    slow = Command("slow", ("-c", waits), (), minutes=0.02)
    call(monkeypatch, tmp_path, (slow, quick, failing))
    assert "said ['full']" in (tmp_path / "a_b.txt").read_text()
    assert "begun" in (tmp_path / "slow.txt").read_text()
    assert "stopped: its time was up" in (tmp_path / "slow.txt").read_text()
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert {name: found["exit code"] for name, found in ended.items()} == {"a b": 0, "fails": 3}
    assert "2 of 3 commands have ended" in capsys.readouterr().out

    (tmp_path / "a_b.txt").write_text("kept")
    soon = Command("slow", (), ("-c", SAY, "toy"))
    call(monkeypatch, tmp_path, (soon, quick, failing), "--toy")
    assert "said ['toy']" in (tmp_path / "slow.txt").read_text()
    assert (tmp_path / "a_b.txt").read_text() == "kept"


def test_nothing_begins_once_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--minutes", "0", "--out", str(tmp_path), "--source", "images.tar"])
    main((Command("quick", ("-c", SAY), ()),))
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_counts_as_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "out", (Command("quick", ("-c", SAY), ()),))
    assert "torch sees no GPU here; --toy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
