"""How a run that is sharded starts: each process draws and keeps its own shards, of the same weights as ever."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stranger_network
from depthmup.data.errors import UserError
from depthmup.models.build import build
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, process_group, read_world_from_environment
from depthmup.train.one_network import OneNetwork
from depthmup.train.tensors import gather_full, take_local
from train_configs import CONV_RESNET, VIT, run_config
from train_processes import run_function

SIZE = {"width": 32, "depth": 4, "base_width": 16, "base_depth": 2}
OWN = {"family": "own", "builder": f"{stranger_network.__file__}:make_network", **SIZE}
MODELS = {
    "vit": VIT,
    "batch_norm": {**CONV_RESNET, "norm": "batch"},
    "own, which computes buffers": OWN,
    "timm's": {
        "family": "timm",
        "timm_name": "convnext_atto",
        "arguments": {"patch_size": 1},
        **SIZE,
        "depth": 1,
        "base_depth": 1,
    },
}
LARGE = {**VIT, "width": 512, "depth": 8, "base_width": 512, "base_depth": 8, "num_heads": 8}


def sharded(config: RunConfig, world: World) -> OneNetwork:
    return OneNetwork(config, "fsdp", 1, world, torch.device("cpu"))


def config_of(*overrides: str, model: dict[str, object] = VIT) -> RunConfig:
    return run_config("nowhere", "parallel.engine=fsdp", "train.global_batch_size=48", *overrides, model=model)


def draw_all(out: str) -> None:
    world = read_world_from_environment()
    config = config_of("seed=7")
    with process_group(world, torch.device("cpu"), config.parallel, "fsdp"):
        for name, model in MODELS.items():
            network = sharded(config_of("seed=7", "model.in_channels=3", model=model), world).engine.network
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            whole = {key: gather_full(tensor.detach()) for key, tensor in tensors.items()}
            if world.is_main:
                torch.save(whole, Path(out) / f"{name}.pt")


@pytest.mark.parametrize("name", MODELS)
def test_three_processes_draw_the_shards_of_the_weights_that_one_process_draws(name: str, tmp_path: Path) -> None:
    """3 divides neither the rows of these weights nor their number."""
    run_function("test_train_start", "draw_all", 3, str(tmp_path))
    config = config_of("seed=7", "model.in_channels=3", model=MODELS[name])
    expected = build(config.model, config.parameterization, 7).network
    found = torch.load(tmp_path / f"{name}.pt")
    for key, tensor in (*expected.named_parameters(), *expected.named_buffers()):
        assert torch.equal(found[key], tensor), key


def note_type(found: dict[str, str], name: str, module: nn.Module, inputs: Any) -> None:
    found[name] = str(next(module.parameters(recurse=False)).dtype)


def look_at_copies(out: str) -> None:
    """In each of four processes, two to a copy."""
    world = read_world_from_environment()
    config = config_of("parallel.shard_size=2", "parallel.gather=bf16", "train.precision=bf16")
    with process_group(world, torch.device("cpu"), config.parallel, "fsdp"):
        trained = sharded(config, world)
        gathered = dict[str, str]()
        for name, module in trained.engine.network.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(partial(note_type, gathered, name))
        with torch.autocast("cpu", torch.bfloat16):
            trained.engine.module(torch.zeros(2, 1, 8, 8))
        weight = dict(trained.engine.network.named_parameters())["blocks.0.mlp.fc1.weight"]
        found = {"gathered": gathered, "shard": len(take_local(weight)), "rows": len(weight)}
        (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))


def test_a_copy_lies_in_shard_size_processes_and_only_what_autocast_rounds_is_gathered_in_bf16(tmp_path: Path) -> None:
    run_function("test_train_start", "look_at_copies", 4, str(tmp_path))
    for file in tmp_path.iterdir():
        found = json.loads(file.read_text())
        assert found["shard"] == found["rows"] / 2
        in_bf16 = {name for name, dtype in found["gathered"].items() if dtype == "torch.bfloat16"}
        matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert in_bf16 == {name for name in found["gathered"] if name.endswith(matrices)}
        assert len(found["gathered"]) > len(in_bf16) > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.shard_size=2", "parallel.engine=ddp"), "shard_size would do nothing: engine is ddp"),
        (("parallel.gather=bf16", "parallel.engine=auto"), "gather would do nothing: engine is auto"),
        (("parallel.gather=bf16",), "would round the weights of a run in fp32"),
    ],
)
def test_what_would_do_nothing_or_round_a_run_of_fp32_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(*overrides)


def test_a_shard_size_that_does_not_divide_the_processes_is_refused_with_those_that_do() -> None:
    assert config_of("parallel.shard_size=4").parallel.copies(8) == 2
    assert config_of().parallel.copies(6) == 1
    with pytest.raises(ValueError, match="shard_size 4 must divide the 6 processes: use 1, 2, 3, 6"):
        config_of("parallel.shard_size=4").parallel.copies(6)


def measure_start(out: str) -> None:
    from benchmarks.start_memory import measure

    world = read_world_from_environment()
    found = measure(config_of(model=LARGE), world.rank, world.size, world.port)
    (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))


def test_no_process_of_a_sharded_run_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """Half of it is each one's own, and beside it one whole parameter, while its shard is taken from it."""
    run_function("test_train_start", "measure_start", 2, str(tmp_path))
    for file in tmp_path.iterdir():
        weights, at_start, _ = json.loads(file.read_text())
        assert weights > 90
        assert 0.45 * weights < at_start < weights
