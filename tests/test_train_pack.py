"""A pack of K runs gives each of them the results and the files that it would have had alone."""

import ctypes
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import packed as measured
from safetensors.torch import load_file
from torch import Tensor, nn

from depthmup.data.batch import to_float
from depthmup.data.config import DataConfig
from depthmup.data.errors import UserError
from depthmup.data.index import Index
from depthmup.data.loader import TrainingStream
from depthmup.data.order import State
from depthmup.models.build import build
from depthmup.models.conv_resnet import Block
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.train import batches, evaluate
from depthmup.train.checkpoint import Checkpoints
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.engines.base import Engine
from depthmup.train.interrupt import Interrupt, Interrupted
from depthmup.train.loop import run
from depthmup.train.packs.batched import CONVOLUTIONS
from depthmup.train.packs.memory import MEMORY_SHARE, find_largest_pack, pack_bytes, pack_size
from depthmup.train.packs.pack import run_pack
from depthmup.train.packs.packing import list_obstacles
from depthmup.train.packs.replicas import Replicas
from depthmup.train.prepare import drop_idle_strides
from depthmup.train.reading import from_plain
from depthmup.train.rundir import RunDirectory
from depthmup.train.schedule import schedule, set_learning_rate
from depthmup.train.step import take_step
from train_configs import After, metric, metrics
from train_processes import start
from wandb_files import records_of

