"""How a file writes seeds, the values of a sweep, and the dimensions of a space. Nothing here imports torch."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from depthmup.data.config import Positive, Whole
from depthmup.models.config_errors import STRICT
from depthmup.models.number import Number
from depthmup.train.config import checked_setting


def make_list(given: Any) -> Any:
    """'2**-6,2**-4', as one types on a command line, and a single value are lists."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    return [given] if isinstance(given, int | float) else given


def count_up(given: Any) -> Any:
    """A number means that many seeds: 16 is 0 to 15."""
    if isinstance(given, float) and given.is_integer():  # 1e1
        given = int(given)
    if isinstance(given, bool) or (isinstance(given, int) and given < 1):
        raise ValueError("state how many seeds, at least 1, or a list of them")
    return tuple(range(given)) if isinstance(given, int) else make_list(given)


def refuse_twice(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two runs of one seed are one run: they would pass for an agreement that nobody measured."""
    if twice := sorted({each for each in given if given.count(each) > 1}):
        raise ValueError(f"{', '.join(map(str, twice))} is there twice: leave one out")
    return given


Seeds = Annotated[
    tuple[Annotated[Whole, Field(ge=0)], ...],
    BeforeValidator(count_up),
    AfterValidator(refuse_twice),
    Field(min_length=1),
]


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class Octaves:
    """first, first * 2^(1/per_octave), ... up to last."""

    first: Annotated[Number, Field(gt=0)]  # the smallest value
    last: Annotated[Number, Field(gt=0)]  # the largest
    per_octave: Positive = 1  # values for each factor of two

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"last {self.last:g} is below first {self.first:g}")

    def values(self) -> tuple[float, ...]:
        count = math.floor(math.log2(self.last / self.first) * self.per_octave + 1e-9) + 1
        return tuple(self.first * 2 ** (i / self.per_octave) for i in range(count))


def sort_values(values: Octaves | tuple[float, ...]) -> tuple[float, ...]:
    return values.values() if isinstance(values, Octaves) else tuple(sorted(set(values)))


def require_several(values: Octaves | tuple[float, ...]) -> Octaves | tuple[float, ...]:
    """One value is for `depthmup converge`."""
    if (count := len(sort_values(values))) in (0, 2):
        raise ValueError(f"needs 3 values or more (1 for a study without an optimum), found {count}")
    return values


# The tags are no keys: messages leave out what is in angle brackets.
Values = Annotated[
    Annotated[Octaves, Tag("<octaves>")]
    | Annotated[tuple[Annotated[Number, Field(gt=0)], ...], BeforeValidator(make_list), Tag("<list>")],
    Discriminator(lambda given: "<octaves>" if isinstance(given, dict | Octaves) else "<list>"),
    AfterValidator(require_several),
]


@checked_setting
@dataclass(config=STRICT, frozen=True, kw_only=True)
class Range:
    """All values from first to last, on a logarithmic or a linear scale."""

    first: Number  # the smallest value
    last: Number  # the largest
    scale: Literal["log", "linear"] = "log"  # on which suggestions are spread

    def __post_init__(self) -> None:
        if self.last <= self.first:
            raise ValueError(f"last {self.last:g} must be above first {self.first:g}")
        if self.scale == "log" and self.first <= 0:
            raise ValueError(f"first {self.first:g} must be above 0 on a logarithmic scale; use scale: linear")


def check_listed(given: Any) -> Any:
    """A single value is neither a range nor a choice."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"state a range, as {{first: 2**-12, last: 2**-5}}, or a list of values (got {given!r})")
    return given


# One dimension of a space: a range, or the values to choose from. The tags are no keys.
Dimension = Annotated[
    Annotated[Range, Tag("<range>")]
    | Annotated[tuple[Any, ...], BeforeValidator(check_listed), Field(min_length=2), Tag("<choice>")],
    Discriminator(lambda given: "<range>" if isinstance(given, dict | Range) else "<choice>"),
]
