"""A live line for a run on a terminal; plain lines go to metrics.jsonl alone elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import RunConfig
from train.distributed import World


@contextmanager
def watch_terminal(config: RunConfig, world: World) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A function that shows a metrics line, or None where nobody watches."""
    if not world.is_main or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loss -", total=config.train.num_steps)

        def show(line: dict[str, Any]) -> None:
            mfu = f" mfu {line['mfu']:.0%}" if "mfu" in line else ""
            text = f"loss {line['loss']:.4f} lr {line['lr']:.2e} {line['images_per_second']:.0f} images/s{mfu}"
            progress.update(task, completed=line["step"], description=text)

        yield show
