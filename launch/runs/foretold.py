"""The forecast of a target's loss, kept beside the target's file from before it is launched until it is judged."""

import json
from dataclasses import dataclass
from pathlib import Path

from depthmup.data.files import write_atomically
from depthmup.train.reading import read_json


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """Of a target's `metric`. `low` and `high` bound it; without them `said` is why there is no number."""

    metric: str
    said: str
    low: float | None = None
    high: float | None = None

    def judge(self, seen: float) -> str:
        """'held', 'missed' or, without a number, ''."""
        if self.low is None or self.high is None:
            return ""
        return "held" if self.low <= seen <= self.high else "missed"


def forecast_file(target: Path) -> Path:
    return target.with_suffix(".forecast.json")


def read_foretold(target: Path) -> Foretold | None:
    """None where none was written. Raises UserError for a file of another shape."""
    return read_json(Foretold, forecast_file(target), missing=None)


def write_foretold(target: Path, foretold: Foretold) -> None:
    write_atomically(forecast_file(target), json.dumps(vars(foretold)).encode())
