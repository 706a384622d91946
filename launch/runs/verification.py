"""A verification: runs with all transferred hyperparameters perturbed at once, beside the transferred ones."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from depthmup.data.errors import UserError
from depthmup.launch.config import Size, StudyFile
from depthmup.launch.joint_config import VerifyConfig
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.space import check_key, check_space, find_fraction, find_value, read_own_value
from depthmup.launch.values import Dimension, Range
from depthmup.launch.wording import show_quantity, show_times

MISSES = 50  # perturbations in a row whose values do not go together: then the space is a mistake


class Verification(JointStudy):
    """A run's file with a section `verify`. Its runs follow from the file alone, those of a smaller `verify.runs` are
    among those of a larger one."""

    verb = "verify"

    def __init__(self, path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> None:
        """Raises UserError for a space that cannot be perturbed, and for runs that cost more than verify.budget."""
        super().__init__(path, file, overrides)
        if len(file.study.sizes) > 1 or len(file.study.grid) > 1:
            raise UserError(
                f"{path}: verify needs one run, and this is a study: give it the target's file (of the study, "
                f"{self.target_file}), or leave study.sizes and study.values out"
            )
        check_space(self._base, self.space, f"{path}: verify.space")
        self.check_budget()

    @property
    def settings(self) -> VerifyConfig:
        assert self.file.verify is not None
        return self.file.verify

    @cached_property
    def space(self) -> dict[str, Dimension]:
        """Each hyperparameter's range, or its choices. Raises UserError."""
        found: dict[str, Dimension] = {}
        for key, around in self.settings.space.items():
            if isinstance(around, Range | tuple):
                found[key] = around
                continue
            check_key(key, f"{self.path}: verify.space.{key}")
            own = self.read_own_value(key)
            if isinstance(own, bool) or not isinstance(own, int | float) or own <= 0:
                why = "the run states no value of its own" if own is None else f"{own} has no values a factor away"
                raise UserError(
                    f"{self.path}: verify.space.{key}: {why}: state a range "
                    "{first: 0, last: 0.2, scale: linear}, or choices [0, 0.1]"
                )
            found[key] = Range(first=own / around, last=own * around)
        return found

    @property
    def size(self) -> Size:
        """At which it is verified."""
        model, settings = self.file.model, self.settings
        return Size(width=settings.width or model.width, depth=settings.depth or model.depth)

    def _at_size(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**{f"model.{key}": value for key, value in self.size.axes.items()}, **values}

    @cached_property
    def transferred(self) -> list[PlannedRun]:
        """The file's own values, a run for each of verify.seeds. Raises UserError where the network has no such
        size."""
        try:
            return self.runs_of(self._at_size({}), self.settings.seeds)
        except UserError as error:
            raise UserError(f"{error}; verify.width and verify.depth say {self.size}") from None

    @cached_property
    def perturbed(self) -> list[tuple[dict[str, Any], PlannedRun]]:
        """(values, run) of every perturbation, in their order. Raises UserError."""
        found: list[tuple[dict[str, Any], PlannedRun]] = []
        misses = 0
        for values in self._draw():
            try:
                (run,) = self.runs_of(self._at_size(values), self.settings.seeds[:1])
                found.append((values, run))
                misses = 0
            except UserError as error:
                misses += 1
                if misses == MISSES:
                    raise UserError(
                        f"{error}; the same holds for {MISSES} draws of verify.space in a row: narrow its ranges"
                    ) from None
            if len(found) == self.settings.runs:
                break
        return found

    def _draw(self) -> Iterator[dict[str, Any]]:
        """Independent draws, uniform on each dimension's own scale: the binomial bound asks for no less."""
        random = np.random.default_rng(self.settings.seed)
        while True:
            fractions = random.random(len(self.space))
            drawn = zip(self.space.items(), fractions.tolist(), strict=True)
            yield {key: find_value(dimension, fraction) for (key, dimension), fraction in drawn}

    def read_own_value(self, key: str) -> Any:
        """What the file itself has for the dotted `key`."""
        return read_own_value(self._base, key)

    def offset(self, key: str, value: Any) -> float | None:
        """How far `value` is from the file's own: in octaves, or on a linear scale in the range's width; None for a
        choice."""
        dimension = self.space[key]
        if not isinstance(dimension, Range):
            return None
        own = self.read_own_value(key)
        if isinstance(own, bool) or not isinstance(own, int | float):
            return None
        width = np.log2(dimension.last / dimension.first) if dimension.scale == "log" else 1.0
        return float(width * (find_fraction(dimension, value) - find_fraction(dimension, own)))

    @cached_property
    def points(self) -> list[PlannedRun]:
        return [*self.transferred, *(run for _, run in self.perturbed)]

    @property
    def examples(self) -> list[PlannedRun]:  # of one size
        return self.transferred[:1]

    def plan_next_batch(self) -> tuple[int, str]:
        return 0, "all of a verification's runs are known from the start"

    # ------------------------------------------------------------ cost

    @cached_property
    def flops(self) -> tuple[int, int]:
        """Of one run where it is verified, and of one run of the file."""
        at_size, own = self.transferred[0], self.runs_of({}, self.settings.seeds[:1])[0]
        return count_flops([at_size])[at_size.size][1], count_flops([own])[own.size][1]

    @property
    def cost(self) -> float:
        """Of all runs, in runs of the file."""
        each, own = self.flops
        return (self.settings.runs + len(self.settings.seeds)) * each / own

    def check_budget(self) -> None:
        """Raises UserError where the runs cost more than verify.budget, with what they cost."""
        if self.cost <= self.settings.budget:
            return
        _, own = self.flops
        raise UserError(
            f"{self.path}: {self.settings.runs + len(self.settings.seeds)} runs at {self.size} are "
            f"{show_quantity(self.cost * own)}FLOPs, {show_times(self.cost)} times one run of this file, and "
            f"verify.budget is {self.settings.budget:g}: verify at a smaller size (verify.width, verify.depth), give "
            f"it fewer verify.runs, or set verify.budget={self.cost:.3g}"
        )
