"""What a run will do, settled and checked from its options, the stores and the output folder alone: in a second, before anything is loaded.

The command line makes a plan before it starts any rank, and each rank makes it again. Needs neither torch nor transformers.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from precompute.scorer.adapter import adapter_of
from precompute.scorer.decoder import lazy_decoder
from store.errors import InputError, StoreError
from store.manifest import Identity, shown
from store.reader import Store, open_store
from store.select import Selection, select
from train import record
from train.config import TrainConfig
from train.data import fitting
from train.zero import refuse_contradictions

COMPARED = ("weights_sha256", "config_sha256", "tokenizer_sha256", "chat_template_sha256", "dtype", "scored_turns")
"""Fields of a store's identity that the policy and an eval store must share."""


@dataclass(frozen=True)
class Policy:
    """Where the policy and its tokenizer are loaded from."""

    name: str
    revision: str | None
    tokenizer: str
    tokenizer_revision: str | None
    dtype: str


@dataclass(frozen=True)
class Plan:
    """One run, as every rank knows it before it loads anything."""

    store: Store
    selection: Selection
    train: np.ndarray
    """Positions in `store`, int32 [pairs], in the order asked for."""
    evals: dict[str, tuple[Store, np.ndarray]]
    """What is evaluated, by name (empty: it needs none): a store, and positions in it."""
    max_length: int
    policy: Policy
    accumulation: int | None
    """Micro-batches per optimizer step and rank; None: by tokens, as lengths decide (train/bins.py)."""
    batch: int
    """Pairs per optimizer step, over all ranks."""
    checkpoint: Path | None
    """To resume from."""
    course: dict
    """What run.json says of the run before step 1."""


def plan(config: TrainConfig, world: int, check: str = "none") -> Plan:
    """For `world` ranks. `check` as in `open_store`. Raises InputError or StoreError for all that can be refused without a model,
    but for what is in the output folder: `refuse_folder`."""
    accumulation = config.accumulation_steps(world)
    checkpoint = record.checkpoint_of(config)
    store = open_store(config.ref_store, check=check)
    max_length = config.max_length or store.identity.max_length
    decode = lazy_decoder(config.ref_store, config.tokenizer)
    selection = select(
        config.ref_store, config.where, config.order_by, config.eval_fraction, decode, config.where_file, config.weight
    )
    train = fitting(store, max_length, config.ld_alpha, selection.train)
    evals = {}
    if config.eval_fraction is not None:
        evals[""] = (store, fitting(store, max_length, config.ld_alpha, selection.eval))
    for name, path in config.eval_stores.items():
        eval_store = open_store(path, check=check)
        compare_stores(eval_store, store)
        evals[name] = (eval_store, fitting(eval_store, max_length, config.ld_alpha))
    if store.identity.scored_turns and "sft" in config.loss_type and accumulation is None:
        raise InputError(
            "sft with micro-batches by tokens weighs whole completions, and the store has the log-probs of some turns",
            where=f"--loss-type {','.join(config.loss_type)}, {store.path}",
            next="Add --per-device-train-batch-size 1.",
        )
    policy = policy_of(config, store.identity)
    for option, name in (("--policy", policy.name), ("--tokenizer", policy.tokenizer)):
        refuse_missing_folder(option, name, store)
    if Path(policy.name).is_dir():  # of a hub's, whoever loads it says what is wrong
        adapter_of(policy.name)
    batch = config.pairs_per_step(world)
    refuse_contradictions(config, policy.dtype, accumulation, batch)
    course = record.started(config, store.identity, asdict(policy), max_length, batch) | {
        "selection": selection.to_json(),
        "num_pairs": len(train),
        "num_eval_pairs": sum(len(rows) for _, rows in evals.values()),
        "world_size": world,
    }
    return Plan(store, selection, train, evals, max_length, policy, accumulation, batch, checkpoint=checkpoint, course=course)


def refuse_folder(config: TrainConfig, planned: Plan) -> None:
    """InputError where the output folder holds another run, or one that cannot go on as is planned."""
    if planned.checkpoint is None:
        record.refuse_other_run(config.output_dir)
    else:
        record.refuse_damaged(planned.checkpoint, config)
        record.compare_with_started(planned.checkpoint, planned.course)


def refuse_other_course(config: TrainConfig) -> None:
    """InputError where the finished run in the output folder is not the one that is asked for: it would not be done."""
    then = record.finished(config.output_dir)
    # The number of ranks is free: where the global batch follows from it, it is taken from then.
    world = then.get("world_size", 1)
    record.compare_with_run(config.output_dir, plan(replace(config, resume=False), world).course)


def policy_of(config: TrainConfig, identity: Identity) -> Policy:
    """What to load: the store's own model and tokenizer, unless the configuration names others."""
    if config.policy is None:
        name, revision, tokenizer = identity.model, identity.revision, config.tokenizer or identity.tokenizer
    else:
        name, revision, tokenizer = config.policy, config.revision, config.tokenizer or config.policy
    return Policy(
        name=name,
        revision=revision,
        tokenizer=tokenizer,
        tokenizer_revision=revision if tokenizer == name else None,
        dtype=config.dtype or identity.dtype,
    )


def refuse_missing_folder(option: str, name: str, store: Store) -> None:
    """InputError for a path that is not there. A hub id, owner/name at most, is left to those who load it."""
    if Path(name).is_dir() or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return
    raise InputError(
        "no such folder",
        where=f"{option} {name}",
        found=f"{store.path} was made with it" if name in (store.identity.model, store.identity.tokenizer) else None,
        next=f"Give its present place with {option}.",
    )


def compare_stores(eval_store: Store, store: Store) -> None:
    """StoreError unless both stores were made by the same model and tokenizer in the same dtype."""
    of_eval, of_train = eval_store.identity, store.identity
    differing = [name for name in COMPARED if getattr(of_eval, name) != getattr(of_train, name)]
    if differing:
        as_loaded = (
            " Weights hash as loaded: in another dtype the same ones differ." if {"weights_sha256", "dtype"} <= {*differing} else ""
        )
        raise StoreError(
            f"the eval store was made with another {', '.join(differing)} than {store.path}",
            where=eval_store.path,
            expected="; ".join(shown(name, of_train) for name in differing),
            found="; ".join(shown(name, of_eval) for name in differing),
            next=f"Make the eval store with --model {of_train.model} --dtype {of_train.dtype} and the same tokenizer and template.{as_loaded}",
        )
