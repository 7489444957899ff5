"""Told to stop: the signals a batch system sends before it kills, as a flag that work looks at where it can stop without loss.

    SIGUSR1   stop soon: finish what is at hand, begin nothing new. slurm/*.sbatch ask for it some minutes before the time limit.
    SIGTERM   stop now: drop what is at hand. Preemption, `scancel`, a shutdown; Slurm kills about 30 seconds later.
    SIGINT, SIGHUP   Ctrl-C, a closed terminal: in training as SIGUSR1, for a checkpoint keeps what was trained

Each way the command ends with exit code 75 (EX_TEMPFAIL of sysexits.h), which means: it can go on, and the error says how.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from store.command import again
from store.errors import RefdpoError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

STOP_TRAINING = (*SIGNALS, signal.SIGINT, signal.SIGHUP)

LONGEST_NAP_S = 0.1
"""A sleeping process looks that often whether it was told to stop."""


class Stopped(RefdpoError):
    """Ended early because it was told to. What is finished is kept."""

    exit_code = 75


class StopRequest:
    """Whether this process was told to stop, and how soon. Plain values, no threading.Event: a handler that sets one while the same thread
    is about to wait for it waits for ever."""

    def __init__(self):
        self._first: signal.Signals | None = None
        self.now = False
        """Drop what is at hand."""
        self.interrupted = False
        """Ctrl-C was heard."""
        self.insisted = False
        """And again: what is at hand was killed."""

    def hear(self, number: int, frame: object = None) -> None:
        """A signal handler."""
        self._first = self._first or signal.Signals(number)
        if number == signal.SIGINT:
            self.interrupted = True
        if number == signal.SIGTERM:
            self.now = True

    @property
    def soon(self) -> bool:
        """Begin nothing new."""
        return self._first is not None

    def sleep(self, seconds: float) -> None:
        """Sleep, but hardly longer than until the first signal."""
        end = time.monotonic() + seconds
        while not self.soon and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_NAP_S))

    def error(self, what: str, where: object, *more: str) -> Stopped:
        """What to raise once everything is put down; `more` are the options that the same command needs to go on."""
        name = "Ctrl-C" if self._first == signal.SIGINT else self._first.name if self._first else "another process"
        with_options = f" with {' '.join(more)}" if more else ""
        return Stopped(
            f"stopped by {name}: {what}", where=where, next=f"Run the same command again{with_options} to go on: {again(*more)}"
        )


@contextmanager
def listening(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Inside the block `signals` set the request instead of ending the process. In other threads than the main one
    Python takes no handlers: there the request is never set."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.hear) for number in _heard(signals)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def passing_on(children: Sequence[subprocess.Popen], signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Inside the block `signals` go to `children` (a list that may still grow); this process itself lives on to report.

    A second Ctrl-C does not ask: it kills the children and all that they started.
    """
    request = StopRequest()

    def forward(number: int, frame: object = None) -> None:
        request.insisted = number == signal.SIGINT and request.interrupted
        request.hear(number)
        for child in children:
            if child.poll() is not None:
                continue
            if not request.insisted:
                child.send_signal(number)
                continue
            for process in (child.pid, *_descendants(child.pid)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in _heard(signals)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Without those that this process was told to ignore, as `nohup` tells it of SIGHUP."""
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]


def _descendants(process: int) -> list[int]:
    """What a process started, and what that started, as Linux tells."""
    children = []
    for each in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, each.read_text().split())
    return [found for child in children for found in (child, *_descendants(child))]
