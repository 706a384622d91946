"""Paths on the command line, and the folders that are the user's."""

import os
import shlex
from pathlib import Path
from typing import Any

import click

from depthmup.data.errors import UserError
from depthmup.data.paths import PACKAGE, expand_path, find_own_home


def refuse_empty(text: str) -> str:
    """`text`; an empty one, mostly a variable that is not set, would be the folder that one is in. Raises UserError."""
    if not text:
        raise UserError("an argument is empty, and should be a path (a variable that is not set?)")
    return text


class Location(click.ParamType):
    """A path or a URL, as text."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        return expand_path(refuse_empty(str(value)))


class FilePath(click.Path):
    """click's own, as a pathlib.Path with ~ and $VAR written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(expand_path(refuse_empty(os.fspath(value))), param, context)


def find_configuration(text: str) -> Path:
    """A configuration's file or a study's folder, with ~ and $VAR written out. What is not there is looked for among
    the recipes that come with the package: digits_resnet, configs/digits_resnet.yaml, paper/vit. Raises UserError."""
    path = Path(expand_path(refuse_empty(text)))
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if path.exists() or path.is_absolute() or not name.name:
        return path
    recipe = PACKAGE / "configs" / name.with_suffix(".yaml")
    return recipe if recipe.is_file() else path


class ConfigPath(FilePath):
    """See find_configuration."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        return find_configuration(os.fspath(value))


def quote_command(verb: str, *words: str | Path) -> str:
    """A command that a shell takes as it stands: `depthmup VERB WORD ...`, quoted where it must be."""
    return shlex.join(["depthmup", verb, *map(str, words)])


def find_user_folder(variable: str, otherwise: str) -> Path | None:
    """depthmup's folder in the one that an XDG variable names, or in `otherwise` in the user's home; None without a
    home."""
    given = os.environ.get(variable, "")
    if os.path.isabs(given):  # others are to be ignored, says the XDG specification
        return Path(given) / "depthmup"
    own = find_own_home()
    return own / otherwise / "depthmup" if own else None
