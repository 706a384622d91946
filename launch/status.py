"""`depthmup status`: one table, from the run directories and one call to squeue."""

import time
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch import states
from launch.progress import duration
from launch.states import RunState, Snapshot
from launch.study import Study

WATCH_SECONDS = 10.0
MAX_ROWS = 40  # more of one state are counted, not listed
HINTS = (  # what an error says -> what may help
    ("out of memory", "launch.memory_gb (host), launch.runs_per_gpu=1 or a smaller micro batch (GPU)"),
    ("attempts ended at step", "launch.timeout_min, train.checkpoint_every"),
    ("TIME LIMIT", "launch.timeout_min, launch.signal_delay_s"),
)


def hint(remark: str) -> str | None:
    return next((advice for words, advice in HINTS if words.lower() in remark.lower()), None)


def short(seconds: float) -> str:
    return duration(seconds).replace(" min ", ":").replace(" h ", ":").replace(" min", "").removesuffix(" s")


def progress(found: RunState) -> tuple[str, str, str, str]:
    """(step, loss, images per second, time left) of a run, as text."""
    last = found.run.directory.last_metrics()
    if last is None:
        return "", "", "", ""
    train = found.run.config.train
    rate, loss = last.get("images_per_second"), last.get("loss")
    left = (train.num_steps - last["step"]) * train.global_batch_size
    eta = short(left / rate) if rate and found.state == "running" else ""
    percent = f"{100 * last['step'] / train.num_steps:.0f}%"
    return percent, f"{loss:.3g}" if loss is not None else "", f"{rate:.0f}" if rate else "", eta


def listed(snapshot: Snapshot, everything: bool) -> Iterable[RunState]:
    """What needs a look: running, failed and lost runs, and of those that wait the first of each reason."""
    seen: dict[tuple[str, str], int] = {}
    order = {
        name: place for place, name in enumerate(("failed", "lost", "running", "diverged", "waiting", "new", "done"))
    }
    for found in sorted(snapshot.runs, key=lambda found: order[found.state]):
        many = found.state in ("waiting", "new", "done", "diverged")
        kind = (found.state, found.remark if found.state == "waiting" else "")
        seen[kind] = seen.get(kind, 0) + 1
        if everything or seen[kind] <= (0 if found.state in ("done", "diverged", "new") else 1 if many else MAX_ROWS):
            yield found


def table(snapshot: Snapshot, hyperparameter: str, everything: bool) -> Table:
    """80 columns: a row per run, and what there is to say of it in a row below."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in (
        "run",
        "",
        "width",
        "depth",
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
    for found in listed(snapshot, everything):
        run = found.run
        cells = (str(run.size.width), str(run.size.depth), f"{run.value:.3g}", str(run.seed))
        shown.add_row(run.directory.path.name, run.parameterization[:14], *cells, found.state, *progress(found))
    return shown


def remarks(snapshot: Snapshot) -> list[str]:
    """Every different thing that is said of failed, lost and waiting runs, with their number."""
    grouped: dict[tuple[str, str], list[RunState]] = {}
    for found in snapshot.of("failed", "lost", "waiting"):
        if found.remark:
            grouped.setdefault((found.state, found.remark), []).append(found)
    lines = []
    for (state, remark), members in grouped.items():
        which = members[0].run.directory.path.name if len(members) == 1 else f"{len(members)} runs"
        lines.append(f"{state}, {which}: {remark}")
    return lines


def render(snapshot: Snapshot, study: Study, everything: bool) -> Group:
    shown = table(snapshot, study.file.study.hyperparameter, everything)
    parts: list[Table | Text] = [shown] if shown.row_count else []
    parts += [Text(line) for line in remarks(snapshot)[:MAX_ROWS]]
    if snapshot.slurm_error:
        parts.append(Text(f"Slurm does not answer: {snapshot.slurm_error}"))
    parts.append(Text(", ".join(f"{count} {name}" for name, count in snapshot.counts().items())))
    return Group(*parts)


def print_status(study: Study, console: Console, everything: bool = False) -> None:
    """A row per run that needs a look, what is said of them, and the counts."""
    console.print(render(states.take(study), study, everything))


def watch_status(study: Study, console: Console, everything: bool = False) -> None:
    """Shows the status again and again until nothing waits or runs."""
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            snapshot = states.take(study)
            live.update(render(snapshot, study, everything), refresh=True)
            if not snapshot.slurm_error and not snapshot.of("running", "waiting"):
                return
            time.sleep(WATCH_SECONDS)


def print_troubles(snapshot: Snapshot, console: Console) -> None:
    """Why runs failed or were lost, and which key may help."""
    advised = set()
    for line in remarks(snapshot):
        if not line.startswith("waiting"):
            console.print(Text(line))
            advised.add(hint(line))
    for advice in sorted(filter(None, advised)):
        console.print(Text(f"may help: {advice}"))
