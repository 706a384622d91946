"""A study whose runs differ in several hyperparameters at once, all at one size: a search, or a verification."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from depthmup.launch.config import Size, show_label
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.space import apply_values
from depthmup.launch.runs.study import Study
from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain
from depthmup.train.rundir import Limits


class JointStudy(Study):
    """No verdict on one hyperparameter over sizes follows from it: it has a report of its own."""

    verb: str  # the command that walks it and prints its report

    @abstractmethod
    def plan_next_batch(self) -> tuple[int, str]:
        """(number of new runs, why), once none is pending; 0 at the end."""

    def early_ends(self) -> Iterator[tuple[PlannedRun, Limits]]:
        """None: no curve is sought whose ends would not matter."""
        return iter(())

    @property
    def choices(self) -> list[PlannedRun]:
        """A run with each listed value of the space that no run has yet."""
        return []

    def runs_of(self, values: Mapping[str, Any], seeds: Sequence[int]) -> list[PlannedRun]:
        """The file's run with `values` by dotted key, trained with `seeds`. Raises UserError where they do not go
        together."""
        config = from_plain(RunConfig, apply_values(self._base, values), f"{self.path} (values of its space)")
        name, size = show_label(config.parameterization), Size(width=config.model.width, depth=config.model.depth)
        runs = [self.plan_run(name, size, config.optimizer.lr, replace(config, seed=seed)) for seed in seeds]
        return [replace(run, ends_for_good=True) for run in runs]
