"""`cli.py submit` before sbatch: both phases' options parsed by their own commands and checked, so that no job ends at its first line."""

import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from precompute.config import completed
from precompute.start import first_of_train
from presets import Preset
from slurm.check import check_precompute, check_train
from slurm.submit import Resources, Submission
from store.errors import InputError
from train.start import config_of

Parse = Callable[[str, list[str]], dict[str, Any]]
"""A phase's name and its words -> its options, as its own command reads them."""


def plan(parse: Parse, options: dict[str, Any]) -> Submission:
    """The two jobs. `options`: SubmitConfig's, and those of Resources for both phases (`gpus`) and for one (`train_gpus`). InputError, or
    StoreError for a store that is there and does not fit."""
    options, dataset, ref_store = dict(options), options["dataset"], options["ref_store"]
    for name in [name for name in options if name.endswith("_args")]:
        options[name] = _words(f"--{name.replace('_', '-')}", options[name])
    phase_1, phase_2 = (_resources(phase, options) for phase in ("precompute", "train"))
    datasets = [word for each in dataset for word in ("--dataset", each)]
    given = _parsed(
        parse,
        "precompute",
        [*datasets, *([] if ref_store is None else ["--ref-store", str(ref_store)])],
        options["precompute_args"],
        ours=("--dataset", "--ref-store", "--num-workers"),
    )
    given.pop("num_workers")
    try:
        preset, reference = completed(given)
    except InputError as error:
        raise InputError(error.what, where=f"--dataset {' + '.join(dataset)}, --precompute-args", next=error.next) from error
    check_precompute(reference, preset)
    if phase_1.num_gpus % reference["gpus_per_worker"]:
        raise InputError(
            "some GPUs of a node would do nothing",
            where=f"--precompute-args --gpus-per-worker {reference['gpus_per_worker']}",
            expected=f"a divisor of {phase_1.num_gpus}, the GPUs per node of phase 1",
        )
    ref_store = reference["ref_store"]

    first = first_of_train(ref_store, reference["chat_template"], reference["layout"], options["train_args"])
    given = _parsed(parse, "train", first, options["train_args"], ours=("--ref-store", "--num-processes"))
    for name in ("num_processes", "resume", "resume_or_start", "overwrite"):
        given.pop(name)
    config = config_of(given, preset or Preset)
    ranks = int(os.environ.get("REFDPO_RANKS_PER_NODE", phase_2.num_gpus))
    check_train(config, reference, world=phase_2.nodes * max(1, ranks))
    return Submission(
        folder=Path.cwd(),
        ref_store=ref_store,
        precompute_options=(*datasets, "--ref-store", str(ref_store), *options["precompute_args"]),
        train_options=(*first, *options["train_args"]),
        precompute=phase_1,
        train=phase_2,
        array=options["array"],
    )


def _words(option: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"cannot be split into words: {error}", where=option) from error


def _resources(phase: str, options: dict[str, Any]) -> Resources:
    """What one phase asks for: its own option where there is one, else that of both."""
    chosen = {}
    for name in [each.name for each in fields(Resources) if each.name in options]:
        own = options[f"{phase}_{name}"]
        chosen[name] = options[name] + own if name == "sbatch_args" else options[name] if own is None else own
    return Resources(nodes=options[f"{phase}_nodes"], **chosen)


def _parsed(parse: Parse, phase: str, first: list[str], more: tuple[str, ...], ours: tuple[str, ...]) -> dict[str, Any]:
    """`first` and the further options of a phase as its own command parses them. InputError for what it refuses, and for `ours` among the
    further ones."""
    if taken := [word for word in more if word.partition("=")[0] in ours]:
        raise InputError(
            "is not for these", where=f"--{phase}-args {taken[0]}", next="It follows from the options of submit itself."
        )
    return parse(phase, [*first, *more])
