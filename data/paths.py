"""Paths as people write them."""

import os
import re

from data.errors import UserError


def expand_path(path: str) -> str:
    """`path` with `~`, `~user`, `$VAR` and `${VAR}` as a shell would read them, where no shell has.

    Raises UserError for a variable that is not set and a home folder that is not known.
    """
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{path}: the environment variable {unset[0]} is not set")
    expanded = os.path.expanduser(expanded)
    if expanded.startswith("~"):
        raise UserError(f"{path}: no home folder is known for it; write the path out, as in ./{expanded} for one here")
    return expanded
