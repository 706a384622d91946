"""A study's runs are launched and waited for. Whatever is there already is used."""

import math
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.index import show_count
from depthmup.launch.jobs import slurm, states
from depthmup.launch.jobs.code_copy import copy_code
from depthmup.launch.jobs.reasons import explain
from depthmup.launch.jobs.share import Share, Start
from depthmup.launch.jobs.states import State
from depthmup.launch.jobs.status import describe_next_command
from depthmup.launch.jobs.submission import count_taken, lock_launch, note_command, read_last_command
from depthmup.launch.progress import display
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.fits import check_fits
from depthmup.launch.runs.grouping import group_packs, make_packs
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.pool import refuse_mixture
from depthmup.launch.runs.rounds import AddedRound, AddedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.written import refuse_other_study
from depthmup.launch.wording import show_duration

POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 10.0
LOOKING_SHARE = 0.05  # of a core, at most, that who waits takes to look at thousands of runs
GONE: tuple[State, ...] = ("interrupted", "lost")  # their jobs are gone, and nothing is wrong with them
IDLE: tuple[State, ...] = ("new", *GONE)
STOPPED: tuple[State, ...] = ("failed", "held", "lost", "interrupted", "cancelled")  # all that were submitted
UNFINISHED: tuple[State, ...] = ("new", *STOPPED)


@dataclass(frozen=True)
class Launched:
    """What was submitted: the runs, the ids of Slurm arrays, and the processes of slots on this machine.

    left: the number of runs that Slurm has no place for now; they are submitted as places become free, by what waits
    for the study or goes on after its jobs.
    """

    runs: list[PlannedRun]
    job_ids: list[str]
    slots: list[subprocess.Popen[bytes]]
    left: int = 0

    def describe_jobs(self) -> str:
        """'8 runs submitted: jobs 4711, 4712'."""
        rest = f"; {self.left} more when Slurm has place for them" if self.left else ""
        return f"{show_count(len(self.runs), 'run')} submitted: jobs {', '.join(self.job_ids)}{rest}"

    def stop(self) -> None:
        """Tells the slots to save and end, and waits for it; a second Ctrl-C meanwhile kills them."""
        for slot in self.slots:
            slot.terminate()
        try:
            for slot in self.slots:
                slot.wait()
        except KeyboardInterrupt:
            for slot in self.slots:
                slot.kill()


@dataclass
class Seen:
    """What a launcher has read of the runs that have ended, which it does not read again: a search waits for a batch
    after the other. ended, seconds, starts: by name, as `take_snapshot` and `Share` take them."""

    ended: dict[str, states.RunState] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)


def launch(
    study: Study, only: Sequence[State] = UNFINISHED, by_itself: bool = False, seen: Seen | None = None
) -> Launched:
    """Writes the study, which `prepare_data` has checked, and submits every run whose state is in `only`, the costliest
    first. Failed runs go again.

    What waits or runs already is left alone, also when an earlier launcher was killed. `by_itself`: no user asked for
    it now, so that only those of `select_resubmittable` go. Where Slurm has no place for all, it submits the costliest
    and the result says how many are left. Raises UserError, and has then submitted nothing, and
    KeyboardInterrupt with the line to say when what trains in this process was stopped.
    """
    config = study.file.launch
    refuse_other_study(study.file)
    with lock_launch(study.file.directory) as lock:
        snapshot = states.take_snapshot(study, seen.ended if seen else {})
        if snapshot.slurm_error:
            raise slurm.Silent(f"Slurm does not answer: {snapshot.slurm_error}. Nothing was submitted")
        if not by_itself:
            note_command(study.file.directory, "launch")
        runs = select_resubmittable(study, snapshot, only) if by_itself else [found.run for found in snapshot.of(*only)]
        if not runs:
            return Launched([], [], [])
        refuse_mixture(study, starting=True)
        flops = count_flops(study.runs)
        runs.sort(key=lambda run: -flops[run.size][1])
        from depthmup.launch.jobs.submit import run_here, submit_local

        packs = make_packs(runs, config)
        if config.cluster == "slurm":
            return launch_wave(study, packs, snapshot, lock)
        study.write()
        forget_failures(runs)
        if config.cluster == "local":
            return Launched(runs, [], submit_local(packs, config, study.file.directory / "local"))
    try:
        run_here(packs, config, study.file.directory / "local")
    except KeyboardInterrupt as told:
        raise type(told)(describe_interrupted(study)) from None
    return Launched(runs, [], [])


