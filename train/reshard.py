"""Resume with another number of ranks. ZeRO's optimizer states lie in one part per rank, and DeepSpeed loads them on as many ranks only.

Where the numbers differ, DeepSpeed's own converter writes the states whole, one file per parameter, into the checkpoint's folder; its engine
loads those with any number of ranks, and they are removed when training goes on. The checkpoint itself stays as it is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import TrainerCallback

from store.errors import InputError
from train.choices import ADAMS

WHOLE = "_universal"
"""DeepSpeed's word for it; ends the name of the folder with the whole states."""

LATEST = "latest_universal"
"""Names that folder to DeepSpeed's engine."""

ENGINE_OPTION = {"checkpoint": {"load_universal": True}}
"""In DeepSpeed's configuration: load whole states."""


def must_reshard(checkpoint: Path, world: int) -> bool:
    """Whether `checkpoint` was written by another number of ranks than `world`, in parts."""
    return _num_parts(checkpoint) not in (0, world)


def refuse_optimizer(checkpoint: Path, optim: str | None) -> None:
    """InputError where DeepSpeed's converter does not know the states of this optimizer; None is AdamW, or --zero-config's."""
    if optim is None or ADAMS.get(optim, "another") is None:
        return
    raise InputError(
        "DeepSpeed converts the states of PyTorch's AdamW alone to another number of processes",
        where=f"{checkpoint}, --optim {optim}",
        next=f"Resume with as many processes as before ({_num_parts(checkpoint)}).",
    )


def write_whole(checkpoint: Path) -> None:
    """On one rank. Needs room for the states once more: 12 bytes per parameter. Raises InputError where the converter fails."""
    parts = _parts(checkpoint)
    whole = parts.with_name(parts.name + WHOLE)
    shutil.rmtree(whole, ignore_errors=True)  # of a start that was killed
    workers = str(min(8, os.cpu_count() or 1))
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(parts),
        "--output_folder",
        str(whole),
    ]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        remove_whole(checkpoint)
        raise InputError(
            f"the optimizer states cannot be converted: {(done.stderr.strip() or 'no message').splitlines()[-1]}",
            where=checkpoint,
            next=f"Resume with as many processes as before ({_num_parts(checkpoint)}).",
        )
    (checkpoint / LATEST).write_text(whole.name, encoding="utf-8")


def remove_whole(checkpoint: Path) -> None:
    """What `write_whole` left."""
    (checkpoint / LATEST).unlink(missing_ok=True)
    parts = _parts(checkpoint)
    shutil.rmtree(parts.with_name(parts.name + WHOLE), ignore_errors=True)


class RemoveWhole(TrainerCallback):
    """Once the states are loaded."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            remove_whole(self.checkpoint)

    on_train_end = on_step_begin  # of a run that had no step left to take


def _parts(checkpoint: Path) -> Path:
    """The folder with DeepSpeed's files."""
    try:
        return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError("DeepSpeed's part of the checkpoint is missing", where=checkpoint / "latest") from error


def _num_parts(checkpoint: Path) -> int:
    """Of its optimizer states: one per rank that wrote them."""
    return len(list(_parts(checkpoint).glob("*zero_pp_rank_*_optim_states.pt")))
