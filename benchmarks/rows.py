"""Rows of a table of measurements that earlier calls have begun: what a time that was up leaves to be measured."""

from collections.abc import Sequence
from pathlib import Path

BEGUN, FAILED = "begun", "failed:"


def find_unmeasured(labels: Sequence[str], log: Path | None) -> list[str]:
    """The labels of which no line of `log` has figures. Those that were begun before come last: one may take more than
    the time that there is, or hang."""
    lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
    said = {label: [line[len(label) :].strip() for line in lines if line.startswith(f"{label} ")] for label in labels}
    left = [name for name in labels if not any(rest and not rest.startswith((BEGUN, FAILED)) for rest in said[name])]
    return sorted(left, key=lambda name: len(said[name]))


def describe_failure(error: Exception) -> str:
    """What stands in the place of figures."""
    return f"{FAILED} {type(error).__name__}: {' '.join(str(error).split())[:160]}"