def launch_wave(study: Study, packs: Sequence[Sequence[PlannedRun]], snapshot: states.Snapshot, lock: int) -> Launched:
    """Submits to Slurm as many of `packs` as it has place for, to a factor of 2, the first ones first. Raises as
    `launch_arrays` does, Full only where nothing of the study waits or runs."""
    try:
        limit = slurm.ask_max_array_size()  # first: without Slurm nothing is written
    except slurm.SlurmError as error:
        raise slurm.Silent(f"Slurm does not answer: {error}. Nothing was submitted") from None
    from depthmup.launch.jobs.submit import deal_tasks

    study.write()
    code = copy_code(study.file.directory / "code")
    by_name = {run.directory.path.name: run for pack in packs for run in pack}
    tasks = group_packs(packs, study.file.launch.runs_per_job)
    taken, size = len(tasks), limit
    while True:
        arrays = deal_tasks(tasks[:taken], size)
        runs = [by_name[name] for task in tasks[:taken] for name in task]
        left = len(by_name) - len(runs)
        try:
            return Launched(runs, launch_arrays(study, arrays, runs, code, snapshot, lock), [], left)
        except slurm.Full as full:
            if taken > 1:
                taken = full.fits or len(arrays[0])
                # In two arrays: when the first has ended, what goes on after it refills the queue.
                size = min(limit, math.ceil(taken / 2))
            elif snapshot.of(*states.ACTIVE):
                return Launched([], [], [], len(by_name))
            else:
                raise


def launch_arrays(
    study: Study,
    arrays: Sequence[list[list[str]]],
    runs: Sequence[PlannedRun],
    code: Path,
    snapshot: states.Snapshot,
    lock: int,
) -> list[str]:
    """Submits `arrays`, whose tasks are `runs`, to Slurm; returns the job ids. Raises UserError when Slurm refuses, and
    leaves nothing behind, or when it stops answering, and then leaves what it has taken, to be found by the next
    launch."""
    from depthmup.launch.jobs.submit import prepare_arrays, submit_arrays, take_turns

    root, config = study.file.directory, study.file.launch
    name = f"depthmup-{study.file.study.name}"
    tasks = [task for array in arrays for task in array]
    turns = take_turns(len(arrays), len(tasks), config.max_running, *count_taken(snapshot.submissions, snapshot.queue))
    submissions = prepare_arrays(arrays, turns, config, root / "jobs", name, code)
    forgotten = forget_failures(runs)
    try:
        submit_arrays(submissions, turns, config, lock)
    except UserError:
        for submission in submissions:
            shutil.rmtree(submission.path)
        for path, content in forgotten.items():
            write_atomically(path, content)
        raise
    except slurm.SlurmError as error:
        taken = [submission for submission in submissions if submission.job_id]
        count = sum(len(names) for submission in taken for names in submission.tasks)
        jobs = f" as jobs {', '.join(str(submission.job_id) for submission in taken)}" if taken else ""
        raise slurm.Silent(
            f"Slurm stopped answering: {error}. {count} of {len(runs)} runs were submitted{jobs}, of the "
            "others perhaps some. Give the same command again once it answers: it submits those that are left"
        ) from None
    return [submission.job_id or "" for submission in submissions]


