"""depth-muP: tune a small network, train a wide and deep one with the same hyperparameters.

The packages lie in the repository's top-level folders; here are links to them, so that only `depthmup` is imported.
`depthmup.plan`, `transfer`, `status`, `report` and `figures` are the commands for notebooks (depthmup.launch.notebook).
"""

from typing import Any

FOR_NOTEBOOKS = ("plan", "transfer", "status", "report", "figures")


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: the commands' own processes need few of these modules."""
    if name not in FOR_NOTEBOOKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from depthmup.launch import notebook

    return getattr(notebook, name)
