"""A ladder of horizons from one run: under warm-up, stable, decay, runs that differ in their length alone are the same
run until the shorter one decays. So the longest is the trunk, which keeps a checkpoint where each shorter one begins to
decay, and these are branches (train.branch): four horizons cost one run of the longest and the decays of the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from depthmup.launch.config import Size
from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.config import RunConfig, TrainConfig, run_hash
from depthmup.train.trunk import Trunk


def stretch_schedule(schedule: dict[str, Any], train: dict[str, Any], samples: int) -> dict[str, Any]:
    """The schedule, whose warm-up is a share of `train`'s steps, for a run of `samples` with as many steps of it."""
    if samples == train["samples"]:
        return schedule
    batch = train["global_batch_size"]
    warmup_steps = round(schedule["warmup"] * (train["samples"] // batch))
    return {**schedule, "warmup": warmup_steps / (samples // batch)}


def stretch_run(config: RunConfig, samples: int) -> RunConfig:
    """The run with another length and the same steps of warm-up."""
    train: TrainConfig = replace(config.train, samples=samples)
    warmup_steps = round(config.schedule.warmup * config.train.num_steps)
    return replace(config, train=train, schedule=replace(config.schedule, warmup=warmup_steps / train.num_steps))


def find_longest_samples(point: PlannedRun, sizes: Sequence[Size]) -> int:
    """Samples of the longest run that differs from `point` in its length alone."""
    return max(size.samples or 0 for size in sizes if size.is_beside(point.size, "samples"))


def is_longest(point: PlannedRun, sizes: Sequence[Size]) -> bool:
    return point.size.samples == find_longest_samples(point, sizes)


def make_trunk_key(point: PlannedRun, samples: int) -> str:
    """The same for all runs that are one until they decay."""
    return run_hash(stretch_run(point.config, samples))


def attach_trunks(points: Sequence[PlannedRun], sizes: Sequence[Size]) -> list[PlannedRun]:
    """`points`, each branch with its trunk and each trunk told which checkpoints to keep."""
    trunks = {
        make_trunk_key(point, find_longest_samples(point, sizes)): point for point in points if is_longest(point, sizes)
    }
    branches, kept = dict[str, Trunk](), dict[str, set[int]]()
    for point in points:
        trunk = trunks.get(make_trunk_key(point, find_longest_samples(point, sizes)))
        step = point.config.schedule.decay_step(point.config.train.num_steps)
        if trunk and step and not is_longest(point, sizes):
            name = trunk.directory.path.name
            branches[point.directory.path.name] = Trunk(run=name, step=step)
            kept.setdefault(name, set()).add(step)
    found = []
    for point in points:
        name = point.directory.path.name
        steps = {*point.config.train.keep_steps, *kept.get(name, ())}
        train = replace(point.config.train, keep_steps=tuple(sorted(steps)))
        found.append(replace(point, config=replace(point.config, train=train), trunk=branches.get(name)))
    return found
