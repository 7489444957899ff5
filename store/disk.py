"""Writing so that a kill at any moment leaves nothing or the whole file: stage, fsync, link to the final name, fsync the folder."""

import contextlib
import errno
import os
import socket
import uuid
from pathlib import Path

from store.command import again
from store.errors import StoreError

STAGING = ".staging"
"""Folder inside a store for unpublished bytes, sidecars and claims; gone once the store is sealed."""


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""How a file system says that it has no hard links."""


def staging_path(store: Path, name: str, suffix: str) -> Path:
    """A file name in the staging folder that no other writer uses. Host and pid are for people, the random part for uniqueness
    (containers share both)."""
    return store / STAGING / f"{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{suffix}"


def write_new(path: Path, data: bytes) -> None:
    """Create `path` with `data` and wait until it is on the disk. The file is removed again if that fails (OSError)."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise
    except OSError:
        drop(path)
        raise


def drop(path: Path) -> None:
    """Remove a file of ours that is no longer wanted, if it is there. Failing at that (on a read-only disk) is no news."""
    with contextlib.suppress(OSError):
        path.unlink()


def publish(staged: Path, final: Path) -> bool:
    """Give a staged file its final name, unless that name is taken: then the staged file is dropped and False returned.

    A hard link is the atomic "rename, but never over another file". File systems without links (some FUSE mounts) get a plain
    rename, where two writers at the same instant are both successful and the later one stays. Raises OSError where the disk refuses.
    """
    try:
        os.link(staged, final)
        published = True
    except FileExistsError:
        published = False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        published = not final.exists()
        if published:
            os.replace(staged, final)
    drop(staged)
    fsync_folder(final.parent)
    return published


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(error: OSError, path: Path, option: str = "--ref-store", *more: str) -> StoreError:
    """The operating system's refusal to write below `path`, which `option` named, with what to do about it. `more`: the options that the same
    command needs to go on."""
    kept = "Finished shards are kept: " if option == "--ref-store" else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        only = "; it does only what is missing" if kept else ""
        with_options = f" with {' '.join(more)}" if more else ""
        return StoreError(
            "disk full or quota reached while writing",
            where=path,
            next=f"{kept}{'free' if kept else 'Free'} some space, then run the same command again{with_options}{only}: {again(*more)}",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            "cannot write here",
            where=path,
            found=(error.strerror or str(error)).lower(),
            next=f"Choose a {option} in a folder you may write to.",
        )
    if not kept:
        return StoreError("cannot be written", where=path, found=error.strerror or error, next=f"Choose another {option}.")
    return StoreError(
        "cannot be written", where=path, found=error, next=f"Finished shards are kept; run the same command again: {again()}"
    )
