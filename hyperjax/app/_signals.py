"""Ctrl-C and preemption: finish the chunk, save, exit 3; a second signal stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from . import _hosts


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class Stop:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise Interrupted if so; called where everything computed has been written.

        Of several processes all must call it, and all are stopped when one was asked to.
        """
        if _hosts.any_of(self.asked):
            raise Interrupted


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set a flag instead of killing, for the time of the context."""
    stop = Stop()

    def ask(signum, _frame):
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
