"""run.json in the output folder: what is trained from what, with which result. Written before step 1 and again at the end.

Needs neither torch nor transformers, so that a command line can ask `checkpoint_of` and `refuse_other_run` before it starts any rank.
"""

import errno
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from stop import Stopped
from store import disk, record
from store.command import again, typed
from store.errors import InputError, RefdpoError
from store.manifest import Identity, causes
from train import alone, zero
from train.checkpoint import COMPLETE, best_of, cut_short, damage, last_checkpoint, model_only, refuse_lost_best, state_of
from train.choices import SORT_PAIRS, WITHOUT_WARMUP
from train.config import DEFAULTS, FREE_ON_RESUME, TrainConfig

NAME = "run.json"

STAGED = f".{NAME}.tmp"

RESTARTABLE = frozenset({NAME, STAGED, alone.NAME, "runs"})
"""What a run that died before its first checkpoint leaves behind: this record and TensorBoard's folder. Nothing is lost by starting again."""


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run."""

    output_dir: str
    num_steps: int
    num_pairs: int
    first_loss: float
    """Of step 1 alone; ln 2 = 0.6931 for sigmoid and sigmoid_norm where the policy is the reference."""
    last_loss: float
    """Of the last log entry: a mean over the steps since the one before."""
    seconds: float
    """Of the training loop."""
    peak_memory: int
    """Bytes, of the process that needed most: allocated on its GPU, or resident where there is none."""
    speed: dict[str, float]
    """Over all ranks: what train/speed.py counts; empty where an earlier start had done all steps."""
    num_steps_before: int = 0
    """Steps that earlier starts had done; `seconds` and `speed` are of the others."""


def started(config: TrainConfig, identity: Identity, policy: dict, max_length: int, batch: int) -> dict:
    """The record of a run before step 1: configuration (seed included), store, versions.

    `policy`: where it is loaded from, and its dtype; `batch`: pairs per optimizer step, over all devices.
    """
    return {
        "status": "running",
        "started": now(),
        "host": socket.gethostname(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": config.to_json(),
        "store": identity.to_json(),
        "policy": policy,
        "dtype": policy["dtype"],
        "max_length": max_length,
        "effective_batch_size": batch,
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "trl", "accelerate", "deepspeed", *(["peft"] if config.use_peft else []))
        },
    }


def now() -> str:
    """UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(folder: Path, content: dict) -> None:
    """Atomically. Raises InputError for a folder that cannot be written, StoreError for a full disk."""
    staged = folder / STAGED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(staged, folder / NAME)
    except OSError as error:
        disk.drop(staged)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk.refusal(error, folder / NAME, "--output-dir", *resuming("--resume-or-start")) from error
        raise InputError(f"cannot be written: {error.strerror}", where=f"--output-dir {folder}") from error


def read(folder: Path) -> dict | None:
    """The record in `folder`; None where there is none that can be read."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished(folder: Path) -> dict | None:
    """The record of a run that came to its end, or None."""
    content = read(folder)
    return content if content is not None and content.get("status") == "finished" else None


@contextmanager
def keeping_status(folder: Path) -> Iterator[None]:
    """The record in `folder` says how the block ended where it ended early: `stopped` (told to) or `failed`, with the reason."""
    try:
        yield
    except BaseException as error:
        status = "stopped" if isinstance(error, Stopped) else "failed"
        with suppress(RefdpoError):  # the first error counts, also on a full disk
            write(folder, (read(folder) or {}) | {"status": status, "ended": now(), "error": f"{type(error).__name__}: {error}"})
        raise


def refuse_other_run(folder: Path) -> None:
    """InputError for an output folder with anything in it that a new run would overwrite: a model is not lost by a slip.

    A run that ended without a checkpoint, perhaps while it saved its model, has left nothing of use: it may be started again.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("a file, not a folder", where=f"--output-dir {folder}")
    present = sorted(entry.name for entry in folder.iterdir() if not cut_short(entry)) if folder.exists() else []
    present = [name for name in present if name != alone.NAME]
    checkpoint = last_checkpoint(folder)
    of_run = read(folder)
    unfinished = of_run is not None and of_run.get("status") != "finished"
    if set(present) <= RESTARTABLE or (unfinished and checkpoint is None):
        return
    shown = ", ".join(present[:5]) + (", …" if len(present) > 5 else "")
    if checkpoint is None or model_only(checkpoint) or finished(folder) is not None:
        remedy = "empty it yourself" if of_run is None else "remove this run with --overwrite"
        advice = f"Choose another --output-dir, or {remedy}."
    elif any(name.endswith(".safetensors") for name in present):
        advice = f"Choose another --output-dir, or finish its run with --resume: {again('--resume')}"
    else:
        advice = f"Continue its run with --resume: {again('--resume')}; or choose another --output-dir."
    raise InputError("the output folder is not empty", where=f"--output-dir {folder}", found=shown, next=advice)


