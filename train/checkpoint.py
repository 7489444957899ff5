"""Checkpoints of a run: which are whole, and the newest that can be resumed from. Imports nothing heavy."""

import json
import re
import shutil
from pathlib import Path

COMPLETE = "trainer_state.json"
"""Written last: a checkpoint folder without it, or with a part of it, was cut short by a kill and is not resumed from."""


def state_of(checkpoint: Path) -> dict | None:
    """What transformers' trainer wrote of itself last (global_step, epoch, log_history, …); None for a checkpoint that was cut short."""
    try:
        state = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`; None if there is none."""
    steps = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and state_of(path) is not None:
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None


def model_only(checkpoint: Path) -> bool:
    """Written with --save-only-model: the model is whole, and the states that a run goes on from are missing."""
    return any(checkpoint.glob("*.safetensors")) and not any(checkpoint.glob("global_step*"))


def cut_short(path: Path) -> bool:
    """A checkpoint folder that a kill left incomplete."""
    return path.name.startswith("checkpoint-") and path.is_dir() and state_of(path) is None


def remove_cut_short(folder: Path) -> None:
    """Before training: what another number of processes left of a checkpoint would else become a part of the next one of that name."""
    for path in folder.glob("checkpoint-*"):
        if cut_short(path):
            shutil.rmtree(path)
