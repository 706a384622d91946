"""Images per second of whole training runs, from JPEG files to updated weights: ours beside those of timm's train.py.

    git clone https://github.com/huggingface/pytorch-image-models
    OMP_NUM_THREADS=1 python benchmarks/against_timm.py pytorch-image-models [--workers 1] [--rounds 3]
    ... pytorch-image-models --device cuda --models vit_s16 resnet50 --batch 256 --workers 16      # bf16, compiled

Both train the same timm network on the same JPEG files (500x375 crops of scikit-learn's two photographs, quality 90)
with the same crop, flip, batch, workers, precision, optimizer and clipping: timm from an ImageFolder, ours
by `python -m depthmup.train` from shards of it. Runs alternate; the first steps of each do not count; the table shows
medians of the rounds. CPU milliseconds are those of all processes: what counts where processes share cores. Decoding an
image for ViT-S/16 on a GPU with 16 workers takes about as long as its step; on a CPU the same holds for the very small
networks here, and `vit_large` is one whose step costs much more, where no loader can help. On a GPU both compile the
whole network.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from depthmup.data.pack import pack

ROOT = Path(__file__).resolve().parents[1]
NUM_DIFFERENT, CLASSES = 512, 4
LOG_EVERY = 10


@dataclass(frozen=True)
class Case:
    """One network, as our config and as timm's command line name it."""

    model: dict[str, Any]
    timm: tuple[str, ...]
    steps: int
    first: int = 20  # steps that do not count: what timm's workers made ready (2 batches each) while it compiled


def vit(width: int, depth: int, steps: int, patch_size: int = 32, first: int = 20) -> Case:
    heads = width // 64
    model = {"family": "vit", "width": width, "depth": depth, "base_width": 64, "base_depth": 1, "head_dim": 64}
    timm = ("vit_tiny_patch16_224", "--model-kwargs", f"embed_dim={width}", f"depth={depth}", f"num_heads={heads}")
    sizes = {"patch_size": patch_size, "image_size": 224}
    return Case(model | sizes, (*timm, f"patch_size={patch_size}", "--img-size", "224"), steps, first)


CASES = {
    "vit": vit(64, 2, 120),
    "vit_large": vit(192, 6, 60),
    "resnet": Case(
        {"family": "resnet", "preactivation": True, "width": 16, "depth": 4, "base_width": 16, "base_depth": 4,
         "image_size": 96},
        ("resnetv2_18", "--model-kwargs", "layers=[1,1,1,1]", "channels=[16,32,64,128]", "stem_chs=16",
         "--input-size", "3", "96", "96"),
        120,
    ),
    "vit_s16": vit(384, 12, 130, patch_size=16, first=60),
    "resnet50": Case(
        {"family": "resnet", "block": "bottleneck", "blocks": [3, 4, 6, 3], "width": 64, "depth": 16, "base_width": 64,
         "base_depth": 16, "image_size": 224},
        ("resnet50", "--channels-last"),
        130,
        60,
    ),
}  # fmt: skip
ON_CPUS = ["vit", "vit_large", "resnet"]


def make_photographs(folder: Path, num_images: int) -> None:
    """Class folders of JPEG files: an epoch that is longer than a run, so that none starts while it is measured."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs, generator = load_sample_images().images, np.random.default_rng(0)
    for number in range(num_images):
        photograph = photographs[number % 2]
        top, left = (int(generator.integers(0, limit)) for limit in np.array(photograph.shape[:2]) - (375, 500) + 1)
        path = folder / f"class-{number % CLASSES}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < NUM_DIFFERENT:
            Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=90)
        else:
            path.hardlink_to(path.with_name(f"{number % NUM_DIFFERENT:04}.jpg"))


@dataclass(frozen=True)
class Rate:
    images_per_second: float
    cpu_ms_per_image: float  # of all processes: what a step costs on cores that others share


def cpu_seconds(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(command: list[str], log: Path, output: Path, step_line: str, case: Case, batch: int) -> Rate:
    """Starts `command`, watches the file `output` for lines that `step_line` finds a step's number in, and kills it.
    What it says on standard error goes to `log`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    marks: dict[int, tuple[float, float]] = {}  # step -> (time, CPU seconds)
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=DEVNULL, stderr=errors) as process,
    ):
        tree = psutil.Process(process.pid)
        while process.poll() is None and max(marks, default=0) < case.steps:
            time.sleep(0.02)
            if output.exists() and (steps := re.findall(step_line, output.read_text())):
                marks.setdefault(int(steps[-1]), (time.monotonic(), cpu_seconds(tree)))
        if process.poll() is not None:
            raise SystemExit(f"{shlex.join(command)} ended early:\n{log.read_text()[-2000:]}")
        for each in (*tree.children(recursive=True), process):
            each.kill()
    steps = sorted(step for step in marks if step >= case.first)
    (since, cpu_before), (until, cpu_after) = marks[steps[0]], marks[steps[-1]]
    images = (steps[-1] - steps[0]) * batch
    return Rate(images / (until - since), (cpu_after - cpu_before) / images * 1000)


