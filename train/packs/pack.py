"""K runs as one process, each with the run directory that it would have alone."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.workers import explained_deaths
from depthmup.train.batches import open_data
from depthmup.train.branch import begin_branch
from depthmup.train.checkpoint import complete, find_fault
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, pick_device
from depthmup.train.interrupt import Interrupt
from depthmup.train.loop import Loop, run
from depthmup.train.owner import read_finished, strip_owner
from depthmup.train.packs.memory import find_largest_pack
from depthmup.train.packs.packing import list_obstacles
from depthmup.train.packs.replicas import Replicas
from depthmup.train.prepare import prepare_device
from depthmup.train.record import RunRecord
from depthmup.train.rundir import RunDirectory


def check_pack(configs: Sequence[RunConfig]) -> None:
    """Raises UserError, naming the fields, when the runs cannot share a pack."""
    for number, config in enumerate(configs):
        if names := list_obstacles(configs[0], config):
            which = f"runs 0 and {number} cannot be packed together" if number else "packs do not know the setting of"
            raise UserError(
                f"{which}: {', '.join(names)}. Runs of one pack may differ in "
                "seed, what the optimizer multiplies with, schedule, parameterization, clipping, label smoothing, "
                "stochastic depth and the decay of the average only"
            )


def find_newest_whole_step(directory: RunDirectory) -> int:
    """The step of the newest checkpoint that is whole, else 0."""
    whole = (path for path in complete(directory.checkpoints) if not find_fault(path, 0, 1))
    return max((int(path.name.removeprefix("step-")) for path in islice(whole, 1)), default=0)


def run_pack(
    configs: Sequence[RunConfig], paths: Sequence[Path], interrupt: Interrupt | None = None
) -> list[dict[str, Any]]:
    """Trains the runs `configs` in the directories `paths`, all at once; returns what each came to.

    Resumes what is there: runs that are done are left alone. Runs that stand at different steps, as after a kill
    between two replicas' saves, go on in a pack for each step, one after the other, as none gives up its checkpoint for
    the others. `interrupt` is looked at after every step: when set, all save and Interrupted is raised.
    Raises UserError when the runs cannot be packed together, do not fit into memory, or the network has an operation
    that does not batch.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError("every run of a pack needs its own directory, and two have the same")
    if len(configs) > 1:
        check_pack(configs)
    interrupt = interrupt or Interrupt()
    while standing := group_by_saved_step(configs, paths):
        runs = standing[max(standing)]
        if len(runs) == 1:
            [(config, path)] = runs
            run(config, path, interrupt=interrupt)
        else:
            train_together(runs, interrupt)
    return [strip_owner(RunDirectory(path).done() or {}) for path in paths]


def group_by_saved_step(configs: Sequence[RunConfig], paths: Sequence[Path]) -> dict[int, list[tuple[RunConfig, Path]]]:
    """The runs that are not done, by the step that they stand at."""
    standing: dict[int, list[tuple[RunConfig, Path]]] = {}
    for config, path in zip(configs, paths, strict=True):
        if not read_finished(directory := RunDirectory(path), config):
            begin_branch(directory, config)
            standing.setdefault(find_newest_whole_step(directory), []).append((config, path))
    return standing


def train_together(runs: Sequence[tuple[RunConfig, Path]], interrupt: Interrupt) -> None:
    """Trains runs none of which is done, and which all stand at one step."""
    configs = [config for config, _ in runs]
    first = configs[0]
    device = pick_device(first.train.device, World())
    index, dtype = open_data(first), prepare_device(first.train, device)
    if len(configs) > (largest := find_largest_pack(first, device)):
        raise UserError(
            f"a pack of {len(configs)} needs more memory than is free on {device}: at most {largest} fit, "
            f"set train.pack={max(largest, 1)}"
        )
    with ExitStack() as closing, explained_deaths():
        networks = Replicas(configs, device, dtype)
        records = [RunRecord(config, path, closing) for config, path in runs]
        Loop(networks, records, index, interrupt).train()