def remove_run(folder: Path) -> None:
    """Remove an output folder with all that is in it. InputError where it holds no run: it is somebody's who did not mean it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if read(folder) is None:
        raise InputError(
            f"holds no run, as it has no {NAME}: nothing is removed",
            where=f"--overwrite, --output-dir {folder}",
            next="Empty it yourself.",
        )
    shutil.rmtree(folder)


def resuming(option: str = "--resume") -> tuple[str, ...]:
    """What the command that runs now lacks to go on from its checkpoint when it is typed again; `--resume-or-start` where there may be none."""
    return () if {"--resume", "--resume-or-start"} & set(typed()) else (option,)


def checkpoint_of(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; None for a new run. Raises InputError where there is none."""
    if config.resume is False:
        return None
    if config.resume is not True:
        if state_of(Path(config.resume)) is None:
            raise InputError(
                "no complete checkpoint of a run", where=f"--resume {config.resume}", expected=f"checkpoint-<step> with {COMPLETE}"
            )
        return _refuse_model_only(Path(config.resume))
    last = last_checkpoint(config.output_dir)
    if last is None:
        raise InputError(
            "there is no checkpoint to resume from", where=f"--output-dir {config.output_dir}", next="Start without --resume."
        )
    return _refuse_model_only(last)


def _refuse_model_only(checkpoint: Path) -> Path:
    if model_only(checkpoint):
        raise InputError(
            "a checkpoint of the model alone, written with --save-only-model",
            where=checkpoint,
            next=f"A run cannot go on from it. To train on from these weights, into another --output-dir: --policy {checkpoint} "
            "--allow-different-policy.",
        )
    return checkpoint


def refuse_damaged(checkpoint: Path, config: TrainConfig) -> None:
    """InputError where files of the checkpoint that a run goes on from are not whole, or of the best one, should that be saved at the end."""
    in_parts = zero.stage(config.zero_config) > 0
    if missing := damage(checkpoint, in_parts):
        raise InputError(
            "files of this checkpoint are missing or cut short",
            where=checkpoint,
            found=_shortened(missing),
            next=f"Copy it again, whole; or remove it to go on from an earlier one: rm -r {shlex.quote(str(checkpoint))}",
        )
    if config.load_best_model_at_end and (best := best_of(checkpoint)) is not None:
        refuse_lost_best(best, in_parts)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compare_with_started(checkpoint: Path, now: dict) -> None:
    """InputError where a resumed run would not be the run that was started: names each setting with both values."""
    compare_with_run(checkpoint.parent, now)


def compare_with_run(folder: Path, now: dict) -> None:
    """The same for the run whose record is in `folder`, finished or not. InputError where it has none that can be read, too."""
    path = folder / NAME
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        before, after = _course(then), _course(json.loads(json.dumps(now)))
        stores = (record.build(Identity, then["store"], path), record.build(Identity, now["store"], path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "the run to resume has no readable record", where=path, next="Start again in another --output-dir."
        ) from error
    differing = [(name, before.get(name), after[name]) for name in after if before.get(name) != after[name]]
    differing += [(name, *(getattr(store, name) for store in stores)) for name in causes(*stores)]
    if differing:
        raise InputError(
            "a resumed run must go on as it began",
            where=path,
            expected="; ".join(f"{name} {_short(value)}" for name, value, _ in differing),
            found="; ".join(f"{name} {_short(value)}" for name, _, value in differing),
            next="Give the options of the first start, or train into another --output-dir.",
        )


def _course(content: dict) -> dict:
    """The settings that decide where a run goes."""
    # Where an earlier state of this project wrote the record, it lacks the options that came since: they were at their defaults.
    absent = {name: value for name, value in DEFAULTS.items() if name not in content["config"]}
    config = content["config"] | {name: [*value] if isinstance(value, tuple) else value for name, value in absent.items()}
    settings = {name: value for name, value in config.items() if name not in FREE_ON_RESUME}
    settings |= {name: content[name] for name in ("dtype", "max_length", "effective_batch_size")}
    if settings.get("lr_scheduler_type") in WITHOUT_WARMUP:
        settings |= {"warmup_ratio": 0.0, "warmup_steps": None}  # an earlier state recorded some, which had no effect
    if not set(SORT_PAIRS).isdisjoint(settings["loss_type"]):
        settings["per_device_train_batch_size"] = content["config"]["per_device_train_batch_size"]
    return settings | {"selection": content.get("selection", {}).get("pair_ids_sha256")}


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) and len(value) > 32 else str(value)
