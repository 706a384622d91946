"""What a person sees of a run: a live line on a terminal (elsewhere metrics.jsonl alone), and its end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from depthmup.train.config import RunConfig
from depthmup.train.distributed import World
from depthmup.train.rundir import PRUNED


@contextmanager
def watch_terminal(config: RunConfig, world: World) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A function that shows a metrics line, or None where nobody watches."""
    if not world.is_main or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(8), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loss -", total=config.train.num_steps)

        def show(line: dict[str, Any]) -> None:
            mfu = f" mfu {line['mfu']:.0%}" if "mfu" in line else ""
            text = f"loss {line['loss']:.4f} lr {line['lr']:.1e} {line['images_per_second']:.0f} images/s{mfu}"
            progress.update(task, completed=line["step"], description=text)

        yield show


def summarize_run(config: RunConfig, result: dict[str, Any], directory: Path) -> str:
    """The content of done.json for a person: what came out, where it lies, and whether anything was learnt."""
    if result["outcome"] == "diverged":
        return f"diverged: the loss of step {result['step']} is not finite ({directory}); lower optimizer.lr"
    if result["outcome"] == PRUNED:
        return f"ended early by a search, after step {result['step']} ({directory})"
    losses = {key: value for key, value in result.items() if key.endswith("_loss")}
    numbers = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in losses.items()]
    numbers += [
        f"{key.replace('_', ' ')} {value:.2%}" for key, value in result.items() if key.endswith(("_top1", "_top5"))
    ]
    lines = [
        f"{result['outcome']}: {result['step']} steps, {result['samples']:,} samples; {', '.join(numbers)}",
        f"results: {directory} (done.json, metrics.jsonl, weights.safetensors)",
    ]
    chance = config.model.chance
    if losses and min(losses.values()) >= chance:
        lines.append(
            f"warning: nothing was learnt: guessing among {config.model.num_classes} classes has a loss of "
            f"{chance:.4g} too; try another optimizer.lr, or more train.samples"
        )
    return "\n".join(lines)
