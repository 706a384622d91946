"""What a search costs beside its runs, and what its samplers are worth: seconds a run, and the loss that their
suggestions reach, on a made-up loss of five hyperparameters with the noise of real runs. No run is trained.

    python benchmarks/tune.py [--trials 400] [--seeds 3] [--batch 1]

With --train real runs on the handwritten digits: the search, with early ends (and in packs where --batch is above 1,
which it is not by default, as one process trains on a CPU), beside Optuna's own random
search run one by one at equal FLOPs, in turns in this one process: CPU seconds, and runs' worth of FLOPs, until the
search has a loss as low as the other's lowest; over the same of the other. Last the expected time to one loss, the
median of random search's lowest after a third, two thirds and all of its runs: what all seeds took until they had it,
or in vain, over the number that got there, of both kinds (the expected running time of 2010 black-box benchmarks, by
Hansen et al.); the 90 % interval is of a bootstrap over seeds.

    python benchmarks/tune.py --train [--trials 24] [--seeds 21] [--first-seed 0] [--batch 1] [--traces FILE]
    python benchmarks/tune.py --read FILE...          # the last figures again, of what --traces wrote
"""

import argparse
import io
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import torch
import yaml
from rich.console import Console

from depthmup.data.pack import pack
from depthmup.launch.chain import finish_study
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.space import make_distributions
from depthmup.launch.transfer import launch
from depthmup.train import loop
from depthmup.train.owner import describe_owner, fingerprint_code

NOISE = 0.02  # of a run's loss
LAST = 50  # runs, whose CPU seconds say what a run takes when so many are known
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
    done = {"outcome": "completed", "step": 1000, "minival_loss": loss, "seconds": 1.0, "code": fingerprint_code()}
    run.directory.write_done(done | describe_owner(run.config))


@dataclass
class Walk:
    """What a launcher took beside its runs, from one to the next. losses: the true one of the best run so far."""

    seconds: list[float]
    cpu: list[float]
    losses: list[float]


def walk(folder: Path, sampler: str, trials: int, seed: int, batch: int | None) -> Walk:
    """`depthmup tune` in this process, with runs that are written and not trained."""
    file = folder / f"{sampler}-{seed}.yaml"
    tune = CONFIG["tune"] | {"trials": trials, "sampler": sampler, "seed": seed, "batch": batch, "rerun": 1}
    data = CONFIG["data"] | {"root": str(folder / "shards")}
    sections = {"study": {"name": file.stem, "directory": str(folder)}, "launch": {"cluster": "debug"}}
    file.write_text(yaml.safe_dump({**CONFIG, **sections, "data": data, "tune": tune}))
    noise, seen, best, found = np.random.default_rng(seed), math.inf, math.inf, Walk([], [], [])
    left, left_cpu = time.perf_counter(), time.process_time()

    def train(packs: list[list[PlannedRun]], *_: Any) -> None:
        nonlocal seen, best, left, left_cpu
        runs = [run for pack in packs for run in pack]
        found.seconds.extend([(time.perf_counter() - left) / len(runs)] * len(runs))
        found.cpu.extend([(time.process_time() - left_cpu) / len(runs)] * len(runs))
        for run in runs:
            finish(run, noise)
            loss = run.done()["minival_loss"]  # type: ignore[index]  # it was written a moment ago
            if loss < seen:
                seen, best = loss, loss_without_noise(run)
            found.losses.append(best)
        left, left_cpu = time.perf_counter(), time.process_time()

    with patch("depthmup.launch.jobs.submit.run_here", train), patch("depthmup.launch.transfer.time.sleep"):
        finish_study(Search(file, read_study_or_run(file)), Console(file=io.StringIO()))
    return found


# ---------------------------------------------------------------- real runs


@dataclass(frozen=True)
class Reached:
    """Where one search stood after a run, or a batch."""

    seconds: float  # of the CPU
    runs: float  # FLOPs, in those of one run to its end
    lowest: float  # loss so far


