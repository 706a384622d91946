"""A study's configuration: one run, the grid around it, and where it runs. Nothing here imports torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from pydantic.dataclasses import dataclass

from depthmup.data.config import NOT_IDENTITY, PathText, Positive, Whole
from depthmup.data.paths import expand_all_read, expand_read, protect
from depthmup.launch.axes import AXES, TRAINING_AXES, find_axes_misfit, find_ladder_misfit
from depthmup.launch.joint_config import TuneConfig, VerifyConfig
from depthmup.launch.values import Octaves, Seeds, Values, make_list, sort_values
from depthmup.models.config_errors import STRICT
from depthmup.models.number import Number
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, checked_setting

Preset = Annotated[
    ParameterizationConfig, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
]


def read_option(given: Any, reading: Any) -> Any:
    """The value of an option of sbatch: a text may hold a path."""
    if not isinstance(given, str | int | bool):
        raise ValueError("Input should be a text, a whole number, true or false")
    return expand_read(given, reading) if isinstance(given, str) else given


Option = Annotated[
    str | int | bool,
    BeforeValidator(read_option),
    PlainSerializer(lambda value: protect(value) if isinstance(value, str) else value),
]
Mounts = Annotated[str, AfterValidator(expand_all_read), PlainSerializer(protect)]


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class Size:
    """A point on the axes of scale. `num_experts`, `batch` (global_batch_size) and `samples` are null in a study
    without such an axis, and numbers at all sizes of one that has it (StudyFile.complete)."""

    width: Positive  # as model.width
    depth: Positive  # as model.depth
    num_experts: Positive | None = None  # as model.num_experts, of family moe_vit
    batch: Positive | None = None  # as train.global_batch_size
    samples: Positive | None = None  # as train.samples

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Size":
        """The size whose axes stand in `record` beside other things."""
        return cls(**{axis: record[axis] for axis in AXES if record.get(axis) is not None})

    @property
    def axes(self) -> dict[str, int]:
        """By name, those that the study has."""
        return {axis: value for axis in AXES if (value := getattr(self, axis)) is not None}

    def is_beside(self, other: "Size", axis: str) -> bool:
        """Whether the two differ in `axis` alone, or not at all."""
        return all(getattr(self, each) == getattr(other, each) for each in AXES if each != axis)

    def is_beside_in_shape(self, other: "Size") -> bool:
        """Whether the two differ in width and depth alone, or not at all."""
        return all(getattr(self, each) == getattr(other, each) for each in AXES if each not in ("width", "depth"))

    def __str__(self) -> str:
        return ", ".join(f"{axis} {value}" for axis, value in self.axes.items())


def check_folder_name(name: str) -> str:
    """It names a folder and jobs: what is no plain word would lead elsewhere, or not be found in the queue again."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("must be letters, digits, '.', '_' and '-', with a letter or digit first")
    return name


