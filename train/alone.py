"""One run at a time in an output folder: two would write into each other's checkpoints, and both would end well.

A lock on `.lock` in the folder. The kernel gives it back however its holder ends, so nothing is left to clean up after a kill.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from store.errors import InputError

NAME = ".lock"

LEASE_S = 120
"""A file server that lost a machine keeps its locks for about a minute. So long a run that was started again elsewhere waits for them."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block no other run can enter it for `folder`, which is made, and removed again should it stay empty.

    Raises InputError for a folder that another run holds, or that cannot be written. A file system without locks is told, and is no hindrance.
    """
    made = not folder.exists()
    if made and folder.is_symlink():
        raise InputError("a link to a folder that is not there", where=f"--output-dir {folder}", found=os.readlink(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=f"--output-dir {folder}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            (folder / NAME).unlink()
        file.close()
        if made:
            with suppress(OSError):
                folder.rmdir()


def refuse_running(folder: Path) -> None:
    """InputError where another run holds `folder`. Nothing is made there."""
    if not (folder / NAME).exists():
        return
    with suppress(OSError), open(folder / NAME, "r+") as file:
        if not _try(file):
            raise _held(folder, _holder(folder))


def _locked(folder: Path) -> IO[str]:
    deadline = None
    while True:
        file = open(folder / NAME, "a+")  # noqa: SIM115   open for as long as the lock is held
        try:
            held = _try(file)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{folder}: this file system has no locks; a second run in this folder would not be noticed")
            return file
        if held and _is_there(file, folder / NAME):
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            file.flush()
            return file
        file.close()
        if held:  # of a file that its holder removed this moment
            continue
        holder = _holder(folder)
        if deadline is None:
            deadline = time.monotonic() + LEASE_S
            if holder.get("host") not in (None, socket.gethostname()):
                print(f"{folder}: held by a run on {holder['host']}; waiting for {LEASE_S} s, should that machine be lost")
        if holder.get("host") in (None, socket.gethostname()) or time.monotonic() > deadline:
            raise _held(folder, holder)
        time.sleep(min(1.0, LEASE_S / 10))


def _try(file: IO[str]) -> bool:
    """Whether the lock is ours now. Not flock: that would be inherited by the loader's workers, and outlive a kill of this process."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(folder: Path) -> dict:
    try:
        holder = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(folder: Path, holder: dict) -> InputError:
    return InputError(
        "another training runs in this folder",
        where=f"--output-dir {folder}",
        found=f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else None,
        next="Wait until it ends, or choose another --output-dir.",
    )
