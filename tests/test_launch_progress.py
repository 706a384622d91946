"""The line that shows how far long work is."""

import io
import re

import pytest
from rich.console import Console

from depthmup.launch.progress import display

TEXT = "29 of 67 done, 2 running, ETA 24 min 24 s, 36 waiting (Resources: Slurm has no place yet)"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_narrow_terminal_shows_the_share_and_every_word(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, legacy_windows=False)
    with display(console, "runs") as shown:
        shown.update(0.52, TEXT)
        assert shown.progress
        shown.progress.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert " 52%" in text
    assert "━" in text
    assert set(TEXT.split()) <= set(text.split())
    assert all(len(line) <= width for line in re.split(r"[\r\n]+", text))


def test_the_share_that_is_shown_never_steps_back() -> None:
    stream = io.StringIO()
    with display(Console(file=stream), "runs") as shown:
        for share in (0.51, 0.43, 0.6):
            shown.update(share, f"really {share}", final=True)
    assert re.findall(r"\d+%", stream.getvalue()) == ["51%", "51%", "60%"]