def open_search(folder: Path, name: str, **tune: Any) -> Search:
    file = folder / f"{name}.yaml"
    content = yaml.safe_load((Path(__file__).parents[1] / "configs" / "digits_tune.yaml").read_text())
    del content["tune"]["trials"]
    content["tune"] |= tune
    content["data"]["root"] = str(folder / "shards")
    content |= {"study": {"name": name, "directory": str(folder)}, "launch": {"cluster": "debug"}}
    file.write_text(yaml.safe_dump(content))
    return Search(file, read_study_or_run(file))


def train_one_by_one(folder: Path, trials: int, seed: int) -> tuple[list[Reached], list[dict[str, Any]]]:
    """Optuna's random search as its users write it: where it stood after each run, and the runs."""
    search = open_search(folder, f"alone-{seed}")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    started, reached, runs, trained = time.process_time(), list[Reached](), 0.0, list[dict[str, Any]]()
    for number in range(trials):
        trial = study.ask(make_distributions(search.settings.space))
        (planned,) = search.runs_of(trial.params, (0,))
        result = loop.run(planned.config, folder / f"alone-{seed}" / str(number))
        study.tell(trial, result.get("minival_loss", math.inf))
        runs += result["step"] / planned.config.train.num_steps
        reached.append(Reached(time.process_time() - started, runs, study.best_value))
        trained.append({"params": trial.params, "loss": result.get("minival_loss")})
    return reached, trained


def train_search(folder: Path, trials: int, seed: int, batch: int | None) -> tuple[list[Reached], list[dict[str, Any]]]:
    """The search, with as many FLOPs for its suggestions: where it stood after each batch, and its suggestions."""
    probe = open_search(folder, f"probe-{seed}")
    budget = trials * probe.flops + probe.rerun_flops
    search = open_search(folder, f"search-{seed}", flops=budget, seed=seed, batch=batch, prune=[0.25, 0.5])
    started, reached = time.process_time(), list[Reached]()
    while search.plan_next_batch()[0] and not search.winners():
        launch(search)
        tried = [search.plan_trial_runs(trial) for trial in search.trials()]
        lowest = min(loss for runs in tried if (loss := search.loss(runs)) is not None)
        spent = sum(run.share_trained() for runs in tried for run in runs)
        reached.append(Reached(time.process_time() - started, spent, lowest))
    tried = [(trial.params, search.plan_trial_runs(trial)) for trial in search.trials()]
    return reached, [
        {"params": params, "loss": search.loss(runs), "share": sum(run.share_trained() for run in runs)}
        for params, runs in tried
    ]


def expected(walks: list[list[Reached]], loss: float, what: str) -> float:
    """Of `what` (a field of Reached) until a search has the loss; infinite where none of `walks` had it."""
    firsts = [next((each for each in walk if each.lowest <= loss), None) for walk in walks]
    spent = sum(getattr(first or walk[-1], what) for first, walk in zip(firsts, walks, strict=True))
    there = sum(first is not None for first in firsts)
    return spent / there if there else math.inf


Walks = list[tuple[list[Reached], list[Reached]]]  # of each seed: one by one, and the search


def expected_ratio(walks: Walks, runs: int, what: str) -> tuple[float, float, float, float]:
    """(loss, expected `what` of the search, of random search, their ratio) to random search's median lowest loss after
    so many runs."""
    alone, searched = ([pair[i] for pair in walks] for i in (0, 1))
    loss = statistics.median(walk[runs - 1].lowest for walk in alone)
    of_search, of_alone = expected(searched, loss, what), expected(alone, loss, what)
    return loss, of_search, of_alone, of_search / of_alone


