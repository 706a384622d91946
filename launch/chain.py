"""The product's main path: a study's runs -> its report -> the target's file -> the target's run -> its line there.

`transfer` walks it and waits. `advance` does what can be done now and, where runs are left, leaves a Slurm job that
does so again once their jobs have ended, so that the user may log out. That job runs `main`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.launch.config import read_study, read_study_or_run
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.submission import launching
from depthmup.launch.paths import command
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import (
    IDLE,
    UNFINISHED,
    Launched,
    Unfinished,
    grow,
    interrupted,
    launch,
    prepare_data,
    unfinished,
    wait,
)
from depthmup.launch.wording import count, duration
from depthmup.models.errors import ModelError

if TYPE_CHECKING:
    from depthmup.launch.report.collect import Report


def show_report(study: Study, console: Console) -> "Report":
    """Writes the report and prints it. Raises UserError when no run is finished."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.page import write_report
    from depthmup.launch.report.tables import print_report

    report = collect(study)
    if not report.results:
        raise UserError(f"no run of {study.path} is finished: start them with {study.command('transfer')}")
    print_report(report, console)  # first: the folder may be another user's
    write_report(report)
    console.print(f"Report: {study.file.directory / 'report.html'} (also .csv and .json)", highlight=False)
    return report


def finish(study: Study, console: Console) -> None:
    """Everything up to the last run: data, runs, and rounds of more values or seeds where a verdict needs them."""
    while study.pending() or grow_aloud(study, console):
        prepare_data(study, console)
        launched = Launched([], [], [])
        try:
            launched = launch(study)
            wait(study, launched, console)
        except KeyboardInterrupt:
            launched.stop()
            place = study.file.launch.cluster
            others = place == "slurm" or (place == "local" and not launched.slots)  # an earlier launch's
            go_on = f" Its jobs go on; to stop them: {study.command('cancel')}" if others else ""
            console.print(f"{interrupted(study)}{go_on}", highlight=False)
            sys.exit(130)


def grow_aloud(study: Study, console: Console) -> int:
    """`grow`, and says so; returns the number of runs added."""
    added, why = grow(study)
    if added:
        console.print(f"{count(added, 'run')} more: {why}", highlight=False, markup=False)
    return added


# ---------------------------------------------------------------- the target


def write_scaled(
    study: Study,
    path: Path,
    target: Path | None,
    changes: tuple[str, ...],
    console: Console,
    parameterization: str | None = None,
    scale_batch: bool = False,
    force: bool = False,
) -> None:
    """Writes the target's file and says what it holds. Raises UserError when the study is inconclusive."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.scale import read_changes, scale, write_target

    scaled = scale(collect(study), path.stem, read_changes(target, changes), parameterization, scale_batch, force)
    write_target(scaled, path)
    for fact in scaled.facts:
        console.print(fact, highlight=False)
    console.print(f"Written: {path}. Start it with: {command('launch', path)}", highlight=False)


def target_study(study: Study, target: Path, console: Console) -> Study:
    """The run over `target` with the study's hyperparameters, as a study of one run."""
    path = study.target_file
    write_scaled(study, path, target, (), console)
    return Study(path, read_study_or_run(path))


def say_next_step(study: Study, console: Console) -> None:
    """How to go on from a study that says which value to use."""
    from depthmup.launch.findings.verdict import CARRIED
    from depthmup.launch.report.collect import collect

    if any(judgement.verdict in CARRIED for judgement in collect(study).analysis.judgements):
        model = study.file.model
        size = (f"model.width={4 * model.base_width}", f"model.depth={4 * model.base_depth}")
        words = (study.file.directory, *size, f"train.samples={10 * study.file.train.samples}")
        console.print(f"Next, for a target of your size: {command('scale', *words)}", markup=False)


def transfer(study: Study, target: Path | None, console: Console) -> None:
    """Walks the whole path and waits for it. Where runs fail, writes the report of what is there all the same."""
    try:
        finish(study, console)
    except Unfinished:
        report_what_is_there(study, console)
        raise
    show_report(study, console)
    if target is None:
        say_next_step(study, console)
        return
    large = target_study(study, target, console)
    if large.pending():
        finish(large, console)
    report_target(study, console)