def ours(case: Case, photographs: Path, folder: Path, batch: int, workers: int, device: str) -> Rate:
    compute = {"precision": "bf16", "compile": "model"} if device == "cuda" else {"precision": "fp32"}
    config = {
        "model": case.model | {"num_classes": CLASSES},
        "parameterization": {"name": "depth_mup"},
        "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 1e-4},
        "data": {"name": "photographs", "root": str(photographs / "shards"), "augment": "resized_crop_flip",
                 "minival": 0, "num_streams": batch, "num_workers": workers, "window": 8},
        "train": {"samples": batch * (case.steps + 100), "global_batch_size": batch, "clip_norm": 1.0, "evaluate": [],
                  "log_every": LOG_EVERY, "device": device, **compute},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))  # YAML reads JSON
    command = [sys.executable, "-m", "depthmup.train", str(folder / "run.json"), str(folder / "run")]
    return measure(command, folder / "ours.log", folder / "run" / "metrics.jsonl", r'"step": (\d+)', case, batch)


def timm(checkout: Path, case: Case, photographs: Path, folder: Path, batch: int, workers: int, device: str) -> Rate:
    start = (
        "import depthmup.models.torchvision_ops, runpy, sys; sys.path[0] = sys.argv[1]; "  # mends torchvision's import
    )
    start += "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    settings = {
        "--data-dir": photographs / "images", "--train-split": "", "--val-split": "", "--num-classes": CLASSES,
        "--batch-size": batch, "--workers": workers, "--device": device, "--epochs": 1, "--opt": "adamw",
        "--lr": 1e-4, "--weight-decay": 0.05, "--clip-grad": 1.0, "--smoothing": 0, "--color-jitter": 0,
        "--train-interpolation": "bicubic", "--warmup-epochs": 0, "--log-interval": LOG_EVERY, "--output": folder,
    }  # fmt: skip
    arguments = [str(part) for setting in settings.items() for part in setting]
    if device == "cuda":
        arguments += ["--amp", "--amp-dtype", "bfloat16", "--torchcompile"]
    command = [
        sys.executable,
        "-c",
        start,
        str(checkout),
        str(checkout / "train.py"),
        "--model",
        *case.timm,
        *arguments,
    ]
    log = folder / "timm.log"
    return measure(command, log, log, r"Train: 0 \[ *(\d+)/", case, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/huggingface/pytorch-image-models")
    parser.add_argument("--models", nargs="+", default=ON_CPUS, choices=list(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.batch % arguments.workers:
        parser.error("--workers must divide --batch: our workers read equal shares of every batch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        longest = max(CASES[model].steps for model in arguments.models)
        make_photographs(folder / "images", arguments.batch * (longest + 20))
        pack(str(folder / "images"), folder / "shards", shard_samples=128)
        print(f"{arguments.workers} worker(s), batches of {arguments.batch}, {arguments.device}")
        print("            images/s: ours   timm  ratio   CPU ms an image: ours   timm  ratio", flush=True)
        for model in arguments.models:
            rates: list[tuple[Rate, Rate]] = []
            for number in range(arguments.rounds):
                out = folder / f"{model}-{number}"
                out.mkdir()
                shared = (CASES[model], folder, out, arguments.batch, arguments.workers, arguments.device)
                rates.append((ours(*shared), timm(arguments.checkout.resolve(), *shared)))
            speed = medians([(a.images_per_second, b.images_per_second) for a, b in rates])
            cost = medians([(a.cpu_ms_per_image, b.cpu_ms_per_image) for a, b in rates])
            print(f"{model:20} {speed} {cost:>34}", flush=True)


def medians(pairs: list[tuple[float, float]]) -> str:
    """Of both columns, and of the ratio."""
    columns = (*zip(*pairs, strict=True), [a / b for a, b in pairs])
    return "{:6.1f} {:6.1f} {:6.2f}".format(*map(statistics.median, columns))


if __name__ == "__main__":
    main()
