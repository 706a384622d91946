"""How often the intervals of a search's surrogate hold the optimum, on made-up losses whose optimum is known.

    python benchmarks/surrogate.py [--searches 200] [--seed 0]

Each search has 2 to 6 ranges, and sometimes a choice of three; 16, 32, 64 or 128 suggestions, of TPE after eight Sobol
points, and then the best three with three new seeds; and noise of 0.5 to 4 % of the loss. The log of the loss is a
quadratic or a skewed bowl whose curvatures differ by a factor of 100. Some ranges do nothing, some optima lie on edges,
and in some searches the effects of two ranges are correlated. No loss is above that of a guess: such runs have none, as
those that diverge. Prints the share of intervals that hold the optimum, and their mean width in the range's, by what
the searches differ in; how often a range that does nothing is called identified, and CPU seconds.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from scipy.stats import qmc

from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.findings.surrogate import Located, locate_optimum
from depthmup.launch.report.hyperparameters import SPREAD_OUT

GUESS, CHOICES, RERUN = math.log(10), 3, 3


@dataclass(frozen=True)
class Bowl:
    """A made-up loss. best, curvature, skew: per range, of no skew 0; effect: of each choice, on the log loss; tilt: of
    the second range on the first."""

    best: np.ndarray
    curvature: np.ndarray
    skew: np.ndarray
    effect: np.ndarray
    tilt: float
    lowest: float

    def __call__(self, point: np.ndarray) -> float:
        away = point[: len(self.best)] - self.best
        away[0] += self.tilt * away[1]
        steep = np.where(self.skew == 0, 1.0, self.skew)
        bent = 2 * (np.exp(np.minimum(steep * away, 5)) - 1 - steep * away) / steep**2
        logs = self.curvature * np.where(self.skew == 0, away**2, bent)
        choice = self.effect[int(point[-1])] if len(self.effect) else 0.0
        return min(self.lowest * math.exp(min(logs.sum() + choice, 5)), GUESS)


def draw_bowl(random: np.random.Generator) -> tuple[Bowl, str]:
    ranges, skewed, tilted = int(random.integers(2, 7)), random.random() < 0.5, random.random() < 0.3
    beyond = 0.0 if tilted else 0.1  # as far the optimum may lie outside of the space
    skew = random.uniform(2, 6, ranges) * random.choice([-1, 1], ranges) if skewed else np.zeros(ranges)
    curvature = np.exp(random.uniform(math.log(0.03), math.log(3), ranges))
    curvature[2:] *= random.random(ranges - 2) > 0.2
    best = random.uniform(0.1 - 2 * beyond, 0.9 + 2 * beyond, ranges)
    effect = random.uniform(0, 0.1, CHOICES) if random.random() < 0.3 else np.zeros(0)
    tilt = random.uniform(-0.7, 0.7) if tilted else 0.0
    return Bowl(best, curvature, skew, effect, tilt, random.uniform(0.4, 1.2)), "skewed" if skewed else "quadratic"


def search(bowl: Callable[[np.ndarray], float], space: dict[str, Any], count: int, noise: float, seed: int) -> Any:
    """(points, losses) of `count` suggestions, and of the best RERUN with as many new seeds each."""
    study, random = optuna.create_study(), np.random.default_rng(seed)
    for point in qmc.Sobol(len(space), seed=seed).random(8).tolist():
        study.enqueue_trial({k: int(CHOICES * x) if k == "choice" else x for k, x in zip(space, point, strict=True)})
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)
    points, losses = [], []
    for _ in range(count):
        trial = study.ask(space)
        points.append([float(trial.params[key]) for key in space])
        truth = bowl(np.array(points[-1]))
        loss = truth * math.exp(noise * random.standard_normal())
        study.tell(trial, min(loss, GUESS))
        losses.append(math.inf if truth >= GUESS else loss)
    again = [points[i] for i in np.argsort(losses)[:RERUN] for _ in range(RERUN) if losses[i] < math.inf]
    losses += [bowl(np.array(point)) * math.exp(noise * random.standard_normal()) for point in again]
    return np.array(points + again), np.array(losses)


@dataclass(frozen=True)
class Seen:
    """One dimension of one search. idle: whether it does nothing."""

    about: dict[str, Any]
    held: bool
    width: float
    identified: bool
    idle: bool


def judge(found: list[Located], bowl: Bowl, about: dict[str, Any]) -> Iterator[Seen]:
    best = np.clip(bowl.best, 0, 1)
    for i, at in enumerate(found[: len(best)]):
        low, high = at.interval
        idle = bowl.curvature[i] == 0
        yield Seen(about | {"kind": "range"}, low <= best[i] <= high, high - low, high - low < SPREAD_OUT, idle)
    if len(bowl.effect):
        likely = found[-1].list_likely(CONFIDENCE)
        held, share = int(np.argmin(bowl.effect)) in likely, len(likely) / CHOICES
        yield Seen(about | {"kind": "choice"}, held, share, share < 1, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seen, seconds = list[Seen](), list[float]()
    for number in range(arguments.searches):
        random = np.random.default_rng((arguments.seed, number))
        bowl, shape = draw_bowl(random)
        count, noise = int(random.choice([16, 32, 64, 128])), float(random.choice([0.005, 0.01, 0.02, 0.04]))
        space: dict[str, Any] = {str(i): optuna.distributions.FloatDistribution(0, 1) for i in range(len(bowl.best))}
        choices = [0] * len(space)
        if len(bowl.effect):
            space["choice"] = optuna.distributions.CategoricalDistribution(range(CHOICES))
            choices.append(CHOICES)
        points, losses = search(bowl, space, count, noise, number)
        started = time.process_time()
        found = locate_optimum(points, losses, choices)
        seconds.append(time.process_time() - started)
        about = {"shape": shape, "ranges": len(bowl.best), "suggestions": count, "noise": noise}
        seen += judge(found, bowl, about)
    acting, idle = [each for each in seen if not each.idle], [each for each in seen if each.idle]
    print(f"CPU seconds a surrogate: {np.mean(seconds):.2f}, at most {max(seconds):.2f}")
    print(f"a range that does nothing is called identified: {sum(e.identified for e in idle)} of {len(idle)}")
    print(f"held by intervals of {CONFIDENCE:.0%}, and their mean width")
    for key in ("", *acting[0].about):
        for value in sorted({each.about.get(key) for each in acting}):
            of = [each for each in acting if each.about.get(key) == value]
            name = f"{key} {value}" if key else "all"
            print(f"  {name:18} {np.mean([e.held for e in of]):.3f}  {np.mean([e.width for e in of]):.2f}  ({len(of)})")


if __name__ == "__main__":
    main()
