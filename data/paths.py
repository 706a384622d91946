"""Paths as users write them: with ~ and $VAR, wherever no shell has seen them."""

import os
import pwd
import re
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError

PACKAGE = Path(__file__).parent.parent  # the folder `depthmup`, which holds the packages
VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>\w+)\}|(?P<name>[A-Za-z_]\w*))")


def find_own_home() -> Path | None:
    """The user's home; None where neither HOME nor the list of users knows one, as in a container."""
    if given := os.environ.get("HOME"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def find_home(user: str) -> str:
    """Raises ValueError for one that is not known."""
    if not user:
        if own := find_own_home():
            return str(own)
        raise ValueError("~: HOME is not set")
    try:
        return pwd.getpwnam(user).pw_dir
    except KeyError:
        raise ValueError(f"~{user}: no such user (a folder of that name is ./~{user})") from None


def expand(text: str) -> str:
    """`text` with ~, ~user, $VAR and ${VAR} written out as a shell does; $$ is a dollar sign.

    Raises ValueError that names what is not set: an empty value would lead to another folder.
    """

    def value(found: re.Match[str]) -> str:
        name = found["braced"] or found["name"]
        if found["dollar"]:
            return "$"
        if not os.environ.get(name):
            raise ValueError(f"{text}: the variable {name} is not set (a dollar sign itself is $$)")
        return os.environ[name]

    if text.startswith("~"):
        user, slash, rest = text[1:].partition("/")
        return find_home(user) + slash + VARIABLE.sub(value, rest)
    return VARIABLE.sub(value, text)


def expand_path(text: str) -> str:
    """As `expand`, where no configuration's reader words the mistake. Raises UserError."""
    try:
        return expand(text)
    except ValueError as error:
        raise UserError(str(error)) from None


def expand_read(text: str, reading: Any) -> str:
    """`expand`, where a configuration is read: a value that was checked before is what it is. pydantic's validator."""
    return expand(text) if reading.context else text


def expand_all_read(text: str, reading: Any) -> str:
    """`expand_all`, likewise."""
    return expand_all(text) if reading.context else text


def expand_all(text: str) -> str:
    """As `expand`, for each of several paths in a list with commas and colons, as mounts are."""
    return "".join(part if part in ",:" else expand(part) for part in re.split("([,:])", text))


def protect(text: str) -> str:
    """What `expand` reads as `text`."""
    return text.replace("$", "$$")
