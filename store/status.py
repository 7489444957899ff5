"""How far phase 1 is: what is done, who works on what, what is missing, how long it will take. From file names and times alone.

Nothing is opened but the identity and the claims in hand, so it answers at once whatever the number of shards.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from store import disk
from store.claim import CLAIM_EXPIRES_S, alive
from store.command import cli
from store.folder import identity_of, refuse_non_store, stored_command
from store.manifest import MANIFEST, Identity, Manifest, manifest_path, rerun
from store.shard import part_name

WINDOW_S = 1800
"""The speed is that of the last half hour before the newest shard."""

SHOWN = 10


@dataclass(frozen=True)
class Running:
    """A claim: somebody is, or was, working on a shard."""

    shard: int
    host: str
    pid: int
    age: float
    """Seconds since its last sign of life."""
    dead: bool
    """Its process is gone, or it has been silent for too long; whoever works next takes its shard over."""


@dataclass(frozen=True)
class Status:
    """One look at a store."""

    identity: Identity
    sealed: bool
    missing: tuple[int, ...]
    running: tuple[Running, ...]
    rows_per_second: float | None
    """Source rows, of all workers together; None with fewer than two shards to measure by."""
    newest_age: float | None
    """Seconds since a shard was last finished."""
    leftovers: tuple[tuple[str, float], ...]
    """Half-written files and their age in seconds."""

    @property
    def rows_missing(self) -> int:
        return sum(len(self.identity.rows_of(shard)) for shard in self.missing)


def status(path: Path) -> Status:
    """Look at the store at `path`, sealed or not. InputError for a path that is no store."""
    path = Path(path)
    refuse_non_store(path)
    identity = identity_of(path)
    now = time.time()
    finished = dict(_times(path, "part-"))
    missing = tuple(shard for shard in range(identity.num_shards) if part_name(shard) not in finished)
    staging = path / disk.STAGING
    staged = [(name, now - moment) for name, moment in _times(staging)]
    times = sorted(finished.values())
    recent = [moment for moment in times if moment > times[-1] - WINDOW_S] if times else []
    span = recent[-1] - recent[0] if recent else 0
    return Status(
        identity=identity,
        sealed=manifest_path(path).exists(),
        missing=missing,
        running=_running(staging, staged, set(missing)),
        rows_per_second=(len(recent) - 1) * identity.shard_size / span if span > 0 else None,
        newest_age=now - times[-1] if times else None,
        leftovers=tuple((name, age) for name, age in staged if name.endswith(".tmp")),
    )


def _times(folder: Path, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and modification times, as far as they are there: workers create and remove files all the time."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat().st_mtime


def _running(staging: Path, staged: list[tuple[str, float]], missing: set[int]) -> tuple[Running, ...]:
    """The newest claim of every missing shard."""
    newest: dict[int, tuple[int, str, float]] = {}
    for name, age in staged:
        if match := re.fullmatch(r"part-(\d+)\.claim-(\d+)", name):
            shard, generation = int(match[1]), int(match[2])
            if shard in missing and generation >= newest.get(shard, (-1,))[0]:
                newest[shard] = (generation, name, age)
    found = []
    for shard, (_, name, age) in sorted(newest.items()):
        try:
            holder = json.loads((staging / name).read_text())
            host, pid = str(holder["host"]), int(holder["pid"])
        except (OSError, ValueError, KeyError, TypeError):  # released this moment, or not yet signed
            continue
        dead = age > CLAIM_EXPIRES_S or (host == socket.gethostname() and not alive(pid))
        found.append(Running(shard, host, pid, age, dead))
    return tuple(found)


def describe(status: Status, path: Path) -> str:
    """A few lines for people."""
    identity, total = status.identity, status.identity.num_shards
    done = total - len(status.missing)
    if status.sealed and not status.missing:
        manifest = Manifest.load(manifest_path(path))
        return f"{path}: sealed, {total:,} shards, {manifest.num_pairs:,} pairs of {identity.num_rows:,} rows"
    alive_now = [each for each in status.running if not each.dead]
    rows = identity.num_rows - status.rows_missing
    lines = [f"{path}: {done:,} of {total:,} shards done ({rows:,} of {identity.num_rows:,} rows, {rows / identity.num_rows:.0%})"]
    if status.sealed:
        lines.append(f"  SEALED, but {len(status.missing):,} shards are gone: {cli('verify', '--ref-store', path)}")
    lines.append(
        f"  running  {len(alive_now):,} shards"
        + _listed(f"{each.shard} on {each.host}, {_age(each.age)} ago" for each in alive_now)
    )
    dead = [each for each in status.running if each.dead]
    if dead:
        lines.append(
            f"  dead     {len(dead):,} claims" + _listed(f"{each.shard} on {each.host}, {_age(each.age)} ago" for each in dead)
        )
    waiting = sorted(set(status.missing) - {each.shard for each in alive_now})
    lines.append(f"  missing  {len(waiting):,} shards nobody works on" + _listed(map(str, waiting)))
    if status.leftovers:
        lines.append(
            f"  staging  {len(status.leftovers):,} files being written" + _listed(f"{_age(age)} old" for _, age in status.leftovers)
        )
    if status.newest_age is not None:
        lines.append(f"  newest shard {_age(status.newest_age)} ago")
    if status.missing and status.rows_per_second and alive_now:
        left = status.rows_missing / status.rows_per_second
        lines.append(f"  speed    {status.rows_per_second:,.3g} pairs/s by all workers; about {_age(left)} left")
    if not alive_now:
        what = "Nobody is working on it" if status.missing else f"All shards are there, {MANIFEST} is missing"
        lines.append(f"{what}: {rerun(identity, path, stored_command(path))}")
    return "\n".join(lines)


def _listed(items: Iterable[str]) -> str:
    listed = list(items)
    return f" ({'; '.join(listed[:SHOWN])}{'; …' if len(listed) > SHOWN else ''})" if listed else ""


def _age(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h {seconds % 3600 // 60} min"