CPU = torch.device("cpu")
NETWORKS = {
    "vit": {"family": "vit", "head_dim": 8, "patch_size": 4, "qk_norm": True},
    "conv_resnet, no norm": {"family": "conv_resnet", "norm": "none"},
    "conv_resnet, LayerNorm": {"family": "conv_resnet", "norm": "layer", "convs_per_branch": 2},
    "conv_resnet, BatchNorm": {"family": "conv_resnet", "norm": "batch"},
}
AMPLIFIES = {  # rounding, at the rates of the others to more than 1e-4 within 20 steps: in fp32 at a 32nd
    "timm's ResNet, GroupNorm": {"family": "resnet", "norm": "group", "num_groups": 2, "depth": 4, "base_depth": 4},
    "timm's ResNetV2": {"family": "resnet", "depth": 4, "base_depth": 4, "preactivation": True},
}
RATES = {"sgd": 0.005, "adamw": 0.004, "muon": 0.001}  # Muon rounds to bf16
OWN = {  # three settings of its own for each
    "sgd": ({"optimizer__momentum": 0.5}, {"optimizer__momentum": 0.0}, {"optimizer__momentum": 0.99}),
    "adamw": (
        {"optimizer__eps": 1e-4},
        {"optimizer__betas": [0.8, 0.9]},
        {"optimizer__betas": [0.95, 0.999], "optimizer__batch_ratio": 4, "optimizer__beta_scaling": "second"},
    ),
    "muon": ({"optimizer__momentum": 0.5}, {"optimizer__betas": [0.8, 0.9]}, {"optimizer__momentum": 0.99}),
}
STEPS = 8  # of warm-up and of decay, with every momentum moving
LONG = pytest.mark.long
# The others, and those that amplify rounding, are in `make test-long`.
SHORT = {
    *(("vit", "adamw"), ("vit", "muon"), ("conv_resnet, no norm", "sgd")),
    *(("conv_resnet, LayerNorm", "muon"), ("conv_resnet, BatchNorm", "sgd")),
}
ALONE = [pytest.param(*case, marks=() if case in SHORT else LONG) for case in product(NETWORKS | AMPLIFIES, RATES)]
DIVERGES = 1e37  # a learning rate after which no weight is finite

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def make(run_settings: dict[str, Any]) -> Callable[..., RunConfig]:
    """A run on the digits: `make(network, optimizer, steps, **overrides)`, overrides with `__` for the dot."""

    def make(network: str, optimizer: str = "sgd", steps: int = 12, **overrides: Any) -> RunConfig:
        size = {"width": 16, "depth": 3, "base_width": 8, "base_depth": 3}
        raw = {
            "model": {**size, **(NETWORKS | AMPLIFIES)[network], "num_classes": 10, "image_size": 8, "in_channels": 1},
            "optimizer": {"name": optimizer, "lr": RATES[optimizer], "weight_decay": 1e-4},
            "data": {**run_settings["data"], "augment": "crop_flip", "in_memory": True},
            "train": {**run_settings["train"], "samples": steps * 16, "global_batch_size": 16, "clip_norm": 1.0},
        }
        for key, value in overrides.items():
            *sections, name = key.split("__")
            target: dict[str, Any] = raw
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
        return from_plain(RunConfig, raw, "test")

    return make


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All but time and memory is equal to 1e-4; gradients and updates, which are differences of larger numbers and show
    rounding sooner than losses do, to 1e-2."""
    assert found.keys() == expected.keys()
    for key in found.keys() - {"images_per_second", "data_wait", "memory", "seconds"}:
        tolerance = 1e-2 if key.startswith(("grad_", "update_rms", "effective_lr")) else 1e-4
        exact = expected[key] is None or isinstance(expected[key], str)
        assert found[key] == (expected[key] if exact else pytest.approx(expected[key], rel=tolerance)), key


@pytest.mark.parametrize(("network", "optimizer"), ALONE)
def test_each_replica_ends_as_it_would_alone_while_one_diverges(
    network: str, optimizer: str, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rate = RATES[optimizer] / (32 if network in AMPLIFIES else 1)
    make = partial(make, network, optimizer, STEPS, optimizer__lr=rate, train__checkpoint_every=5, train__log_every=3)
    configs = [
        make(),
        make(optimizer__lr=rate * DIVERGES),
        make(optimizer__lr=rate / 2, optimizer__weight_decay=0.0, schedule__name="constant"),
        make(**OWN[optimizer][0], parameterization={"name": "mup", "gamma0": 1.5}),
        make(seed=1, train__clip_norm=None, parameterization={"beta": 0.5}),
    ]
    alone = [run(config, tmp_path / f"alone-{number}") for number, config in enumerate(configs)]
    started = time.monotonic()
    packed = run_pack(configs, [tmp_path / f"packed-{number}" for number in range(len(configs))])
    elapsed = time.monotonic() - started
    assert [result["outcome"] for result in packed] == ["completed", "diverged"] + ["completed"] * 3
    shares = [result["seconds"] for result in packed]
    assert 0 < shares[1] < shares[0]  # of one process's time, without that of building the pack
    assert sum(shares) < elapsed
    for number, (one, other) in enumerate(zip(alone, packed, strict=True)):
        single, together = tmp_path / f"alone-{number}", tmp_path / f"packed-{number}"
        assert_close(other, one)
        assert {p.name for p in single.iterdir()} == {p.name for p in together.iterdir()}
        assert len(metrics(together)) == len(metrics(single))
        for mine, theirs in zip(metrics(together), metrics(single), strict=True):
            assert_close(mine, theirs)
        if one["outcome"] == "completed":
            assert (
                load_file(together / "weights.safetensors").keys() == load_file(single / "weights.safetensors").keys()
            )


RECIPE = {
    "data__mixup": 0.4,
    "data__cutmix": 1.0,
    "train__label_smoothing": 0.1,
    "train__drop_path": 0.5,
    "train__ema": 0.8,
    "train__evaluate_every": 5,
}


@pytest.mark.parametrize("network", ["vit", "conv_resnet, BatchNorm"])
def test_mixing_stochastic_depth_the_average_and_evaluation_on_the_way_are_in_a_pack_what_they_are_alone(
    network: str, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """With two seeds, whose images are mixed and dropped each in their own way."""
    configs = [
        make(network, **RECIPE, seed=seed, optimizer__lr=lr) for seed, lr in ((0, 0.005), (0, 0.002), (3, 0.005))
    ]
    packed = run_pack(configs, [tmp_path / f"packed-{number}" for number in range(3)])
    for number, config in enumerate(configs):
        single, together = tmp_path / f"alone-{number}", tmp_path / f"packed-{number}"
        assert_close(packed[number], run(config, single))
        assert [line["step"] for line in metrics(together) if "minival_ema_loss" in line] == [5, 10]
        for mine, theirs in zip(metrics(together), metrics(single), strict=True):
            assert_close(mine, theirs)
        average, expected = (load_file(path / "weights_ema.safetensors") for path in (together, single))
        torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-5)
    assert len({result["minival_ema_loss"] for result in packed}) == 3


@pytest.mark.parametrize(
    ("network", "mixed"),
    [
        ("vit", True),
        ("conv_resnet, BatchNorm", False),
        pytest.param("vit", False, marks=LONG),
        pytest.param("conv_resnet, BatchNorm", True, marks=LONG),
    ],
)
def test_smoothing_stochastic_depth_and_the_averages_decay_may_differ_in_a_pack(
    network: str, mixed: bool, make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """None of a run's own values is another's: no smoothing and no drop beside much of both, with classes and with
    mixed classes as targets."""
    recipe = RECIPE if mixed else {key: value for key, value in RECIPE.items() if key.startswith("train__")}
    own = [(0.0, 0.5, 0.5), (0.1, 0.0, 0.9), (0.3, 0.2, 0.7)]
    names = ("train__label_smoothing", "train__drop_path", "train__ema")
    configs = [
        make(network, **recipe | dict(zip(names, values, strict=True)), seed=n // 2) for n, values in enumerate(own)
    ]
    packed = run_pack(configs, [tmp_path / f"packed-{number}" for number in range(3)])
    for number, config in enumerate(configs):
        single, together = tmp_path / f"alone-{number}", tmp_path / f"packed-{number}"
        assert_close(packed[number], run(config, single))
        for mine, theirs in zip(metrics(together), metrics(single), strict=True):
            assert_close(mine, theirs)
        average, expected = (load_file(path / "weights_ema.safetensors") for path in (together, single))
        torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-5)


def test_runs_with_an_average_share_no_pack_with_runs_without(make: Callable[..., RunConfig]) -> None:
    with_average, without = make("vit", train__ema=0.9), make("vit")
    assert list_obstacles(with_average, without) == ["train.ema"]
    assert list_obstacles(with_average, make("vit", train__ema=0.5)) == []


def test_every_setting_of_a_recipe_changes_what_a_pack_learns(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    def learn(name: str, **settings: Any) -> list[float]:
        configs = [make("vit", steps=3, seed=seed, **settings) for seed in range(2)]
        return [r["train_loss"] for r in run_pack(configs, [tmp_path / name / str(n) for n in range(2)])]

    without = learn("without")
    for setting in RECIPE.keys() - {"train__evaluate_every", "train__ema"}:
        found = learn(setting, **{setting: RECIPE[setting]})
        assert all(one != other for one, other in zip(found, without, strict=True)), setting


def test_a_stop_in_an_evaluation_of_a_pack_is_obeyed_and_the_pack_ends_bit_for_bit_as_without(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [make("conv_resnet, BatchNorm", "adamw", **RECIPE, seed=seed) for seed in range(2)]
    whole, stopped = ([tmp_path / name / str(n) for n in range(2)] for name in ("whole", "stopped"))
    run_pack(configs, whole)
    interrupt, batches = Interrupt(), []

    def evaluating(*given: Any) -> Any:
        batches.append(given)
        interrupt.request()
        return to_float(*given)

    monkeypatch.setattr(evaluate, "to_float", evaluating)
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        run_pack(configs, stopped, interrupt)
    monkeypatch.undo()
    assert len(batches) == 1
    run_pack(configs, stopped)
    for one, other in zip(whole, stopped, strict=True):
        assert metric(other, "loss") == metric(one, "loss")
        for name in ("weights.safetensors", "weights_ema.safetensors"):
            expected = load_file(one / name)
            assert all(torch.equal(w, expected[key]) for key, w in load_file(other / name).items())


@pytest.mark.parametrize("optimizer", RATES)
def test_in_double_precision_packed_steps_are_those_of_each_run_alone(
    optimizer: str, make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what differs in fp32 is rounding, also at rates and in networks that amplify it."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        for network in (*AMPLIFIES, "vit"):
            one = partial(make, network, optimizer, STEPS, optimizer__lr=0.02)
            configs = [
                one(**OWN[optimizer][1], optimizer__weight_decay=0.02, parameterization={"gamma0": 1.5}),
                one(**OWN[optimizer][2], parameterization={"beta": 0.5}, seed=1),
                one(optimizer__weight_decay=0.1, optimizer__weight_decay_mode="coupled", train__clip_norm=None),
            ]
            images = torch.rand(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            labels = torch.arange(16).view(2, 8) % 10
            replicas = Replicas(configs, CPU)
            together = [replicas.step(images, labels) for _ in range(STEPS)][-1]
            for number, config in enumerate(configs):
                loss = alone(config, images[config.seed], labels[config.seed], STEPS)
                tolerance = 1e-5 if optimizer == "muon" else 1e-7  # Muon rounds to bf16 on the way
                assert float(together[number]) == pytest.approx(loss, rel=tolerance), (network, number)
    finally:
        torch.set_default_dtype(torch.float32)


def alone(config: RunConfig, images: Tensor, labels: Tensor, num_steps: int) -> float:
    """The loss of the last of the steps that train.loop would take, all on one batch."""
    scaled = build(config.model, config.parameterization, config.seed)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config.optimizer)
    engine = Engine(scaled.network, lambda network: build_optimizer(groups, config.optimizer))
    for step in range(num_steps):
        set_learning_rate(engine.optimizer, config.optimizer.lr, schedule(config.schedule, step, num_steps))
        result = take_step(engine, images, labels, clip_norm=config.train.clip_norm)
    return float(result.loss)


def test_runs_of_one_seed_read_every_image_once(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[int] = []
    stream = batches.TrainingStream

    def counted(data: DataConfig, index: Index, state: State, *shape: int) -> TrainingStream:
        streams.append(state.seed)
        return stream(data, index, state, *shape)

    monkeypatch.setattr(batches, "TrainingStream", counted)
    configs = [make("vit", steps=2, data__in_memory=False, seed=seed) for seed in (0, 0, 3, 0)]
    run_pack(configs, [tmp_path / str(number) for number in range(4)])
    assert sorted(streams) == [0, 3]


def test_a_replica_alone_can_go_on_from_a_packs_checkpoint(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    for optimizer in RATES:
        configs = [make("vit", optimizer), make("vit", optimizer, **OWN[optimizer][1], seed=3)]
        paths = [tmp_path / optimizer / str(number) for number in range(2)]
        run_pack(configs, paths)
        for config, path in zip(configs, paths, strict=True):
            before = json.loads((path / "done.json").read_text())
            (path / "done.json").unlink()
            assert (path / "checkpoints" / "step-8").is_dir()
            assert run(config, path)["train_loss"] == pytest.approx(before["train_loss"], rel=1e-5)
            assert metric(path, "step") == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("network", "optimizer", "in_memory"),
    [
        ("conv_resnet, BatchNorm", "adamw", True),
        ("vit", "sgd", False),
        pytest.param("timm's ResNet, GroupNorm", "sgd", True, marks=LONG),
    ],
)
def test_a_killed_pack_ends_bit_for_bit_as_without(
    network: str,
    optimizer: str,
    in_memory: bool,
    make: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = partial(make, network, optimizer, data__in_memory=in_memory, train__log_every=3)  # losses pend at a save
    configs = [make(seed=seed, optimizer__lr=rate) for seed, rate in ((0, 0.01), (1, 0.002))]
    whole, broken = ([tmp_path / name / str(n) for n in range(2)] for name in ("whole", "broken"))
    run_pack(configs, whole)

    save, saves = Checkpoints.save, []

    def dies_at_the_third(*args: Any, **kwargs: Any) -> None:
        saves.append(args)
        if len(saves) == 3:  # both replicas have step 4, none has step 8
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_pack(configs, broken)
    monkeypatch.undo()
    for path in broken:
        assert RunDirectory(path).list_checkpoint_steps() == [4]
        state = path / "checkpoints" / "step-4" / "state.json"
        content = json.loads(state.read_text())
        assert 0 < content["seconds"] < 1000
        state.write_text(json.dumps(content | {"seconds": 1000.0}))

    run_pack(configs, broken)
    for one, other in zip(whole, broken, strict=True):
        assert metric(other, "loss") == metric(one, "loss")
        assert json.loads((other / "done.json").read_text())["seconds"] > 1000  # of the first start
        expected = load_file(one / "weights.safetensors")
        assert all(torch.equal(w, expected[name]) for name, w in load_file(other / "weights.safetensors").items())


def test_a_pack_takes_no_checkpoint_from_a_run_that_is_ahead_of_the_others(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    configs = [make("conv_resnet, no norm", seed=seed) for seed in range(4)]
    alone, packed = ([tmp_path / name / str(n) for n in range(4)] for name in ("alone", "packed"))
    results = [run(config, path) for config, path in zip(configs, alone, strict=True)]
    with pytest.raises(Interrupted, match="after step 5"):
        run(configs[1], packed[1], interrupt=After(5))
    with pytest.raises(Interrupted, match="after step 2"):
        run_pack(configs[2:], packed[2:], After(2))
    with pytest.raises(Interrupted, match="after step 6"):
        run_pack(configs, packed, After(1))
    assert [max(RunDirectory(path).list_checkpoint_steps(), default=0) for path in packed] == [0, 6, 2, 2]
    ended = run_pack(configs, packed)
    for path, one, other in zip(packed, results, ended, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert metric(path, "step") == [2, 4, 6, 8, 10, 12]
    assert "resumed from step-6" in (packed[1] / "log-0.txt").read_text()
    assert "replica 0 of a pack of 2" in (packed[2] / "log-0.txt").read_text()


def test_a_pack_whose_process_is_killed_goes_on_and_leaves_a_finished_replica_alone(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    configs = [make("conv_resnet, no norm", optimizer__lr=rate) for rate in (0.01, 0.02, 0.04)]
    whole, broken = ([tmp_path / name / str(n) for n in range(3)] for name in ("whole", "broken"))
    run_pack(configs, whole)
    for path in broken:
        path.mkdir(parents=True)
        shutil.copy(whole[0].parent / path.name / "config.yaml", path)
    program = """
