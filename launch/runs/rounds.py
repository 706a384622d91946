"""The rounds of a study whose design is sequential, kept in its folder as rounds.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmup.data.files import write_atomically
from depthmup.launch.config import Size


@dataclass(frozen=True, kw_only=True)
class Added:
    """What was added to one curve."""

    parameterization: str  # its label
    width: int
    depth: int
    num_experts: int | None = None  # in a study with this axis, as the next two
    batch: int | None = None
    samples: int | None = None

    @property
    def size(self) -> Size:
        return Size.of(vars(self))

    def make_record(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class AddedRun(Added):
    """A point that a round asks for."""

    value: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class AddedRound:
    """Runs that were asked for together, and why."""

    reason: str
    runs: list[AddedRun]


def write_added_rounds(file: Path, rounds: Sequence[AddedRound]) -> None:
    plain = [{"reason": each.reason, "runs": [run.make_record() for run in each.runs]} for each in rounds]
    write_atomically(file, json.dumps(plain, indent=1).encode())


def plan_coarse_round(parameterizations: Sequence[str], base: Size, values: Sequence[float], seed: int) -> AddedRound:
    """The coarse pass at the base."""
    runs = [
        AddedRun(parameterization=name, **base.axes, value=value, seed=seed)
        for name in parameterizations
        for value in values
    ]
    return AddedRound(reason="a coarse pass at the base", runs=runs)


@dataclass(frozen=True, kw_only=True)
class AddedValues(Added):
    """Values that a curve got beyond study.values."""

    values: list[float]


@dataclass(frozen=True, kw_only=True)
class AddedSeed(AddedValues):
    """One seed more at some values of a curve."""

    seed: int


def write_rounds(file: Path, rounds: Sequence[Sequence[AddedValues]]) -> None:
    write_atomically(
        file, json.dumps([[entry.make_record() for entry in added] for added in rounds], indent=1).encode()
    )
