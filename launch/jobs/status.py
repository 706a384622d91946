"""`depthmup status`: one table, from the run directories and one call to squeue."""

import os
import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from depthmup.launch.jobs import states
from depthmup.launch.jobs.follower import format_path_command
from depthmup.launch.jobs.hold import strip_error
from depthmup.launch.jobs.reasons import explain
from depthmup.launch.jobs.states import RunState, Snapshot, State, read_last_line
from depthmup.launch.jobs.submission import read_last_command
from depthmup.launch.runs.opened import list_studies, open_planned
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import is_over_sizes
from depthmup.launch.wording import show_duration, show_power

WATCH_SECONDS = 10.0
MAX_ROWS = 40  # more of one state are counted, not listed
ORDER: tuple[State, ...] = ("failed", "stalled", "lost", "interrupted", "preempted", "running", "ending", "starting")
ORDER += ("diverged", "cancelled", "held", "waiting", "new", "pruned", "done")
FEW: dict[State, int] = {"ending": 1, "starting": 1, "waiting": 1, "held": 0, "cancelled": 1, "diverged": 0, "new": 0}
FEW |= {"pruned": 0, "done": 0}
PLAIN = ("Priority", "Resources", "None")  # reasons that need no word
HINTS = (  # what an error says -> what may help
    ("out of memory", "launch.memory_gb (host), launch.runs_per_gpu=1 or a smaller micro batch (GPU)"),
    ("attempts ended at step", "launch.timeout_min, train.checkpoint_every"),
    ("TIME LIMIT", "launch.timeout_min, launch.signal_delay_s"),
)


def find_hint(remark: str) -> str | None:
    return next((advice for words, advice in HINTS if words.lower() in remark.lower()), None)


def format_duration(seconds: float) -> str:
    """For a narrow column: '42s', '3m05' or '2h10'."""
    words = show_duration(seconds).replace(" min ", "m").replace(" h ", "h").removesuffix(" min")
    return words.replace(" s", "" if "m" in words else "s")


def format_progress(found: RunState) -> tuple[str, str, str, str]:
    """(step, loss, images per second, time left) of a run, as text."""
    last = found.run.directory.read_last_metrics()
    if last is None:
        return "", "", "", ""
    train = found.run.config.train
    rate, loss = last.get("images_per_second"), last.get("loss")
    left = (train.num_steps - last["step"]) * train.global_batch_size
    eta = format_duration(left / rate) if rate and found.state == "running" else ""
    percent = f"{100 * last['step'] / train.num_steps:.0f}%"
    return percent, f"{loss:.3g}" if loss is not None else "", f"{rate:.0f}" if rate else "", eta


def select_listed(snapshot: Snapshot, everything: bool) -> Iterable[RunState]:
    """What needs a look: all that began and is not done, and of those that wait the first of each reason."""
    seen: dict[tuple[str, str], int] = {}
    for found in sorted(snapshot.runs, key=lambda found: ORDER.index(found.state)):
        group = (found.state, strip_error(found.remark) if found.state == "waiting" else "")
        seen[group] = seen.get(group, 0) + 1
        if everything or seen[group] <= FEW.get(found.state, MAX_ROWS):
            yield found


def draw_table(snapshot: Snapshot, hyperparameter: str, everything: bool) -> Table:
    """80 columns: a row per run, and what there is to say of it in a row below."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    axes = snapshot.runs[0].run.size.axes if snapshot.runs else ()
    for heading in (
        "run",
        "",
        *axes,
        hyperparameter.split(".")[-1],
        "seed",
        "state",
        "step",
        "loss",
        "img/s",
        "left",
    ):
        right = heading not in ("run", "", "state")
        shown.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for found in select_listed(snapshot, everything):
        run = found.run
        cells = (*map(str, run.size.axes.values()), show_power(run.value), str(run.seed))
        shown.add_row(run.directory.path.name, run.parameterization[:14], *cells, found.state, *format_progress(found))
    return shown


def list_remarks(snapshot: Snapshot, everything: bool = False) -> list[str]:
    """Every different kind of thing that is said of runs that are not done, with their number. Of those that differ in
    numbers only, as in the job, one stands for all, by its name, unless `everything` is asked for; but what mends a
    stalled run is another command for each."""
    grouped: dict[tuple[str, str], list[RunState]] = {}
    told = (state for state in ORDER if state not in ("new", *states.ENDED))
    for found in snapshot.of(*told):
        if found.remark:
            what = found.remark if everything or found.state == "stalled" else strip_error(found.remark)
            grouped.setdefault((found.state, what), []).append(found)
    lines = []
    for (state, _), members in grouped.items():
        first = members[0]
        name, many = first.run.directory.path.name, f"{len(members)} runs"
        if any(found.remark != first.remark for found in members):
            many += f", as {name}"
        lines.append(f"{state}, {name if len(members) == 1 else many}: {first.remark}")
    return lines


def explain_remarks(snapshot: Snapshot) -> list[str]:
    """What Slurm's reasons mean and what to type, each once."""
    waiting = [found.remark.rsplit("), ", 1)[-1] for found in snapshot.of("waiting", "preempted") if found.task]
    reasons = [reason for reason in dict.fromkeys(waiting) if reason not in PLAIN]
    return [f"{reason}: {meaning}" for reason in reasons if (meaning := explain(reason))]


