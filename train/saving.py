"""What a run writes, and the one error where that fails: a full disk shows itself in another way to each library that writes."""

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from store import disk
from train import record

OF_TORCH = ("inline_container", "PytorchStreamWriter")
"""Words of the RuntimeErrors by which torch.save tells that a file could not be written; the reason is lost on its way."""


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around what writes files into `path`: StoreError where the file system refuses, with the command that goes on. Other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        refused = _refused(error, path)
        if refused is None:
            raise
        raise disk.refusal(refused, path, "--output-dir", *record.resuming("--resume-or-start")) from error


def _refused(error: Exception, path: Path) -> OSError | None:
    """What the file system said; None for an error of another kind."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))
    if not any(word in str(error) for word in OF_TORCH):
        return None
    return _asked(path) or OSError(errno.EIO, str(error).strip().splitlines()[0])


def _asked(path: Path) -> OSError | None:
    """What the file system says to one more file there."""
    probe = path / f".{uuid.uuid4().hex}.tmp"
    try:
        disk.write_new(probe, bytes(1 << 20))
    except OSError as error:
        return error
    finally:
        disk.drop(probe)
    return None
