"""Runs -> packs -> jobs: which runs of a study one process trains together (train.pack), and where. Without torch."""

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.launch.config import LaunchConfig, StudyFile
from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.packs.packing import group_alike, list_obstacles, list_unknown_to_packs, pack_limit

GPU_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")  # a number, or a name that may be cut short


def group_runs(runs: Sequence[PlannedRun], config: LaunchConfig, on_gpu: bool, slots: int) -> list[list[PlannedRun]]:
    """As `pack_alike`, with the branches of a ladder in the list of their trunk, after which they are trained."""
    names = {run.directory.path.name for run in runs}
    branches = [run for run in runs if run.trunk and run.trunk.run in names]
    packs = pack_alike([run for run in runs if run not in branches], config, on_gpu, slots)
    of_trunk = {run.directory.path.name: pack for pack in packs for run in pack}
    for run in branches:
        assert run.trunk
        of_trunk[run.trunk.run].append(run)
    return packs


def pack_alike(runs: Sequence[PlannedRun], config: LaunchConfig, on_gpu: bool, slots: int) -> list[list[PlannedRun]]:
    """`runs` in packs, in the order of their first runs: as large as train.pack allows while each of `slots` processes
    still gets one. Raises UserError when train.pack asks for packs that these runs cannot form."""
    if not runs:
        return []
    train = runs[0].config.train
    if obstacle := find_obstacle(runs[0], config):
        if (train.pack or 0) > 1:
            raise UserError(f"train.pack is {train.pack}, but {obstacle}: set train.pack=1, or change that")
        return [[run] for run in runs]
    groups = [[runs[i] for i in numbers] for numbers in group_alike([run.config for run in runs])]
    limits = [pack_limit(group[0].config, on_gpu) for group in groups]  # a study's sizes may differ in it
    largest = max(limits)
    while largest > 1 and count_packs(groups, limits, largest) < min(slots, len(runs)):
        largest -= 1
    if largest == 1:
        return [[run] for run in runs]
    return [
        pack for group, limit in zip(groups, limits, strict=True) for pack in split_evenly(group, min(limit, largest))
    ]


def check_packable(runs: Sequence[PlannedRun]) -> None:
    """Raises UserError when train.pack asks for packs of a study no two runs of which can share one, and says why."""
    configs = [run.config for run in runs]
    if len(configs) < 2 or (configs[0].train.pack or 0) <= 1 or list_unknown_to_packs(configs[0]):
        return  # of what packs do not know, `group_runs` says so
    if len(group_alike(configs)) == len(configs):
        names = sorted({name for config in configs[1:] for name in list_obstacles(configs[0], config)})
        raise UserError(
            f"train.pack is {configs[0].train.pack}, but no two of the study's {len(configs)} runs can be trained "
            f"together: each has values of its own of {', '.join(names)}. Set train.pack=1"
        )


def count_packs(groups: Sequence[Sequence[PlannedRun]], limits: Sequence[int], largest: int) -> int:
    """How many packs `split_evenly` makes of `groups` when none is larger than its group's limit and `largest`."""
    return sum(-(-len(group) // min(limit, largest)) for group, limit in zip(groups, limits, strict=True))


def find_obstacle(run: PlannedRun, config: LaunchConfig) -> str | None:
    """What keeps the runs of a study out of packs, in words."""
    if config.tasks > 1:
        return f"a job of {config.tasks} tasks trains one run"
    if config.runs_per_gpu > 1:
        return f"launch.runs_per_gpu is {config.runs_per_gpu}, the other way to fill a GPU"
    if names := sorted(list_unknown_to_packs(run.config)):
        return f"packs do not know {', '.join(names)} as set here"
    return None


def split_evenly(runs: Sequence[PlannedRun], limit: int) -> list[list[PlannedRun]]:
    """Packs of nearly equal size, at most `limit`, those of one seed side by side: they share their images."""
    ordered = sorted(runs, key=lambda run: run.seed)
    total, number = len(runs), -(-len(runs) // limit)
    return [ordered[total * i // number : total * (i + 1) // number] for i in range(number)]


def list_visible_gpus() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them; found without torch, whose import takes seconds.

    As CUDA does, the list is read up to the first entry that names no GPU: -1, NoDevFiles, nothing. One that names
    a GPU twice shows none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = list(takewhile(GPU_NAME.fullmatch, map(str.strip, visible.split(","))))
        return gpus if len(set(gpus)) == len(gpus) else []
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def assign_gpus(config: LaunchConfig) -> list[str | None]:
    """The GPU of each slot, None for a slot on the CPU. As many slots as asked for, or one per GPU, or per core."""
    gpus = list_visible_gpus()
    count = config.slots or len(gpus) or len(os.sched_getaffinity(0))
    return [gpus[slot % len(gpus)] if gpus else None for slot in range(count)]


def count_processes_per_gpu(config: LaunchConfig) -> float:
    """How many processes train side by side on a GPU; 1 where there is none."""
    if config.cluster == "slurm":
        return config.runs_per_gpu
    gpus = assign_gpus(config)
    return 1 if config.cluster == "debug" or gpus[0] is None else len(gpus) / len(set(gpus))


def make_packs(runs: Sequence[PlannedRun], config: LaunchConfig) -> list[list[PlannedRun]]:
    """What each process trains at once: a pack, or a single run. Raises UserError."""
    slots = len(assign_gpus(config)) if config.cluster == "local" else 1
    return group_runs(runs, config, trains_on_gpu(config), slots)


def trains_on_gpu(config: LaunchConfig) -> bool:
    """Whether runs train on a GPU."""
    return config.gpus_per_node > 0 if config.cluster == "slurm" else assign_gpus(config)[0] is not None


def trains_one_by_one(file: StudyFile) -> bool:
    """Whether one process of this machine trains all runs on a CPU, where a pack takes about as long as its runs alone,
    and none is asked for."""
    config = file.launch
    slots = 1 if config.cluster == "debug" else len(assign_gpus(config))
    return config.cluster != "slurm" and slots == 1 and not trains_on_gpu(config) and (file.train.pack or 1) == 1


def group_packs(packs: Sequence[Sequence[PlannedRun]], size: int) -> list[list[str]]:
    """The runs' names, one list per job: a pack, or several as long as they are no more than `size` runs."""
    tasks: list[list[str]] = []
    for pack in packs:
        names = [run.directory.path.name for run in pack]
        if tasks and len(tasks[-1]) + len(names) <= size:
            tasks[-1] += names
        else:
            tasks.append(names)
    return tasks
