"""One run of a study: its place in it, its configuration and its directory."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.storage import is_remote
from depthmup.launch.config import Size
from depthmup.launch.findings.failures import ERRORS, MOST_GUESS_NOISE
from depthmup.models.parameterization import Scale
from depthmup.models.parameterization_config import scale_of
from depthmup.models.training_scale import TrainingFactors, compute_training_factors
from depthmup.train.config import RunConfig
from depthmup.train.owner import check_owner, fingerprint_data
from depthmup.train.rundir import PRUNED, RunDirectory
from depthmup.train.trunk import Trunk


@dataclass(frozen=True)
class PlannedRun:
    """One point of the grid."""

    parameterization: str  # its label
    size: Size
    value: float
    seed: int
    config: RunConfig
    directory: RunDirectory
    any_shards: bool = False  # whether a result counts that was trained on other images
    trunk: Trunk | None = None  # the run that it branches off, of those that are planned
    ends_for_good: bool = False  # whether it is not looked at again once it has ended: a search asks thousands, often

    @property
    def share(self) -> float:
        """Of the run's steps, what it trains itself."""
        return 1 - (self.trunk.step / self.config.train.num_steps if self.trunk else 0.0)

    def done(self) -> dict[str, Any] | None:
        """The done marker, None before the run's end. Raises UserError for one that is damaged, or another run's.

        A marker that has not changed since it was read is not read again, nor are its images looked at: whoever waits
        asks thousands of runs, often. Where a run `ends_for_good`, it is not looked at either.
        """
        if self.ends_for_good and (done := next(iter(self._read.values()), None)):
            return done
        try:
            status = (self.directory.path / "done.json").stat()
        except FileNotFoundError:
            return None
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version not in self._read:
            if done := self.directory.done():
                shards = None if self.any_shards or is_remote(self.config.data.root) else fingerprint_data(self.config)
                check_owner(self.directory.path / "done.json", done, self.config, shards)
            self._read.clear()
            self._read[version] = done
        return self._read[version]

    @cached_property
    def _read(self) -> dict[Any, dict[str, Any] | None]:
        """The marker, by its version on disk."""
        return {}

    def loss(self, metric: str) -> float | None:
        """The metric of a run that is done, infinite where it diverged, that of a guess where it ended early at the
        loss of a guess; None before its end. Raises UserError for a marker without that metric, and as `done`."""
        if (done := self.done()) is None:
            return None
        if self.ended_hopeless():
            return self.config.model.chance
        if done["outcome"] == PRUNED:
            raise UserError(
                f"{self.directory.path}: a search ended this run early, after step {done.get('step')}: choose another "
                "study.name, or delete the folder to train it to its end"
            )
        loss: float | None = done.get(metric) if done["outcome"] == "completed" else math.inf
        if loss is None:
            raise UserError(
                f"{self.directory.path}: done.json has no {metric}; add minival to train.evaluate, or, "
                "if another version wrote it, delete the folder to train it again"
            )
        return loss

    @property
    def hopeless_loss(self) -> float:
        """The lowest loss that is within noise of that of a guess."""
        return self.config.model.chance * math.exp(-ERRORS * MOST_GUESS_NOISE)

    def ended_hopeless(self) -> bool:
        """Whether it ended early at the loss of a guess (launch.runs.hopeless)."""
        done = self.done() or {}
        return done.get("outcome") == PRUNED and done.get("limit", 0.0) >= self.hopeless_loss

    def is_pruned(self) -> bool:
        """Whether it was ended early: in a search it has no result then."""
        done = self.done()
        return done is not None and done["outcome"] == PRUNED

    def share_trained(self) -> float:
        """The share of its steps that it takes: 1 but for one that has diverged or was ended early."""
        done = self.done() or {}
        return float(done.get("step", self.config.train.num_steps) / self.config.train.num_steps)

    def failed(self) -> dict[str, Any] | None:
        """As `done`, of the failed marker; None where another run failed in this directory."""
        failed, name = self.directory.failed(), self.directory.path.name
        return failed if failed and failed.get("run", name) == name else None


def set_value(config: Any, key: str, value: Any) -> Any:
    """`config` with the dotted `key` set to a value that was checked before."""
    name, dot, rest = key.partition(".")
    return replace(config, **{name: set_value(getattr(config, name), rest, value) if dot else value})


def compute_scaling(config: RunConfig) -> tuple[Scale, TrainingFactors]:
    """The run's size over the base's, and the factors of its batch and samples over the base's."""
    scale = scale_of(config.model.size, config.model.base_size, config.parameterization)
    optimizer = config.optimizer
    ratios = optimizer.batch_ratio, optimizer.samples_ratio
    return scale, compute_training_factors(scale.parameterization, optimizer.name, *ratios)


def list_size_factors(config: RunConfig) -> tuple[Any, ...]:
    """What the parameterization makes of this run's size: at the base size, for one, all of them make the same."""
    scale, training = compute_scaling(config)
    return *scale.all_factors(config.optimizer.name), training
