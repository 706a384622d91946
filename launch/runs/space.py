"""What may be tuned or swept; a search's space, and from a suggestion to a run's configuration."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from depthmup.data.config import DataConfig
from depthmup.data.errors import UserError
from depthmup.launch.axes import MODEL_AXES
from depthmup.launch.runs.planned import list_size_factors
from depthmup.launch.values import Dimension, Range
from depthmup.train.config import RunConfig, TrainConfig, run_hash
from depthmup.train.reading import from_plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DRAWS = 50  # from a space: where the values of none go together, the space is a mistake
TUNABLE = ("optimizer", "schedule", "parameterization", "data", "train")  # sections
# What does not stay the proxy's task: losses of other horizons and other images are not comparable.
FIXED = {
    "train.samples": "the horizon is the proxy's: losses after another number of samples are not comparable",
    "train.global_batch_size": "the batch is the proxy's; optimizer.batch_ratio says how the target's differs",
    "train.precision": "it belongs to the hardware, not to the recipe",
    "data.name": "losses on other images are not comparable",
    "data.minival": "losses on other images are not comparable",
    "data.validation_share": "losses on other images are not comparable",
    "data.root": "it is a path",
    "data.source": "it is a path",
    "train.ema": "the metric is that of the weights, not of their average",
    "train.evaluate": "it says what is measured",
    "optimizer.batch_ratio": "it says how the batch differs from the base's",
    "optimizer.samples_ratio": "it says how the samples differ from the base's",
    "optimizer.name": "another optimizer has other hyperparameters: tune each in a search of its own",
    "parameterization.name": "parameterizations make the same of the base: compare them in a study",
}

SWEPT_BY_SIZES = tuple(f"model.{base}{axis}" for base in ("", "base_") for axis in MODEL_AXES)  # of a study
# What changes no result: all suggestions would be one run.
NO_RESULT = {
    f"{section}.{field.name}"
    for section, settings in (("data", DataConfig), ("train", TrainConfig))
    for field in fields(settings)
    if not field.metadata.get("identity", True)
}


def apply_values(plain: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a run with each dotted key set."""
    changed = copy.deepcopy(plain)
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed.setdefault(section, {})[name] = value
    return changed


def list_examples(dimension: Dimension) -> list[Any]:
    """The values that are tried before anything runs: the ends of a range, every choice."""
    return [dimension.first, dimension.last] if isinstance(dimension, Range) else list(dimension)


def check_key(key: str, where: str) -> None:
    """Raises UserError for a key that cannot be tuned, at the place `where`."""
    section, _, name = key.partition(".")
    if section == "model":
        raise UserError(f"{where}: a key of the model changes the network: compare shapes in a study (study.sizes)")
    if section not in TUNABLE or not name or "." in name:
        known = ", ".join(f"{each}.KEY" for each in TUNABLE)
        raise UserError(f"{where}: not a hyperparameter of the run; a space has {known}")
    if key in FIXED:
        raise UserError(f"{where}: cannot be tuned: {FIXED[key]}")
    if key in NO_RESULT:
        raise UserError(f"{where}: cannot be tuned: it changes how a run is trained, not what it learns")


def check_space(plain: dict[str, Any], space: Mapping[str, Dimension], source: str) -> None:
    """Raises UserError for a key that cannot be tuned, and for a value that is none for this run; names both. `source`:
    the file and the space's own key in it."""
    for key, dimension in space.items():
        where = f"{source}.{key}"
        check_key(key, where)
        runs, refused, idle = list[RunConfig](), None, None
        for value in (values := list_examples(dimension)):
            try:
                runs.append(from_plain(RunConfig, apply_values(plain, {key: value}), f"{where}: {value!r}"))
            except UserError as error:
                if "would do nothing" in str(error):
                    idle = error
                else:
                    refused = refused or error
        names = [run_hash(run) for run in runs]
        if idle and len(set(names)) < 2:  # the one value that is not refused is the key's default
            raise idle
        if refused:
            raise refused
        if len(set(names)) < len(names):
            raise UserError(f"{where}: a value occurs twice in {values}: leave one out")
        if key.startswith("parameterization.") and len({list_acting_settings(run) for run in runs}) < 2:
            raise UserError(
                f"{where}: would do nothing at width {runs[0].model.width}, depth {runs[0].model.depth}, the base's: "
                "leave it out, or compare its values in a study (study.parameterizations)"
            )
    check_together(plain, space, source)