import os, signal, sys, time
from pathlib import Path
from depthmup.train.checkpoint import Checkpoints
from depthmup.train.config import RunConfig
from depthmup.train.packs.pack import run_pack
from depthmup.train.reading import from_plain, read_yaml

paths, save = [Path(p) for p in sys.argv[1:]], Checkpoints.save

def save_or_die(self, progress, *given):
    if progress.step == 8:
        while not all((path / "checkpoints" / "step-4").exists() for path in paths):  # written by threads
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, progress, *given)

Checkpoints.save = save_or_die
run_pack([from_plain(RunConfig, read_yaml(path / "config.yaml"), str(path)) for path in paths], paths)
"""
    (child,) = start(["-c", program, *map(str, broken)], world_size=1)
    output, _ = child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL, output
    assert not (broken[0] / "done.json").exists()

    shutil.rmtree(broken[1])  # the middle one was finished by someone else meanwhile
    shutil.copytree(whole[1], broken[1])
    stamp = (broken[1] / "done.json").stat().st_mtime_ns
    results = run_pack(configs, broken)
    assert (broken[1] / "done.json").stat().st_mtime_ns == stamp
    for number in range(3):
        assert results[number]["train_loss"] == pytest.approx(
            json.loads((whole[number] / "done.json").read_text())["train_loss"], rel=1e-5
        )
        assert metric(broken[number], "step") == metric(whole[number], "step")
    assert "resumed from step-4" in (broken[0] / "log-0.txt").read_text()


def test_a_pack_that_is_asked_to_stop_saves_all_replicas_and_goes_on(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    configs = [make("conv_resnet, no norm", seed=seed) for seed in range(2)]
    paths = [tmp_path / str(number) for number in range(2)]
    with pytest.raises(Interrupted, match="stopped after step 5 of 12"):
        run_pack(configs, paths, After(5))
    assert all((path / "checkpoints" / "step-5").is_dir() for path in paths)
    assert [result["step"] for result in run_pack(configs, paths)] == [12, 12]
    assert metric(paths[1], "step") == [2, 4, 6, 8, 10, 12]


def test_a_frozen_replica_keeps_its_weights_while_the_others_learn(make: Callable[..., RunConfig]) -> None:
    for optimizer in RATES:
        replicas = Replicas([make("vit", optimizer, seed=seed) for seed in range(2)], CPU)
        images, labels = torch.randn(2, 4, 1, 8, 8), torch.arange(8).view(2, 4)
        replicas.step(images, labels)
        replicas.alive[1] = False
        before = [{name: w.clone() for name, w in replicas.weights(number).items()} for number in range(2)]
        replicas.step(images, labels)
        assert all(torch.equal(w, before[1][name]) for name, w in replicas.weights(1).items())
        assert not torch.equal(replicas.weights(0)["head.weight"], before[0]["head.weight"])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", RATES)
def test_replicas_that_are_left_out_change_nothing_for_the_others_to_the_last_bit(
    network: str, optimizer: str, make: Callable[..., RunConfig]
) -> None:
    """Down to two, with all that may differ, and with the seeds becoming fewer. One alone differs by rounding."""
    make = partial(make, network, optimizer, steps=9, data__mixup=0.4)
    own = [(0, 0.0, 0.5, 0.5), (0, 0.1, 0.0, 0.9), (1, 0.3, 0.2, 0.7), (0, 0.0, 0.1, 0.8), (1, 0.0, 0.0, 0.6)]
    configs = [
        make(seed=seed, train__label_smoothing=smoothing, train__drop_path=drop, train__ema=decay,
             train__clip_norm=clip, optimizer__lr=RATES[optimizer] * (1 + seed), parameterization={"beta": 1 + decay})
        for (seed, smoothing, drop, decay), clip in zip(own, (1.0, None, 2.0, 1.0, None), strict=True)
    ]  # fmt: skip
    whole, fewer = Replicas(configs, CPU), Replicas(configs, CPU)
    generator = torch.Generator().manual_seed(0)
    left = [0, 1, 2, 3, 4]
    for step, places in enumerate(([0, 2, 3, 4], [0, 1, 3], [1, 2], [0, 1])):
        images = torch.rand(2, 8, 1, 8, 8, generator=generator)
        targets = torch.rand(2, 8, 10, generator=generator).softmax(2)
        uniform = torch.rand(2, whole.num_drop_branches, 8, generator=generator)
        losses = whole.step(images, targets, uniform, measure=True)
        seeds = fewer.seeds
        assert torch.equal(fewer.step(images[seeds], targets[seeds], uniform[seeds], measure=True), losses[left]), step
        assert fewer.measurements() == [whole.measurements()[number] for number in left]
        fewer.keep(places)
        left = [left[place] for place in places]
        for place, number in enumerate(left):
            of_whole, of_fewer = whole.state(number), fewer.state(place)
            for part in ("model", "average"):
                assert all(torch.equal(w, of_fewer[part][name]) for name, w in of_whole[part].items())
    assert (left, fewer.seeds, len(fewer.configs)) == ([2, 4], [1], 2)


def test_bf16_replicas_learn_like_bf16_runs(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Rounding differs between batched and single kernels, so bf16 is compared in its own precision."""
    configs = [make("vit", "adamw", train__precision="bf16", optimizer__lr=rate) for rate in (0.01, 0.02)]
    results = run_pack(configs, [tmp_path / str(number) for number in range(2)])
    for number, config in enumerate(configs):
        single = run(config, tmp_path / f"alone-{number}")
        assert results[number]["train_loss"] == pytest.approx(single["train_loss"], rel=2e-2)
        assert "torch.bfloat16" in (tmp_path / str(number) / "log-0.txt").read_text()

    for network in ("vit", "conv_resnet, BatchNorm", "timm's ResNet, GroupNorm"):
        configs = [make(network, optimizer__lr=rate) for rate in (0.002, 0.004)]
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(16) % 10
        exact, rounded = Replicas(configs, CPU), Replicas(configs, CPU, torch.bfloat16)
        for _ in range(3):
            losses = exact.step(images[None], labels[None])
            low = rounded.step(images[None], labels[None])
        assert torch.allclose(low, losses, rtol=2e-2), network
        assert not torch.equal(low, losses)
        assert rounded.groups[0].values.dtype == torch.float32


