"""Several processes that stop and go on end bit for bit as those that never stopped, under every engine.

`make test` has the two whose processes save parts: FSDP and ZeRO 2. The others are in `make test-long`.
"""

from pathlib import Path
from typing import Any

import pytest

from depthmup.train.config import ParallelConfig
from test_train_engines import ENGINES, SHALLOW
from train_configs import pack_digits, run_config, timeless_metrics
from train_processes import run_function

WORLD_SIZE = 3  # sums of two numbers have one order only
STEPS = 6
CHOSEN = [pytest.param(name, marks=() if name in ("fsdp", "zero2") else pytest.mark.long) for name in ENGINES]


def stop_and_go_on(shards: str, out: str, *engines: str) -> None:
    """In each process: each of `engines` trains once without a stop, and once with one after step 3."""
    import torch

    from depthmup.train.distributed import process_group, read_world_from_environment
    from depthmup.train.interrupt import Interrupt, Interrupted
    from depthmup.train.loop import run

    world = read_world_from_environment()
    settings = ("optimizer.name=adamw", "optimizer.lr=0.002", "train.clip_norm=0.5", "train.global_batch_size=48")
    more = (f"train.samples={STEPS * 48}", "train.drop_path=0.1", "data.num_streams=12", "parallel.micro_batch_size=8")
    with process_group(world, torch.device("cpu"), ParallelConfig(), "ddp"):
        for name in engines:
            config = run_config(shards, *settings, *more, *ENGINES[name], model=SHALLOW)
            run(config, Path(out) / name / "whole", world)
            interrupt = Interrupt()

            def watch(line: dict[str, Any], interrupt: Interrupt = interrupt) -> None:
                if line["step"] == 2:
                    interrupt.request()

            with pytest.raises(Interrupted, match="after step 3 of 6"):
                run(config, Path(out) / name / "stopped", world, interrupt, watch)
            run(config, Path(out) / name / "stopped", world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The runs of the engines that the chosen tests are about."""
    engines = [item.callspec.params["engine"] for item in request.session.items if item.fspath == request.fspath]
    out = tmp_path_factory.mktemp("exact")
    shards = pack_digits(out / "shards")
    run_function("test_train_exact", "stop_and_go_on", WORLD_SIZE, str(shards), str(out), *engines)
    return out


@pytest.mark.parametrize("engine", CHOSEN)
def test_a_run_of_three_processes_that_stops_ends_as_one_that_never_did(runs: Path, engine: str) -> None:
    whole, stopped = runs / engine / "whole", runs / engine / "stopped"
    assert len(timeless_metrics(whole)) == STEPS
    assert timeless_metrics(stopped) == timeless_metrics(whole)
    assert (stopped / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
