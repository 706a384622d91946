"""Several processes that stop and go on end bit for bit as those that never stopped, under every engine."""

from pathlib import Path
from typing import Any

import pytest

from depthmup.train.config import ParallelConfig
from test_train_engines import ENGINES
from train_configs import VIT, pack_digits, run_config, timeless_metrics
from train_processes import run_function

WORLD_SIZE = 3  # sums of two numbers have one order only


def stop_and_go_on(shards: str, out: str) -> None:
    """In each process: every engine trains once without a stop, and once with one after step 4."""
    import torch

    from depthmup.train.distributed import process_group, world_from_environment
    from depthmup.train.interrupt import Interrupt, Interrupted
    from depthmup.train.loop import run

    world = world_from_environment()
    settings = ("optimizer.name=adamw", "optimizer.lr=0.002", "train.clip_norm=0.5", "train.global_batch_size=48")
    more = ("train.samples=384", "train.drop_path=0.1", "data.num_streams=12", "parallel.micro_batch_size=8")
    with process_group(world, torch.device("cpu"), ParallelConfig(), "ddp"):
        for name, overrides in ENGINES.items():
            config = run_config(shards, *settings, *more, *overrides, model=VIT)
            run(config, Path(out) / name / "whole", world)
            interrupt = Interrupt()

            def watch(line: dict[str, Any], interrupt: Interrupt = interrupt) -> None:
                if line["step"] == 3:
                    interrupt.request()

            with pytest.raises(Interrupted, match="after step 4 of 8"):
                run(config, Path(out) / name / "stopped", world, interrupt, watch)
            run(config, Path(out) / name / "stopped", world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact")
    run_function("test_train_exact", "stop_and_go_on", WORLD_SIZE, str(pack_digits(out / "shards")), str(out))
    return out


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_three_processes_that_stops_ends_as_one_that_never_did(runs: Path, engine: str) -> None:
    whole, stopped = runs / engine / "whole", runs / engine / "stopped"
    assert len(timeless_metrics(whole)) == 8
    assert timeless_metrics(stopped) == timeless_metrics(whole)
    assert (stopped / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
