"""What can be seen to be wrong before anything is queued: a job that waits for hours should not end at its first line.

Options are parsed by the commands themselves (cli.py); here is what they name. Nothing is loaded and no network is asked.
"""

import glob
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from presets import Preset
from store.errors import InputError
from store.folder import refuse_non_store, stored_identity
from store.manifest import check_same, manifest_path
from train import record
from train.checkpoint import last_checkpoint
from train.config import TrainConfig
from train.plan import plan, refuse_folder
from train.zero import refuse_contradictions

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

DATA_ENDINGS = (".parquet", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".gz", ".zst", ".bz2", ".arrow", ".txt")


def check_precompute(options: dict[str, Any], preset: Preset | None) -> None:
    """`options` of `precompute`, completed by the preset. InputError, or StoreError for a store that has other numbers."""
    for source in options["dataset"]:
        _check_dataset(source)
    if preset is None or options["model"] != preset.model:  # the demo's is made at first use
        _check_model("--model", options["model"])
    if options["tokenizer"] != options["model"]:
        _check_folder_or_id("--tokenizer", options["tokenizer"])
    path = options["ref_store"]
    refuse_non_store(path, for_writing=True)
    if (stored := stored_identity(path) if path.exists() else None) is not None:
        asked = {name: options[name] for name in ("max_length", "dtype", "shard_size") if options[name] is not None}
        check_same(stored, replace(stored, **asked), path)


def check_train(config: TrainConfig, reference: dict[str, Any], world: int) -> None:
    """`config` for `world` ranks, against `reference`, the options of the phase before it. InputError, or StoreError for a store that is
    sealed already and does not fit."""
    if config.policy is not None:
        _check_model("--policy", config.policy)
    if config.tokenizer is not None:
        _check_folder_or_id("--tokenizer", config.tokenizer)
    if config.max_length is not None and config.max_length > reference["max_length"]:
        raise InputError(
            "longer than what phase 1 scores",
            where=f"--max-length {config.max_length}",
            expected=f"at most {reference['max_length']}",
        )
    for store in config.eval_stores.values():
        refuse_non_store(store)
    accumulation = config.accumulation_steps(world)
    refuse_contradictions(config, config.dtype or reference["dtype"], accumulation, config.pairs_per_step(world))
    if record.finished(config.output_dir) is not None:
        return  # it says so, and ends well
    config = replace(config, resume=last_checkpoint(config.output_dir) is not None)
    if manifest_path(config.ref_store).exists():
        refuse_folder(config, plan(config, world))
    elif not config.resume:
        record.refuse_other_run(config.output_dir)


def _check_dataset(source: str) -> None:
    path = Path(source).expanduser()
    if path.exists():
        return
    if glob.has_magic(source):
        if not glob.glob(str(path), recursive=True):
            raise InputError("no file matches this pattern", where=f"--dataset {source}")
    elif _is_path(source) or source.endswith(DATA_ENDINGS):
        raise InputError("no such file or folder", where=f"--dataset {source}", next=f"This is {Path.cwd()}.")
    else:
        _check_id("--dataset", source)


def _check_model(option: str, name: str) -> None:
    _check_folder_or_id(option, name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError("holds no model", where=f"{option} {name}", expected="config.json and its weights")


def _check_folder_or_id(option: str, name: str) -> None:
    if Path(name).is_file():
        raise InputError("a file, not the folder of a model", where=f"{option} {name}")
    if Path(name).is_dir():
        return
    if _is_path(name):
        raise InputError("no such folder", where=f"{option} {name}", next=f"This is {Path.cwd()}.")
    _check_id(option, name)


def _is_path(name: str) -> bool:
    """Not a hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _check_id(option: str, name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise InputError("neither a file or folder that is there nor a hub id", where=f"{option} {name}", expected="owner/name")
