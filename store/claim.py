"""Claims: how workers that never talk avoid scoring the same shard twice.

A claim only saves work. If one is lost, a shard is scored twice and the first to publish wins; nothing breaks. So a claim may
expire by the clock, and needs no lock service: only "create this file unless it exists", which every shared file system has.

    .staging/part-00007.claim-0     host and pid of the holder; its modification time is renewed while the holder lives
    .staging/part-00007.claim-1     taken over from claim-0, which had gone stale

The newest generation counts. Taking over creates the next one instead of removing the stale one, so that two workers who both saw
it stale cannot both win.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from store import disk
from store.manifest import MANIFEST
from store.shard import part_name

CLAIM_EXPIRES_S = 600
"""A claim not renewed for so long is stale."""


@dataclass(frozen=True)
class Claim:
    """The right to score one shard. Renew it well within CLAIM_EXPIRES_S, release it when the shard is published."""

    path: Path

    def refresh(self) -> None:
        """Renew. A claim that is gone meanwhile (sealed, or cleaned up) is left alone."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            pass

    def release(self) -> None:
        """Give it up, with the stale ones it was taken over from. From the newest down, so that generations never have gaps; a claim
        that was itself taken over stays, below its successor."""
        if not self._generation(_generation(self.path) + 1).exists():
            for generation in range(_generation(self.path), -1, -1):
                disk.drop(self._generation(generation))

    def _generation(self, generation: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.claim-{generation}")


def claim(store: Path, index: int) -> Claim | None:
    """Claim a shard; None if it is there already or somebody alive holds it."""
    return _claim(store, part_name(index))


def claim_sealing(store: Path) -> Claim | None:
    """Claim the sealing of a store whose shards are all there; None if it is sealed or somebody alive is sealing."""
    return _claim(store, MANIFEST)


def _claim(store: Path, name: str) -> Claim | None:
    """Claim the making of the file `name`."""
    try:
        if (store / name).exists():
            return None
        newest = _newest(store, name)
        if newest is not None and not _stale(store, newest):
            return None
        path = _path(store, name, 0 if newest is None else _generation(newest) + 1)
        _create(path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    except FileExistsError:
        return None
    except FileNotFoundError:  # no staging folder: the store was sealed a moment ago
        return None
    except OSError as error:
        raise disk.refusal(error, store) from error
    mine = Claim(path)
    if (store / name).exists():  # published between the caller's look and ours
        mine.release()
        return None
    return mine


def _create(path: Path, signature: bytes) -> None:
    """Create `path` with its signature in it, or FileExistsError. Linked into place: a worker killed between creating and signing would
    leave a claim of nobody, which all others respect until it expires."""
    staged = disk.staging_path(path.parent.parent, path.name, "tmp")
    try:
        staged.write_bytes(signature)
        try:
            os.link(staged, path)
        except OSError as error:
            if error.errno not in disk.NO_LINKS:
                raise
            with open(path, "xb") as file:
                file.write(signature)
    finally:
        disk.drop(staged)


def _path(store: Path, name: str, generation: int) -> Path:
    return store / disk.STAGING / f"{Path(name).stem}.claim-{generation}"


def _generation(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _newest(store: Path, name: str) -> Path | None:
    """Looked up by name: with ten thousand shards a listing of the folder for every claim would be a hundred million entries."""
    newest = None
    for generation in count():
        path = _path(store, name, generation)
        if not path.exists():
            break
        newest = path
    return newest


def _stale(store: Path, path: Path) -> bool:
    """True if the holder is a dead process of this host, or has not renewed for CLAIM_EXPIRES_S."""
    try:
        holder = json.loads(path.read_text())
        if holder["host"] == socket.gethostname() and not alive(holder["pid"]):
            return True
    except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
    ):  # not yet written, or its writer died in between: only the clock can tell
        pass
    except FileNotFoundError:  # released this moment
        return False
    try:
        # Far in the future is as stale: it was written before somebody set the clock back.
        return abs(_now(store) - path.stat().st_mtime) > CLAIM_EXPIRES_S
    except FileNotFoundError:
        return False


def alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so it is alive
        return True
    return True


_CLOCK_CHECKED_S = 60
_clocks: dict[Path, tuple[float, float]] = {}
"""By store: (time by the file system, time.monotonic()) at the last check."""


def _now(store: Path) -> float:
    """The time by the file system's own clock (a file server's may be minutes off ours), asked for at most once a minute."""
    if store not in _clocks or time.monotonic() - _clocks[store][1] > _CLOCK_CHECKED_S:
        probe = store / disk.STAGING / f"clock.{uuid.uuid4().hex}"
        try:
            probe.touch(exist_ok=False)
            _clocks[store] = (probe.stat().st_mtime, time.monotonic())
        finally:
            disk.drop(probe)
    then, monotonic = _clocks[store]
    return then + time.monotonic() - monotonic
