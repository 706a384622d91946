"""Planned runs: opened from a file, trained, or marked as done without training them."""

import math
from pathlib import Path
from typing import Any, TypeVar

import yaml

from depthmup.launch.reading import read_study, read_study_or_run
from depthmup.launch.runs.opened import open_planned
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.train.owner import describe_owner, fingerprint_code

Kind = TypeVar("Kind", bound=Study)


def open_as(kind: type[Kind], file: Path, *overrides: str) -> Kind:
    """What the file describes, which is of that kind."""
    study = open_planned(file, read_study_or_run(file, overrides), overrides)
    assert isinstance(study, kind)
    return study


def finish(run: PlannedRun, loss: float) -> None:
    """Marks the run done, as it does itself; one of an infinite loss has diverged."""
    run.directory.path.mkdir(parents=True, exist_ok=True)
    step = run.config.train.num_steps
    outcome = {"outcome": "completed" if math.isfinite(loss) else "diverged", "step": step, "seconds": 1.0}
    metric = {"minival_loss": loss} if math.isfinite(loss) else {}
    run.directory.write_done(outcome | metric | describe_owner(run.config) | {"code": fingerprint_code()})


def train_depths(settings: dict[str, Any], folder: Path, lr: float, seeds: int) -> Path:
    """Trains a study over three depths at one rate, and returns its folder. `settings`: one run's."""
    from depthmup.train.loop import run  # torch, which the other functions do without

    sizes = [{"width": 8, "depth": depth} for depth in (3, 6, 12)]
    study_settings = {"name": "grown", "directory": str(folder), "seeds": seeds, "values": [lr], "sizes": sizes}
    path = folder / "grown.yaml"
    path.write_text(yaml.safe_dump({**settings, "study": {**study_settings, "parameterizations": ["depth_mup"]}}))
    study = Study(path, read_study(path))
    study.write()
    for planned in study.runs:
        run(planned.config, planned.directory.path)
        # so short a training may be lost in the noise of its seeds, and such a size is left out
        done = planned.directory.done() or {}
        planned.directory.write_done({**done, "minival_loss": 1.0 + 0.01 * planned.seed})
    return study.file.directory