def check_sweep(
    key: str, values: Sequence[float], at_base: Callable[[float], RunConfig], base: str, source: str
) -> None:
    """Raises UserError where the runs of a study's curve at `base`, its first size, would all be the same, or of
    different tasks. `at_base`: from a value of `key` to the run's configuration; `source`: the study's file."""
    where = f"{source}: study.hyperparameter {key}"
    if key in SWEPT_BY_SIZES:
        raise UserError(f"{where}: study.sizes sets the sizes: sweep another key, such as optimizer.lr")
    if key in NO_RESULT or key.split(".")[0] not in (*TUNABLE, "model"):
        raise UserError(f"{where} changes how a run is trained, not what it learns: sweep another key")
    if key in ("train.samples", "train.ema", "data.minival", "data.validation_share"):
        raise UserError(f"{where}: {FIXED[key]}: sweep another key")
    if not key.startswith("parameterization.") or len(values) == 1:
        return
    first, other = values[:2]
    if list_acting_settings(at_base(first)) == list_acting_settings(at_base(other)):
        name = key.removeprefix("parameterization.")
        raise UserError(
            f"{where} would do nothing at the base ({base}): compare its values instead, as in "
            f"study.parameterizations=[{{{name}: {first:g}}}, {{{name}: {other:g}}}]"
        )


def list_acting_settings(run: RunConfig) -> tuple[Any, ...]:
    """All that the run's parameterization changes in its training."""
    return list_size_factors(run), run.parameterization.beta, run.parameterization.gamma0


def check_together(plain: dict[str, Any], space: Mapping[str, Dimension], source: str) -> None:
    """Raises UserError where no values of the space go together, as two keys that say the same thing."""
    random = np.random.default_rng(0)
    for _ in range(DRAWS):
        drawn = {key: find_value(dimension, random.random()) for key, dimension in space.items()}
        try:
            from_plain(RunConfig, apply_values(plain, drawn), source)
        except UserError as error:
            refused = error
        else:
            return
    raise UserError(f"{refused} (the same for each of {DRAWS} draws from the space)")


def make_distributions(space: Mapping[str, Dimension]) -> "dict[str, BaseDistribution]":
    """The space in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for key, dimension in space.items():
        if isinstance(dimension, Range):
            found[key] = FloatDistribution(dimension.first, dimension.last, log=dimension.scale == "log")
        else:
            found[key] = CategoricalDistribution([make_hashable(value) for value in dimension])
    return found


def make_hashable(value: Any) -> Any:
    """A choice as Optuna keeps it: a list, as of betas, is a tuple."""
    return tuple(map(make_hashable, value)) if isinstance(value, list) else value


def find_fraction(dimension: Range, value: float) -> float:
    """Of `value` in the range, from 0 to 1 on its own scale."""
    ends = (dimension.first, value, dimension.last)
    low, at, high = map(math.log, ends) if dimension.scale == "log" else ends
    return (at - low) / (high - low)


def find_value(dimension: Dimension, fraction: float) -> Any:
    """The inverse of `find_fraction`; of a choice, the one that has this part of [0, 1)."""
    if not isinstance(dimension, Range):
        return make_hashable(dimension[int(fraction * len(dimension))])
    if dimension.scale == "log":
        return dimension.first * (dimension.last / dimension.first) ** fraction
    return dimension.first + (dimension.last - dimension.first) * fraction


def encode_values(space: Mapping[str, Dimension], values: Mapping[str, Any]) -> list[float]:
    """Of each dimension the fraction of its range, or the number of the choice."""
    return [
        find_fraction(dimension, values[key])
        if isinstance(dimension, Range)
        else float([make_hashable(each) for each in dimension].index(make_hashable(values[key])))
        for key, dimension in space.items()
    ]


def read_own_value(plain: dict[str, Any], key: str) -> Any:
    """What the file itself has for the dotted `key`."""
    section, _, name = key.partition(".")
    return make_hashable(plain.get(section, {}).get(name))


def choose_default_values(plain: dict[str, Any], space: Mapping[str, Dimension]) -> dict[str, Any] | None:
    """The file's own values where the space holds all of them: the first suggestion, and what the search is to beat."""
    values = {}
    for key, dimension in space.items():
        value = read_own_value(plain, key)
        if isinstance(dimension, Range):
            if not isinstance(value, int | float) or not dimension.first <= value <= dimension.last:
                return None
        elif value not in [make_hashable(each) for each in dimension]:
            return None
        values[key] = value
    return values
