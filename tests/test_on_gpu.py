"""All that a GPU is to measure, in pieces: what has ended is not measured again, and what has not begins anew."""

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from benchmarks import on_gpu, step_ideas
from benchmarks.on_gpu import Command, main
from benchmarks.rows import find_unmeasured
from torch import Tensor


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the test's own process


SAY = "import sys; print('said', sys.argv[1:])"


def call(monkeypatch: pytest.MonkeyPatch, out: Path, commands: tuple[Command, ...], *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--minutes", "1", "--out", str(out), *more])
    main(commands)


def test_all_say_into_one_file_and_a_later_call_runs_what_has_not_ended_and_once_more_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = Command("a, b", ("-c", SAY, "full"), ())
    failing = Command("fails", ("-c", "print('tried'); raise SystemExit(3)"), ())
    waits = "import time; print('begun', flush=True); time.sleep(60)"
    slow = Command("slow", ("-c", waits), (), minutes=0.02)

    def read() -> tuple[str, dict[str, int]]:
        ended = json.loads((tmp_path / "ended.json").read_text())
        return (tmp_path / "on_gpu.txt").read_text(), {name: found["exit code"] for name, found in ended.items()}

    call(monkeypatch, tmp_path, (slow, failing, quick))
    said, ended = read()
    assert "begun" in said
    assert "stopped: its time was up" in said
    assert "said ['full']" in said
    assert ended == {"a, b": 0, "fails": 3}
    assert "2 of 3 commands have ended" in capsys.readouterr().out

    soon = Command("slow", ("-c", SAY, "soon"), ())
    for _ in range(2):
        call(monkeypatch, tmp_path, (failing, soon, quick))
    said, ended = read()
    assert said.index("begun") < said.index("said ['soon']") < said.rindex("tried")
    assert said.count("\ntried") == 2
    assert said.count("\nsaid ['full']") == said.count("\nsaid ['soon']") == 1
    assert ended == {"slow": 0, "a, b": 0, "fails": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"ended.json", "on_gpu.txt"}


def test_a_table_goes_on_with_its_rows_that_have_no_figures(tmp_path: Path) -> None:
    log = tmp_path / "on_gpu.txt"
    labels = ["vit a", "vit ab", "vit b", "vit c", "vit d"]
    assert find_unmeasured(labels, log) == find_unmeasured(labels, None) == labels
    log.write_text(
        "vit ab begun\nvit a begun\na warning\nvit a 1.0 2.0\nvit c failed: OutOfMemoryError: no\nvit b begun\n"
    )
    assert find_unmeasured(labels, log) == ["vit d", "vit ab", "vit b", "vit c"]


def test_a_command_of_rows_is_told_where_the_earlier_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, tmp_path, (Command("rows", ("-c", SAY), (), in_rows=True),))
    assert f"said ['--after', '{tmp_path / 'on_gpu.txt'}']" in (tmp_path / "on_gpu.txt").read_text()


def test_a_trial_on_a_cpu_does_not_count_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Command("a", ("-c", SAY, "full"), ("-c", SAY, "toy"))
    call(monkeypatch, tmp_path, (command,), "--toy")
    call(monkeypatch, tmp_path, (command,))
    assert "said ['full']" in (tmp_path / "on_gpu.txt").read_text()
    assert "said ['toy']" in (tmp_path / "toy" / "on_gpu.txt").read_text()


def test_what_a_command_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import time; time.sleep(60)"
    starts = f"import subprocess, sys; print('child', subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    call(monkeypatch, tmp_path, (Command("starts", ("-c", starts), ()),))
    number = int((tmp_path / "on_gpu.txt").read_text().rpartition("child ")[2])
    end = time.monotonic() + 30
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_the_machine_lacks_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        with pytest.raises(SystemExit):
            call(monkeypatch, tmp_path / "out", (Command("quick", ("-c", SAY), ()),), *more)
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--source nowhere.tar does not exist" in refused("--source", "nowhere.tar")
    monkeypatch.setattr(on_gpu, "MODULES", "depthmup nothing_of_this_name")
    assert f"not installed for {sys.executable}: nothing_of_this_name" in refused()


@pytest.mark.parametrize("name", ["GELU by tanh in cuBLASLt", "no copies, CUDA graphs"])
def test_an_idea_leaves_the_gradients_of_a_block_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU GELU is exact in both; attention by FlashAttention's own layout is stood in for."""
    from timm.models.vision_transformer import Block
    from torch.nn.attention import varlen

    def attend(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, _: Tensor, tokens: int, __: int) -> Tensor:
        parts = [part.unflatten(0, (-1, tokens)).transpose(1, 2) for part in (query, key, value)]
        return (
            torch.softmax(parts[0] @ parts[1].mT / query.shape[-1] ** 0.5, -1)
            .matmul(parts[2])
            .transpose(1, 2)
            .flatten(0, 1)
        )

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    torch.manual_seed(0)
    block, images = Block(16, 2, qkv_bias=True).double(), torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[Tensor]:
        of = [images, *block.parameters()]
        return list(torch.autograd.grad(block(images).square().sum(), of))

    expected = gradients()
    with step_ideas.IDEAS[name].context():
        found = gradients()
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_nothing_begins_once_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--minutes", "0", "--out", str(tmp_path), "--source", __file__])
    main((Command("quick", ("-c", SAY), ()),))
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_counts_as_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "out", (Command("quick", ("-c", SAY), ()),))
    assert "torch sees no GPU here (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
