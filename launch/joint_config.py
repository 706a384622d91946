"""The sections of the two studies of all hyperparameters at once: tune and verify. Nothing here imports torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from depthmup.data.config import Positive, Whole
from depthmup.launch.values import Dimension, Range, Seeds, make_list
from depthmup.models.config_errors import STRICT
from depthmup.models.number import Number
from depthmup.train.config import checked_setting


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class TuneConfig:
    """A joint search of the proxy's hyperparameters: `trials` suggestions in batches, each trained with `seeds`; then
    the best `rerun` of them with `rerun_seeds` new seeds, which alone say which is best."""

    space: Annotated[dict[str, Dimension], Field(min_length=1)]  # the keys that are searched, each a range or a list
    trials: Positive | None = None  # null: as many as `flops` pays for, and 32 without that
    flops: Annotated[Number, Field(gt=0)] | None = None  # of all runs, the winners' too
    # suggestions at once: one pack, or one array of jobs; null: 1 where one process of this machine trains them on a
    # CPU, 8 elsewhere, and what a search began with, it keeps
    batch: Positive | None = None
    sampler: Literal["tpe", "random"] = "tpe"  # of Optuna
    seeds: Seeds = (0,)  # of each suggestion
    seed: Annotated[Whole, Field(ge=0)] = 0  # of the sampler
    rerun: Positive = 3  # the best suggestions, which train again
    rerun_seeds: Annotated[Whole, Field(ge=2)] = 3  # new ones, of each of them
    # shares of the steps at which a run whose loss is above the median of the suggestions before its batch is ended
    prune: Annotated[tuple[Annotated[Number, Field(gt=0, lt=1)], ...], BeforeValidator(make_list)] = ()

    def __post_init__(self) -> None:
        if self.trials and self.flops:
            raise ValueError("trials and flops are two budgets: state one of them")

    @property
    def most_trials(self) -> int:
        """Where the budget is one of suggestions."""
        return self.trials or 32

    @property
    def most_winners(self) -> int:
        """How many suggestions train again: all where there are fewer than `rerun`."""
        return self.rerun if self.flops else min(self.rerun, self.most_trials)


Factor = Annotated[Number, Field(gt=1)]  # all values from the file's own over it to the file's own times it
Around = Annotated[
    Annotated[Factor, Tag("<factor>")]
    | Annotated[Range, Tag("<range>")]
    | Annotated[tuple[Any, ...], Field(min_length=2), Tag("<choice>")],
    Discriminator(
        lambda given: (
            "<range>"
            if isinstance(given, dict | Range)
            else "<choice>"
            if isinstance(given, list | tuple)
            else "<factor>"
        )
    ),
]


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class VerifyConfig:
    """A verification of the file's own hyperparameters: `runs` runs with all of `space` perturbed at once, beside the
    file's own values with `seeds`. Where none of 59 is better, they are among the best 5 % of the space with 95 %
    confidence."""

    # the keys that are perturbed: a factor around the file's own value, a range, or a list
    space: Annotated[dict[str, Around], Field(min_length=1)]
    runs: Positive = 59  # perturbed ones; of 59, none better: among the best 5 % with 95 % confidence
    seeds: Seeds = (0, 1, 2)  # of the file's own values; perturbed ones have the first
    width: Positive | None = None  # where it is verified; null: the file's own size
    depth: Positive | None = None  # as width
    top: Annotated[Number, Field(gt=0, lt=1)] = 0.05  # share of the space
    budget: Annotated[Number, Field(gt=0)] = 1.0  # FLOPs of all runs at most, in those of one run of the file
    seed: Annotated[Whole, Field(ge=0)] = 0  # of the perturbations
