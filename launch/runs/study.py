"""A study's runs: the grid written out, each run with its identity and its directory."""

import glob
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from depthmup.data.errors import UserError
from depthmup.launch.axes import MODEL_AXES, TRAINING_AXES
from depthmup.launch.config import Size, StudyFile, show_label
from depthmup.launch.paths import quote_command
from depthmup.launch.runs.hopeless import limit_hopeless
from depthmup.launch.runs.ladder import attach_trunks, stretch_schedule
from depthmup.launch.runs.planned import PlannedRun, list_size_factors, set_value
from depthmup.launch.runs.rounds import (
    Added,
    AddedRound,
    AddedRun,
    AddedSeed,
    AddedValues,
    plan_coarse_round,
    write_added_rounds,
    write_rounds,
)
from depthmup.launch.runs.space import check_sweep
from depthmup.launch.runs.written import make_paths_absolute, write_study
from depthmup.models.config import OF_SEVERAL_EXPERTS
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.reading import STUDY_SECTIONS, from_plain, read_json, set_dotted, to_plain
from depthmup.train.rundir import Limits, RunDirectory

if TYPE_CHECKING:
    from depthmup.launch.findings.analysis import Result

Point = TypeVar("Point")  # a value, or a value and a seed
Run = tuple[str, Size, float, int]  # whose it is, size, value, seed


