"""A file system without file locks: one line that says so, whatever is asked for, and nothing is submitted."""

import subprocess
import sys
from pathlib import Path

import pytest

from train_processes import START


@pytest.fixture
def without_locks(tmp_path: Path) -> dict[str, str]:
    """An environment in which flock is not implemented, as on Lustre without -o flock."""
    source, library = tmp_path / "noflock.c", tmp_path / "noflock.so"
    source.write_text("#include <errno.h>\nint flock(int file, int how) { errno = ENOSYS; return -1; }\n")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler here")
    return {"LD_PRELOAD": str(library)}


def test_every_command_says_in_one_line_that_there_are_no_locks(
    study_file: Path, without_locks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", without_locks["LD_PRELOAD"])
    (study_file.parent / "runs" / "tiny").mkdir(parents=True)
    for command in ("launch", "cancel", "transfer"):
        said = subprocess.run(
            [sys.executable, "-c", START, command, str(study_file)], capture_output=True, text=True, check=False
        )
        assert said.returncode == 2, (command, said.stderr)
        assert len(said.stderr.splitlines()) == 1, said.stderr
        assert "has no file locks" in said.stderr
        assert "-o flock" in said.stderr
    assert not list(study_file.parent.glob("runs/tiny/*/*/done.json"))
    assert not list(study_file.parent.glob("runs/tiny/local/*"))
