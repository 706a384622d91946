"""A sweep whose first runs all fail for one reason is held: its other runs would fail for it, too."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from depthmup.data.files import write_atomically
from depthmup.launch.jobs.submission import Submission
from depthmup.train.rundir import RunDirectory


def strip_error(error: str) -> str:
    """The error without what differs from run to run: numbers and hashes."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+", "#", error)


def count_steps_made(directory: RunDirectory) -> int:
    last = directory.read_last_metrics()
    return max(last["step"] if last else 0, directory.find_newest_step())


@dataclass(frozen=True)
class Hold:
    """Looks at all runs of one submission: `after` of them that failed for one reason, with none that ended otherwise
    and none that is further than they came, hold the rest. `after` 0 holds nothing."""

    submission: Submission
    directories: Sequence[RunDirectory]
    after: int

    def reason(self) -> str | None:
        """Why runs that have not begun are held; None where they are not. Notes it for `status` the first time."""
        if not self.after:
            return None
        if reason := self.submission.held():
            return reason
        if (reason := self.find_common_failure()) is None:
            return None
        write_atomically(self.submission.held_file, json.dumps({"reason": reason}).encode())
        print(f"held: {reason}", flush=True)
        return reason

    def find_common_failure(self) -> str | None:
        errors, furthest = [], 0
        pending = []
        for directory in self.directories:
            if directory.done():
                return None
            if failed := directory.failed():
                errors.append(failed["error"])
                furthest = max(furthest, count_steps_made(directory))
            else:
                pending.append(directory)
        if len(errors) < self.after or len(set(map(strip_error, errors))) > 1:
            return None
        if any(count_steps_made(directory) > furthest for directory in pending):
            return None
        return f"{len(errors)} runs failed for one reason, and none succeeded: {errors[0].splitlines()[0]}"

    def select_startable(self, directories: Sequence[RunDirectory]) -> list[RunDirectory]:
        """Those of `directories` that are not held: what has saved a step goes on."""
        if not self.reason():
            return list(directories)
        return [directory for directory in directories if directory.list_checkpoint_steps()]
