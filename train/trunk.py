"""Which run a run branches off (train.branch): trunk.json in the branch's directory. Nothing here imports torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from depthmup.data.files import write_atomically
from depthmup.train.rundir import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """`run`: the name of the trunk's directory, beside the branch's; `step`: of its checkpoint."""

    run: str
    step: int
    taken: bool = False

    def checkpoint(self, branch: RunDirectory) -> Path:
        return self.directory(branch).checkpoints / f"step-{self.step}"

    def directory(self, branch: RunDirectory) -> RunDirectory:
        return RunDirectory(branch.path.parent / self.run)


def read_trunk(directory: RunDirectory) -> Trunk | None:
    """None for a run that is no branch. Raises UserError for a file that is none of these."""
    found = directory.read_marker("trunk.json", "run", "step")
    return Trunk(**found) if found else None


def write_trunk(directory: RunDirectory, trunk: Trunk) -> None:
    write_atomically(directory.path / "trunk.json", json.dumps(vars(trunk)).encode())


def waits_for_trunk(directory: RunDirectory) -> bool:
    """Whether the checkpoint that the run would take may yet come: it has to wait, or would be trained from nothing."""
    trunk = read_trunk(directory)
    if trunk is None or directory.list_checkpoint_steps() or trunk.checkpoint(directory).exists():
        return False
    other = trunk.directory(directory)
    return other.config.exists() and not other.done() and not other.failed()
