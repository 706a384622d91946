"""Being asked to stop: a signal sets a flag, and the loop looks at the flag between two steps. No torch here."""

import io
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # Slurm's warning before the time limit, and preemption
AGAIN_SECONDS = 0.01


def prepare_streams() -> None:
    """Has the standard streams that a shell closed (>&-) lead to nowhere: Python has None for them, and the next file
    that is opened would get a stream's number. And has names that the output's encoding lacks written as \\xe9, and
    lines written where a terminal says that it has no columns: rich would write nothing at all."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so already
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


class HungUp(KeyboardInterrupt):
    """SIGHUP: the terminal is gone, as when an ssh session ends. What obeys Ctrl-C obeys it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, from `kill` or a batch system. What obeys Ctrl-C obeys it."""


ENDINGS: dict[type[KeyboardInterrupt], signal.Signals] = {
    KeyboardInterrupt: signal.SIGINT,
    HungUp: signal.SIGHUP,
    Terminated: signal.SIGTERM,
}


def leave_terminal() -> None:
    """Has streams whose terminal is gone lead to nowhere: a write there would fail, and end what is to be saved."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGHUP and SIGTERM end the block as Ctrl-C does, with what it stops and says then. Under nohup, where SIGHUP is
    ignored, it stays so. Only in the main thread."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # A shell sends SIGHUP once more. A second SIGTERM ends the process at once.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        leave_terminal()
        raise HungUp if number == signal.SIGHUP else Terminated

    obeyed = [each for each in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(each) is signal.SIG_DFL]
    for number in obeyed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in obeyed:
            signal.signal(number, signal.SIG_DFL)


def stop_now(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def raised_again() -> Iterator[None]:
    """Raises a KeyboardInterrupt again, a moment later, that Python has dropped ("Exception ignored in ..."): it drops
    what is raised in a callback of fork, as when data workers begin, and in a destructor."""
    hook = sys.unraisablehook

    def raise_again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)  # what is raised in here is dropped, too
        else:
            hook(dropped)

    alarm = signal.signal(signal.SIGALRM, stop_now)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


class Interrupt:
    """The flag. `request` may be called from a signal handler or another thread. Data workers sleep through these
    signals (data.workers.JOB_SIGNALS): those to the whole job do not take the data away."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, number: int = 0, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        if number == signal.SIGHUP:
            leave_terminal()
        self.requested = True

    @classmethod
    @contextmanager
    def on_signals(cls, *more: signal.Signals) -> Iterator["Interrupt"]:
        """A flag that SIGUSR2, SIGTERM, SIGHUP where nohup has not had it ignored, and the signals `more` set while the
        block runs. Only in the main thread."""
        interrupt = cls()
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        before = {number: signal.signal(number, interrupt.request) for number in (*STOP_SIGNALS, *hangup, *more)}
        try:
            with raised_again() if signal.SIGINT in more else nullcontext():
                yield interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interrupted(Exception):
    """The run was asked to stop, has saved a checkpoint, and goes on from there when it is started again."""
