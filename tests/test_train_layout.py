"""One configuration has one result, however its global batch is spread over processes and micro-batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from depthmup.data.errors import UserError
from depthmup.data.mixing import order_pairs
from depthmup.data.order import list_places
from depthmup.train.batch_norm import BatchStatistics, Grouping, choose_grouping
from depthmup.train.config import ParallelConfig, run_hash
from depthmup.train.loop import run
from depthmup.train.packs.pack import run_pack
from train_configs import CONV_RESNET, VIT, losses, pack_digits, run_config
from train_processes import run_function

BATCH_NORM = {**CONV_RESNET, "norm": "batch"}
RESNET = {"family": "resnet", "width": 8, "depth": 4, "base_width": 8, "base_depth": 4}
PREACTIVATION = {**RESNET, "preactivation": True}  # timm's BatchNormAct2d
RECIPE = ("data.mixup=0.3", "data.cutmix=0.5", "train.drop_path=0.4", "train.label_smoothing=0.1")
# Those in `make test-long`; others have their BatchNorm in another network, or over fewer images.
LONG = ("ResNet, statistics of all", "pre-activation, statistics of all")
# name -> model, what makes it this run, micro-batch sizes on one process, on two
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[int | None, ...], tuple[int | None, ...]]] = {
    "statistics of a quarter": (BATCH_NORM, ("train.batch_norm_images=8",), (None, 8), (None, 8)),
    "statistics of 4": (BATCH_NORM, ("train.batch_norm_images=4",), (None, 4), (4,)),
    "statistics of 2": (BATCH_NORM, ("train.batch_norm_images=2", "optimizer.lr=2**-8"), (None, 4, 2), (2,)),
    "statistics of all": (BATCH_NORM, (), (None,), (None,)),
    "ResNet, statistics of all": (RESNET, (), (None,), (None,)),
    "pre-activation, statistics of all": (PREACTIVATION, (), (None,), (None,)),
    "pre-activation, statistics of 8": (PREACTIVATION, ("train.batch_norm_images=8",), (None, 8), (8,)),
    "recipe": (VIT, RECIPE, (None, 8), (None, 8)),
    "recipe, one of each stream": (VIT, (*RECIPE, "data.num_streams=32"), (None, 8), (8,)),
    "recipe with BatchNorm": (BATCH_NORM, (*RECIPE, "train.batch_norm_images=4"), (None, 4), (4,)),
}


def train_layouts(shards: str, out: str, world_size: int, chosen: Sequence[str]) -> None:
    from depthmup.train.distributed import process_group, read_world_from_environment

    world = read_world_from_environment()
    engine = "ddp" if world_size == 2 else "none"
    with process_group(world, torch.device("cpu"), ParallelConfig(), engine):
        for name in chosen:
            model, overrides, one, two = LAYOUTS[name]
            for size in two if world_size == 2 else one:
                stated = (*overrides, *([f"parallel.micro_batch_size={size}"] if size else []))
                config = run_config(shards, "train.samples=192", *stated, model=model)
                run(config, Path(out) / name / f"{world_size} x {size}", world)


def train_on_two(shards: str, out: str, *chosen: str) -> None:
    train_layouts(shards, out, 2, chosen)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("layout") / "shards")


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """All layouts, of the LONG ones those that the chosen tests are about."""
    stated = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [name for name in LAYOUTS if name not in LONG or {"layout": name} in stated]
    out = tmp_path_factory.mktemp("layouts")
    train_layouts(str(shards), str(out), 1, chosen)
    run_function("test_train_layout", "train_on_two", 2, str(shards), str(out), *chosen)
    return out


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in LAYOUTS])
def test_a_result_does_not_depend_on_processes_and_micro_batches(runs: Path, layout: str) -> None:
    _, _, one, two = LAYOUTS[layout]
    first, *others = (*(f"1 x {size}" for size in one), *(f"2 x {size}" for size in two))
    expected = losses(runs / layout / first)
    result = json.loads((runs / layout / first / "done.json").read_text())
    for other in others:
        assert losses(runs / layout / other) == pytest.approx(expected, rel=1e-5), other
        found = json.loads((runs / layout / other / "done.json").read_text())
        assert found["val_loss"] == pytest.approx(result["val_loss"], rel=1e-5), other  # with running statistics


def test_the_number_of_images_of_a_statistic_is_part_of_a_runs_identity_and_matters(runs: Path, shards: Path) -> None:
    found = [losses(runs / f"statistics of {n}" / "1 x None")[-1] for n in ("2", "4", "a quarter", "all")]
    assert len({round(loss, 3) for loss in found}) == 4
    hashes = [
        run_hash(run_config(shards, *stated, model=BATCH_NORM)) for stated in ((), ("train.batch_norm_images=4",))
    ]
    assert hashes[0] != hashes[1]


def test_stochastic_depth_drops_the_same_after_whatever_else_a_run_does(shards: Path, tmp_path: Path) -> None:
    found = [
        run(run_config(shards, "train.samples=64", "train.drop_path=0.9", *more, model=VIT), tmp_path / str(len(more)))
        for more in ((), ("train.log_every=2", "train.checkpoint_every=1"))
    ]
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-6)
    other = run(run_config(shards, "train.samples=64", model=VIT), tmp_path / "no drop")
    assert other["train_loss"] != pytest.approx(found[0]["train_loss"], rel=1e-4)


def test_a_statistic_that_does_not_fit_into_memory_at_once_is_refused_before_training(
    shards: Path, tmp_path: Path
) -> None:
    for overrides, message in {
        (): r"over 32 images .* has 4 .*: use parallel.micro_batch_size=32, .* train.batch_norm_images=4$",
        ("train.batch_norm_images=8",): r"over 8 images .* needs 8 at once and has 4",
    }.items():
        with pytest.raises(UserError, match=message):
            run(run_config(shards, "parallel.micro_batch_size=4", *overrides, model=BATCH_NORM), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        ("train.batch_norm_images=5", BATCH_NORM, "batch_norm_images 5 must divide global_batch_size 32"),
        ("train.batch_norm_images=4", VIT, "batch_norm_images would do nothing: model.family vit has no BatchNorm"),
        ("train.batch_norm_images=4", CONV_RESNET, "batch_norm_images would do nothing"),
        ("train.batch_norm_images=1", BATCH_NORM, "batch_norm_images: Input should be greater than or equal to 2"),
    ],
)
def test_impossible_numbers_of_images_of_a_statistic_are_refused(
    shards: Path, overrides: str, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_config(shards, overrides, model=model)


@pytest.mark.parametrize("images", [None, 4])
def test_a_pack_takes_its_statistics_as_each_run_alone_does(shards: Path, tmp_path: Path, images: int | None) -> None:
    stated = (f"train.batch_norm_images={images or 'null'}", "train.samples=320")
    configs = [run_config(shards, *stated, f"optimizer.lr={lr}", model=BATCH_NORM) for lr in (0.05, 0.02)]
    packed = run_pack(configs, [tmp_path / f"packed-{number}" for number in range(2)])
    for number, config in enumerate(configs):
        alone = run(config, tmp_path / f"alone-{number}")
        assert packed[number]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


@pytest.mark.parametrize("overrides", [(), ("train.batch_norm_images=4",)])
def test_recomputation_moves_running_statistics_once(shards: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plain, recomputed = (
        run(run_config(shards, "train.samples=128", *overrides, *more, model=BATCH_NORM), tmp_path / str(len(more)))
        for more in ((), ("train.activation_checkpointing=true",))
    )
    assert recomputed["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)


def test_running_statistics_move_as_torchs_own_do() -> None:
    images = torch.randn(3, 8, 5, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    ours, torchs = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    statistics = BatchStatistics(nn.Sequential(ours), None)
    for batch in images:
        assert torch.allclose(ours(batch), torchs(batch))
        statistics.move(0, 1)
    assert torch.allclose(ours.running_mean, torchs.running_mean)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, torchs.running_var)  # type: ignore[arg-type]
    assert torch.equal(ours.num_batches_tracked, torchs.num_batches_tracked)  # type: ignore[arg-type]
    assert set(ours.state_dict()) == set(torchs.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [2, 4, 8, 16, 32, 64])
def test_the_images_of_a_statistic_and_of_a_pair_are_the_same_in_every_layout(world_size: int, images: int) -> None:
    """64 images from 8 streams, counted across streams."""
    groups = Grouping(64 // images, 0, 0)
    seen: dict[int, set[int]] = {}
    partners = set()
    for rank in range(world_size):
        mine = list_places(rank, world_size, 8, 64)
        assert set(mine % world_size) == {rank}
        ordered = mine[groups.order(mine)]
        for group in np.split(ordered, len(np.unique(ordered % groups.num_groups))):
            assert len(set(group % groups.num_groups)) == 1
            seen.setdefault(int(group[0]) % groups.num_groups, set()).update(group.tolist())
        paired = mine[order_pairs(mine, 8, 64)]
        partners |= {frozenset(pair) for pair in zip(paired.tolist(), paired[::-1].tolist(), strict=True)}
    assert {len(group) for group in seen.values()} == {images}
    assert partners == {frozenset({8 * i + c, 8 * (7 - i) + c}) for i in range(8) for c in range(8)}


def test_processes_share_a_statistic_only_where_it_cannot_be_one_processs_own(shards: Path) -> None:
    config = run_config(shards, "train.batch_norm_images=8", model=BATCH_NORM)  # four groups in a batch of 32
    shared = {size: choose_grouping(config, size, 1).processes for size in (1, 2, 4, 8)}
    assert shared == {1: 1, 2: 1, 4: 1, 8: 2}
