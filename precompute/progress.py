"""What phase 1 shows while it runs: pairs done by all workers, their speed together, the time left, and whether the model waits.

On a terminal one line that is rewritten; in a log a line a minute; as JSON an event per line on stdout. Only the first worker of each
machine speaks. The time left is counted in tokens: what the finished shards took per row, times the rows that are missing.
"""

import json
import sys
import time
from pathlib import Path

from launch import Process
from precompute.config import Show
from store.errors import StoreError
from store.folder import missing_shards
from store.manifest import Identity, ShardReport
from store.shard import part_name, read_footer

SECONDS_BETWEEN_LINES = {True: 0.5, False: 60.0}
"""On a terminal, in a log."""

WAITING_IS_SLOW = 0.1
"""Share of the time the model may wait for tokens or for the disk before the line says so."""


def say_where_it_goes_on(store: Path, identity: Identity, before: list[Path]) -> None:
    """Say how many rows are in the shards `before`, those that were there when this run began. Nothing where there were none."""
    names = {path.name for path in before}
    if rows := sum(len(identity.rows_of(shard)) for shard in range(identity.num_shards) if part_name(shard) in names):
        goes_on = "sealing" if rows == identity.num_rows else "going on"
        print(f"{store}: {rows:,} of {identity.num_rows:,} rows are done, {goes_on}", file=sys.stderr)


class Progress:
    """Counts what this worker scores, and looks at the store for what the others did."""

    def __init__(self, store: Path, identity: Identity, process: Process, show: Show = "text"):
        self.store, self.identity, self.process, self.show = store, identity, process, show
        self.terminal = show == "text" and sys.stderr.isatty()
        self.started = self.shown = self.active = time.monotonic()
        self.known: set[int] = set()
        self.finished_rows = self.finished_tokens = 0  # of all finished shards, whoever scored them
        self.rows_done = self._look()
        self.before = self.finished_tokens
        self.partial = 0  # tokens of this worker's shards that are not finished yet
        self.waited = 0.0
        self.nothing_to_score = self.rows_done == identity.num_rows

    def _look(self) -> int:
        """Read the footers of shards finished since the last look; return the rows done."""
        missing = set(missing_shards(self.store, self.identity))
        for shard in set(range(self.identity.num_shards)) - missing - self.known:
            try:
                _, report = read_footer(self.store / part_name(shard))
            except StoreError:  # whoever opens the store says what is wrong with it
                continue
            self.known.add(shard)
            self.finished_rows += report.num_rows
            self.finished_tokens += report.model_tokens
        return self.identity.num_rows - sum(len(self.identity.rows_of(shard)) for shard in missing)

    def shard_started(self) -> float:
        """Its tokens are there; returns how many seconds the model had nothing to do since its last batch."""
        waited = time.monotonic() - self.active
        self.waited += waited
        return waited

    def batch_done(self, num_model_tokens: int) -> None:
        """The model has computed so many positions more of the shard at hand."""
        self.active = time.monotonic()
        self.partial += num_model_tokens
        if self.active - self.shown > SECONDS_BETWEEN_LINES[self.terminal]:
            self._say()

    def shard_done(self, report: ShardReport) -> None:
        """A shard of this worker is scored."""
        self.partial -= report.model_tokens  # from now on it counts as finished, as soon as it is on disk
        if self.terminal:
            self._say()

    def close(self) -> None:
        """The last line."""
        self._say(final=True)

    def state(self) -> dict:
        """Where the whole store is, as an event: tokens are positions the model computes, seconds_left None while nothing is
        known."""
        elapsed = max(1e-9, time.monotonic() - self.started)
        self.rows_done = self._look()
        speed = (self.finished_tokens - self.before + self.partial) / elapsed
        per_row = self.finished_tokens / self.finished_rows if self.finished_rows else None
        left = 0.0 if self.rows_done == self.identity.num_rows else None
        if left is None and per_row is not None and speed > 0:
            left = max(0.0, (self.identity.num_rows - self.rows_done) * per_row - self.partial) / speed
        return {
            "event": "progress",
            "rows_done": self.rows_done,
            "num_rows": self.identity.num_rows,
            "tokens_per_second": speed,
            "num_workers": self.process.world,
            "seconds": elapsed,
            "seconds_left": left,
            # Up to the last batch: what comes after, waiting for other workers' shards, is not the tokenizer's or the disk's doing.
            "waiting": self.waited / max(self.waited, self.active - self.started, 1e-9),
        }

    def _say(self, final: bool = False) -> None:
        self.shown = time.monotonic()
        if self.process.local_rank or self.show == "nothing" or self.nothing_to_score:
            return
        state = self.state()
        if self.show == "json":
            print(json.dumps(state), flush=True)
            return
        workers = f" by {state['num_workers']} workers" if state["num_workers"] > 1 else ""
        left = "?" if state["seconds_left"] is None else _clock(state["seconds_left"])
        line = f"scored {state['rows_done']:,}/{state['num_rows']:,} pairs · {state['tokens_per_second']:,.0f} tokens/s{workers} · "
        line += f"{_clock(state['seconds'])} so far, {left} left"
        scored = state["tokens_per_second"] > 0  # or all of it was taken from other stores: the model had nothing to wait for
        if scored and (final or state["waiting"] > WAITING_IS_SLOW):
            line += f" · the model waited {state['waiting']:.1%} of the time for tokenizer or disk"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if final else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