LATTICE = 8  # values an octave of an adaptive design: curves share them, and a run keeps its name
COARSE = 2.0  # octaves between the values of its first round


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudyConfig:
    """Every parameterization x size x value x seed is a point, of which an adaptive design runs those that tell most.
    The first size is the base that others compare with."""

    name: Annotated[str, AfterValidator(check_folder_name)]  # of its folder and its jobs
    directory: PathText = field(default="runs", metadata=NOT_IDENTITY)  # folder of the study's folder
    # names, or names with changed keys, as {name: depth_mup, beta: 0.5}
    parameterizations: Annotated[tuple[Preset, ...], BeforeValidator(make_list), Field(min_length=1)]
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]  # the base first
    hyperparameter: str = "optimizer.lr"  # the key that is swept
    values: Values  # of it: a range, or a list
    seeds: Seeds = (0,)  # a list, or how many
    metric: Literal["minival_loss", "train_loss"] = "minival_loss"  # what is lowest at the optimum
    regret_limit: Annotated[Number, Field(gt=0)] = 0.005  # share of the loss that a value may cost and still transfer
    cost_limit: Annotated[Number, Field(gt=0)] = 0.05  # share of the loss beyond which it does not transfer at all
    # adaptive: rounds of runs where they tell most, over a range of values; grid, and every list: all values
    design: Literal["adaptive", "grid"] = "adaptive"
    # adaptive: octaves to either side to which drifts are to be known as well; without it the verdict alone counts
    drift_precision: Annotated[Number, Field(gt=0)] | None = None
    budget: Annotated[Number, Field(gt=0)] = 1.0  # adaptive: FLOPs of all rounds at most, in those of the grid
    extend: Annotated[Whole, Field(ge=0)] = (
        2  # grid: rounds in which it grows by two values where its best is on the edge
    )
    more_seeds: Annotated[Whole, Field(ge=0)] = (
        2  # grid: rounds in which one seed is added where a verdict hangs on the noise
    )
    ladder: bool = False  # sizes that differ in samples alone are the longest run and branches that decay from it
    # lets results of different code, or of different shards under one data.name, count side by side; the report says so
    pool_different: tuple[Literal["code", "shards"], ...] = field(default=(), metadata=NOT_IDENTITY)

    def __post_init__(self) -> None:
        if self.complement and max(self.grid) >= 1:
            raise ValueError(f"values of {self.hyperparameter} must be below 1, found {max(self.grid):g}")
        idle = ("extend", "more_seeds") if self.adaptive else ("budget", "drift_precision")
        needed = "design grid" if self.adaptive else "design adaptive and a range of values, {first: ..., last: ...}"
        for key in idle:
            if getattr(self, key) not in (getattr(StudyConfig, key), 0):  # 0 switches off what is not there
                default = "null" if getattr(StudyConfig, key) is None else f"{getattr(StudyConfig, key):g}"
                raise ValueError(f"{key} would do nothing: leave it out, as {key}={default} does, or use {needed}")
        if self.ladder and self.adaptive:
            raise ValueError("ladder needs every value at every horizon: use design grid")
        if self.cost_limit <= self.regret_limit:
            raise ValueError(f"cost_limit {self.cost_limit:g} must be above regret_limit {self.regret_limit:g}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The swept values in ascending order."""
        return sort_values(self.values)

    @property
    def adaptive(self) -> bool:
        return self.design == "adaptive" and isinstance(self.values, Octaves) and len(self.grid) > 1

    def on_lattice(self, octaves: float) -> float:
        """The value there, where it is one of LATTICE an octave, counted from the first value, exactly."""
        origin = self.grid[0]
        steps = round((octaves - self.octaves(origin)) * LATTICE) / LATTICE
        return 1 - (1 - origin) * 2.0**steps if self.complement else float(origin * 2.0**steps)

    @property
    def coarse(self) -> tuple[float, ...]:
        """The values that the first round of an adaptive design runs."""
        ends = self.octaves(self.grid[0]), self.octaves(self.grid[-1])
        count = math.floor((max(ends) - min(ends)) / COARSE + 1e-9) + 1
        return tuple(self.on_lattice(min(ends) + i * COARSE) for i in range(count))

    # An octave of momentum is a factor of two in 1 - momentum: the number of steps that it averages over.

    @property
    def complement(self) -> bool:
        return self.hyperparameter == "optimizer.momentum"

    @property
    def axis(self) -> str:
        """What octaves are of: 'lr', '1 - momentum'."""
        return ("1 - " if self.complement else "") + self.hyperparameter.split(".")[-1]

    def octaves(self, value: float) -> float:
        """Position of a value on the axis on which optima are fitted."""
        return math.log2(1 - value if self.complement else value)

    def show(self, octaves: float) -> str:
        """The value there as a power of two; '0' or 'inf' of an interval whose side is open."""
        if math.isinf(octaves):
            return f"{self.value_at(octaves):g}"
        return f"{'1 - ' if self.complement else ''}2^{octaves:.1f}"

    def value_at(self, octaves: float) -> float:
        """The inverse of `octaves`."""
        return 1 - 2.0**octaves if self.complement else 2.0**octaves


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class LaunchConfig:
    """Where runs execute. Hardware: no part of any run's identity.

    One job is one array element: `runs_per_job` runs one after another, `runs_per_gpu` of them side by side. A job of
    several tasks (nodes, tasks_per_node) trains one run over all of them.
    """

    # local: processes of this machine; debug: this process, one run after another; slurm: jobs
    cluster: Literal["local", "debug", "slurm"] = "local"
    slots: Annotated[Whole, Field(ge=0)] = 0  # local: runs side by side; 0 is one per GPU, or one per core
    partition: str | None = None  # sbatch --partition
    account: str | None = None  # sbatch --account
    qos: str | None = None  # sbatch --qos
    constraint: str | None = None  # sbatch --constraint: features that nodes must have
    nodes: Positive = 1  # of one job
    gpus_per_node: Annotated[Whole, Field(ge=0)] = 0  # 0: a job on CPUs
    tasks_per_node: Positive | None = None  # null: one per GPU
    cpus_per_task: Positive = 1  # cores of one process, its data.num_workers included
    memory_gb: Positive | None = None  # per node; null: the cluster's default
    timeout_min: Positive = 240  # time limit of a job, in minutes; a run goes on in the next one
    signal_delay_s: Positive = 120  # Slurm's warning before the time limit: a step and a checkpoint must fit in
    max_running: Positive = 64  # jobs at once
    max_attempts: Positive = 5  # of a run whose job ended without a word
    hold_after: Annotated[Whole, Field(ge=0)] = 3  # runs that fail for one reason hold the rest; 0 holds nothing
    runs_per_job: Positive = 1  # one after another in a job
    runs_per_gpu: Positive = 1  # processes side by side on a GPU
    price_per_gpu_hour: Annotated[Number, Field(ge=0)] | None = None  # for the report: in your currency
    setup: tuple[str, ...] = ()  # shell lines before the job: module load, source, export
    python: str | None = None  # null: the interpreter that launches; in a container usually `python`
    container_image: PathText | None = None  # srun --container-image (pyxis, enroot)
    container_mounts: Mounts | None = None  # srun --container-mounts: HOST:CONTAINER, with commas between them
    sbatch: dict[str, Option] = field(default_factory=dict)  # further #SBATCH options by their names
    # those of the small job on a CPU that goes on after the runs (transfer --detach), as a partition without GPUs
    continuation: dict[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tasks > 1 and (self.runs_per_job > 1 or self.runs_per_gpu > 1):
            raise ValueError(
                f"a job of {self.tasks} tasks trains one run: runs_per_job and runs_per_gpu must be 1 with nodes, "
                "gpus_per_node or tasks_per_node above 1"
            )

    @property
    def tasks(self) -> int:
        """Processes of one run. On this machine it is one."""
        return self.nodes * (self.tasks_per_node or max(self.gpus_per_node, 1)) if self.cluster == "slurm" else 1


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudyFile(RunConfig):
    """A configuration file with a study. Without its last sections it is the configuration of one run."""

    study: StudyConfig
    tune: TuneConfig | None = None
    verify: VerifyConfig | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tune and self.verify:
            raise ValueError("tune and verify are two studies: give each a file of its own")
        chosen = (each.choose(self.model, self.optimizer.name) for each in self.study.parameterizations)
        object.__setattr__(self, "study", replace(self.study, parameterizations=tuple(dict.fromkeys(chosen))))
        if self.parameterization not in (ParameterizationConfig(), *self.study.parameterizations):
            raise ValueError(
                f"parameterization: {show_label(self.parameterization)} would do nothing: study.parameterizations says "
                "what a study compares; state it there, as in study.parameterizations=[{name: depth_mup, beta: 0.5}]"
            )
        if self.study.metric == "minival_loss" and ("minival" not in self.train.evaluate or not self.data.minival):
            mend = "use study.metric=train_loss, or add minival to train.evaluate"
            if "minival" in self.train.evaluate:  # which no run could do
                mend = "give data.minival a share, or leave minival out of train.evaluate"
            raise ValueError(f"study.metric is minival_loss, which no run would measure: {mend}")
        sizes = tuple(map(self.complete, self.study.sizes))
        if twice := [size for size in sizes if sizes.count(size) > 1]:
            raise ValueError(f"study.sizes: {twice[0]} is there twice: leave one out")
        object.__setattr__(self, "study", replace(self.study, sizes=sizes))
        if "num_experts" in self.optional_axes and self.model.family != "moe_vit":
            raise ValueError(f"study.sizes: num_experts is of family moe_vit, and model.family is {self.model.family}")
        training = [axis for axis in self.optional_axes if axis in TRAINING_AXES]
        varied = {axis: {getattr(size, axis) for size in sizes} for axis in training}
        compared = self.study.parameterizations, self.study.hyperparameter
        misfit = self.study.ladder and find_ladder_misfit(varied.get("samples", set()), self, *compared)
        if misfit := misfit or find_axes_misfit(varied, self, *compared):
            raise ValueError(misfit)

    @property
    def own_axes(self) -> dict[str, int | None]:
        """What the file has on the axes that a size may leave out."""
        trained = {axis: getattr(self.train, key) for axis, key in TRAINING_AXES.items()}
        return {"num_experts": getattr(self.model, "num_experts", None), **trained}

    @property
    def optional_axes(self) -> tuple[str, ...]:
        """Those of `own_axes` that some size states."""
        return tuple(axis for axis in self.own_axes if any(getattr(size, axis) for size in self.study.sizes))

    def complete(self, size: Size) -> Size:
        """`size` with what it leaves out of the study's axes as the file has it. One that was noted when the study had
        another axis is the same size without it, where it was the base's in that."""
        own = self.own_axes
        missing = {axis: own[axis] for axis in self.optional_axes if getattr(size, axis) is None}
        idle = [axis for axis in own if axis not in self.optional_axes and getattr(size, axis) == own[axis]]
        return Size.of({axis: value for axis, value in (size.axes | missing).items() if axis not in idle})

    @property
    def directory(self) -> Path:
        return Path(self.study.directory) / self.study.name


def show_label(parameterization: ParameterizationConfig) -> str:
    """'depth_mup', or 'depth_mup alpha=1' where a field overrides the preset."""
    defaults = ParameterizationConfig()
    overrides = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in vars(parameterization).items()
        if key != "name" and value != getattr(defaults, key)
    ]
    return " ".join([parameterization.name, *overrides])