class Study:
    """A study's file and the runs that follow from it."""

    def __init__(self, path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> None:
        self.path, self.file, self.overrides = path, file, overrides

    @property
    def chance(self) -> float:
        """The loss of a guess."""
        return self.file.model.chance

    def command(self, verb: str, *words: str) -> str:
        """A command on this study that a shell takes as it stands: by its folder, which knows the overrides that it was
        run with, once there is one."""
        folder = self.file.directory
        if (folder / "study.yaml").exists():
            return quote_command(verb, folder, *words)
        return quote_command(verb, self.path, *self.overrides, *words)

    @cached_property
    def points(self) -> list[PlannedRun]:
        """The points of all curves. Raises UserError when a size or value is impossible for the model."""
        points = list(self._grid())
        return attach_trunks(points, self.file.study.sizes) if self.file.study.ladder else points

    @cached_property
    def runs(self) -> list[PlannedRun]:
        """The runs behind the points, each once: points that train the same network the same way share one."""
        by_directory: dict[Path, PlannedRun] = {}
        for run in self.points:
            by_directory.setdefault(run.directory.path, run)
        return list(by_directory.values())

    @property
    def runs_to_come(self) -> int:
        """How many more will follow from the results of these, where that is known."""
        return 0

    def _forget_runs(self) -> None:
        """To be called once what they follow from has grown: they are then made anew."""
        for name in ("points", "runs"):
            self.__dict__.pop(name, None)

    def _grid(self) -> Iterator[PlannedRun]:
        """Every size and every value is checked once, not every pair of them: a plan of thousands is quick."""
        study, planned = self.file.study, self._planned()
        at_base = partial(self._checked, study.parameterizations[0], study.sizes[0])
        check_sweep(study.hyperparameter, study.grid, at_base, str(study.sizes[0]), str(self.path))
        checked: dict[float, Any] = {}
        for parameterization, size in product(study.parameterizations, study.sizes):
            name = show_label(parameterization)
            points = sorted(planned.get((name, size), ()))
            values = sorted({value for value, _ in points})
            config = self._checked(self._first_alike[name, size], size, values[0] if values else study.grid[0])
            for value in values:
                if value not in checked:
                    valid: Any = self._checked(parameterization, size, value)
                    for part in study.hyperparameter.split("."):
                        valid = getattr(valid, part)
                    checked[value] = valid
            for value, seed in points:
                one = replace(set_value(config, study.hyperparameter, checked[value]), seed=seed)
                yield self.plan_run(name, size, value, one)

    def plan_run(self, parameterization: str, size: Size, value: float, config: RunConfig) -> PlannedRun:
        """The run of `config` as one of the study's, in the folder that its hash names."""
        directory = RunDirectory(self.file.directory / "runs" / run_hash(config))
        any_shards = "shards" in self.file.study.pool_different
        return PlannedRun(parameterization, size, value, config.seed, config, directory, any_shards)

    def _curve(self, added: Added) -> tuple[str, Size]:
        return added.parameterization, self.file.complete(added.size)

    def _planned(self) -> dict[tuple[str, Size], set[tuple[float, int]]]:
        """(value, seed) of every point, per (parameterization, size)."""
        study = self.file.study
        found: dict[tuple[str, Size], set[tuple[float, int]]] = {}
        if study.adaptive:
            for run in chain.from_iterable(each.runs for each in self.rounds()):
                found.setdefault(self._curve(run), set()).add((run.value, run.seed))
            return {curve: set(points) for curve, points in self._shared(found).items()}
        added, seeds = self.added_values(), self.added_seeds()
        for parameterization, size in product(study.parameterizations, study.sizes):
            curve = show_label(parameterization), size
            values = {*study.grid, *added.get(curve, ())}
            found[curve] = {*product(values, study.seeds), *seeds.get(curve, ())}
        return found

    @property
    def owners(self) -> dict[tuple[str, Size], str]:
        """Per (label, size) the label of the parameterization under which its runs are planned."""
        return {curve: show_label(first) for curve, first in self._first_alike.items()}

    @cached_property
    def examples(self) -> list[PlannedRun]:
        """A run of each size, whether the study has asked for one yet or not."""
        study, found = self.file.study, []
        for size in study.sizes:
            name, value, seed = show_label(study.parameterizations[0]), study.grid[0], study.seeds[0]
            config = replace(self._checked(self._first_alike[name, size], size, value), seed=seed)
            found.append(self.plan_run(name, size, value, config))
        return found

    def may_have(self, size: Size, octaves: float) -> bool:
        """Whether a run of an adaptive design may have the value there."""
        return self._is_valid(
            show_label(self.file.study.parameterizations[0]), size, self.file.study.on_lattice(octaves)
        )

    @cached_property
    def _first_alike(self) -> dict[tuple[str, Size], ParameterizationConfig]:
        """Per (label, size) the first of the study's parameterizations with the same factors: their runs are the same,
        so all of them are that one's."""
        study, found = self.file.study, {}
        for size in study.sizes:
            made = [(p, list_size_factors(self._checked(p, size, study.grid[0]))) for p in study.parameterizations]
            for parameterization, own in made:
                found[show_label(parameterization), size] = next(first for first, other in made if other == own)
        return found

    def _shared(self, added: Mapping[tuple[str, Size], Collection[Point]]) -> dict[tuple[str, Size], list[Point]]:
        """For each curve, what was `added` to any curve that has the same runs."""
        pooled: dict[tuple[str, Size], list[Point]] = {}
        for (name, size), first in self._first_alike.items():
            pooled.setdefault((show_label(first), size), []).extend(added.get((name, size), ()))
        return {(name, size): pooled[show_label(first), size] for (name, size), first in self._first_alike.items()}

    def _checked(self, parameterization: Any, size: Size, value: float) -> RunConfig:
        """The run's configuration, read as if from a file. Raises UserError."""
        shape = {axis: value for axis, value in size.axes.items() if axis in MODEL_AXES}
        raw = {**self._base, "model": {**self._base["model"], **shape}}
        if size.num_experts == 1:  # the dense network, which reads none of what mixes experts
            raw["model"] = {key: stated for key, stated in raw["model"].items() if key not in OF_SEVERAL_EXPERTS}
        # A study may sweep a field of the parameterization itself (beta, gamma0).
        raw["parameterization"] = dict(vars(parameterization))
        raw["optimizer"] = deepcopy(self._base["optimizer"])
        raw["train"] = dict(self._base["train"])
        for axis, key in TRAINING_AXES.items():
            if value_there := getattr(size, axis):
                if axis == "samples" and self.file.study.ladder:  # one trunk: what it trains with, all horizons do
                    raw["schedule"] = stretch_schedule(raw["schedule"], raw["train"], value_there)
                else:
                    raw["optimizer"][f"{axis}_ratio"] *= value_there / raw["train"][key]
                raw["train"][key] = value_there
            if raw["optimizer"][f"{axis}_ratio"] == 1:  # as at the base, which all exponents make the same of
                raw["parameterization"][f"{axis}_lr"] = None
        hyperparameter = self.file.study.hyperparameter
        if "." not in hyperparameter:
            raise UserError(
                f"{self.path}: study.hyperparameter {hyperparameter!r} must be SECTION.KEY, as optimizer.lr"
            )
        set_dotted(raw, f"{hyperparameter}={value!r}")
        return from_plain(RunConfig, raw, f"{self.path} ({size}, {hyperparameter} {value:g})")

    def _is_valid(self, parameterization: str, size: Size, value: float) -> bool:
        """Whether a run may have the value: a share of warm-up, say, has an upper end."""
        try:
            self._checked(self._first_alike[parameterization, size], size, value)
        except UserError:
            return False
        return True

    @cached_property
    def _base(self) -> dict[str, Any]:
        """The file without its study, as plain data, with absolute paths: jobs run in another folder. All runs of a
        study are one group on wandb unless the file says otherwise."""
        base: dict[str, Any] = to_plain(make_paths_absolute(self.file))
        for section in STUDY_SECTIONS:
            del base[section]
        base["track"]["group"] = self.file.track.group or self.file.study.name
        return base

    @property
    def target_file(self) -> Path:
        """Where the target's configuration is written (launch.scale); of several, the first one's."""
        return self.file.directory / f"{self.file.study.name}_target.yaml"

    def target_files(self, targets: Sequence[Path]) -> list[Path]:
        """Where the configurations of `targets`, files of a user's, are written: those after the first by their names.
        Raises UserError for two of one name."""
        files = [self.target_file.with_stem(f"{self.target_file.stem}_{target.stem}") for target in targets]
        files[:1] = [self.target_file][: len(files)]
        if len(set(files)) < len(files):
            raise UserError(f"two targets have the same name: {', '.join(map(str, targets))}: rename one of them")
        return files

    def written_targets(self) -> list[Path]:
        """The targets' configurations that were written."""
        return sorted(self.file.directory.glob(f"{glob.escape(self.target_file.stem)}*.yaml"))

    def pending(self) -> list[PlannedRun]:
        return [run for run in self.runs if not run.done()]

    # ------------------------------------------------------------ rounds of an adaptive design

    @property
    def rounds_file(self) -> Path:
        return self.file.directory / "rounds.json"

    def rounds(self) -> list[AddedRound]:
        """All rounds so far. The first follows from the file; before the second none is written down."""
        study = self.file.study
        names = [show_label(each) for each in study.parameterizations]
        coarse = plan_coarse_round(names, study.sizes[0], study.coarse, study.seeds[0])
        return read_json(list[AddedRound], self.rounds_file, missing=[coarse])

    def owned(self, run: "AddedRun | PlannedRun | Result") -> Run:
        size = self.file.complete(run.size)
        return self.owners[run.parameterization, size], size, run.value, run.seed

    def list_asked_runs(self) -> list[set[Run]]:
        """Per round its runs, those of several parameterizations once."""
        return [set(map(self.owned, each.runs)) for each in self.rounds()]

    def add_round(self, added: AddedRound) -> int:
        """Returns how many runs it makes. Durable: every later command sees them."""
        before = len(self.runs)
        write_added_rounds(self.rounds_file, [*self.rounds(), added])
        self._forget_runs()
        return len(self.runs) - before

    # ------------------------------------------------------------ growing the grid

    @property
    def added_values_file(self) -> Path:
        return self.file.directory / "added_values.json"

    def added_values(self) -> dict[tuple[str, Size], list[float]]:
        """Values beyond study.values, per (parameterization, size)."""
        found: dict[tuple[str, Size], list[float]] = {}
        for entry in chain.from_iterable(read_json(list[list[AddedValues]], self.added_values_file, missing=[])):
            found.setdefault(self._curve(entry), []).extend(entry.values)
        return self._shared(found)

    def grow(self, edges: Mapping[tuple[str, Size], str]) -> int:
        """Adds two values on the `low` or `high` side of each curve in `edges`; returns how many runs that makes.

        0 when there is nothing to add, as where no run may have the values, or study.extend rounds were made. Durable:
        every later command sees the values.
        """
        rounds = read_json(list[list[AddedValues]], self.added_values_file, missing=[])
        if not edges or len(rounds) >= self.file.study.extend:
            return 0
        growth, known = [], self.added_values()
        for (parameterization, size), side in edges.items():
            grid = {*self.file.study.grid, *known.get((parameterization, size), ())}
            x = sorted(map(self.file.study.octaves, grid), reverse=side == "high")
            values = [self.file.study.value_at(x[0] + steps * (x[0] - x[1])) for steps in (1, 2)]
            if valid := [value for value in values if self._is_valid(parameterization, size, value)]:
                growth.append(AddedValues(parameterization=parameterization, **size.axes, values=valid))
        return self._keep_rounds(self.added_values_file, [*rounds, growth]) if growth else 0

    def _keep_rounds(self, file: Path, rounds: Sequence[Sequence[AddedValues]]) -> int:
        """Writes the rounds of growth; returns how many runs the last one makes."""
        before = len(self.runs)
        write_rounds(file, rounds)
        self._forget_runs()
        return len(self.runs) - before

    @property
    def added_seeds_file(self) -> Path:
        return self.file.directory / "added_seeds.json"

    def added_seeds(self) -> dict[tuple[str, Size], list[tuple[float, int]]]:
        """(value, seed) beyond study.seeds, per (parameterization, size)."""
        found: dict[tuple[str, Size], list[tuple[float, int]]] = {}
        for entry in chain.from_iterable(read_json(list[list[AddedSeed]], self.added_seeds_file, missing=[])):
            found.setdefault(self._curve(entry), []).extend((value, entry.seed) for value in entry.values)
        return self._shared(found)

    def add_seeds(self, wanted: Mapping[tuple[str, Size], Sequence[float]]) -> int:
        """Adds one seed at the values of each curve in `wanted`; returns how many runs that makes.

        0 when nothing is wanted or study.more_seeds rounds were made. Durable: every later command sees the seeds.
        """
        rounds, known = read_json(list[list[AddedSeed]], self.added_seeds_file, missing=[]), self.added_seeds()
        if not wanted or len(rounds) >= self.file.study.more_seeds:
            return 0
        added = []
        for (parameterization, size), values in wanted.items():
            seed = max([*self.file.study.seeds, *(seed for _, seed in known.get((parameterization, size), ()))]) + 1
            added.append(AddedSeed(parameterization=parameterization, **size.axes, values=list(values), seed=seed))
        return self._keep_rounds(self.added_seeds_file, [*rounds, added])

    # ------------------------------------------------------------ writing

    def early_ends(self) -> Iterator[tuple[PlannedRun, Limits]]:
        """Where those of the last round end early."""
        study = self.file.study
        if not study.adaptive or study.hyperparameter != "optimizer.lr":
            return
        last = self.list_asked_runs()[-1]
        earlier = [run for run in self.points if self.owned(run) not in last]
        later = [run for run in self.runs if self.owned(run) in last]
        yield from limit_hopeless(earlier, later, study.metric)

    def write(self) -> None:
        """Writes the study's own file, every run's configuration, and where it ends early. Raises UserError for an
        unwritable folder."""
        write_study(self)
