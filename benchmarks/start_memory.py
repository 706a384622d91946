"""What host memory a ViT takes at its start and in a step on CPU processes, under each engine.

    OMP_NUM_THREADS=1 python -m benchmarks.start_memory --width 768 --depth 12 --processes 2

The figures are of the process that takes the most: how far its peak lies above what it held before, beside the size of
all weights in fp32.
"""

import argparse
import multiprocessing
import re
import socket
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.fsdp  # before memory is measured

from depthmup.data.config import DataConfig
from depthmup.models.build import build_meta
from depthmup.models.config import VisionTransformerConfig
from depthmup.models.flops import count_parameters
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.train.config import ParallelConfig, RunConfig, TrainConfig
from depthmup.train.distributed import World, process_group
from depthmup.train.engines.zero import import_deepspeed
from depthmup.train.one_network import OneNetwork

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held(key: str = "VmRSS") -> float:
    """MB of this process, now (VmRSS) or at most since `reset_peak` (VmHWM)."""
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) / 1024


def reset_peak() -> None:
    CLEAR.write_text("5")


def measure(config: RunConfig, rank: int, world_size: int, port: int, steps: bool = True) -> tuple[float, float, float]:
    """MB of all weights, at the peak of the start and at that of a step (0 without one); the peaks above what was held
    before."""
    torch.set_num_threads(1)
    world = World(rank, world_size, rank, "localhost", port)
    engine, device = config.parallel.engine, torch.device("cpu")
    with process_group(world, device, config.parallel, engine):
        whole = build_meta(config.model, config.parameterization).network  # timm, which is imported here
        if engine == "deepspeed":
            import_deepspeed(device)
        before = held()
        reset_peak()
        network = OneNetwork(config, engine, 1, world, device)
        started = held("VmHWM") - before
        weights = count_parameters(whole) * 4 / 2**20
        if not steps:
            return weights, started, 0.0
        reset_peak()
        shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
        images = torch.zeros(1, config.train.global_batch_size // world_size, *shape)
        network.step(images, torch.zeros(*images.shape[:2], dtype=torch.int64))
        stepped = held("VmHWM") - before
        return weights, started, stepped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--start-only", action="store_true", help="no step, which takes gradients and moments too")
    parser.add_argument(
        "--engines", nargs="+", default=["ddp", "fsdp", "deepspeed-3"], help="ZeRO's stage after a dash"
    )
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd: without momentum")
    arguments = parser.parse_args()
    model = VisionTransformerConfig(
        width=arguments.width, depth=arguments.depth, base_width=arguments.width, base_depth=arguments.depth,
        num_heads=arguments.width // 64, patch_size=16, image_size=32, in_channels=3, num_classes=10,
    )  # fmt: skip
    count = arguments.processes
    config = RunConfig(
        model=model,
        optimizer=OptimizerConfig(name="adamw", lr=1e-4)
        if arguments.optimizer == "adamw"
        else OptimizerConfig(name="sgd", lr=1e-4, momentum=0.0),
        data=DataConfig(name="none", root=".", num_streams=1),
        train=TrainConfig(samples=count, global_batch_size=count, device="cpu", precision="fp32"),
    )
    for engine in arguments.engines:
        name, _, stage = engine.partition("-")
        chosen = replace(config, parallel=ParallelConfig(engine=name, **({"zero_stage": int(stage)} if stage else {})))
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            of_ranks = [(chosen, rank, count, port, not arguments.start_only) for rank in range(count)]
            found = pool.starmap(measure, of_ranks, chunksize=1)
        weights, started, stepped = map(max, zip(*found, strict=True))
        peaks = f"peak at the start {started:.0f} MB"
        if not arguments.start_only:
            peaks += f", in the first step {stepped:.0f} MB"
        print(f"{engine}: weights {weights:.0f} MB; {peaks}")


if __name__ == "__main__":
    main()
