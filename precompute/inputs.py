"""What makes the numbers, loaded side by side and checked against each other: rows, tokenizer, model, and the identity they give a store."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any

import torch
from transformers import PreTrainedModel

from precompute.clock import Clock
from precompute.config import PrecomputeConfig
from precompute.pairs import check_rows
from precompute.plan import default_shard_size
from precompute.rows.dataset import JoinedRows, Rows, check_and_fingerprint, load_rows
from precompute.scorer.api import (
    SCORER_VERSION,
    chat_template_sha256,
    config_sha256,
    library,
    load_model,
    load_tokenizer,
    refuse_dynamic,
    refuse_too_large,
    tokenizer_sha256,
    weights_sha256,
)
from store import ScoredTurns
from store.errors import InputError
from store.manifest import MAX_SHARDS, DatasetPart, Identity

ROWS_CHECKED_AT_A_TIME = 64

LONG_CHECK_S = 5
"""After the model is there, until the user is told what is waited for."""


def load_inputs(
    config: PrecomputeConfig,
    where: tuple[torch.device, ...],
    known_weights: str | None = None,
    say: Callable[[str], object] = print,
) -> tuple:
    """(rows, tokenizer, model on `where`, Identity): everything that makes the numbers, loaded, checked against each other and hashed.
    Where the hash of the weights is known (precompute/sealed.py) the model is None: there is nothing to score. `say` gets what is unusual about
    the model's checkpoint."""
    if known_weights is None:
        refuse_too_large(config.model, revision=config.revision, dtype=config.dtype, devices=where)
    given_up = Event()
    with ThreadPoolExecutor(3) as background, _set_at_the_end(given_up):
        needed = where[0].type == "cpu" and config.layout == "packed" and known_weights is None
        compiled = background.submit(library) if needed else None  # takes a second where it is the first time
        rows, parts = _load_all(config)
        fingerprint = background.submit(check_and_fingerprint, rows)  # while the model loads
        tokenizer = load_tokenizer(
            config.tokenizer,
            revision=config.revision if config.tokenizer == config.model else None,
            chat_template=config.chat_template,
        )
        clock = Clock(tokenizer, config.template_date)
        checked = None
        if known_weights is None or clock.may_be_asked:
            checked = background.submit(_check_every_row, rows, tokenizer, fingerprint, given_up, config.scored_turns)
        tokenizer_hash = background.submit(tokenizer_sha256, tokenizer)
        model = None
        if known_weights is None:
            model = load_model(
                config.model,
                revision=config.revision,
                dtype=config.dtype,
                device=where,
                attn_implementation=config.attn_implementation,
                say=say,
            )
        if checked is not None:
            if wait([checked], timeout=LONG_CHECK_S).not_done and config.show == "text":
                print(f"checking all {len(rows):,} rows before any is scored", file=sys.stderr)
            checked.result()
        shard_size = _shard_size(config, len(rows))
        identity = _identity(
            config,
            len(rows),
            parts,
            shard_size=shard_size,
            weights_sha256=known_weights or weights_sha256(model),
            tokenizer_sha256=tokenizer_hash.result(),
            chat_template_sha256=chat_template_sha256(tokenizer),
            dataset_fingerprint=fingerprint.result(),
            template_date=config.template_date if clock.asked else None,
        )
        if compiled is not None:
            compiled.result()
    if model is not None:
        _check_fits(model, len(tokenizer), config)
    return rows, tokenizer, model, identity


def _shard_size(config: PrecomputeConfig, num_rows: int) -> int:
    """Rows per shard. InputError for more shards than a store may have."""
    shard_size = config.shard_size or default_shard_size(num_rows)
    if num_rows > MAX_SHARDS * shard_size:
        raise InputError(
            "too many shards",
            where=f"--shard-size {shard_size}",
            expected=f"at least {-(-num_rows // MAX_SHARDS)} for {num_rows:,} rows",
        )
    return shard_size


def _identity(config: PrecomputeConfig, num_rows: int, parts: tuple[DatasetPart, ...] | None, **found: Any) -> Identity:
    """What the store is made of: what was asked for, and what was `found`, hashes above all."""
    return Identity(
        model=config.model,
        revision=config.revision,
        tokenizer=config.tokenizer,
        dataset=" + ".join(config.dataset),
        split=config.split,
        dataset_revision=config.dataset_revision,
        config_sha256=config_sha256(config.model, config.revision),
        num_rows=num_rows,
        max_length=config.max_length,
        truncation="keep_start",
        dtype=config.dtype,
        scorer_version=SCORER_VERSION,
        dataset_config=config.dataset_config,
        scored_turns=config.scored_turns,
        datasets=parts,
        **found,
    )


def _load_all(config: PrecomputeConfig) -> tuple[Rows | JoinedRows, tuple[DatasetPart, ...] | None]:
    """The rows of the dataset, or of all; and which are whose, where there are several."""
    found = [
        load_rows(
            name,
            split=config.split,
            config=config.dataset_config,
            revision=config.dataset_revision,
            limit=config.limit,
            options=config.columns,
        )
        for name in config.dataset
    ]
    if len(found) == 1:
        return found[0], None
    return JoinedRows(tuple(found)), tuple(DatasetPart(name, len(part)) for name, part in zip(config.dataset, found, strict=True))


def _check_every_row(
    rows: Rows | JoinedRows, tokenizer, fingerprint: Future, given_up: Event, scored_turns: ScoredTurns | None
) -> None:
    """InputError for a row that cannot be rendered: found now, not after hours. What the columns say comes first, in fewer words."""
    fingerprint.result()
    blocks = (range(first, min(first + ROWS_CHECKED_AT_A_TIME, len(rows))) for first in range(0, len(rows), ROWS_CHECKED_AT_A_TIME))
    check_rows(tokenizer, (row for block in blocks if not given_up.is_set() for row in rows.select(block).to_list()), scored_turns)


@contextlib.contextmanager
def _set_at_the_end(event: Event) -> Iterator[None]:
    """So that an error in the foreground need not wait for the background."""
    try:
        yield
    finally:
        event.set()


def _check_fits(model: PreTrainedModel, num_tokens: int, config: PrecomputeConfig) -> None:
    text_config = model.config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise InputError(
            "longer than the model's context", where=f"--max-length {config.max_length}", expected=f"at most {longest}"
        )
    refuse_dynamic(model, config.max_length)
    if num_tokens > model.get_input_embeddings().weight.shape[0]:
        raise InputError(
            "the tokenizer has more tokens than the model",
            where=f"--tokenizer {config.tokenizer}",
            expected=f"at most {model.get_input_embeddings().weight.shape[0]}",
            found=num_tokens,
            next="Pass the tokenizer that belongs to the model.",
        )
