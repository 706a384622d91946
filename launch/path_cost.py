"""What it costs to tune a proxy for a target: at most so many FLOPs, as a share of the target's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depthmup.launch.config import StudyFile
from depthmup.launch.runs.cost import count_flops, count_runs
from depthmup.launch.runs.design import build_design
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import search_of
from depthmup.launch.scale import merge, run_of, run_settings
from depthmup.launch.wording import show_quantity, show_share


@dataclass(frozen=True)
class PathCost:
    """FLOPs, forward and backward: of the search at the base (0 without one), of the study over sizes at most, and of
    the target's run."""

    search: float
    study: float
    target: float

    @property
    def share(self) -> float:
        """Of the target's FLOPs, that tuning costs at most."""
        return (self.search + self.study) / self.target

    def __str__(self) -> str:
        parts = [f"{show_quantity(self.search)}FLOPs for the search"] if self.search else []
        parts.append(f"at most {show_quantity(self.study)}FLOPs for the study over sizes")
        return (
            f"Tuning costs at most {show_share(self.share)} of the target's {show_quantity(self.target)}FLOPs: "
            f"{', '.join(parts)}."
        )


def count_path(path: Path, file: StudyFile, changes: dict[str, Any]) -> PathCost:
    """The cost of the study `file`, of the search before it where it has a section `tune`, and of the target that the
    sections `changes` make of it. Raises UserError for a target that is no valid run."""
    study = Study(path, replace(file, tune=None))
    if file.study.adaptive:
        over_sizes = build_design(study).budget
    else:
        flops = count_flops(study.runs)
        over_sizes = sum(run.share * flops[run.size][1] for run in study.runs)
    target = run_of(merge(run_settings(file), changes), f"{path}, the target")
    ((_, of_target),) = count_runs([target])
    return PathCost(Search(path, search_of(file)).total_flops if file.tune else 0, over_sizes, of_target)
