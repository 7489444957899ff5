"""TRL's cache of reference log-probs -> a store, after checking that it belongs to this model and dataset.

The cache (an Arrow file with ref_chosen_logps and ref_rejected_logps, one row per pair that TRL kept) says nothing about what made
it. So the rows are tokenized here, counted against it, and some pairs are scored again. What single tokens contribute is not in it: those
log-probs are null in the store, whose scorer version says so; `train` uses the sums and refuses what needs more.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from precompute.config import PrecomputeConfig
from precompute.inputs import load_inputs
from precompute.pairs import Pair, tokenize_rows
from precompute.rows.source_columns import Beside, SourceColumns
from precompute.scorer.api import TOLERANCE, named_kernel, score, self_test, use_kernel
from precompute.scorer.packing import Sequence
from precompute.shard import shard_of
from store.errors import InputError
from store.folder import missing_shards, prepare_store, settle_source_columns
from store.manifest import Identity, Manifest, ShardReport
from store.schema import SCHEMA, SUMS_ONLY, without_token_logps
from store.seal import seal
from store.shard import publish_shard

NAMES = ("ref_chosen_logps", "ref_rejected_logps")


def import_trl(
    config: PrecomputeConfig,
    cache: Path,
    devices: tuple[torch.device, ...],
    num_pairs: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make the store `config.ref_store` from TRL's `cache` for the same dataset, model and max_length.

    InputError for a file that is no such cache, has another number of pairs, or disagrees with the model on `num_pairs` random
    pairs.
    """
    cached = read_cache(cache)
    use_kernel(config.attention_kernel, layout=config.layout, device=devices[0], dtype=config.dtype)
    rows, tokenizer, model, identity = load_inputs(config, devices)
    identity = replace(identity, scorer_version=SUMS_ONLY)
    blocks = [
        tokenize_rows(tokenizer, rows.select(identity.rows_of(i)).to_list(), identity.rows_of(i).start, config.max_length)
        for i in range(identity.num_shards)
    ]
    pairs = [pair for block in blocks for pair in block.pairs]
    if len(pairs) != len(cached):
        raise InputError(
            "not a cache of these rows under this max_length",
            where=f"--cache {cache}",
            expected=f"{len(pairs):,} pairs",
            found=f"{len(cached):,}",
            next="Pass the dataset, split, tokenizer, template and --max-length that TRL was given.",
        )
    with named_kernel(config.attention_kernel):
        self_test(model, config.dtype, layout=config.layout, tokens_per_batch=_budget(config))
    _check_numbers(model, config, pairs, cached, num_pairs, cache)
    command = config.command()
    prepare_store(config.ref_store, identity, command)
    offered = SourceColumns.of(rows)
    beside = Beside(rows, offered, settle_source_columns(config.ref_store, offered.columns))
    missing = set(missing_shards(config.ref_store, identity))
    first = 0
    for index, block in enumerate(blocks):
        stop = first + len(block.pairs)
        if index in missing:
            publish_shard(config.ref_store, identity, *_shard(identity, index, block, cached[first:stop], beside), {})
        first = stop
        if progress is not None:
            progress(index + 1, len(blocks))
    return seal(
        config.ref_store,
        identity,
        {"imported_from": f"TRL's cache {cache.name}", "command": command.to_json()},
        config.preset,
    )


def read_cache(path: Path) -> np.ndarray:
    """float64 [pairs, 2]: chosen and rejected sums. InputError if the file is no such cache."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot be read as an Arrow stream: {str(error).splitlines()[0]}", where=f"--cache {path}") from error
    missing = [name for name in NAMES if name not in table.column_names]
    if missing:
        raise InputError(
            "not TRL's cache",
            where=f"--cache {path}",
            expected=f"columns {' and '.join(NAMES)}",
            found=", ".join(table.column_names),
        )
    wrong = [f"{name}: {kind}" for name in NAMES if not pa.types.is_floating(kind := table.schema.field(name).type)]
    if wrong:
        raise InputError(
            "not TRL's cache", where=f"--cache {path}", expected="columns of floating-point numbers", found=", ".join(wrong)
        )
    values = np.stack([table[name].to_numpy().astype(np.float64) for name in NAMES], axis=1)
    if not np.isfinite(values).all():
        raise InputError("a value is not finite", where=f"--cache {path}, pair {int(np.argwhere(~np.isfinite(values))[0][0])}")
    return values


def _budget(config: PrecomputeConfig) -> int:
    """Tokens per batch of the check: padded, each sequence stands alone."""
    return 1 if config.layout == "padded" else config.tokens_per_batch


def _check_numbers(
    model: PreTrainedModel, config: PrecomputeConfig, pairs: list[Pair], cached: np.ndarray, num_pairs: int, cache: Path
) -> None:
    chosen = sorted(np.random.default_rng(0).choice(len(pairs), size=min(num_pairs, len(pairs)), replace=False).tolist())
    sequences: list[Sequence] = [sequence for index in chosen for sequence in pairs[index].sequences]
    now = score(model, sequences, layout=config.layout, tokens_per_batch=_budget(config))
    stored = cached[chosen].reshape(-1)
    off = [abs(float(new.sum(dtype=np.float64)) - old) / len(new) for new, old in zip(now, stored, strict=True)]
    if not np.mean(off) <= TOLERANCE[config.dtype]:
        worst = pairs[chosen[int(np.argmax(off)) // 2]].row
        raise InputError(
            f"these are not the log-probs of this model: {len(chosen)} random pairs are off by {np.mean(off):.2g} nats per token",
            where=f"--cache {cache}",
            expected=f"at most {TOLERANCE[config.dtype]:g} in {config.dtype}",
            found=f"{max(off):.2g} on row {worst}",
            next="Pass the model, dtype and dataset order that TRL was given, or score with precompute.",
        )


def _shard(identity: Identity, index: int, block, sums: np.ndarray, beside: Beside) -> tuple[ShardReport, pa.Table]:
    """`sums`: float64 [pairs, 2], chosen and rejected."""
    unknown = [[np.zeros(len(ids), np.float32) for ids in (pair.chosen_ids, pair.rejected_ids)] for pair in block.pairs]
    report, table = shard_of(
        identity,
        index,
        block,
        [each[0] for each in unknown],
        [each[1] for each in unknown],
        0,
        *beside.of([pair.row for pair in block.pairs]),
    )
    for side, name in enumerate(NAMES):
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), pa.array(sums[:, side], pa.float64()))
    return report, without_token_logps(table)
