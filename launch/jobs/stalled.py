"""A run that hangs looks like one that trains: its last step and rate stay. What differs is that no news comes."""

import time
from pathlib import Path

from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.wording import show_duration
from depthmup.train.lock import Holder
from depthmup.train.rundir import RunDirectory

LINES = 20  # a run may take so many times as long as from one metrics line to the next: it evaluates and saves between
LEAST_SECONDS = 300.0
SECONDS_TO_FIRST_LINE = 1800.0  # compilation and a cold file system


def measure_seconds_without_news(directory: RunDirectory) -> float:
    """Since the run, or a process of its, wrote a metrics line, a checkpoint or the line that it has begun."""
    names = ("metrics.jsonl", "attempts.jsonl", "checkpoints")
    times = [path.stat().st_mtime for name in names if (path := Path(directory.path / name)).exists()]
    return max(0.0, time.time() - max(times, default=time.time()))


def estimate_seconds_per_line(run: PlannedRun) -> float | None:
    """From one metrics line to the next at the run's own pace, without what lies between; None before the first."""
    last, train = run.directory.read_last_metrics(), run.config.train
    rate = last.get("images_per_second") if last else None
    return train.log_every * train.global_batch_size / rate if rate else None


def measure_silence(run: PlannedRun) -> tuple[str, bool]:
    """('no news for 12 min 00 s, a metrics line takes 3 s', whether that is too long); ('', False) where there is
    nothing to say."""
    silent, line = measure_seconds_without_news(run.directory), estimate_seconds_per_line(run)
    if silent < max(3 * (line or 0), 60):
        return "", False
    if line is None:
        return f"no news for {show_duration(silent)}, since it began", silent > SECONDS_TO_FIRST_LINE
    text = f"no news for {show_duration(silent)}, a metrics line takes {show_duration(line)}"
    return text, silent > max(LINES * line, LEAST_SECONDS)


def describe_stall(run: PlannedRun, holder: Holder | None, task: QueuedTask | None) -> tuple[str, bool]:
    """What there is to say of a run that should train, and whether it is stalled; with what mends it then."""
    said, too_long = measure_silence(run)
    if task and not holder:
        said = "no process has it: it was killed, or its node has failed, and Slurm does not know yet"
        too_long = True
    if holder and holder.is_frozen:
        said = f"{holder} has not moved for {show_duration(holder.silent)}: it is stopped, or its host is"
        too_long = True
    if not too_long:
        return said, False
    if task:
        return f"{said}. To start it again from its checkpoint: scontrol requeue {task.element}", True
    on = f" on {holder.host}" if holder and holder.host else ""
    return (
        f"{said}. To start it again from its checkpoint: kill -9 {holder.pid if holder else 'PID'}{on}, then launch",
        True,
    )
