"""How a file writes seeds, the values of a sweep, and the dimensions of a space. Nothing here imports torch."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from depthmup.data.config import Positive
from depthmup.models.checked import STRICT
from depthmup.models.number import Number
from depthmup.train.config import checked_setting


def listed(given: Any) -> Any:
    """'2**-6,2**-4', as one types on a command line, and a single value are lists."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    return [given] if isinstance(given, int | float) else given


# A number means that many: 16 is 0 to 15.
Seeds = Annotated[
    tuple[int, ...], BeforeValidator(lambda given: tuple(range(given)) if isinstance(given, int) else listed(given))
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


def ascending(values: Octaves | tuple[float, ...]) -> tuple[float, ...]:
    return values.values() if isinstance(values, Octaves) else tuple(sorted(set(values)))


def enough(values: Octaves | tuple[float, ...]) -> Octaves | tuple[float, ...]:
    """One value is for `depthmup converge`."""
    if (count := len(ascending(values))) in (0, 2):
        raise ValueError(f"needs at least 3 values, or one where no optimum is asked for, found {count}")
    return values


# The tags are no keys: messages leave out what is in angle brackets.
Values = Annotated[
    Annotated[Octaves, Tag("<octaves>")]
    | Annotated[tuple[Annotated[Number, Field(gt=0)], ...], BeforeValidator(listed), Tag("<list>")],
    Discriminator(lambda given: "<octaves>" if isinstance(given, dict | Octaves) else "<list>"),
    AfterValidator(enough),
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


# One dimension of a space: a range, or the values to choose from. The tags are no keys.
Dimension = Annotated[
    Annotated[Range, Tag("<range>")] | Annotated[tuple[Any, ...], Field(min_length=2), Tag("<choice>")],
    Discriminator(lambda given: "<range>" if isinstance(given, dict | Range) else "<choice>"),
]