def print_expected(walks: Walks) -> None:
    """The expected times to three losses, with intervals."""
    trials, random = len(walks[0][0]), np.random.default_rng(0)
    print("expected until random search's median lowest loss, search / one by one, [90 % by bootstrap over seeds]")
    for runs in (trials // 3, 2 * trials // 3, trials):
        found = []
        for what in ("seconds", "runs"):
            loss, searched, alone, ratio = expected_ratio(walks, runs, what)
            drawn = [
                expected_ratio([walks[i] for i in random.integers(len(walks), size=len(walks))], runs, what)[3]
                for _ in range(2000)
            ]
            low, high = np.quantile(drawn, [0.05, 0.95], method="nearest")  # some may be infinite
            found.append(f"{what} {searched:4.1f} / {alone:4.1f} = {ratio:.2f} [{low:.2f} to {high:.2f}]")
        print(f"  after {runs:2} runs, {loss:.3f}: {'   '.join(found)}")
    of_search, of_alone = (
        sum(pair[i][-1].seconds for pair in walks) / sum(pair[i][-1].runs for pair in walks) for i in (1, 0)
    )
    print(f"CPU seconds of a run's FLOPs: {of_search:.2f} / {of_alone:.2f} = {of_search / of_alone:.2f}")


def compare(trials: int, seeds: range, batch: int | None, traces: Path | None) -> None:
    """Prints a line a seed, and the expected times; writes what every seed saw to the file `traces`, a line each."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    print("      one by one                  search                      to the former's lowest, search / one by one")
    print("seed  CPU s   runs  lowest loss   CPU s   runs  lowest loss   CPU s         runs")
    walks: Walks = []
    with tempfile.TemporaryDirectory() as folder:
        pack("sklearn:digits", Path(folder) / "shards", validation_share=0.2)
        for seed in seeds:
            alone, ran = train_one_by_one(Path(folder), trials, seed)
            searched, tried = train_search(Path(folder), trials, seed, batch)
            walks.append((alone, searched))
            if traces:
                seen = {"seed": seed, "alone": list(map(asdict, alone)), "search": list(map(asdict, searched))}
                with open(traces, "a") as file:
                    file.write(json.dumps({**seen, "alone_runs": ran, "suggestions": tried}) + "\n")
            ends = "   ".join(
                f"{end.seconds:5.0f}  {end.runs:5.1f}  {end.lowest:11.3f}" for end in (alone[-1], searched[-1])
            )
            first = next(each for each in alone if each.lowest <= alone[-1].lowest)
            never = Reached(math.inf, math.inf, math.inf)
            then = next((each for each in searched if each.lowest <= first.lowest), never)
            print(
                f"{seed:4}  {ends}   {then.seconds:.0f}/{first.seconds:.0f} = {then.seconds / first.seconds:.2f}   "
                f"{then.runs:.1f}/{first.runs:.1f} = {then.runs / first.runs:.2f}",
                flush=True,
            )
    print_expected(walks)


def read_traces(files: list[Path]) -> Walks:
    """What `compare` wrote."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def walk(seen: list[dict[str, float]]) -> list[Reached]:
        return [Reached(**each) for each in seen]

    return [(walk(line["alone"]), walk(line["search"])) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--read", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.read:
        print_expected(read_traces(arguments.read))
        return
    if arguments.train:
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        compare(min(arguments.trials, 32), seeds, arguments.batch, arguments.traces)
        return
    marks = [count for count in (16, 32, 64, 128, 256, 512, 1024, 2048) if count <= arguments.trials]
    after = ", ".join(map(str, marks))
    print(f"sampler  seconds a run  CPU seconds, mean and of the last {LAST}  true loss above the best, after {after}")
    with tempfile.TemporaryDirectory() as folder:
        pack("sklearn:digits", Path(folder) / "shards", validation_share=0.2)
        for sampler in ("random", "tpe"):
            settings = (Path(folder), sampler, arguments.trials)
            walks = [walk(*settings, seed, arguments.batch) for seed in range(arguments.seeds)]
            seconds, cpu = (
                statistics.fmean(statistics.fmean(getattr(w, key)) for w in walks) for key in ("seconds", "cpu")
            )
            last = statistics.fmean(statistics.fmean(each.cpu[-LAST:]) for each in walks)
            reached = [f"{statistics.median(each.losses[mark - 1] for each in walks) - 0.5:.4f}" for mark in marks]
            print(f"{sampler:7}  {seconds:13.3f}  {cpu:.3f} {last:.3f}  {'  '.join(reached)}", flush=True)


if __name__ == "__main__":
    main()
