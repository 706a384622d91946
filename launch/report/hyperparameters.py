"""What a search says of each hyperparameter: its importance, and where its optimum lies by the surrogate."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.findings.surrogate import Located, locate_optimum
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.space import encode_values, find_fraction, find_value
from depthmup.launch.values import Dimension, Range
from depthmup.launch.wording import join_with_and

BEST_SHARE = 0.25  # of the suggestions, by their loss: what PED-ANOVA compares with the others
EDGE_SHARE = 0.03  # of a range, at each of its ends: a value there is on the edge
SPREAD_OUT = 0.7  # of a range that the optimum's interval covers: the losses do not say which value is best


@dataclass(frozen=True)
class Hyperparameter:
    """What the search says of one hyperparameter. The surrogate's `optimum` is None where there is no surrogate. low,
    high: its interval at CONFIDENCE, of a range; likely: the fewest values that hold it at CONFIDENCE, of a choice."""

    key: str
    best: Any
    importance: float | None  # share of what the values decide, by PED-ANOVA (arXiv 2304.10255)
    optimum: Any = None
    low: float | None = None
    high: float | None = None
    likely: tuple[Any, ...] = ()
    identified: bool = False


def measure_importance(search: Search) -> tuple[dict[str, float], str]:
    """(of each hyperparameter, in sum 1; why there is none, in Optuna's words, as where too little has finished)."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    journal = search.journal.read()
    assert journal is not None  # it has winners
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("error", UserWarning)  # of too few trials it gives all the same importance
        try:
            evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
            return get_param_importances(journal, evaluator=evaluator), ""
        except (ValueError, RuntimeError, UserWarning) as error:
            return {}, " ".join(str(error).split())


def locate_optima(search: Search) -> list[Located]:
    """The surrogate's optimum on each dimension of the space, from all runs; empty where too few have a loss: that of a
    run which is no better than a guess, or was ended early, is none."""
    trials = search.trials()
    tried = [(trial.params, search.plan_trial_runs(trial)) for trial in trials]
    tried += [(trials[number].params, search.plan_reruns(number)) for number in search.winners()]
    found = [(values, search.loss([run])) for values, runs in tried for run in runs]
    points = [encode_values(search.settings.space, values) for values, _ in found]
    losses = [math.inf if loss is None or loss >= search.chance else loss for _, loss in found]
    choices = [0 if isinstance(each, Range) else len(each) for each in search.settings.space.values()]
    return locate_optimum(np.array(points), np.array(losses), choices)


def describe_hyperparameters(search: Search, best: Mapping[str, Any]) -> tuple[list[Hyperparameter], str]:
    """(each hyperparameter of the space, why nothing is said of importance). best: the best winner's values."""
    importance, no_importance = measure_importance(search)
    found = [Hyperparameter(key, best[key], importance.get(key)) for key in search.settings.space]
    if located := locate_optima(search):
        dimensions = search.settings.space.values()
        found = [add_optimum(*each) for each in zip(found, dimensions, located, strict=True)]
    return found, no_importance


def add_optimum(each: Hyperparameter, dimension: Dimension, at: Located) -> Hyperparameter:
    if isinstance(dimension, Range):
        low, high = (find_value(dimension, fraction) for fraction in at.interval)
        identified = at.interval[1] - at.interval[0] < SPREAD_OUT
        return replace(each, optimum=find_value(dimension, at.best), low=low, high=high, identified=identified)
    likely = tuple(dimension[i] for i in at.list_likely(CONFIDENCE))
    return replace(each, optimum=dimension[int(at.best)], likely=likely, identified=len(likely) < len(dimension))


def shorten_key(key: str) -> str:
    return key.split(".")[-1]


def find_edge(dimension: Dimension, value: Any) -> str:
    """The edge of its range that the value is on, 'low' or 'high'; '' inside of it, and for a choice."""
    if not isinstance(dimension, Range):
        return ""
    fraction = find_fraction(dimension, value)
    return "low" if fraction <= EDGE_SHARE else "high" if fraction >= 1 - EDGE_SHARE else ""


def describe_edge(dimension: Dimension, each: Hyperparameter) -> str:
    """Says that the surrogate's optimum, where it is identified, or the best trial's value is on an edge of its range;
    '' where neither is. Of both on one edge it names the surrogate's optimum alone."""
    name = shorten_key(each.key)
    values = [(f"the surrogate's optimum of {name}", each.optimum)] if each.identified else []
    said: dict[str, str] = {}
    for whose, value in [*values, (f"the best trial's {name}", each.best)]:
        if edge := find_edge(dimension, value):
            said.setdefault(edge, f"{whose}, {show_value(value)}, is on the {edge} edge of its range")
    return join_with_and(list(said.values()))


def show_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_likely(each: Hyperparameter) -> str:
    """Where the surrogate's optimum may lie: '0.01 to 0.03', or the choices '0, 0.05'."""
    if each.low is None or each.high is None:
        return ", ".join(map(show_value, each.likely))
    return f"{show_value(each.low)} to {show_value(each.high)}"
