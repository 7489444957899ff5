"""A progress bar for commands that only read: rewritten in place on a terminal, a line a minute in a log, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = {True: 0.2, False: 60.0}
"""On a terminal, in a log."""


@contextmanager
def bar(doing: str, unit: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`; ends the line on leaving. Writes to stderr, so that answers on stdout stay clean."""
    terminal = sys.stderr.isatty()
    started = time.monotonic()
    shown = started - (SECONDS_BETWEEN_LINES[True] if terminal else 0)
    wrote = False

    def progress(done: int, total: int) -> None:
        nonlocal shown, wrote
        now = time.monotonic()
        if quiet or (now - shown < SECONDS_BETWEEN_LINES[terminal] and not (terminal and done == total)):
            return
        shown, wrote = now, True
        speed = done / max(1e-9, now - started)
        left = clock((total - done) / speed) if done else "?"
        line = f"{doing} {done:,}/{total:,} {unit} · {speed:,.0f} {unit}/s · {left} left"
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if wrote and terminal:
            print(file=sys.stderr)


def clock(seconds: float) -> str:
    """12.3 seconds as 0:00:12."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