def report_what_is_there(study: Study, console: Console) -> None:
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.page import write_report

    if (report := collect(study)).results:
        write_report(report)
        console.print(f"Report of what is done: {study.file.directory / 'report.html'}", highlight=False)


def report_target(study: Study, console: Console) -> None:
    """Writes the report again, now with the target's line, and prints that."""
    from depthmup.launch.report.collect import collect, target_line
    from depthmup.launch.report.page import write_report

    write_report(collect(study))
    console.print(f"{target_line(study)} Report: {study.file.directory / 'report.html'}", highlight=False)


# ---------------------------------------------------------------- without waiting


def advance(study: Study, target: Path | None, console: Console, by_itself: bool = False) -> None:
    """Submits what the path needs next and a job that goes on after it, or ends the path with its report.

    `by_itself`: no user asked for it now; failed runs do not go again. Raises UserError when the path cannot go on: an
    inconclusive study, or runs that no job has and that may not go again.
    """
    current = study
    if not study.pending() and not grow_aloud(study, console):
        show_report(study, console)
        if target is None:
            say_next_step(study, console)
            return
        current = target_study(study, target, console)
        if not current.pending():
            report_target(study, console)
            return
    prepare_data(current, console)
    launched = launch(current, IDLE if by_itself else UNFINISHED, by_itself)
    if launched.job_ids:
        console.print(f"{len(launched.runs)} runs submitted: jobs {', '.join(launched.job_ids)}", highlight=False)
    job_ids = sorted({found.task.job_id for found in take(current, launched.job_ids).runs if found.task})
    if not job_ids:
        raise unfinished(current)
    console.print(go_on_after(study, target, job_ids), highlight=False)


def take(study: Study, job_ids: Sequence[str]) -> states.Snapshot:
    """The states after `job_ids` were submitted. Raises UserError when Slurm has stopped answering since."""
    snapshot = states.take(study)
    if snapshot.slurm_error:
        raise slurm.silent(snapshot.slurm_error, job_ids)
    return snapshot


def go_on_after(study: Study, target: Path | None, job_ids: Sequence[str]) -> str:
    """Leaves a job that goes on once `job_ids` have ended, unless one waits already; says which. One that runs may have
    looked already, or be this one."""
    from depthmup.launch.jobs.submit import submit_continuation

    with launching(study.file.directory) as lock:  # of two that look at once, the second finds the first's
        waiting = [task for task in take(study, job_ids).continuations if task.waits]
        try:
            job_id = waiting[0].job_id if waiting else submit_continuation(study, target, job_ids, lock)
        except slurm.Silent:
            raise
        except UserError as error:
            again = study.command("transfer", *(["--target", str(target)] if target else []))
            raise UserError(
                f"the runs wait or run as jobs {', '.join(job_ids)}, but nothing goes on after them: {error}. Once "
                f"there is place for one job more: {again} --detach; or wait for them: {again}"
            ) from None
    return f"Job {job_id} goes on after {', '.join(job_ids)}: see {study.command('status')}"


PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0  # between two tries: the first, doubled until the longest
PATIENCE_SECONDS = 1800.0  # the job's own time limit is an hour, unless launch.timeout_min is less


def patiently(step: Callable[[], None], console: Console) -> None:
    """Takes `step` again and again while Slurm does not answer, and says so each time. Raises UserError when it has not
    for PATIENCE_SECONDS."""
    pause, end = PAUSE_SECONDS, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return step()
        except slurm.Silent as error:
            left = end - time.monotonic()
            if left <= 0:
                raise UserError(f"{error} (waited {duration(PATIENCE_SECONDS)} for it)") from None
            pause = min(pause, left)
            console.print(f"{error}. Next try in {duration(pause)}", markup=False, highlight=False)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def go_on(folder: Path, target: Path | None, console: Console) -> None:
    """`advance` by itself, with what is in the study's folder now."""
    advance(Study(folder, read_study(folder)), target, console, by_itself=True)


def main() -> int:
    """One step in a Slurm job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    arguments = parser.parse_args()
    console = Console(width=120, soft_wrap=True)  # one line each: status shows the last
    try:
        patiently(lambda: go_on(arguments.study, arguments.target, console), console)
    except (UserError, ModelError) as error:
        console.print(f"Stopped: {error}", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
