"""What the multipliers cost: step time over that of the same network without them, in one process, interleaved.

    python benchmarks/model_overhead.py [--compile] [--width 384 --depth 4 --batch-size 8 --rounds 15]

Prints the median over rounds of the ratio of neighbouring steps with its quartiles, the same for a second copy of the
network without multipliers (what the machine's noise is), and the time to build and group 1,000 blocks on meta.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # works without an installation

from depthmup.models.build import build, build_meta
from depthmup.models.config import VisionTransformerConfig
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization_config import ParameterizationConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    for name, default in (("width", 384), ("depth", 4), ("batch-size", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU the time of this process alone, which other work on the machine does not enter.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    # four heads: the head dim grows, so that the queries are multiplied too
    config = VisionTransformerConfig(
        width=given.width, depth=given.depth, base_width=given.width // 2, base_depth=1, num_heads=4, image_size=224
    )
    optimizer_config = OptimizerConfig(lr=1e-4)
    images = torch.randn(given.batch_size, 3, 224, 224, device=device)

    def prepare(model: VisionTransformerConfig):
        scaled = build(model, ParameterizationConfig(), 0, device)
        groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, optimizer_config)
        print(f"{len(scaled.multipliers)} multipliers, {len(groups)} optimizer groups")
        optimizer = build_optimizer(groups, optimizer_config)
        network = torch.compile(scaled.network) if given.compile else scaled.network

        def step() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - started

        return step

    plain_config = replace(config, base_width=config.width, base_depth=config.depth)
    plain, control, with_multipliers = prepare(plain_config), prepare(plain_config), prepare(config)
    for step in (plain, control, with_multipliers):
        step()
    ratios: dict[str, list[float]] = {"with multipliers": [], "without (noise)": []}
    for _ in range(given.rounds):
        for values, step in zip(ratios.values(), (with_multipliers, control), strict=True):
            before, middle, after = plain(), step(), plain()
            values.append(2 * middle / (before + after))
    mode = "compiled" if given.compile else "eager"
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"step time {name} / without, {mode}, {device}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")

    started = clock()
    deep = build_meta(replace(config, depth=1000), ParameterizationConfig())
    parameter_groups(deep.network, deep.rules, deep.scale, optimizer_config)
    print(f"1,000 blocks built and grouped on meta: {clock() - started:.1f} s")


if __name__ == "__main__":
    main()
