"""How long work shows itself: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

PLAIN_SECONDS = 15.0  # between two plain lines


class Display:
    """Shows a share done and a line of text."""

    def __init__(self, console: Console, what: str, progress: Progress | None) -> None:
        self.console, self.what, self.progress = console, what, progress
        self.task = progress.add_task(what, total=1.0, text="") if progress else None
        self.shown_at, self.shown, self.share = -PLAIN_SECONDS, "", 0.0

    def update(self, share: float, text: str, final: bool = False) -> None:
        """`share` in [0, 1]: it never steps back, also where the whole is later found to be longer. `final` prints the
        last plain line whatever the time."""
        self.share = share = max(share, self.share)
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=share, text=text)
        elif text != self.shown and (final or time.monotonic() - self.shown_at > PLAIN_SECONDS):
            self.console.print(f"{self.what} {share:4.0%}  {text}", highlight=False)
            self.shown_at, self.shown = time.monotonic(), text


@contextmanager
def display(console: Console, what: str) -> Iterator[Display]:
    """A Display for the time of the block."""
    if not console.is_terminal:
        yield Display(console, what, None)
        return
    bar = BarColumn(24 if console.width > 110 else 12)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), bar, TextColumn("{task.percentage:3.0f}%"))
    # The only column that wraps: rich would shorten all of them alike, the share and the bar away.
    text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=False))
    with Progress(*columns, TimeElapsedColumn(), text, console=console) as progress:
        yield Display(console, what, progress)
