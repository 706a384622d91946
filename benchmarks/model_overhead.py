"""What the multipliers cost: step time over that of the same network without them, in one process, interleaved.

    python benchmarks/model_overhead.py [--compile] [--width 384 --depth 4 --batch-size 8 --rounds 15]

Prints the median over rounds of the ratio of neighbouring steps, and the time to build and group 1,000 blocks on meta.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without an installation

from models.build import build, build_meta
from models.config import OptimizerConfig, ParameterizationConfig, VisionTransformerConfig
from models.optimizer import build_optimizer, parameter_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    for name, default in (("width", 384), ("depth", 4), ("batch-size", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            started = time.perf_counter()
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        return step

    plain = prepare(replace(config, base_width=config.width, base_depth=config.depth))
    with_multipliers = prepare(config)
    for step in (plain, with_multipliers):
        step()
    ratios = []
    for _ in range(given.rounds):
        before, scaled, after = plain(), with_multipliers(), plain()
        ratios.append(2 * scaled / (before + after))
    mode = "compiled" if given.compile else "eager"
    print(f"step time with multipliers / without, {mode}, {device}: {statistics.median(ratios):.3f}")

    started = time.perf_counter()
    deep = build_meta(replace(config, depth=1000), ParameterizationConfig())
    parameter_groups(deep.network, deep.rules, deep.scale, optimizer_config)
    print(f"1,000 blocks built and grouped on meta: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
