"""What a study with a sequential design fixes beforehand."""

import math
from functools import partial

from depthmup.launch.config import show_label
from depthmup.launch.findings.points import Design
from depthmup.launch.findings.verdict import Limits
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.study import Study


def find_limits(study: Study) -> Limits:
    return Limits(study.file.study.regret_limit, study.file.study.cost_limit)


def build_design(study: Study) -> Design:
    """What the study fixes beforehand; counts FLOPs. The budget is `study.budget` of what its grid would cost."""
    settings = study.file.study
    flops = {size: float(each) for size, (_, each) in count_flops(study.examples).items()}
    curves = {(owner, size) for (_, size), owner in study.owners.items()}  # each of its own runs
    grid = sum(flops[size] for _, size in curves) * len(settings.grid) * len(settings.seeds)
    ends = settings.octaves(settings.grid[0]), settings.octaves(settings.grid[-1])
    return Design(
        parameterizations=tuple(map(show_label, settings.parameterizations)),
        sizes=settings.sizes,
        flops=flops,
        low=min(ends),
        high=max(ends),
        seeds=settings.seeds,
        budget=settings.budget * grid,
        limits=find_limits(study),
        octaves=settings.octaves,
        chance=study.chance,
        alike=study.owners,
        drift_precision=settings.drift_precision or math.inf,
        is_valid=partial(study.may_have, settings.sizes[0]),
    )