def forget_failures(runs: Sequence[PlannedRun]) -> dict[Path, bytes]:
    """Removes the failed markers of `runs`, so that they go again; returns what they held."""
    paths = (run.directory.path / "failed.json" for run in runs)
    held = {path: path.read_bytes() for path in paths if path.exists()}
    for path in held:
        path.unlink()
    return held


def select_resubmittable(study: Study, snapshot: states.Snapshot, only: Sequence[State]) -> list[PlannedRun]:
    """The runs in one of the states `only` that may be submitted while the user is away: none after a cancel, and none
    that was submitted `launch.max_attempts` times since the user's last command."""
    command, since = read_last_command(study.file.directory)
    if command == "cancel":
        return []
    recent = (submission for submission in snapshot.submissions if submission.created >= since and submission.job_id)
    counts = Counter(name for submission in recent for names in submission.tasks for name in names)
    runs = [found.run for found in snapshot.of(*only)]
    return [run for run in runs if counts[run.directory.path.name] < study.file.launch.max_attempts]


def wait(study: Study, launched: Launched, console: Console, seen: Seen | None = None) -> None:
    """Shows progress until nothing waits or runs. On Slurm, runs whose job ended without a word are submitted again,
    and those that it had no place for when half of the jobs have ended that took the places. Where others fill the
    places by then, or Slurm does not answer, it says so and waits.

    `seen`: of earlier waits. Raises UserError when runs are left over.
    """
    on_slurm = study.file.launch.cluster == "slurm"
    places: int | None = None  # that the study has, where Slurm has no place for more of its runs
    flops = {size: float(each) for size, (_, each) in count_flops(study.runs).items()}
    seen = seen or Seen()
    settings = study.file.train.num_steps, study.file.launch.tasks, study.runs_to_come
    shares = Share(flops, *settings, seen.seconds, seen.starts)
    started, at_start = time.monotonic(), None
    with display(console, "runs") as shown:
        while True:
            looked = time.process_time()
            ended = all(slot.poll() is not None for slot in launched.slots)  # asked before the markers are read
            snapshot = states.take_snapshot(study, seen.ended)
            seen.ended = {found.run.directory.path.name: found for found in snapshot.of(*states.ENDED)}
            ended = ended and not snapshot.slurm_error and not snapshot.of(*states.ACTIVE)
            at_start = shares.look(snapshot) if at_start is None else at_start
            share, before = shares.measure(snapshot, at_start)
            gained, elapsed = share - before, time.monotonic() - started
            left_seconds = elapsed * (1 - share) / gained if gained > 0.01 else None
            text = describe_progress(snapshot, len(study.runs) + shares.to_come, left_seconds)
            active = len(snapshot.of(*states.ACTIVE))
            if launched.left and places is None:
                places = active
            if on_slurm and not snapshot.slurm_error and (places is None or 2 * active <= places):
                try:
                    again = resubmit(study, snapshot, IDLE if places else GONE)
                except (slurm.Full, slurm.Silent) as error:
                    text += f", {error}"
                    ended = False
                else:
                    places = active + len(again.runs) if again.left else None
                    if again.runs:
                        launched = again
                        continue
            shown.update(share, text, final=ended)
            if ended:
                break
            pause = (time.process_time() - looked) * (1 / LOOKING_SHARE - 1)
            time.sleep(max(pause, SLURM_POLL_SECONDS if on_slurm else POLL_SECONDS))
    if len(seen.ended) < len(study.runs):
        raise count_unfinished(study)


def describe_interrupted(study: Study) -> str:
    """What to say after Ctrl-C: where the runs stand, and how to go on."""
    left = study.pending()
    saved = [
        f"{run.directory.path.name} saved at step {step}" for run in left if (step := run.directory.find_newest_step())
    ]
    shown = saved if len(saved) <= 2 else [f"{len(saved)} others saved"]
    stand = ", ".join([f"{len(study.runs) - len(left)} of {len(study.runs)} runs are done", *shown])
    return f"Interrupted: {stand}; the same command continues."


