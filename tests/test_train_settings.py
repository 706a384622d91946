"""Settings of a run that are wrong, or that must not change its result."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from depthmup.data.errors import UserError
from depthmup.data.order import State
from depthmup.train import one_network
from depthmup.train.average import WeightAverage, average_tensors
from depthmup.train.config import ParallelConfig, run_hash
from depthmup.train.distributed import World, process_group
from depthmup.train.engines.zero import import_deepspeed
from depthmup.train.loop import run
from depthmup.train.metrics import TensorBoardTracker
from depthmup.train.prepare import cuts_patches, patch_product, prepare
from depthmup.train.record import RunRecord
from depthmup.train.stochastic_depth import install_stochastic_depth
from depthmup.train.telemetry import find_peak_row
from train_configs import VIT, pack_digits, run_config


@pytest.fixture(scope="module")
def one_group() -> Iterator[None]:
    """A process group for several runs of one process: DeepSpeed keeps the first one that it sees."""
    with process_group(World(), torch.device("cpu"), ParallelConfig(), "ddp"):
        yield


# 8 kinds of block, as a ResNet-50 has
BOTTLENECKS = {"family": "resnet", "block": "bottleneck", "blocks": [2, 2, 2, 2], "width": 8, "depth": 8,
               "base_width": 8, "base_depth": 8}  # fmt: skip
SHALLOW = {**VIT, "depth": 2, "base_depth": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("settings") / "shards")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.micro_batch_size=5", r"micro_batch_size 5 must divide the 32 images"),
        ("train.device=cuda", r"torch sees no GPU: use train.device=cpu or auto"),
        ("data.num_streams=5", r"num_streams 5 must divide train.global_batch_size 32: .*global_batch_size=30 or 35,"),
        (
            "train.global_batch_size=1760 train.samples=1760",
            r"train.global_batch_size 1760 is more than the \d+ training samples: use at most 16\d\d$",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    shards: Path, tmp_path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as refused:
        run(run_config(shards, *override.split()), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 32 must be a multiple of the 3 processes: use 30 or 33"):
        ParallelConfig().micro_batches(32, 3)


def test_deepspeed_that_is_not_installed_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'depthmup\[deepspeed\]'"):
        run(run_config(shards, "parallel.engine=deepspeed"), tmp_path)


def test_how_a_run_is_computed_is_no_part_of_its_identity(shards: Path) -> None:
    hardware = ("parallel.engine=fsdp", "train.compile=block", "train.activation_checkpointing=true")
    assert run_hash(run_config(shards, *hardware)) == run_hash(run_config(shards))
    assert run_hash(run_config(shards, "train.ema=0.9")) != run_hash(run_config(shards))


def test_recomputation_leaves_the_losses_as_they_are(shards: Path, tmp_path: Path) -> None:
    results = [
        run(run_config(shards, *overrides, "train.drop_path=0.1", model=VIT), tmp_path / str(len(overrides)))
        for overrides in ((), ("train.activation_checkpointing=true",))
    ]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)


@pytest.mark.usefixtures("one_group")
def test_channels_last_leaves_the_losses_as_they_are_under_every_engine(shards: Path, tmp_path: Path) -> None:
    """It is the default of ResNets; FSDP and ZeRO cannot shard weights that lie so in memory."""
    model = {**BOTTLENECKS, "block": "basic", "blocks": [1, 1, 1, 1], "depth": 4, "base_depth": 4}
    common = ("train.samples=96", "train.checkpoint_every=2")
    plain = run_config(shards, *common, "train.channels_last=false", model=model)
    expected = run(plain, tmp_path / "plain")["train_loss"]
    zero = [("parallel.engine=deepspeed", f"parallel.zero_stage={stage}") for stage in (2, 3)]
    linear = torch.nn.functional.linear
    for engine in (("parallel.engine=none",), ("parallel.engine=ddp",), ("parallel.engine=fsdp",), *zero):
        config = run_config(shards, *common, *engine, model=model)
        found = run(config, tmp_path / "-".join(engine))["train_loss"]
        assert found == pytest.approx(expected, rel=1e-5), engine
        assert torch.nn.functional.linear is linear  # which ZeRO 3 replaces for the whole process


@pytest.mark.parametrize(
    ("model", "backend", "overrides"),
    [
        (SHALLOW, "aot_eager", ("train.compile=block", "parallel.engine=fsdp", "train.activation_checkpointing=true")),
        (SHALLOW, "aot_eager", ("train.compile=model", "train.activation_checkpointing=true")),
        (BOTTLENECKS, "eager", ("train.compile=block",)),
    ],
)
def test_compilation_takes_every_block_and_leaves_the_losses_as_they_are(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    backend: str,
    overrides: tuple[str, ...],
) -> None:
    """With what traces the code alone, of many kinds of block without their backward pass: torch's compiler of kernels
    takes a minute on a CPU."""
    common = ("train.samples=64", "train.drop_path=0.1")
    plain = run(run_config(shards, *common, model=model), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    compiled = run(run_config(shards, *common, *overrides, model=model), tmp_path / "compiled")
    assert counters["stats"]["calls_captured"] > 10  # a recomputed block is one
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # no kind of block was left out
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


def test_a_patch_embedding_as_a_product_is_the_conv_and_no_other_conv_is_taken_for_one() -> None:
    for conv in (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 9, 2, 2, groups=3)):
        assert not cuts_patches(conv)
    conv = nn.Conv2d(3, 8, (4, 2), stride=(4, 2))
    assert cuts_patches(conv)
    images = torch.randn(2, 3, 9, 10)
    found = []
    for forward in (conv, patch_product(conv)):
        embedded = forward(images)
        found.append((embedded, *torch.autograd.grad(embedded.square().sum(), (conv.weight, conv.bias))))
    for tensor, expected in zip(*found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("one_group")
@pytest.mark.parametrize("residual", ["true", "false"])
def test_bf16_gives_the_residual_stream_the_same_type_and_the_losses_the_same_size_under_every_engine(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residual: str
) -> None:
    types: list[torch.dtype] = []

    def preparing(network: torch.nn.Module, blocks: list[str], *arguments: Any) -> bool:
        network.get_submodule(blocks[-1]).register_forward_pre_hook(
            lambda module, inputs: types.append(inputs[0].dtype)
        )
        return prepare(network, blocks, *arguments)

    monkeypatch.setattr(one_network, "prepare", preparing)
    losses = []
    for engine in ("none", "ddp", "fsdp", "deepspeed"):
        overrides = ("train.precision=bf16", f"train.bf16_residual={residual}", f"parallel.engine={engine}")
        overrides += ("train.samples=192",)
        losses.append(run(run_config(shards, *overrides, model=VIT), tmp_path / engine)["train_loss"])
    assert set(types) == {torch.bfloat16 if residual == "true" else torch.float32}
    assert losses == pytest.approx([losses[0]] * 4, rel=0.002)


@pytest.mark.usefixtures("one_group")
def test_deepspeed_calls_no_collective_that_torch_warns_of() -> None:
    """It would in every step of a log that somebody has to read."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.comm.torch import TorchBackend

    backend = TorchBackend("gloo", None, None)
    values, result = torch.arange(3.0), torch.empty(3)
    for collective in (backend.all_gather_function, backend.reduce_scatter_function):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collective(result.zero_(), values)
        assert torch.equal(result, values)


