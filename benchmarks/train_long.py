"""What long runs cost beside their steps: the stall of a checkpoint, and whether memory grows.

    OMP_NUM_THREADS=1 python benchmarks/train_long.py

Stall: 250 steps of a ViT of width 192 and depth 12 with AdamW (64 MB of state), saved every 100 steps. The loop's share
is the time it spends inside a save (waiting for the last one, copying); the rest is what the writing thread takes from
the steps that follow, counted as what the 5 steps after a save take beyond the median step. Memory: 2,000 steps of a
small net on shards that are read and decoded all the time; resident memory is the kernel's (/proc/self/statm).
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from depthmup.train import loop
from train_configs import CONV_RESNET, VIT, pack_digits, run_config

EVERY, AFTER = 100, 5


def checkpoint_stall(shards: Path, out: Path) -> str:
    config = run_config(
        shards, "optimizer.name=adamw", "optimizer.lr=0.001", "train.samples=4000", "train.global_batch_size=16",
        f"train.checkpoint_every={EVERY}", "train.evaluate=[]",
        model=VIT | {"width": 192, "depth": 12, "num_heads": 4},
    )  # fmt: skip
    times: list[float] = []
    stalls: list[float] = []
    save = loop.Loop.save

    def timed(self: loop.Loop) -> None:
        start = time.perf_counter()
        save(self)
        stalls.append(time.perf_counter() - start)

    loop.Loop.save = timed
    loop.run(config, out, watch=lambda line: times.append(16 / line["images_per_second"]))
    saved = range(EVERY, len(times), EVERY)  # a line is written before its step's save: that belongs to the next line
    late = [times[step + i] for step in saved for i in range(AFTER)]
    usual = statistics.median(times[10:])
    stall, all_in_all = statistics.mean(stalls), (statistics.mean(late) - usual) * AFTER
    return (
        f"checkpoint: step {usual * 1000:.0f} ms; a save holds the loop for {stall * 1000:.0f} ms, "
        f"{stall / (EVERY * usual):.2%} of {EVERY} steps, with the slower steps {all_in_all / (EVERY * usual):.2%}"
    )


def resident_memory(shards: Path, out: Path) -> str:
    resident: dict[int, float] = {}

    def watch(line: dict[str, Any]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident[line["step"]] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    config = run_config(
        shards, "train.samples=64000", "train.log_every=100", "train.checkpoint_every=200", "train.evaluate=[]",
        model=CONV_RESNET,
    )  # fmt: skip
    loop.run(config, out, watch=watch)
    shown = ", ".join(f"{resident[step]:.1f} at step {step}" for step in (200, 500, 1000, 1500, 2000))
    return f"resident MB: {shown}; growth after step 200: {resident[2000] / resident[200] - 1:+.2%}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        shards = pack_digits(Path(name) / "shards")
        print(resident_memory(shards, Path(name) / "memory"), flush=True)
        print(checkpoint_stall(shards, Path(name) / "checkpoint"), flush=True)


if __name__ == "__main__":
    main()
