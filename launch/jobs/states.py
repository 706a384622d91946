"""Where every run stands: its own files say what it did, one call to squeue says what waits and runs."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from depthmup.data.files import describe_full_disk
from depthmup.launch.jobs import slurm
from depthmup.launch.jobs.attempts import LOST, find_last_start, read_attempts
from depthmup.launch.jobs.slurm import QueuedTask
from depthmup.launch.jobs.stalled import describe_stall
from depthmup.launch.jobs.submission import (
    Slot,
    Submission,
    load_all,
    match_queued_runs,
    read_cancelled_runs,
    recover_ids,
    stop_causes,
)
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.launch.wording import show_duration
from depthmup.train.lock import Holder, find_holder
from depthmup.train.rundir import PRUNED

Activity = Literal["running", "stalled", "starting", "waiting", "preempted", "ending"]
State = Literal["done", "diverged", "pruned", "failed", Activity, "held", "interrupted", "cancelled", "lost", "new"]
STATES: tuple[State, ...] = get_args(State)
ACTIVE: tuple[State, ...] = get_args(Activity)
ENDED: tuple[State, ...] = ("done", "diverged", "pruned")  # each a result, of a kind
TRAINS: tuple[State, ...] = ("running", "stalled")
FREE_SLOT = "for a free slot"
LITTLE_ROOM = 1 << 20  # bytes that are left on a disk that is as good as full: less than a checkpoint
Causes = Mapping[tuple[str, int], str]  # as stop_causes gives them


@dataclass(frozen=True)
class RunState:
    """`stalled`: a process has it and gives no sign of life, or none for much too long, or is gone from a job that
    Slurm calls running; `waiting`: a job will train it; `preempted`: that job was preempted, and waits again;
    `starting`: its nodes boot, or its process runs, and has not begun it in this start; `ending`: its job or its
    process was told to stop, and is still there. No job has the others: `held` was not begun since all before it failed
    for one reason, `cancelled` was stopped by the user's last command, `interrupted` was told to stop otherwise and has
    saved, `lost` began or was submitted and ended without a word, `new` is none of these. `remark` holds why it waits,
    and how often and why it was stopped before its end."""

    run: PlannedRun
    state: State
    remark: str = ""
    task: QueuedTask | None = None


@dataclass(frozen=True)
class Snapshot:
    """The states of all runs at one moment. `slurm_error`: squeue's words when it did not answer."""

    runs: list[RunState]
    submissions: list[Submission]
    continuations: list[QueuedTask]  # jobs that go on with the study after its runs
    slots: list[Slot]  # processes that work through lists of its runs without Slurm
    slurm_error: str | None = None
    queue: Sequence[QueuedTask] = ()  # all that Slurm has of the study

    def of(self, *states: State) -> list[RunState]:
        return [run for run in self.runs if run.state in states]

    def counts(self) -> dict[State, int]:
        """Number of runs per state that occurs."""
        counted = Counter(run.state for run in self.runs)
        return {state: counted[state] for state in STATES if state in counted}


def find_state(
    run: PlannedRun,
    task: QueuedTask | None,
    slot: Holder | None,
    submitted: tuple[Submission, int] | None,
    asked: bool,
    causes: Causes,
    cancelled: bool,
    told: Collection[Holder],
) -> RunState:
    """`task`: the queued array element that has the run; `slot`: a process here that has it on its list; `submitted`:
    the last submission and element that ever had it; `asked`: whether Slurm said what has become of that; `causes`: why
    jobs ended; `cancelled`: whether the user's last command stopped it; `told`: processes that it told to stop."""
    directory = run.directory
    if ended := find_end_state(run, task):
        return ended
    event = begun[-1]["event"] if (begun := read_attempts(directory)) else None
    held = find_holder(directory.lock) if event == "started" else None
    if event == "started" and held is None and (ended := find_end_state(run, task)):
        return ended  # since we looked
    if task:
        return find_state_in_job(run, task, begun, held, causes)
    frozen_elsewhere = bool(held and held.is_frozen and not held.is_here)
    if held and (cancelled or held in told) and not held.is_frozen:
        return RunState(run, "ending", f"{held} was told to stop")
    if held and not frozen_elsewhere:
        return find_training_state(run, None, begun, held, causes)
    stops = list_interruptions(begun, causes)
    if slot:
        return RunState(run, "waiting", f"{FREE_SLOT} on {slot.host}")
    if submitted and not asked:
        return RunState(
            run, "waiting", f"perhaps in job {submitted[0].job_id or submitted[0].name}: Slurm does not say"
        )
    if cancelled:
        saved = directory.find_newest_step()
        return RunState(run, "cancelled", f"saved at step {saved}" if saved else "")
    if submitted and (reason := submitted[0].held()):
        return RunState(run, "held", reason)
    if event == "interrupted":
        return RunState(run, "interrupted", f"{count_causes(stops)}, and saved; 'transfer' or 'launch' resumes it")
    if held and frozen_elsewhere:
        return RunState(
            run, "lost", f"{held} has not moved for {show_duration(held.silent)}: another may take its place"
        )
    if event or (submitted and submitted[0].job_id):
        return RunState(run, "lost", read_last_words(submitted))
    return RunState(run, "new")