def test_more_workers_than_cpus_are_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    run(run_config(shards, "data.num_workers=4", "train.samples=64"), tmp_path / "run")
    assert "warning: 4 data workers share 1 CPU(s): " in (tmp_path / "run" / "log-0.txt").read_text()


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


def test_wandb_without_a_key_is_kept_on_the_disk_and_said(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # with no .netrc
    run(run_config(shards, "track.wandb=online", "train.samples=64"), tmp_path / "run")
    assert "no wandb key, so track.wandb is offline" in capsys.readouterr().err
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_wandb_with_a_key_and_without_a_network_is_kept_on_the_disk_and_said(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("depthmup.train.metrics.WANDB_SECONDS", 1)
    assert run(run_config(shards, "track.wandb=online", "train.samples=64"), tmp_path / "run")["outcome"] == "completed"
    assert "warning: wandb did not start online, so track.wandb is offline: later run" in capsys.readouterr().err
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


@pytest.mark.parametrize("fails", ["__init__", "log", "finish"])
def test_what_only_records_never_ends_a_run(
    fails: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any) -> None:
        raise PermissionError("read-only\nfile system")

    monkeypatch.setattr(TensorBoardTracker, fails, fail)
    result = run(run_config(shards, "track.tensorboard=true", "train.samples=128"), tmp_path)
    assert (result["outcome"], result["step"]) == ("completed", 4)
    said = capsys.readouterr().err
    expected = "warning: tensorboard failed, and the run goes on without it: PermissionError: read-only file system\n"
    assert said.count(expected) == 1


def test_an_average_of_the_weights_comes_with_the_average_of_the_statistics_that_belong_to_them() -> None:
    """With decays of at most 1/10 and 2/11 in the first two steps."""
    network = torch.nn.BatchNorm1d(1)
    average = WeightAverage(average_tensors(network), decay=0.9)
    for step, mean in enumerate((10.0, 20.0)):
        network.running_mean.fill_(mean)  # type: ignore[union-attr, operator]
        average.update(step)
    expected = 2 / 11 * (0.9 * 10) + 9 / 11 * 20
    with average.swapped_in():
        assert network.running_mean.item() == pytest.approx(expected)  # type: ignore[union-attr, operator]
    assert network.running_mean.item() == 20  # type: ignore[union-attr, operator]


def test_the_step_of_the_first_bad_loss_is_found_in_a_window(shards: Path, tmp_path: Path) -> None:
    with ExitStack() as closing:
        record = RunRecord(run_config(shards), tmp_path, closing)
        record.losses = [2.0, float("nan"), 1.0]
        assert record.find_first_bad_step(12) == 11
        record.losses = [2.0, 1.0]
        assert record.find_first_bad_step(12) is None


def test_no_checkpoint_is_made_of_a_step_whose_loss_is_not_finite(shards: Path, tmp_path: Path) -> None:
    with ExitStack() as closing:
        record = RunRecord(run_config(shards), tmp_path, closing)
        for step, loss in ((1, 2.0), (2, float("inf"))):
            record.losses.append(loss)
            record.save(step, State(seed=0), lambda: {"model": {"weight": torch.ones(1)}})
        record.checkpoints.wait()
        assert record.directory.list_checkpoint_steps() == [1]


@pytest.mark.parametrize(
    ("device", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H20", "H20"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_a_device_gets_its_own_peak_and_not_that_of_a_like_name(device: str, row: str | None) -> None:
    found = find_peak_row(device)
    assert (found and found[0]) == row
