"""A study's configuration: one run, the grid around it, and where it runs. Nothing here imports torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from data.config import NOT_IDENTITY, Positive
from data.errors import UserError
from models.config import Number, ParameterizationConfig
from train.config import RunConfig, from_plain, read_yaml, set_dotted

Preset = Annotated[
    ParameterizationConfig, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
]


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Positive
    depth: Positive

    def __str__(self) -> str:
        return f"width {self.width}, depth {self.depth}"


@dataclass(frozen=True, kw_only=True)
class Octaves:
    """first, first * 2^(1/per_octave), ... up to last."""

    first: Annotated[Number, Field(gt=0)]
    last: Annotated[Number, Field(gt=0)]
    per_octave: Positive = 1

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"last {self.last:g} is below first {self.first:g}")

    def values(self) -> tuple[float, ...]:
        count = math.floor(math.log2(self.last / self.first) * self.per_octave + 1e-9) + 1
        return tuple(self.first * 2 ** (i / self.per_octave) for i in range(count))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Every parameterization x size x value x seed is one run. The first size is the base that others compare with."""

    name: str
    directory: str = field(default="runs", metadata=NOT_IDENTITY)
    parameterizations: Annotated[tuple[Preset, ...], Field(min_length=1)]
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]
    hyperparameter: str = "optimizer.lr"
    values: Octaves | Annotated[tuple[Annotated[Number, Field(gt=0)], ...], Field(min_length=3)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    metric: Literal["minival_loss", "train_loss"] = "minival_loss"
    tolerance: Annotated[Number, Field(gt=0)] = 1.0  # octaves by which an optimum may drift and still transfer

    @property
    def grid(self) -> tuple[float, ...]:
        """The swept values in ascending order."""
        return self.values.values() if isinstance(self.values, Octaves) else tuple(sorted(set(self.values)))


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where runs execute. `slots` is how many run side by side on this machine; 0 is one per core, or per GPU."""

    cluster: Literal["local", "debug", "slurm"] = "local"
    slots: Annotated[int, Field(ge=0)] = 0
    partition: str | None = None
    account: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_task: Positive = 1
    timeout_min: Positive = 240
    max_running: Positive = 64


@dataclass(frozen=True, kw_only=True)
class StudyFile(RunConfig):
    """A configuration file with a study. Without its last two sections it is the configuration of one run."""

    study: StudyConfig
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def directory(self) -> Path:
        return Path(self.study.directory) / self.study.name


def label(parameterization: ParameterizationConfig) -> str:
    """'depth_mup', or 'depth_mup alpha=1' where a field overrides the preset."""
    defaults = ParameterizationConfig()
    overrides = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in vars(parameterization).items()
        if key != "name" and value != getattr(defaults, key)
    ]
    return " ".join([parameterization.name, *overrides])


def read_raw(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    raw = read_yaml(path)
    for override in overrides:
        set_dotted(raw, override)
    return raw


def read_study(path: Path, overrides: tuple[str, ...] = ()) -> StudyFile:
    """Reads and checks a study's file. Raises UserError."""
    raw = read_raw(path, overrides)
    if "study" not in raw:
        raise UserError(f"{path}: no section study: (a single run is started with 'depthmup train {path}')")
    file = from_plain(StudyFile, raw, str(path))
    base = file.study.sizes[0]
    if (base.width, base.depth) != (file.model.base_width, file.model.base_depth):
        raise UserError(
            f"{path}: the first of study.sizes ({base}) must be the base, model.base_width {file.model.base_width} and "
            f"model.base_depth {file.model.base_depth}"
        )
    return file


def read_run(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads one run's configuration; the sections study and launch of a study's file are left aside."""
    raw = read_raw(path, overrides)
    return from_plain(RunConfig, {key: raw[key] for key in raw if key not in ("study", "launch")}, str(path))
