"""Being asked to stop: a signal sets a flag, and the loop looks at the flag between two steps. No torch here."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # Slurm's warning before the time limit, and preemption


class Interrupt:
    """The flag. `request` may be called from a signal handler or another thread. Data workers sleep through these
    signals (data.loader.JOB_SIGNALS): those to the whole job do not take the data away."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, number: int = 0, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.requested = True

    @classmethod
    @contextmanager
    def on_signals(cls, *more: signal.Signals) -> Iterator["Interrupt"]:
        """A flag that SIGUSR2, SIGTERM and the signals `more` set while the block runs. Only in the main thread."""
        interrupt = cls()
        before = {number: signal.signal(number, interrupt.request) for number in (*STOP_SIGNALS, *more)}
        try:
            yield interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interrupted(Exception):
    """The run was asked to stop, has saved a checkpoint, and goes on from there when it is started again."""
