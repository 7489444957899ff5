"""Runs that cannot end before a test has sent its signal, however slow this machine or fast that run: no test has to be quick."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store import disk
from store.claim import claim

TESTS = Path(__file__).parent


@contextmanager
def shard_held(store: Path, index: int) -> Iterator[None]:
    """Inside the block this process holds a shard that nobody has scored, as another worker would: all else can be scored, but not the
    whole. `store` need not be there yet."""
    (store / disk.STAGING).mkdir(parents=True, exist_ok=True)
    held = claim(store, index)
    assert held is not None, f"shard {index} of {store} was there already, or held"
    try:
        yield
    finally:
        held.release()


def held_training(until: str = "told") -> dict[str, str]:
    """Variables for a training whose first rank waits at the end of step 3 until it is told to stop, says so, and goes on; or until it is
    `killed`. A job that Slurm started again does not wait. held_training/sitecustomize.py, which Python runs before anything else, does it."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (TESTS / "held_training", TESTS.parent))), "HELD_UNTIL": until}


HELD = "told to stop while held"
"""What it then says."""
