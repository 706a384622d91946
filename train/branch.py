"""A run that branches off a longer one: it takes the checkpoint that its trunk has of the step where its own schedule
begins to decay, and goes on from there. Until then the two are the same run, so that nothing is trained twice, and the
branch is what it would be if it had begun from nothing: bit for bit on one process in fp32.

`trunk.json` in the branch's directory says which run and step that is, and whether the checkpoint was taken. Where the
trunk has none, as when it was trained before anyone asked for a branch, the branch begins from nothing.
"""

import json
import shutil

from depthmup.data.errors import UserError
from depthmup.train.checkpoint import find_fault, flush_to_disk
from depthmup.train.config import RunConfig
from depthmup.train.metrics import truncate_after
from depthmup.train.owner import describe_owner, list_differences
from depthmup.train.rundir import RunDirectory
from depthmup.train.trunk import Trunk, read_trunk, write_trunk

MAY_DIFFER = ("train.samples", "schedule.warmup")  # the length, and the same steps of warm-up as a share of it


def begin_branch(directory: RunDirectory, config: RunConfig) -> None:
    """Gives a branch that has not begun its trunk's checkpoint and metrics, as its own. One process calls it, while it
    holds the run's lock. Raises UserError where the trunk is another run than this one at another length."""
    trunk = read_trunk(directory)
    if trunk is None or directory.done() or directory.list_checkpoint_steps():
        return
    source = trunk.checkpoint(directory)
    if not source.exists():
        directory.add_to_log(f"trunk {trunk.run} has no checkpoint of step {trunk.step}: begins from nothing")
        return
    if fault := find_fault(source, 0, 1):
        directory.add_to_log(f"warning: {source} cannot be used ({fault.reason}): begins from nothing")
        return
    state = json.loads((source / "state.json").read_text())
    mine = describe_owner(config)
    different = [each for each in list_differences(state, config) if not each.startswith(MAY_DIFFER)]
    if different or state.get("shards") != mine["shards"]:
        reason = "; ".join(different) or "it was trained on other images"
        raise UserError(f"{directory.path}: {source} is not of the same run at another length ({reason})")
    lines = directory.path / "tmp-metrics.jsonl"
    shutil.copyfile(trunk.directory(directory).metrics, lines)
    truncate_after(lines, trunk.step)  # else the branch would seem to be beyond its own last step
    lines.rename(directory.metrics)
    temporary = directory.checkpoints / f"tmp-step-{trunk.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    content = {**state, **mine, "seconds": 0.0}  # the trunk's time is the trunk's
    (temporary / "state.json").write_text(json.dumps(content))
    for path in (*temporary.iterdir(), temporary):
        flush_to_disk(path)
    write_trunk(directory, Trunk(run=trunk.run, step=trunk.step, taken=True))
    temporary.rename(directory.checkpoints / source.name)
    flush_to_disk(directory.checkpoints)
    directory.add_to_log(f"branches off {trunk.run} after step {trunk.step}")
