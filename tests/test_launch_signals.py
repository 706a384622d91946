"""Ctrl-C, a closed terminal and SIGTERM end a command with one line that says how to go on, and with the signal's
code."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from depthmup.launch import chain, check
from depthmup.launch.cli import main
from depthmup.launch.jobs import status
from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study
from depthmup.launch.transfer import Launched
from depthmup.train.interrupt import HungUp, Interrupt, ended_as_by_ctrl_c

SIGNALS = {signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def obeyed() -> Iterator[None]:
    """As in a shell's foreground: in the background, or under nohup, some of them are ignored from the start."""
    default = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in default.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A command's code, and its one line on standard error."""

    def run(*command: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["depthmup", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert isinstance(ended.value.code, int)
        return ended.value.code, line

    return run


def sender(number: signal.Signals) -> Callable[..., NoReturn]:
    """What stands for a command's long work, in which this process gets a signal."""

    def work(*arguments: Any, **options: Any) -> NoReturn:
        os.kill(os.getpid(), number)
        raise AssertionError("it did not end")

    return work


@pytest.mark.parametrize("number", SIGNALS)
def test_work_of_which_nothing_is_kept_ends_with_one_line_and_leaves_no_file(
    study_file: Path, number: signal.Signals, said: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(check, "check", sender(number))
    code, line = said("check", study_file, "--factors", "1,2")
    assert (code, line) == (SIGNALS[number], "Interrupted; the same command does what is left.")
    assert not list(study_file.parent.glob("runs/**/*.png"))
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("number", SIGNALS)
def test_who_no_longer_watches_is_told_that_the_runs_go_on(
    study_file: Path,
    command: str,
    number: signal.Signals,
    said: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "goes_on", lambda snapshot: True)
    monkeypatch.setattr(status.time, "sleep", sender(number))
    code, line = said(command, study_file, "--watch")
    assert code == SIGNALS[number]
    assert line == "No longer watched; what waits or runs goes on, and the same command watches it."


@pytest.mark.parametrize("number", SIGNALS)
def test_a_study_stops_the_processes_that_it_started_and_says_where_the_runs_stand(
    study_file: Path, number: signal.Signals, said: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    study = Study(study_file, read_study(study_file))
    monkeypatch.setattr(chain, "launch", lambda study, **_: Launched(study.runs, [], [slot]))
    monkeypatch.setattr(chain, "wait", sender(number))
    code, line = said("transfer", study_file)
    assert code == SIGNALS[number]
    assert line == f"Interrupted: 0 of {len(study.runs)} runs are done; the same command continues."
    assert slot.poll() == -signal.SIGTERM


def test_nohup_keeps_what_it_is_for() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ended_as_by_ctrl_c(), Interrupt.on_signals() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_run_saves_when_its_terminal_is_closed_and_a_shell_may_say_so_twice() -> None:
    with ended_as_by_ctrl_c():
        with Interrupt.on_signals(signal.SIGINT) as interrupt:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested
        with pytest.raises(HungUp):
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # the second one does not end what is being stopped


IN_A_TERMINAL = """
import pathlib, sys, time
from depthmup.train.interrupt import Interrupt, ended_as_by_ctrl_c
try:
    with ended_as_by_ctrl_c():
        if sys.argv[1] == "runs":
            with Interrupt.on_signals() as interrupt:
                print("ready", flush=True)
                while not interrupt.requested:
                    time.sleep(0.01)
        else:
            print("ready", flush=True)
            time.sleep(60)
except KeyboardInterrupt:
    pass
print("saved", flush=True)
pathlib.Path(sys.argv[2]).touch()
"""


@pytest.mark.parametrize("what", ["runs", "waits"])
def test_what_is_said_after_the_terminal_is_closed_does_not_end_what_is_to_be_saved(what: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-c", IN_A_TERMINAL, what, str(saved)])
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended) == 0, said
    assert saved.exists()
