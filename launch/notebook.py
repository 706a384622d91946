"""The commands as functions, for notebooks and scripts: they return plain records instead of printing tables.

    import depthmup

    depthmup.transfer("configs/digits_resnet.yaml")
    pandas.DataFrame(depthmup.report("runs/digits_resnet")["sizes"])

CONFIG is a YAML file, a recipe's name or a study's folder, with ~ and $VAR, and overrides are texts such as
"model.depth=48", as on the command line. All functions raise UserError, or ModelError, with the line that a command
would print.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from depthmup.launch.jobs import states
from depthmup.launch.paths import find_configuration
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.opened import open_planned
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def open_study(config: str | Path, overrides: tuple[str, ...]) -> Study:
    path = find_configuration(os.fspath(config))
    return open_planned(path, read_study_or_run(path, overrides), overrides)


def describe_run(run: PlannedRun) -> Record:
    return {
        "run": str(run.directory.path),
        "parameterization": run.parameterization,
        **run.size.axes,
        "value": run.value,
        "seed": run.seed,
    }


def plan(config: str | Path, *overrides: str) -> list[Record]:
    """A record per run, with its FLOPs and whether it is done; launches nothing."""
    study = open_study(config, overrides)
    flops = count_flops(study.runs)
    return [{**describe_run(run), "flops": flops[run.size][1], "done": bool(run.done())} for run in study.runs]


def transfer(config: str | Path, *overrides: str) -> Record:
    """Runs a whole study, or continues it, and returns `report`. Progress goes to the output."""
    from depthmup.launch import chain

    chain.transfer(open_study(config, overrides), (), Console())
    return report(config, *overrides)


def status(config: str | Path, *overrides: str) -> list[Record]:
    """A record per run: its state, what is to be said of it, and its last line of metrics (None before the first)."""
    snapshot = states.take_snapshot(open_study(config, overrides))
    return [
        {
            **describe_run(found.run),
            "state": found.state,
            "remark": found.remark,
            "metrics": found.run.directory.read_last_metrics(),
        }
        for found in snapshot.runs
    ]


def report(config: str | Path, *overrides: str) -> Record:
    """What report.json holds: verdicts, sizes, points, forecasts; what is infinite is None. Writes no file."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.record import make_record

    return make_record(collect(open_study(config, overrides)))


def figures(config: str | Path, *overrides: str) -> "dict[str, Figure]":
    """The report's figures by name (curves, drift, loss); a notebook shows one that is the last value of a cell."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.page import draw_figures as draw

    return draw(collect(open_study(config, overrides)))
