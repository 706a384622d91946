"""Dataclasses that hold every value to its annotation. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, ErrorDetails

from models.errors import ModelError


def said(error: ErrorDetails) -> str:
    """What one of pydantic's errors says, with the value that it found."""
    message = error["msg"].removeprefix("Value error, ")
    found = error.get("input")
    return message + (f" (got {found!r})" if isinstance(found, str | int | float | bool) else "")


Class = TypeVar("Class", bound=type)


def checked(cls: Class) -> Class:
    """The dataclass `cls` with a constructor that holds every value to its annotation, as reading YAML does.

    It raises ModelError with every mistake in one line.
    """
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]  # pydantic's own name
    adapter: Callable[[], TypeAdapter[Any]] = cache(lambda: TypeAdapter(cls))
    names = [field.name for field in fields(cls)]

    def describe(error: ErrorDetails) -> str:
        unknown = error["type"].startswith("unexpected_")
        path = list(error["loc"])
        if path and isinstance(path[0], int) and not unknown:  # given by position
            path[0] = names[path[0]]
        key = ".".join(map(str, [cls.__name__, *path]))
        return f"{key}: " + (f"unknown; known: {', '.join(names)}" if unknown else said(error))

    @wraps(cls.__init__)  # type: ignore[misc]  # mypy: a subclass could have another; these have none
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            # pydantic makes an instance of its own without calling this
            vars(self).update(vars(adapter().validate_python(ArgsKwargs(args, values))))
        except ValidationError as error:
            raise ModelError("; ".join(describe(item) for item in error.errors(include_url=False))) from None

    cls.__init__ = init  # type: ignore[misc]  # mypy knows no class decorator that replaces a method
    return cls