@pytest.fixture
def large_numbers_in_fresh_memory() -> Iterator[None]:
    """malloc fills what it gives with bytes that are 3.4e38 as a float."""
    perturb, option = ctypes.CDLL(None).mallopt, -6  # M_PERTURB
    perturb(option, 0x80)
    yield
    perturb(option, 0)


@pytest.mark.usefixtures("large_numbers_in_fresh_memory")
def test_in_bf16_a_stage_of_one_pixel_has_gradients_of_the_size_of_fp32s(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """oneDNN leaves those of idle weights unwritten under a stride: any number may stand there."""
    make = partial(make, "timm's ResNet, GroupNorm", "sgd", 4, train__log_every=1, train__clip_norm=None)
    single, rounded = make(), make(train__precision="bf16")
    run(single, tmp_path / "fp32")
    run(rounded, tmp_path / "alone")
    run_pack([rounded, make(train__precision="bf16", seed=1)], [tmp_path / "pack", tmp_path / "beside"])
    expected = metric(tmp_path / "fp32", "grad_norm")
    for name in ("alone", "pack"):
        assert metric(tmp_path / name, "grad_norm") == pytest.approx(expected, rel=0.05), name


def test_a_stride_is_left_out_over_one_pixel_alone() -> None:
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    mended = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    mended.load_state_dict(plain.state_dict())
    drop_idle_strides(mended)
    for pixels in (1, 2, 5, 1):
        images = torch.randn(2, 8, pixels, pixels)
        torch.testing.assert_close(mended(images), plain(images))
    assert mended.stride == (1, 1)
    smaller = nn.Conv2d(8, 8, 3, stride=2, padding=2)  # one pixel becomes two by two
    drop_idle_strides(smaller)
    assert smaller(torch.zeros(1, 8, 1, 1)).shape == (1, 8, 2, 2)


def test_all_ways_to_convolve_give_the_same_gradients(make: Callable[..., RunConfig]) -> None:
    configs = [make("conv_resnet, LayerNorm", seed=seed) for seed in range(3)]
    images = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12).view(3, 4) % 10
    norms: list[Tensor] = []
    for method in CONVOLUTIONS:
        replicas = Replicas(configs, CPU, convolution=method)
        replicas.step(images, labels)
        norms.append(replicas.gradient_norms)
    assert all(torch.allclose(norm, norms[0], rtol=1e-5) for norm in norms)


