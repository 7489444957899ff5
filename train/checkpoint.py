"""Checkpoints of a run: the newest that can be resumed from, and writing one when told to stop. Imports nothing heavy by itself."""

import json
import re
from pathlib import Path

COMPLETE = "trainer_state.json"
"""Written last: a checkpoint folder without it was cut short by a kill and is not resumed from."""


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`; None if there is none."""
    steps = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / COMPLETE).is_file():
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None


def cut_short(path: Path) -> bool:
    """A checkpoint folder that a kill left incomplete."""
    return path.name.startswith("checkpoint-") and path.is_dir() and not (path / COMPLETE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a run that came to its end."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False
