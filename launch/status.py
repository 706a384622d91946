"""`depthmup status`: one table from the run directories alone."""

import fcntl

from rich.console import Console
from rich.table import Table

from launch.study import PlannedRun, Study
from train.rundir import RunDirectory


def is_locked(directory: RunDirectory) -> bool:
    """Whether a process on this machine trains the run now."""
    try:
        with open(directory.lock) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def state(run: PlannedRun) -> tuple[str, str]:
    """(done, diverged, failed, running or waiting; what there is to say)."""
    if done := run.directory.done():
        return ("done", "") if done["outcome"] == "completed" else ("diverged", f"at step {done['step']}")
    if failed := run.directory.failed():
        return "failed", failed["error"].splitlines()[0]
    if is_locked(run.directory):
        return "running", ""
    return "waiting", "interrupted, will resume" if run.directory.metrics.exists() else ""


def print_status(study: Study, console: Console) -> None:
    """One line per run that is not done, and the counts."""
    counts: dict[str, int] = {}
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "", "width", "depth", study.file.study.hyperparameter, "seed", "state", "step", "loss", ""):
        table.add_column(heading)
    for run in study.runs:
        name, remark = state(run)
        counts[name] = counts.get(name, 0) + 1
        if name in ("done", "waiting") and not remark:
            continue
        last = run.directory.last_metrics() or {}
        loss = last.get("loss")
        table.add_row(
            run.directory.path.name,
            run.parameterization,
            str(run.size.width),
            str(run.size.depth),
            f"{run.value:.4g}",
            str(run.seed),
            name,
            str(last.get("step", "")),
            f"{loss:.4g}" if loss is not None else "",
            remark,
        )
    if table.row_count:
        console.print(table)
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()), highlight=False)