class Unfinished(UserError):
    """Runs are left over that no process has."""


def count_unfinished(study: Study) -> Unfinished:
    """How many runs are left over, what the first of them says, and what to type."""
    left = [found for found in states.take_snapshot(study).runs if found.state not in states.ENDED]
    number = f"{len(left)} of {len(study.runs)} runs"
    if read_last_command(study.file.directory)[0] == "cancel":
        return Unfinished(f"cancelled: {number} are left. Run the same command to resume them")
    if held := [found for found in left if found.state == "held"]:
        return Unfinished(
            f"{number} did not finish, {len(held)} are held: {held[0].remark}; {describe_next_command(study)}"
        )
    return Unfinished(
        f"{number} did not finish ({left[0].run.directory.path}: {left[0].remark or left[0].state}). "
        "Run the same command again to resume them"
    )


def describe_progress(snapshot: states.Snapshot, of_all: int, left_seconds: float | None) -> str:
    """'3 of 12 done, 2 running, ETA 5 min 10 s, 1 failed, 6 waiting (Priority)'."""
    counts = snapshot.counts()
    text = f"{len(snapshot.of(*states.ENDED))} of {of_all} done, {counts.get('running', 0)} running"
    text += "" if left_seconds is None else f", ETA {show_duration(left_seconds)}"
    shown = ("stalled", "starting", "ending", "failed", "held")
    text += "".join(f", {counts[state]} {state}" for state in shown if state in counts)
    return text + describe_waiting(snapshot) + (", Slurm does not answer" if snapshot.slurm_error else "")


def describe_waiting(snapshot: states.Snapshot) -> str:
    """', 12 waiting (Priority)': with the commonest reason, and what it means; ', 12 waiting for a free slot' here."""
    waiting = Counter(found.remark for found in snapshot.of("waiting", "preempted"))
    if not waiting:
        return ""
    reason = waiting.most_common(1)[0][0]
    if reason == "None":  # Slurm has not looked yet
        return f", {waiting.total()} waiting"
    if reason.startswith(states.FREE_SLOT):
        return f", {waiting.total()} waiting {states.FREE_SLOT}"
    meaning = explain(reason)
    return f", {waiting.total()} waiting ({reason}{f': {meaning}' if meaning else ''})"


def resubmit(study: Study, snapshot: states.Snapshot, only: Sequence[State]) -> Launched:
    """Submits runs in one of the states `only`, where they may go by themselves."""
    if not select_resubmittable(study, snapshot, only):
        return Launched([], [], [])
    return launch(study, only, by_itself=True)


def grow(study: Study) -> tuple[int, str]:
    """(number of new runs, why): of a search its next batch; the next round of an adaptive design; of a grid two values
    for every curve whose optimum is on its edge, and where there is none, a seed where a verdict hangs on the noise."""
    if isinstance(study, JointStudy):
        if not study.runs:
            check_fits(study)  # before a space is written down of which some values cannot run
        return study.plan_next_batch()
    from depthmup.launch.findings.verdict import find_wanted_seeds
    from depthmup.launch.report.collect import collect

    report = collect(study)
    if study.file.study.adaptive:
        wanted = report.next_round
        if not wanted.points:
            return 0, wanted.reason
        value_of = study.file.study.on_lattice
        runs = [
            AddedRun(parameterization=p.parameterization, **p.size.axes, value=value_of(p.x), seed=p.seed)
            for p in wanted.points
        ]
        return study.add_round(AddedRound(reason=wanted.reason, runs=runs)), wanted.reason
    edges = {(c.parameterization, c.size): c.optimum.censored for c in report.analysis.curves if c.optimum.censored}
    if added := study.grow(edges):
        return added, "the best is on the edge of the grid (study.extend)"
    wanted_seeds = find_wanted_seeds(report.analysis, study.file.study.value_at)
    return study.add_seeds(wanted_seeds), "noise decides (study.more_seeds)"
