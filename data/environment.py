"""What the user's environment says of remote data. Read when it is needed: a mistake in it is said by who needs it."""

import math
import os
import tempfile
from functools import cached_property
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path


def read_number(name: str, otherwise: float) -> float:
    """The variable `name`, a number above 0; `otherwise` where it is not set. Raises UserError."""
    given = os.environ.get(name)
    try:
        number = float(given) if given else otherwise
    except ValueError:
        number = math.nan
    if not number > 0:
        raise UserError(f"{name}={given}: expected a number above 0, as in {name}={otherwise:g}")
    return number


class Environment:
    """Each value is read once. Reading raises UserError where it is none."""

    @cached_property
    def timeout(self) -> float:
        """Seconds for one request."""
        return read_number("DEPTHMUP_TIMEOUT", 60)

    @cached_property
    def cache(self) -> Path:
        """The folder of cached blocks."""
        given = os.environ.get("DEPTHMUP_CACHE")
        return Path(expand_path(given or f"{tempfile.gettempdir()}/depthmup-cache-{os.getuid()}"))

    @cached_property
    def cache_bytes(self) -> float:
        """Bytes that the cache may hold."""
        return read_number("DEPTHMUP_CACHE_GB", 50) * 1e9


environment = Environment()
