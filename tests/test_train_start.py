"""How a run that is sharded starts: each process draws and keeps its own shards, of the same weights as ever."""

import json
from pathlib import Path

import pytest
import torch

from depthmup.models.build import build
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, process_group, world_from_environment
from depthmup.train.one_network import OneNetwork
from depthmup.train.tensors import full_tensor
from train_configs import CONV_RESNET, VIT, run_config
from train_processes import run_function

MODELS = {"vit": VIT, "batch_norm": {**CONV_RESNET, "norm": "batch"}}
LARGE = {**VIT, "width": 512, "depth": 8, "base_width": 512, "base_depth": 8, "num_heads": 8}


def sharded(config: RunConfig, world: World) -> OneNetwork:
    return OneNetwork(config, "fsdp", 1, world, torch.device("cpu"))


def config_of(*overrides: str, model: dict[str, object] = VIT) -> RunConfig:
    return run_config("nowhere", "parallel.engine=fsdp", "train.global_batch_size=48", *overrides, model=model)


def draw_all(out: str) -> None:
    world = world_from_environment()
    config = config_of("seed=7")
    with process_group(world, torch.device("cpu"), config.parallel, "fsdp"):
        for name, model in MODELS.items():
            network = sharded(config_of("seed=7", model=model), world).engine.network
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            whole = {key: full_tensor(tensor.detach()) for key, tensor in tensors.items()}
            if world.is_main:
                torch.save(whole, Path(out) / f"{name}.pt")


@pytest.mark.parametrize("name", MODELS)
def test_three_processes_draw_the_shards_of_the_weights_that_one_process_draws(name: str, tmp_path: Path) -> None:
    """3 divides neither the rows of these weights nor their number."""
    run_function("test_train_start", "draw_all", 3, str(tmp_path))
    config = config_of("seed=7", model=MODELS[name])
    expected = build(config.model, config.parameterization, 7).network
    found = torch.load(tmp_path / f"{name}.pt")
    for key, tensor in (*expected.named_parameters(), *expected.named_buffers()):
        assert torch.equal(found[key], tensor), key


def measure_start(out: str) -> None:
    from benchmarks.start_memory import measure

    world = world_from_environment()
    found = measure(config_of(model=LARGE), world.rank, world.size, world.port)
    (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))


def test_no_process_of_a_sharded_run_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """Half of it is each one's own, and beside it one whole parameter, while its shard is taken from it."""
    run_function("test_train_start", "measure_start", 2, str(tmp_path))
    for file in tmp_path.iterdir():
        weights, at_start, _ = json.loads(file.read_text())
        assert weights > 90
        assert 0.45 * weights < at_start < weights