def find_end_state(run: PlannedRun, task: QueuedTask | None) -> RunState | None:
    """Of a run that has a result, or has failed."""
    if done := run.done():
        if done["outcome"] == "completed":
            return RunState(run, "done")
        if done["outcome"] == PRUNED:
            return RunState(run, "pruned", f"ended early at step {done.get('step')}")
        return RunState(run, "diverged", f"at step {done.get('step')}")
    if failed := run.failed():
        return RunState(run, "failed", failed["error"].splitlines()[0], task)
    return None


def find_state_in_job(
    run: PlannedRun, task: QueuedTask, begun: Sequence[Mapping[str, Any]], held: Holder | None, causes: Causes
) -> RunState:
    """Of a run that a job has. `begun`: its attempts; `held`: who has it, where its last attempt has not said how it
    ended. That may be one of an earlier start of the job, or of an earlier job."""
    event = begun[-1]["event"] if find_last_start(begun) == (task.element, task.restarts) else None  # of this start
    if task.runs and event == "started":
        return find_training_state(run, task, begun, held, causes)
    if task.ends or (task.runs and event in ("interrupted", LOST)):
        return RunState(run, "ending", f"{task} is ending", task)
    stops = list_interruptions(begun, causes)
    requeued = [f"requeued ({count_causes(stops)})"] if stops else []
    if task.waits:
        state: State = "preempted" if stops[-1:] == ["preempted"] else "waiting"
        return RunState(run, state, ", ".join([*requeued, task.reason]), task)
    if task.is_suspended:
        return RunState(run, "waiting", f"{task} is suspended", task)
    former = [f"waits for {held} to end"] if held and task.runs else []
    return RunState(run, "waiting", ", ".join([f"in {task}", *requeued, *former]), task)


def find_training_state(
    run: PlannedRun, task: QueuedTask | None, begun: Sequence[Mapping[str, Any]], held: Holder | None, causes: Causes
) -> RunState:
    """Of a run whose last attempt goes on, as far as one knows."""
    stops = list_interruptions(begun[:-1], causes)
    silence, is_stalled = describe_stall(run, held, task)
    again = f"began again ({count_causes(stops)})" if stops else ""
    on_cpu = "on the CPU: its job has a GPU, and torch sees none" if begun[-1].get("lacks_gpu") else ""
    said = ", ".join(filter(None, (again, on_cpu, silence)))
    return RunState(run, "stalled" if is_stalled else "running", said, task)


def list_interruptions(lines: Sequence[Mapping[str, Any]], causes: Causes) -> list[str]:
    """Why each of a run's attempts ended before the run did, the oldest first; `lines` are those of attempts.jsonl."""
    found = []
    for line, after in zip_longest(lines, lines[1:]):
        if line["event"] != "started" or (after and after["event"] not in ("started", "interrupted", LOST)):
            continue
        # A batch script that has no word for it is gone, with its node; one told to stop elsewhere than on Slurm is.
        words = {"interrupted": "stopped", LOST: "a process was lost"}
        unknown = words.get(after["event"] if after else "", "node failed or killed")
        found.append(causes.get((str(line.get("job")), line.get("restart", 0)), unknown))
    return found


def count_causes(causes: Sequence[str]) -> str:
    """'preempted twice, time limit'."""
    often = {1: "", 2: " twice"}
    return ", ".join(cause + often.get(count, f" {count} times") for cause, count in Counter(causes).items())


