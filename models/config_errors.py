"""Errors of pydantic's dataclasses, which hold every value to its annotation, in one line. Imports no torch."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from depthmup.models.errors import ModelError

STRICT = ConfigDict(extra="forbid")
Class = TypeVar("Class", bound=type)


def describe_error(error: ErrorDetails) -> str:
    """What one of pydantic's errors says, with the value that it found."""
    found = error.get("input")
    context = error.get("ctx", {})
    if error["type"] in ("tuple_type", "list_type"):
        message = "Input should be a list, as [a, b]"
    elif error["type"] in ("dict_type", "dataclass_type", "model_attributes_type"):
        message = "Input should be keys with values, as {key: value}"
    elif error["type"] == "string_type":
        message = "Input should be text" + (f": put it in quotes, as '{found}'" if found is not None else "")
    elif error["type"] == "too_short":
        counted = "item" if context["min_length"] == 1 else "items"
        message = f"needs at least {context['min_length']} {counted}, found {context['actual_length']}"
    else:
        message = error["msg"].removeprefix("Value error, ")
    return message + (f" (got {found!r})" if isinstance(found, str | int | float | bool) else "")


def strip_echoes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """`errors` but for those that say of a list with a bad item that it is too short."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(place != error["loc"] and place[: len(error["loc"])] == error["loc"] for place in places)
    ]


def checked(error_type: type[Exception]) -> Callable[[Class], Class]:
    """For a dataclass of pydantic's: its constructor, and so `dataclasses.replace`, raises `error_type` with every
    mistake in one line."""

    def decorate(cls: Class) -> Class:
        names = [field.name for field in fields(cls)]

        def describe(error: ErrorDetails) -> str:
            unknown = error["type"].startswith("unexpected_")
            path = [part for part in error["loc"] if not str(part).startswith("<")]  # a tag of a union is no key
            if path and isinstance(path[0], int) and not unknown:  # given by position
                path[0] = names[path[0]]
            key = ".".join(map(str, [cls.__name__, *path]))
            return f"{key}: " + (f"unknown; known: {', '.join(names)}" if unknown else describe_error(error))

        construct = cls.__init__  # type: ignore[misc]  # mypy: a subclass could have another; these have none

        @wraps(construct)
        def init(self: Any, *args: Any, **values: Any) -> None:
            try:
                construct(self, *args, **values)
            except ValidationError as error:
                mistakes = strip_echoes(error.errors(include_url=False))
                raise error_type("; ".join(map(describe, mistakes))) from None

        cls.__init__ = init  # type: ignore[misc]  # mypy knows no class decorator that replaces a method
        return cls

    return decorate


checked_model = checked(ModelError)
