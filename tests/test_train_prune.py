"""A run with limits of a search ends early where its loss is above them; the others learn what they would have."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from depthmup.train.config import RunConfig
from depthmup.train.interrupt import Interrupted
from depthmup.train.loop import run
from depthmup.train.packs.pack import run_pack
from depthmup.train.packs.replicas import Replicas
from depthmup.train.reading import from_plain
from depthmup.train.rundir import Limits, RunDirectory
from train_configs import After, metric, metrics

RATES = (0.004, 1e-6, 0.003, 2e-6)  # of four runs


@pytest.fixture
def make(run_settings: dict[str, Any]) -> Callable[..., RunConfig]:
    """A ViT on the digits for 12 steps."""

    def make(rate: float, **train: Any) -> RunConfig:
        raw = {
            **run_settings,
            "model": {"family": "vit", "width": 16, "depth": 2, "base_width": 16, "base_depth": 2, "head_dim": 8,
                      "patch_size": 4, "num_classes": 10, "image_size": 8, "in_channels": 1},
            "optimizer": {"name": "adamw", "lr": rate, "weight_decay": 1e-4},
            "train": {**run_settings["train"], "samples": 12 * 16, "global_batch_size": 16, **train},
        }  # fmt: skip
        return from_plain(RunConfig, raw, "test")

    return make


def with_limits(folder: Path, limits: dict[int, float | None]) -> Path:
    folder.mkdir(parents=True)
    RunDirectory(folder).write_limits(Limits(limits))
    return folder


def test_a_run_ends_after_the_step_at_which_its_loss_is_above_the_limit_and_says_so(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = with_limits(tmp_path / "run", {3: None, 6: 0.5, 9: None})
    result = run(make(RATES[0]), path)
    assert (result["outcome"], result["step"], result["samples"]) == ("pruned", 6, 96)
    assert result["loss"] > result["limit"] == 0.5
    assert not any(key.endswith("_loss") for key in result)  # nothing that could be taken for a result
    assert [line["step"] for line in metrics(path) if "minival_loss" in line] == [3, 6]
    assert not RunDirectory(path).weights.exists()
    assert run(make(RATES[0]), path) == result  # it is done


def test_a_run_below_its_limits_is_bit_for_bit_what_it_is_without(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = with_limits(tmp_path / "limits", {5: 100.0, 9: None})
    results = [run(make(RATES[0]), folder) for folder in (path, tmp_path / "plain")]
    assert results[0]["minival_loss"] == results[1]["minival_loss"]
    weights = [load_file(RunDirectory(folder).weights) for folder in (path, tmp_path / "plain")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def set_limits(folder: Path, ends: Sequence[int | None], steps: Sequence[int]) -> list[Path]:
    """Folders of runs of which each ends after its step of `ends`, whatever its loss is there; None: at the last."""
    return [
        with_limits(folder / str(number), {step: 0.0 if step == end else None for step in steps})
        for number, end in enumerate(ends)
    ]


@pytest.mark.parametrize("stop", [None, 2, 5, 7, 10])
def test_those_of_a_pack_that_go_on_learn_bit_for_bit_what_they_would_have_while_it_shrinks(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    """At each rung it shrinks, at the end to one run; also where it was stopped and went on in between, from the
    checkpoints of what was left of it."""
    sizes: list[int] = []
    step = Replicas.step

    def counted(self: Replicas, *given: Any, **settings: Any) -> Tensor:
        sizes.append(len(losses := step(self, *given, **settings)))
        return losses

    configs = [
        make(rate, evaluate_every=3, label_smoothing=smoothing)
        for rate, smoothing in zip((*RATES, 0.001), (0.0, 0.1, 0.0, 0.05, 0.1), strict=True)
    ]
    plain = [tmp_path / "plain" / str(number) for number in range(5)]
    run_pack(configs, plain)
    ends = [None, 3, None, 6, 9]
    paths = set_limits(tmp_path / "limits", ends, (3, 6, 9))
    monkeypatch.setattr(Replicas, "step", counted)
    if stop:
        with pytest.raises(Interrupted):
            run_pack(configs, paths, After(stop))
    results = run_pack(configs, paths)
    assert sizes == [5] * 3 + [4] * 3 + [3] * 3 + [2] * 3
    assert [result["step"] for result in results] == [end or 12 for end in ends]
    for path, alike, end in zip(paths, plain, ends, strict=True):
        assert metric(path, "loss") == metric(alike, "loss")[: len(metric(path, "loss"))]
        assert metric(path, "step")[-1] == (end or 12)
        if not end:
            expected = load_file(RunDirectory(alike).weights)
            assert all(torch.equal(w, expected[name]) for name, w in load_file(RunDirectory(path).weights).items())


def test_a_run_that_diverged_is_computed_no_longer_than_to_the_next_metrics_line(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[int]] = []
    keep = Replicas.keep
    monkeypatch.setattr(Replicas, "keep", lambda self, numbers: [kept.append([*numbers]), keep(self, numbers)])
    configs = [make(rate, log_every=4) for rate in (RATES[0], 1e37, RATES[2])]
    results = run_pack(configs, [tmp_path / str(number) for number in range(3)])
    assert [result["outcome"] for result in results] == ["completed", "diverged", "completed"]
    assert kept == [[0, 2]]


def test_a_pack_all_of_which_is_above_its_limits_ends_there(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    paths = [with_limits(tmp_path / str(number), {4: 1e-3}) for number in range(2)]
    assert [result["step"] for result in run_pack([make(rate) for rate in RATES[:2]], paths)] == [4, 4]


def test_a_limit_of_the_training_loss_needs_no_evaluation(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    for number, (limit, outcome) in enumerate([(0.5, "pruned"), (100.0, "completed")]):
        path = tmp_path / str(number)
        path.mkdir()
        RunDirectory(path).write_limits(Limits({6: limit}, "loss"))
        result = run(make(RATES[0], log_every=4), path)
        assert result["outcome"] == outcome
        lines = {line["step"]: line for line in metrics(path)}
        assert "minival_loss" not in lines[6]
        if outcome == "pruned":
            assert (result["step"], result["loss"]) == (6, lines[6]["loss"])
