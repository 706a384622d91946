"""Images per second of whole runs, from JPEG files to updated weights, as a share of the step's own speed.

    python -m benchmarks.whole_runs                                                  # on a GPU: ViT-S/16 and ResNet-50
    python -m benchmarks.whole_runs --models tiny --batch 8 --steps 2 --rounds 2 --images 32 --workers 1 # on a CPU

Runs of train.loop.run on the same photographs (500x375 crops of scikit-learn's two, quality 90) with random resized
crops, one for each decoder of data.backend, and one of pictures that lie decoded on the device (data.in_memory), which
is the step's own speed. Medians over the rounds after the first, a metrics line each, with the share of the time that
the run waited for data. nvjpeg needs a GPU.
"""

import argparse
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.against_timm import make_photographs
from benchmarks.rows import describe_failure
from benchmarks.train_throughput import CASES, configuration, make_shards

from depthmup.data.pack import pack
from depthmup.train.loop import run


def measure(config: Any, out: Path) -> tuple[float, float]:
    """Images per second, and the share of the time that was spent waiting for data."""
    lines: list[dict[str, Any]] = []
    run(config, out, watch=lines.append)
    speed, waited = ([line[key] for line in lines[1:]] for key in ("images_per_second", "data_wait"))
    return statistics.median(speed), statistics.median(waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=["vit_s16", "resnet50"], choices=list(CASES))
    parser.add_argument("--backends", nargs="+", default=["nvjpeg", "fast"] if on_gpu else ["fast"])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--images", type=int, default=16384, help="files; of 512 different pictures")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="a metrics line")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", default="model" if on_gpu else "off", choices=["off", "block", "model"])
    arguments = parser.parse_args()
    arguments.precision, arguments.bf16_residual = "bf16" if on_gpu else "fp32", False
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, {vars(arguments)}")
    print("model      pictures           images/s  of the step's own  waiting for data", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "noise").mkdir()
        noise = make_shards(folder / "noise")
        make_photographs(folder / "images", arguments.images)
        pack(str(folder / "images"), folder / "shards", shard_samples=128)
        for model in arguments.models:
            own = configuration(CASES[model], noise, arguments)
            data = replace(
                own.data, root=str(folder / "shards"), augment="resized_crop_flip", in_memory=False,
                num_workers=arguments.workers, window=8,
            )  # fmt: skip
            classes = replace(own.model, num_classes=4)
            rows = {"decoded, on device": own}
            for backend in arguments.backends:
                rows[backend] = replace(own, model=classes, data=replace(data, backend=backend))
            speeds: dict[str, float] = {}
            for row, config in rows.items():
                try:
                    speed, waiting = measure(config, folder / f"{model} {row}")
                    speeds.setdefault(row, speed)
                    share = speed / speeds["decoded, on device"] if "decoded, on device" in speeds else math.nan
                    found = f"{speed:8.0f} {share:18.1%} {waiting:17.1%}"
                except Exception as error:  # one row's; the others go on
                    found, failed = describe_failure(error), True
                print(f"{model:10} {row:18} {found}", flush=True)
                torch.compiler.reset()
                if on_gpu:
                    torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