def test_what_cannot_be_packed_is_named(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    base = make("vit", parameterization={"name": "sp"})
    packs = [
        make("vit", seed=5),
        make("vit", optimizer__lr=1.0, optimizer__momentum=0.1, schedule__warmup=0.3),
        make("vit", model__base_width=16, parameterization={"name": "completep", "alpha": 0.7}),
    ]
    assert [list_obstacles(base, other) for other in packs] == [[], [], []]
    other = make("vit", "adamw", steps=14, model__width=24, data__window=8)
    assert list_obstacles(base, other) == ["data.window", "model.width", "optimizer.name", "train.samples"]
    assert list_obstacles(base, replace(base, track=replace(base.track, wandb="offline"))) == ["track.wandb"]
    compiled = replace(base, train=replace(base.train, compile="block"))
    assert list_obstacles(compiled, compiled) == ["train.compile"]
    with pytest.raises(UserError, match=r"runs 0 and 1 cannot be packed together: data.window, model.width"):
        run_pack([base, other], [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="two have the same"):
        run_pack([base, packs[0]], [tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(UserError, match=r"packs do not know the setting of: train\.compile"):
        run_pack([compiled, compiled], [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "a").exists()


def test_each_replica_is_a_run_of_its_own_on_wandb(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    configs = [make("vit", seed=seed, track__wandb="offline", train__log_every=4) for seed in (1, 2)]
    folders = [tmp_path / "a", tmp_path / "b"]
    run_pack(configs, folders)
    for config, folder in zip(configs, folders, strict=True):
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        records = records_of(file)
        assert {each.run.run_id for each in records if each.HasField("run")} == {run_hash(config)}
        steps = [{item.key or item.nested_key[0]: item.value_json for item in each.history.item} for each in records]
        losses = [float(step["loss"]) for step in steps if "loss" in step]
        assert losses == [line["loss"] for line in metrics(folder)]


def test_a_server_of_wandb_that_does_not_answer_is_asked_once_by_all_runs_of_a_process(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def login(**given: Any) -> bool:
        asked.append(given)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("wandb.login", login)
    monkeypatch.setattr("depthmup.train.metrics.silent_servers", set())
    configs = [make("vit", seed=seed, track__wandb="online") for seed in (1, 2, 3)]
    folders = [tmp_path / str(config.seed) for config in configs]
    run_pack(configs, folders)
    assert len(asked) == 1
    assert all(len(list(folder.glob("wandb/offline-run-*"))) == 1 for folder in folders)


def test_a_pack_larger_than_memory_says_how_many_fit(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("vit")
    three = pack_bytes(config, 3, CPU)
    monkeypatch.setattr(
        "depthmup.train.packs.memory.measure_free_bytes", lambda device: round(three * 0.98 / MEMORY_SHARE)
    )
    assert find_largest_pack(config, CPU) == 2
    sizes = {k: pack_size(replace(config, train=replace(config.train, pack=k)), CPU) for k in (None, 0, 1, 2, 8)}
    assert sizes == {None: 2, 0: 1, 1: 1, 2: 2, 8: 2}
    with pytest.raises(UserError, match=r"a pack of 3 .* at most 2 fit, set train.pack=2"):
        run_pack([make("vit", seed=seed) for seed in range(3)], [tmp_path / str(n) for n in range(3)])
    monkeypatch.setattr("depthmup.train.packs.memory.measure_free_bytes", lambda device: 1000)
    assert find_largest_pack(config, CPU) == 0


@pytest.mark.parametrize("network", ["vit", "conv_resnet, no norm", "conv_resnet, BatchNorm"])
def test_memory_of_a_pack_is_as_torchs_profiler_counts_it(network: str, make: Callable[..., RunConfig]) -> None:
    """What a library needs within one operation, the profiler alone sees: MEMORY_SHARE leaves room for it."""
    config = make(network)
    for num_replicas in (1, 4):
        _, peak = measured.prepare(partial(measured.packed, [config] * num_replicas, CPU, None), CPU)
        assert MEMORY_SHARE * peak <= pack_bytes(config, num_replicas, CPU) <= 1.02 * peak


@pytest.mark.parametrize("network", ["vit", "conv_resnet, no norm", "conv_resnet, BatchNorm"])
def test_a_pack_takes_at_most_k_times_the_memory_of_a_run(network: str, make: Callable[..., RunConfig]) -> None:
    """Plus 10 %, of building it and of its first steps, by torch's profiler."""
    config = make(network)
    _, one = measured.prepare(partial(measured.alone, config, CPU, None), CPU)
    _, eight = measured.prepare(partial(measured.packed, [config] * 8, CPU, None), CPU)
    assert eight <= 1.1 * 8 * one


def test_a_module_that_does_not_batch_is_named(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gate(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    build_block = Block.__init__

    def with_gate(self: Block, *args: Any) -> None:
        build_block(self, *args)
        self.drop_path = Gate()

    monkeypatch.setattr(Block, "__init__", with_gate)
    configs = [make("conv_resnet, no norm", seed=seed) for seed in range(2)]
    with pytest.raises(UserError, match=r"module 'stages.0.0.drop_path' \(Gate\) does not batch over replicas"):
        run_pack(configs, [tmp_path / "a", tmp_path / "b"])