def read_last_words(submitted: tuple[Submission, int] | None) -> str:
    """The last line that the job printed: there slurmstepd says why it ended it. On a full disk it has printed none."""
    said = read_last_line(submitted[0].log(submitted[1])) if submitted else None
    if submitted and not said and shutil.disk_usage(submitted[0].path).free < LITTLE_ROOM:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(submitted[0].path))
        return f"its job ended without a word; {describe_full_disk(full, '')}"
    return said or "its job ended without a word"


def read_last_line(log: Path) -> str | None:
    """The last line of a job's log that says something: srun reports every step that ends."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    lines = [line for line in lines if not line.startswith("srun: ")]
    return lines[-1].removeprefix("slurmstepd: error: ").strip("* ") if lines else None


def ask_slurm(study: Study, submissions: Sequence[Submission]) -> tuple[list[QueuedTask], set[str], str | None]:
    """(what is in the queue, names of the submissions of which Slurm does not say whether they are, its words when it
    did not answer). It is asked once, if anything was ever submitted to it that may still be there."""
    if not (any(submission.goes_on for submission in submissions) or (submissions and study.pending())):
        return [], set(), None
    ids = [job_id for submission in submissions if (job_id := submission.job_id)]
    unknown = [submission.name for submission in submissions if not submission.job_id and not submission.refused()]
    try:
        queue = slurm.read_queue(ids, unknown)
        recover_ids(submissions, queue)
        there = {task.name for task in queue}
        others = {s.name for s in submissions if s.owner != os.getuid() and s.name not in there}
        return queue, others if others and slurm.has_private_jobs() else set(), None
    except slurm.SlurmError as failure:
        return [], {submission.name for submission in submissions}, str(failure)


def take_snapshot(study: Study, ended: Mapping[str, RunState] = MappingProxyType({})) -> Snapshot:
    """Reads every run's files and asks Slurm. `ended`: by name, runs whose end the caller has seen before: they are not
    looked at again."""
    root = study.file.directory
    submissions, local = load_all(root / "jobs"), load_all(root / "local")
    queue, unsaid, error = ask_slurm(study, submissions)
    tasks = match_queued_runs(submissions, queue)
    causes, stopped = stop_causes(submissions), read_cancelled_runs(root)
    everything = sorted([*submissions, *local], key=lambda submission: submission.created)
    last = {name: (s, index) for s in everything for index, names in enumerate(s.tasks) for name in names}
    listed, slots = dict[str, Holder](), list[Slot]()
    for submission in local:
        if not ended.keys() >= set(chain.from_iterable(submission.tasks)):
            slots += submission.slots()
    working = [slot for slot in slots if not slot.is_told]
    for slot in working:
        listed.update(dict.fromkeys(slot.names, slot.holder))
    told = [slot.holder for slot in slots if slot not in working]
    ours = {submission.name for submission in submissions if submission.goes_on}
    continuations = [task for task in queue if task.name in ours]
    found = []
    for run in study.runs:
        name = run.directory.path.name
        if before := ended.get(name):
            found.append(before)
            continue
        submitted = last.get(name)
        asked = not (submitted and submitted[0].name in unsaid)
        state = find_state(run, tasks.get(name), listed.get(name), submitted, asked, causes, name in stopped, told)
        found.append(state)
    return Snapshot(show_starting(found, working), submissions, continuations, slots, error, queue)


def show_starting(found: Sequence[RunState], slots: Sequence[Slot]) -> list[RunState]:
    """Of a job that runs or whose nodes boot, and of processes here, none of whose runs has begun, the first ones are
    starting."""
    busy = {state.task for state in found if state.state in TRAINS}
    idle_slots = 0 if None in busy else len(slots)
    shown = []
    for state in found:
        task = state.task
        if state.state == "waiting" and task and (task.boots or task.runs) and task not in busy:
            does = f"{task} waits for its nodes to boot" if task.boots else f"{task} has begun"
            state = replace(state, state="starting", remark=state.remark.replace(f"in {task}", does, 1))
        elif state.state == "waiting" and state.task is None and state.remark.startswith(FREE_SLOT) and idle_slots:
            idle_slots -= 1
            state = replace(state, state="starting", remark="")
        shown.append(state)
    return shown