def describe_followers(snapshot: Snapshot, study: Study) -> list[str]:
    """Which job goes on with the study after its runs, or else the last words of the last one. Where the next one waits
    for its time, and for no run, these say why. One that has gone without a word, and not by the user's `cancel`, was
    ended by another, as with scancel."""
    there = {task.name for task in snapshot.continuations}
    ended = [submission for submission in snapshot.submissions if submission.goes_on and submission.name not in there]
    said = read_last_line(ended[-1].log(0)) if ended else None
    if snapshot.continuations:
        targets = {s.name: s.details.get("targets", []) for s in snapshot.submissions if s.goes_on}
        lines = [
            f"then: job {task.job_id} goes on ({task.state}, {task.reason})"
            + (f", to {', '.join(map(str, to))}" if (to := targets.get(task.name)) else "")
            for task in snapshot.continuations
        ]
        begins_later = any(task.reason == "BeginTime" for task in snapshot.continuations)
        return [*lines, f"the one before it: {said}"] if said and begins_later else lines
    if ended and (refusal := ended[-1].refused()):
        return [f"after the runs: nothing goes on by itself, that job was refused ({refusal})"]
    if said:
        return [f"after the runs: {said}"]
    ours = [submission for submission in ended if submission.owner == os.getuid()]  # others' jobs may be hidden
    if not ours or snapshot.slurm_error or read_last_command(study.file.directory)[0] == "cancel":
        return []
    gone = ours[-1]
    again = format_path_command(study, gone.details.get("targets", []), gone.details.get("after", False))
    return [f"after the runs: nothing goes on by itself, job {gone.job_id} has gone without a word: {again} --detach"]


def describe_next_command(study: Study) -> str:
    """What to type where runs are held."""
    again = study.command("launch")
    return f"held runs: mend that, then {again}; to try them as they are: {again} launch.hold_after=0"


def list_parts(snapshot: Snapshot, study: Study, everything: bool) -> list[Table | Text]:
    shown = draw_table(snapshot, study.file.study.hyperparameter, everything)
    parts: list[Table | Text] = [shown] if shown.row_count else []
    said = list_remarks(snapshot, everything)
    parts += [Text(line) for line in (said if everything else said[:MAX_ROWS])]
    parts += [Text(line) for line in explain_remarks(snapshot)]
    if snapshot.of("held"):
        parts.append(Text(describe_next_command(study)))
    parts += [Text(line) for line in describe_followers(snapshot, study)]
    if study.file.study.adaptive:
        parts.append(Text(f"round {len(study.rounds())}: {study.rounds()[-1].reason}"))
    if snapshot.slurm_error:
        parts.append(Text(f"Slurm does not answer: {snapshot.slurm_error}"))
    parts.append(Text(", ".join(f"{count} {name}" for name, count in snapshot.counts().items())))
    return parts


def take_path(study: Study) -> list[tuple[Study, Snapshot]]:
    """Where the study stands, after a search its study, and then each target that was scaled from it."""
    return [(one, states.take_snapshot(one)) for one in list_studies(study)]


def render_status(path: Sequence[tuple[Study, Snapshot]], everything: bool) -> Group:
    """The study, and under it each target, which is always shown: that is what all of it is for."""
    (study, snapshot), *targets = path
    parts = list_parts(snapshot, study, everything)
    for target, of_target in targets:
        kind = "Study" if is_over_sizes(target.file) else "Target"
        parts += [Text(f"\n{kind}: {target.file.directory}"), *list_parts(of_target, target, kind == "Target")]
    return Group(*parts)


def goes_on(snapshot: Snapshot) -> bool:
    """Whether something waits or runs, or may: Slurm did not say."""
    return bool(snapshot.slurm_error or snapshot.of(*states.ACTIVE) or snapshot.continuations)


def print_status(study: Study, console: Console, everything: bool = False) -> None:
    """A row per run that needs a look, what is said of them, and the counts; and the same of the targets. A line is
    left to the terminal to break, so that a command in it can be copied."""
    for part in render_status(take_path(study), everything).renderables:
        console.print(part, soft_wrap=isinstance(part, Text))


def watch_studies(studies: Sequence[Study], show: Callable[[Sequence[Sequence[tuple[Study, Snapshot]]]], None]) -> None:
    """Shows where the studies stand, each as `take_path` says it, again and again: a last time when nothing of them
    waits or runs, and until Ctrl-C."""
    try:
        while True:
            now = [open_planned(each.path, each.file, each.overrides) for each in studies]  # they may have grown
            paths = [take_path(study) for study in now]
            show(paths)
            if not any(goes_on(snapshot) for path in paths for _, snapshot in path):
                return
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt as told:
        raise type(told)("No longer watched; what waits or runs goes on, and the same command watches it.") from None


def watch_status(study: Study, console: Console, everything: bool = False) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        watch_studies([study], lambda paths: live.update(render_status(paths[0], everything), refresh=True))


def print_troubles(snapshot: Snapshot, console: Console) -> None:
    """Why no job has runs that are not done, and which key may help."""
    advised = set()
    for line in list_remarks(snapshot):
        if not line.startswith(states.ACTIVE):
            console.print(Text(line))
            advised.add(find_hint(line))
    for advice in sorted(filter(None, advised)):
        console.print(Text(f"may help: {advice}"))
