"""A search's space: what may be tuned, and from a suggestion to a run's configuration."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.launch.config import Range, TuneConfig
from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TUNABLE = ("optimizer", "schedule", "parameterization", "data", "train")  # sections
# What does not stay the proxy's task: losses of other horizons and other images are not comparable.
FIXED = {
    "train.samples": "the horizon is the proxy's: losses after another number of samples are not comparable",
    "train.global_batch_size": "the batch is the proxy's; optimizer.batch_ratio says how the target's differs",
    "train.precision": "it belongs to the hardware, not to the recipe",
    "data.name": "losses on other images are not comparable",
    "data.minival": "losses on other images are not comparable",
    "data.root": "it is a path",
    "data.source": "it is a path",
    "optimizer.name": "another optimizer has other hyperparameters: tune each in a search of its own",
    "parameterization.name": "parameterizations make the same of the base: compare them in a study",
}


def with_values(plain: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a run with each dotted key set."""
    changed = copy.deepcopy(plain)
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed.setdefault(section, {})[name] = value
    return changed


def examples(tune: TuneConfig, key: str) -> list[Any]:
    """The values of one dimension that are tried before anything runs: the ends of a range, every choice."""
    dimension = tune.space[key]
    return [dimension.first, dimension.last] if isinstance(dimension, Range) else list(dimension)


def check_space(plain: dict[str, Any], tune: TuneConfig, source: str) -> None:
    """Raises UserError for a key that cannot be tuned, and for a value that is none for this run; names both."""
    for key in tune.space:
        where = f"{source}: tune.space.{key}"
        section, _, name = key.partition(".")
        if section == "model":
            raise UserError(f"{where}: a key of the model changes the network: compare shapes in a study (study.sizes)")
        if section not in TUNABLE or not name or "." in name:
            known = ", ".join(f"{each}.KEY" for each in TUNABLE)
            raise UserError(f"{where}: not a hyperparameter of the run; a space has {known}")
        if key in FIXED:
            raise UserError(f"{where}: cannot be tuned: {FIXED[key]}")
        refused = 0
        for value in (values := examples(tune, key)):
            try:
                from_plain(RunConfig, with_values(plain, {key: value}), f"{where}: {value!r}")
            except UserError as error:
                refused += 1
                # a value at which the key does nothing is its default: only where every value is idle is it a mistake
                if "would do nothing" not in str(error) or refused == len(values):
                    raise


def distributions(tune: TuneConfig) -> "dict[str, BaseDistribution]":
    """The space in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for key, dimension in tune.space.items():
        if isinstance(dimension, Range):
            found[key] = FloatDistribution(dimension.first, dimension.last, log=dimension.scale == "log")
        else:
            found[key] = CategoricalDistribution([hashable(value) for value in dimension])
    return found


def hashable(value: Any) -> Any:
    """A choice as Optuna keeps it: a list, as of betas, is a tuple."""
    return tuple(map(hashable, value)) if isinstance(value, list) else value


def default_values(plain: dict[str, Any], tune: TuneConfig) -> dict[str, Any] | None:
    """The file's own values where the space holds all of them: the first suggestion, and what the search is to beat."""
    values = {}
    for key, dimension in tune.space.items():
        section, _, name = key.partition(".")
        value = hashable(plain.get(section, {}).get(name))
        if isinstance(dimension, Range):
            if not isinstance(value, int | float) or not dimension.first <= value <= dimension.last:
                return None
        elif value not in [hashable(each) for each in dimension]:
            return None
        values[key] = value
    return values
