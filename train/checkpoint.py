"""Checkpoints of a run: which are whole, and the newest that can be resumed from. Imports nothing heavy."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from store.errors import InputError

COMPLETE = "trainer_state.json"
"""Written last: a checkpoint folder without it, or with a part of it, was cut short by a kill and is not resumed from."""

SCHEDULER, PART = "scheduler.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"

NAMED = re.compile(r"checkpoint-(\d+)")
"""What transformers calls them, by step. A folder of another name, `checkpoint-2-mine`, is somebody's own."""


def state_of(checkpoint: Path) -> dict | None:
    """What transformers' trainer wrote of itself last (global_step, epoch, log_history, …); None for a checkpoint that was cut short."""
    try:
        state = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`; None if there is none."""
    return next((path for path in reversed(_by_step(folder)) if state_of(path) is not None), None)


def model_only(checkpoint: Path) -> bool:
    """Written with --save-only-model: the model is whole, and the states that a run goes on from are missing."""
    of_states = (*checkpoint.glob("global_step*"), checkpoint / "latest", checkpoint / SCHEDULER)
    return any(checkpoint.glob("*.safetensors")) and not any(path.exists() for path in of_states)


def best_of(checkpoint: Path) -> Path | None:
    """Of the run up to `checkpoint`, the one that evaluated best, which lies beside it; None where that was not asked for."""
    step = (state_of(checkpoint) or {}).get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def refuse_lost_best(best: Path, in_parts: bool) -> None:
    """InputError where the checkpoint that a run is to save at its end is not there or not whole; `in_parts` as in `damage`."""
    if state_of(best) is None or damage(best, in_parts):
        raise InputError(
            "the checkpoint that evaluated best so far is not there, or not whole",
            where=best,
            next="Bring it back; or go on without --load-best-model-at-end, which saves the last model.",
        )


def damage(checkpoint: Path, in_parts: bool) -> list[str]:
    """Files of a complete checkpoint that are missing or cut short, as a copy that broke off leaves them; [] if there are none.

    Only the ends of files are read: torch writes zip archives, whose directory comes last. `in_parts`: ZeRO deals the optimizer's states to the
    ranks, as its stages 1 and 2 do.
    """
    try:
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        tag = ""
    if not tag or not (checkpoint / tag).is_dir():
        return ["latest" if not tag else tag]
    parts = sorted((checkpoint / tag).glob("*zero_pp_rank_*_optim_states.pt"))
    ranks = [re.search(r"zero_pp_rank_(\d+)_", path.name) for path in parts]
    ranks += [re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in checkpoint.glob("rng_state_*.pth")]
    world = max((int(rank[1]) + 1 for rank in ranks if rank is not None), default=1)
    expected = [checkpoint / SCHEDULER, checkpoint / tag / "mp_rank_00_model_states.pt"]
    expected += [checkpoint / ("rng_state.pth" if world == 1 else f"rng_state_{rank}.pth") for rank in range(world)]
    if parts or in_parts:
        named = re.sub(r"zero_pp_rank_\d+_", "zero_pp_rank_{}_", parts[0].name) if parts else PART
        expected += [checkpoint / tag / named.format(rank) for rank in range(world)]
    return [str(path.relative_to(checkpoint)) for path in expected if not zipfile.is_zipfile(path)]


def cut_short(path: Path) -> bool:
    """A checkpoint folder that a kill left incomplete."""
    return NAMED.fullmatch(path.name) is not None and path.is_dir() and state_of(path) is None


def remove_cut_short(folder: Path) -> list[Path]:
    """Before training: what another number of processes left of a checkpoint would else become a part of the next one of that name.
    Returns what was removed."""
    removed = [path for path in folder.glob("checkpoint-*") if cut_short(path)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def remove_oldest(folder: Path, keep: int, best_step: int | None) -> None:
    """Of the checkpoints in `folder` the oldest by step, until `keep` are left; never the newest, nor that of `best_step`.

    transformers goes by the folders' times: a copied or touched old checkpoint, or a clock that was set back, costs the one just written.
    """
    checkpoints = _by_step(folder)
    kept = {checkpoints[-1], *(path for path in checkpoints if _step(path) == best_step)}
    for path in checkpoints:
        if len(checkpoints) <= max(keep, len(kept)):
            return
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
            checkpoints = [each for each in checkpoints if each != path]


def _by_step(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*") if NAMED.fullmatch(path.name))
    return sorted(found, key=_step) if folder.is_dir() else []


def _step(checkpoint: Path) -> int:
    return int(NAMED.fullmatch(checkpoint.name)[1])
