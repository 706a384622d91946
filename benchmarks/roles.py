"""How long it takes to find the roles of a ViT and to scale it to 1,000 blocks, and the memory: seconds of CPU, peak.

OMP_NUM_THREADS=1 python -m benchmarks.roles                # timm's ViT of width 64, from 3 blocks
OMP_NUM_THREADS=1 python -m benchmarks.roles --depth 100
"""

import argparse
import resource
import time

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm
import torch
from torch import nn

from depthmup.models import Size, build_scaled


def build_vit(width: int, depth: int) -> nn.Module:
    network: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=depth, num_heads=width // 32
    )
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=1000)
    arguments = parser.parse_args()
    begun = time.process_time()
    size, base = Size(width=arguments.width, depth=arguments.depth), Size(width=arguments.width, depth=3)
    scaled = build_scaled(build_vit, size=size, base=base, inputs=torch.zeros(1, 3, 32, 32))
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(scaled.rules)} parameters, {seconds:.1f} s of CPU, {peak:.2f} GB with torch and timm themselves")


if __name__ == "__main__":
    main()
