"""Which runs of a study end early: those that stand at the loss of a guess where others had learned.

A run ends after three quarters of its steps where its training loss is within noise of that of a guess, and some runs
of its parameterization at its learning rate or below had by then made half of the progress that they made in all: so
its rate is not too small. They are of earlier rounds, so that a study that is resumed ends the same runs. Half of the
steps would be too early: the rate falls, and a network that it held at the loss of a guess begins to learn
(docs/verdict.md).
"""

import math
from collections.abc import Iterator, Sequence

from depthmup.launch.findings.failures import LOST
from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.rundir import Limits, parse_lines

SHARE = 0.75  # of a run's steps
LEARNERS = 3  # runs that had learned by then, at least


def limit_step(run: PlannedRun) -> int:
    """The step after which a run may end."""
    return max(round(SHARE * run.config.train.num_steps), 1)


def has_learned_early(run: PlannedRun, metric: str) -> bool:
    """Whether a finished run had, at its `limit_step`, made LOST of its whole progress in log loss."""
    last = run.loss(metric)
    if last is None or last >= run.hopeless_loss:
        return False
    lines, chance = parse_lines(run.directory.metrics, "step", "loss"), run.config.model.chance
    losses = [line["loss"] for line in lines if line["step"] <= limit_step(run)]
    return bool(losses) and math.log(chance / losses[-1]) >= LOST * math.log(chance / last)


def limit_hopeless(
    earlier: Sequence[PlannedRun], later: Sequence[PlannedRun], metric: str
) -> Iterator[tuple[PlannedRun, Limits]]:
    """Limits for the runs `later`, by what those of `earlier` rounds came to. All sweep the learning rate."""
    learned: dict[str, list[float]] = {}
    for run in earlier:
        if has_learned_early(run, metric):
            learned.setdefault(run.parameterization, []).append(run.value)
    for run in later:
        if sum(value <= run.value for value in learned.get(run.parameterization, ())) >= LEARNERS:
            yield run, Limits({limit_step(run): run.hopeless_loss}, "loss")
