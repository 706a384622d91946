"""A study's runs: the grid written out, each run with its identity and its directory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from data.errors import UserError
from launch.config import Size, StudyFile, label
from train.config import RunConfig, from_plain, run_hash, set_dotted, to_plain, to_yaml
from train.rundir import RunDirectory


@dataclass(frozen=True)
class PlannedRun:
    """One point of the grid."""

    parameterization: str  # its label
    size: Size
    value: float
    seed: int
    config: RunConfig
    directory: RunDirectory


class Study:
    """A study's file and the runs that follow from it."""

    def __init__(self, path: Path, file: StudyFile) -> None:
        self.path, self.file = path, file

    @cached_property
    def runs(self) -> list[PlannedRun]:
        """All runs, each once. Raises UserError when a size or value is impossible for the model."""
        by_hash = {run.directory.path.name: run for run in self._grid()}
        return list(by_hash.values())

    def _grid(self) -> Iterator[PlannedRun]:
        study, base = self.file.study, to_plain(self.file)
        for section in ("study", "launch"):
            del base[section]
        for parameterization, size in product(study.parameterizations, study.sizes):
            for value, seed in product(study.grid, study.seeds):
                raw = {**base, "seed": seed, "model": {**base["model"], **vars(size)}}
                # A study may sweep a field of the parameterization itself (beta, gamma0).
                raw["parameterization"] = dict(vars(parameterization))
                raw["optimizer"] = dict(base["optimizer"])
                set_dotted(raw, f"{study.hyperparameter}={value!r}")
                config = from_plain(RunConfig, raw, f"{self.path} ({size}, {study.hyperparameter} {value:g})")
                directory = RunDirectory(self.file.directory / "runs" / run_hash(config))
                yield PlannedRun(label(parameterization), size, value, seed, config, directory)

    def pending(self) -> list[PlannedRun]:
        return [run for run in self.runs if not run.directory.done()]

    def check_writable(self) -> None:
        """Raises UserError when the study's folder could not be made. Makes nothing."""
        root = self.file.directory.absolute()
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            raise UserError(f"{root}: {nearest} is not writable; set study.directory to a folder that is")

    def write(self) -> None:
        """Writes the study's own file and every run's configuration. Raises UserError for an unwritable folder."""
        root = self.file.directory
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / "study.yaml").write_text(to_yaml(self.file))
            for run in self.runs:
                if not run.directory.config.exists():
                    run.directory.path.mkdir(parents=True, exist_ok=True)
                    run.directory.config.write_text(to_yaml(run.config))
        except OSError as error:
            raise UserError(
                f"{root}: cannot write there ({error.strerror}); set study.directory to a folder that is writable"
            ) from None


def count_flops(runs: list[PlannedRun]) -> dict[Size, tuple[int, int]]:
    """Per size: (parameters, FLOPs of one run: forward and backward over all its samples)."""
    from models.build import build_meta  # torch, which most commands do not need
    from models.flops import num_parameters, training_flops

    counted = {}
    for run in runs:
        if run.size not in counted:
            model = run.config.model
            network = build_meta(model, run.config.parameterization).network
            shape = (model.in_channels, model.image_size, model.image_size)
            steps = run.config.train.num_steps * run.config.train.global_batch_size
            counted[run.size] = (num_parameters(network), training_flops(network, shape) * steps)
    return counted
