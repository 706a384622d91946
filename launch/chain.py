"""The product's main path: a study's runs -> its report -> the target's file -> the target's run -> its line there.

`transfer` walks it and waits. `advance_study` does what can be done now and, where runs are left, leaves a Slurm job
that does so again once their jobs have ended, so that the user may log out. That job runs `main`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.index import show_count
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.follower import Postponed, submit_follower
from depthmup.launch.jobs.submission import read_last_command
from depthmup.launch.paths import quote_command
from depthmup.launch.prepare import prepare_data
from depthmup.launch.reading import read_study, read_study_or_run
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.opened import open_planned
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import (
    IDLE,
    UNFINISHED,
    Launched,
    Seen,
    Unfinished,
    count_unfinished,
    describe_interrupted,
    grow,
    launch,
    wait,
)
from depthmup.launch.wording import show_duration
from depthmup.models.errors import ModelError

if TYPE_CHECKING:
    from depthmup.launch.report.collect import Report


def show_report(study: Study, console: Console, out: Path | None = None) -> "Report":
    """Prints the report, and writes it into the study's folder, or that of its name in `out`. Raises UserError when no
    run is finished."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.page import write_report
    from depthmup.launch.report.place import open_results
    from depthmup.launch.report.record import make_page_record
    from depthmup.launch.report.tables import print_report

    report = collect(study)
    if not report.results:
        raise UserError(f"no run of {study.path} is finished: start them with {study.command('transfer')}")
    record = make_page_record(report)
    print_report(record, console)  # first: the folder may be another user's
    with open_results(study, out) as root:
        write_report(report, record, root)
    console.print(f"Report: {root / 'report.html'} (also .csv and .json)", highlight=False)
    track = study.file.track
    if track.wandb != "off" or track.tensorboard:
        from depthmup.launch.report.tracked import log_study  # torch, for TensorBoard, which takes seconds

        def warn(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        log_study(track, record, root, warn)
    return report


def run_search(study: JointStudy, console: Console) -> Study | None:
    """Trains all runs of a search or a verification, waits for them, and shows what they say, as `show_joint`."""
    from depthmup.launch.report.joint import show_joint

    finish_study(study, console)
    return show_joint(study, console)


def watch_report(studies: list[Study], console: Console, out: Path | None) -> None:
    """Writes the reports again and again until nothing of the studies waits or runs, or Ctrl-C; where `show_report`
    does."""
    from depthmup.launch.jobs.status import WATCH_SECONDS, watch_studies

    def show(paths: Sequence[Sequence[tuple[Study, states.Snapshot]]]) -> None:
        for (study, snapshot), *_ in paths:
            write_what_is_there(study, out, round(WATCH_SECONDS))
            done = len(snapshot.of(*states.ENDED))
            console.print(f"{study.file.study.name}: {done} of {len(study.runs)} runs are done", highlight=False)

    watch_studies(studies, show)


def write_what_is_there(study: Study, out: Path | None = None, reload_seconds: int | None = None) -> bool:
    """Writes the report of the runs that are done where `show_report` does, and returns whether there are any.
    `reload_seconds`: as `write_report` takes it."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.report.page import write_report
    from depthmup.launch.report.place import open_results
    from depthmup.launch.report.record import make_page_record

    report = collect(study)
    if report.results:
        with open_results(study, out) as root:
            write_report(report, make_page_record(report), root, reload_seconds)
    return bool(report.results)


def finish_study(study: Study, console: Console, begun: bool = False) -> None:
    """Everything up to the last run: data, runs, and rounds of more values or seeds where a verdict needs them. After
    the first of them, and so after a cancel meanwhile, none begins that no user asked for.

    `begun`: the path has, before this study. Then, as after the first launch, nobody looks any more: where Slurm has no
    place, or does not answer, it says so and waits.
    """
    if study.file.study.adaptive and study.pending():
        console.print(describe_round(study), highlight=False, markup=False)
    later, seen = False, Seen()
    while study.pending() or grow_and_print(study, console):
        prepare_data(study, console)
        launched = Launched([], [], [])
        try:
            if later:
                launched = repeat_while_silent(lambda: launch(study, IDLE, by_itself=True, seen=seen), console)
            elif begun:
                launched = repeat_while_silent(lambda: launch(study, seen=seen), console)
            else:
                launched = launch(study, seen=seen)
            later = True
            wait(study, launched, console, seen)
        except KeyboardInterrupt as told:
            launched.stop()
            place = study.file.launch.cluster
            others = place == "slurm" or (place == "local" and not launched.slots)  # an earlier launch's
            go_on = f" Its jobs go on; to stop them: {study.command('cancel')}" if others else ""
            raise type(told)(f"{describe_interrupted(study)}{go_on}") from None


def describe_round(study: Study) -> str:
    """What the present round of an adaptive design settles, and by how many runs."""
    rounds = study.rounds()
    return f"Round {len(rounds)}: {show_count(len(study.pending()), 'run')} for: {rounds[-1].reason}"


def grow_and_print(study: Study, console: Console) -> int:
    """`grow`, and says so; returns the number of runs added."""
    added, why = grow(study)
    if added:
        line = describe_round(study) if study.file.study.adaptive else f"{show_count(added, 'run')} more: {why}"
        console.print(line, highlight=False, markup=False)
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
    """Writes the target's file and says what it holds. Raises UserError when the study is inconclusive, with what to
    type where its value is to be used all the same."""
    from depthmup.launch.report.collect import collect
    from depthmup.launch.scale import Doubtful, read_changes, scale, write_forecast, write_target

    try:
        scaled = scale(collect(study), path.stem, read_changes(target, changes), parameterization, scale_batch, force)
    except Doubtful as error:
        words = [*changes, *(["--target", str(target)] if target else [])]
        words += [] if path == study.target_file else ["--out", str(path)]
        words += ["--parameterization", parameterization] if parameterization else []
        words += ["--scale-batch"] if scale_batch else []
        forced = study.command("scale", *words, "--force")
        raise UserError(f"{error}. To use its value all the same: {forced}, then 'launch' of that file") from None
    write_target(scaled, path)
    write_forecast(scaled, path)
    for fact in scaled.facts:
        console.print(fact, highlight=False)
    console.print(f"Written: {path}. Start it with: {quote_command('launch', path)}", highlight=False, soft_wrap=True)


def make_target_studies(study: Study, targets: Sequence[Path], console: Console) -> list[Study]:
    """The run over each of `targets` with the study's hyperparameters, as a study of one run."""
    paths = study.target_files(targets)
    for path, target in zip(paths, targets, strict=True):
        write_scaled(study, path, target, (), console)
    return [Study(path, read_study_or_run(path)) for path in paths]


def say_next_step(report: "Report", console: Console) -> None:
    """How to go on from a study that says which value to use."""
    from depthmup.launch.findings.verdict import CARRIED

    if any(judgement.verdict in CARRIED for judgement in report.analysis.judgements):
        file = report.study.file
        size = (f"model.width={4 * file.model.base_width}", f"model.depth={4 * file.model.base_depth}")
        words = (file.directory, *size, f"train.samples={10 * file.train.samples}")
        console.print(
            f"Next, for a target of your size: {quote_command('scale', *words)}", markup=False, soft_wrap=True
        )


def transfer(study: Study, targets: Sequence[Path], console: Console) -> None:
    """Walks the whole path and waits for it. Where runs fail, writes the report of what is there all the same."""
    from depthmup.launch.report.collect import check_swept

    check_swept(study)
    before = read_last_command(study.file.directory)
    try:
        finish_study(study, console)
    except Unfinished:
        if write_what_is_there(study):
            console.print(f"Report of what is done: {study.file.directory / 'report.html'}", highlight=False)
        raise
    report = show_report(study, console)
    if not targets:
        say_next_step(report, console)
        return
    now = read_last_command(study.file.directory)
    if now != before and now[0] == "cancel":
        raise UserError("cancelled before the target began: the same command continues")
    for large in make_target_studies(study, targets, console):
        if large.pending():
            finish_study(large, console, begun=True)
    report_target(study, console)


def report_target(study: Study, console: Console) -> None:
    """Writes the report again, now with the target's line, and prints that."""
    from depthmup.launch.report.collect import describe_targets

    write_what_is_there(study)
    console.print(f"{describe_targets(study)} Report: {study.file.directory / 'report.html'}", highlight=False)


# ---------------------------------------------------------------- without waiting


def advance_study(
    study: Study, targets: Sequence[Path], console: Console, by_itself: bool = False, after: bool = False
) -> None:
    """Submits what the path needs next and a job that goes on after it, or ends the path with its report.

    `by_itself`: no user asked for it now; failed runs do not go again. `after`: goes on from a search to its study.
    Raises UserError when the path cannot go on: an inconclusive study, or runs that no job has and that may not go
    again.
    """
    current = [study]
    if not study.pending() and not grow_and_print(study, console):
        if isinstance(study, JointStudy):
            from depthmup.launch.report.joint import show_joint

            tuned = show_joint(study, console)
            if after and tuned:
                advance_study(tuned, targets, console, by_itself)
            return
        report = show_report(study, console)
        if not targets:
            say_next_step(report, console)
            return
        current = [large for large in make_target_studies(study, targets, console) if large.pending()]
        if not current:
            report_target(study, console)
            return
    for one in current:
        prepare_data(one, console)
    with submit_follower(study, targets, after, by_itself) as (job_id, attach):
        job_ids: set[str] = set()
        for one in current:
            launched = launch(one, IDLE if by_itself else UNFINISHED, by_itself)
            if launched.job_ids:
                console.print(launched.describe_jobs(), highlight=False)
            queued = sorted(
                {found.task.job_id for found in take_after_submission(one, launched.job_ids).runs if found.task},
                key=int,
            )
            job_ids |= set(queued[: math.ceil(len(queued) / 2)] if launched.left else queued)
        if not job_ids:
            raise count_unfinished(current[0])
        attach(sorted(job_ids))
    then = f"Job {job_id} goes on after {', '.join(sorted(job_ids))}"
    console.print(f"{then}: see {study.command('status', '--watch')}", highlight=False, soft_wrap=True)


def take_after_submission(study: Study, job_ids: Sequence[str]) -> states.Snapshot:
    """The states after `job_ids` were submitted. Raises UserError when Slurm has stopped answering since."""
    snapshot = states.take_snapshot(study)
    if snapshot.slurm_error:
        raise slurm.describe_silence(snapshot.slurm_error, job_ids)
    return snapshot


PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0  # between two tries: the first, doubled until the longest
PATIENCE_SECONDS = 1800.0  # the job's own time limit is an hour, unless launch.timeout_min is less
Value = TypeVar("Value")


def repeat_while_silent(step: Callable[[], Value], console: Console, patience: float = math.inf) -> Value:
    """What `step` returns, taken again and again while Slurm does not answer, or has no place for one job more; says so
    each time. Raises UserError when that lasts for `patience` seconds."""
    pause, end = PAUSE_SECONDS, time.monotonic() + patience
    while True:
        try:
            return step()
        except (slurm.Silent, slurm.Full) as error:
            left = end - time.monotonic()
            if left <= 0:
                raise UserError(f"{error} (waited {show_duration(patience)} for it)") from None
            pause = min(pause, left)
            console.print(f"{error}. Next try in {show_duration(pause)}", markup=False, highlight=False)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def continue_path(folder: Path, targets: Sequence[Path], after: bool, console: Console) -> None:
    """`advance_study` by itself, with what is in the study's folder now."""
    advance_study(open_planned(folder, read_study(folder)), targets, console, by_itself=True, after=after)


def main() -> int:
    """One step in a Slurm job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("targets", type=Path, nargs="*")
    parser.add_argument("--after", action="store_true", help="from a search go on to its study")
    arguments = parser.parse_args()
    console = Console(width=120, soft_wrap=True)  # one line each: status shows the last
    try:
        repeat_while_silent(
            lambda: continue_path(arguments.study, arguments.targets, arguments.after, console),
            console,
            PATIENCE_SECONDS,
        )
    except Postponed as error:
        console.print(str(error), markup=False, highlight=False)
    except (UserError, ModelError) as error:
        console.print(f"Stopped: {error}", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
