"""Settings of a run that are wrong, or that must not change its result."""

import sys
from pathlib import Path

import pytest
import torch
from train_configs import VIT, pack_digits, run_config

from data.errors import UserError
from train.config import ParallelConfig, run_hash
from train.loop import run
from train.stochastic_depth import install_stochastic_depth
from train.telemetry import PEAK_FLOPS, LossWindow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("settings") / "shards")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.micro_batch_size=5", r"micro_batch_size 5 must divide the 32 images"),
        ("train.device=cuda", r"torch sees no GPU: use train.device=cpu or auto"),
        ("data.num_streams=5", r"num_streams 5 must divide"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    shards: Path, tmp_path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as refused:
        run(run_config(shards, override), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 32 must be a multiple of the 3 processes"):
        ParallelConfig().micro_batches(32, 3)


def test_deepspeed_that_is_not_installed_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'depthmup\[deepspeed\]'"):
        run(run_config(shards, "parallel.engine=deepspeed"), tmp_path)


def test_how_a_run_is_computed_is_no_part_of_its_identity(shards: Path) -> None:
    hardware = ("parallel.engine=fsdp", "train.compile=block", "train.activation_checkpointing=true")
    assert run_hash(run_config(shards, *hardware)) == run_hash(run_config(shards))
    assert run_hash(run_config(shards, "train.ema=0.9")) != run_hash(run_config(shards))


@pytest.mark.parametrize("override", ["train.activation_checkpointing=true", "train.channels_last=true"])
def test_recomputation_and_memory_format_leave_the_losses_as_they_are(
    shards: Path, tmp_path: Path, override: str
) -> None:
    results = [
        run(run_config(shards, *overrides, "train.drop_path=0.1", model=VIT), tmp_path / str(len(overrides)))
        for overrides in ((), (override,))
    ]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)


def test_bf16_trains(shards: Path, tmp_path: Path) -> None:
    overrides = ("train.precision=bf16", "train.samples=128", "train.bf16_residual=true")
    assert run(run_config(shards, *overrides, model=VIT), tmp_path)["outcome"] == "completed"


def test_stochastic_depth_drops_whole_images_keeps_the_mean_and_rests_in_evaluation(shards: Path) -> None:
    network = torch.nn.Sequential(torch.nn.ModuleDict({"end": torch.nn.Identity()}), torch.nn.Identity())
    install_stochastic_depth(torch.nn.ModuleDict({"a": network[0], "b": torch.nn.ModuleDict({"end": network[1]})}),
                             ["a.end", "b.end"], ["a", "b"], 0.25)  # fmt: skip
    ones = torch.ones(4000, 3)
    assert torch.equal(network[0]["end"](ones), ones)  # rate 0 in the first block
    dropped = network[1](ones)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped[:, 0], dropped[:, 2])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(network[1].eval()(ones), ones)


def test_the_step_of_the_first_bad_loss_is_found_in_a_window() -> None:
    window = LossWindow([torch.tensor(1.0), torch.tensor(float("nan"))], [2.0])
    assert not window.finite()
    assert window.drain(12)[1] == 12
    assert window.read == []


def test_longer_device_names_are_looked_up_before_shorter_ones() -> None:
    names = [row[0] for row in PEAK_FLOPS]
    for index, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:index]), name
