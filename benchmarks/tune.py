"""What a search costs beside its runs, and what its sampler is worth: seconds a run, and the loss that TPE and random
suggestions reach, on a made-up loss of five hyperparameters with the noise of real runs. No run is trained.

    python benchmarks/tune.py [--trials 400] [--seeds 3]
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from depthmup.data.pack import pack
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.search import Search
from depthmup.train.owner import code_fingerprint, owner

NOISE = 0.02  # of a run's loss
CONFIG = {
    "model": {"family": "conv_resnet", "width": 16, "depth": 3, "base_width": 16, "base_depth": 3, "num_classes": 10,
              "image_size": 8, "in_channels": 1},
    "optimizer": {"name": "adamw", "lr": 2**-12, "weight_decay": 1e-6},
    "data": {"name": "digits", "in_memory": True},
    "train": {"samples": 64000, "global_batch_size": 64},
    "tune": {
        "space": {
            "optimizer.lr": {"first": 2**-14, "last": 2**-4},
            "optimizer.weight_decay": {"first": 1e-6, "last": 1e-2},
            "schedule.warmup": {"first": 0, "last": 0.5, "scale": "linear"},
            "parameterization.beta": {"first": 0.1, "last": 4},
            "train.label_smoothing": [0, 0.05, 0.1],
        },
    },
}  # fmt: skip


def loss_without_noise(run: PlannedRun) -> float:
    """A valley: the best rate falls with beta, decay matters little, and a long warm-up allows a higher rate."""
    config = run.config
    rate = math.log2(config.optimizer.lr) + 9 + math.log2(config.parameterization.beta) - 2 * config.schedule.warmup
    beta, decay = math.log2(config.parameterization.beta), math.log10(config.optimizer.weight_decay) + 4
    return 0.5 + 0.02 * rate**2 + 0.02 * beta**2 + 0.002 * decay**2 + 0.2 * config.train.label_smoothing


def finish(run: PlannedRun, noise: np.random.Generator) -> None:
    """Writes what a run leaves behind."""
    run.directory.path.mkdir(parents=True, exist_ok=True)
    loss = min(loss_without_noise(run) * (1 + NOISE * noise.standard_normal()), math.log(10))
    done = {"outcome": "completed", "step": 1000, "minival_loss": loss, "seconds": 1.0, "code": code_fingerprint()}
    run.directory.write_done(done | owner(run.config))


def walk(folder: Path, sampler: str, trials: int, seed: int) -> tuple[float, list[float]]:
    """(seconds a run that the search took, the true loss of the best suggestion so far after each)."""
    file = folder / f"{sampler}-{seed}.yaml"
    tune = CONFIG["tune"] | {"trials": trials, "sampler": sampler, "seed": seed}
    data = CONFIG["data"] | {"root": str(folder / "shards")}
    study = {"name": file.stem, "directory": str(folder)}
    file.write_text(yaml.safe_dump({**CONFIG, "data": data, "tune": tune, "study": study}))
    noise, seconds, seen, best = np.random.default_rng(seed), 0.0, math.inf, list[float]()
    search = Search(file, read_study_or_run(file))
    while len(best) < trials:
        started = time.perf_counter()
        search.go_on()
        pending = search.pending()
        seconds += time.perf_counter() - started
        for run in pending:
            finish(run, noise)
            loss = run.done()["minival_loss"]  # type: ignore[index]  # it was written a moment ago
            if loss < seen:
                seen, truth = loss, loss_without_noise(run)
            best.append(truth)
    return seconds / trials, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    marks = [count for count in (16, 32, 64, 128, 256, 512, 1024, 2048) if count <= arguments.trials]
    print("sampler  seconds a run  true loss above the best possible, after " + ", ".join(map(str, marks)))
    with tempfile.TemporaryDirectory() as folder:
        pack("sklearn:digits", Path(folder) / "shards", validation_share=0.2)
        for sampler in ("random", "tpe"):
            walks = [walk(Path(folder), sampler, arguments.trials, seed) for seed in range(arguments.seeds)]
            seconds = statistics.median(seconds for seconds, _ in walks)
            reached = [statistics.median(best[mark - 1] for _, best in walks) - 0.5 for mark in marks]
            print(f"{sampler:7}  {seconds:13.3f}  {'  '.join(f'{each:.4f}' for each in reached)}", flush=True)


if __name__ == "__main__":
    main()
