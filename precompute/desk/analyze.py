"""What a dataset is like before anything is scored: lengths, what each max_length cuts, what sharing prefixes saves, formats and
traps.

    rows ──blocks──► worker processes: tokenize whole, measure (`_measure_block`) ──► one Analysis ──► analyze_view.py shows it

Rows are tokenized by pairs.py, as precompute does it, and batches are planned by packing.py: the numbers are those precompute will
meet.
"""

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from precompute.clock import Clock
from precompute.config import AnalyzeConfig
from precompute.pairs import TokenizedRows, tokenize_rows
from precompute.rows.dataset import load_rows
from precompute.scorer.api import load_tokenizer
from precompute.scorer.packing import common_prefix, plan
from store import ScoredTurns
from store.errors import InputError

WHOLE = 1 << 30
"""A max_length that cuts nothing."""

ROWS_PER_BLOCK = 256
"""Rows tokenized and packed together: a shard's worth, so that sharing between rows is counted as precompute meets it."""

ROWS_PER_PROCESS = 2000
"""Starting a process costs about as much as so many rows."""

ENOUGH = 0.95
"""The recommended max_length leaves at least this share of the pairs whole ..."""
LOST = 0.01
"""... and costs at most this share of the pairs, whose prompt alone fills it."""


@dataclass(frozen=True)
class AtMaxLength:
    """The dataset under one max_length. Counts are rows; tokens are what a model computes for all pairs that are left."""

    max_length: int
    fits: float
    """Share of pairs whose longer side is whole."""
    chosen_truncated: int
    rejected_truncated: int
    unscorable: int
    """No scored token of a side is within max_length, as where the prompt alone fills it, or the row has nothing to score at any."""
    lost: int
    """Of these, the pairs that a longer max_length would have."""
    cut_to_the_same: int
    """Pairs whose sides first differ behind max_length: no preference is left."""
    tokens_unshared: int
    """Prompt + chosen + prompt + rejected, without padding: what plain batches compute at least."""
    tokens_packed: int
    """The same with every shared prefix computed once, as precompute batches them."""
    tokens_padded: int
    """A training step's rows: both sides padded to the longer one, one pair per batch."""


@dataclass(frozen=True)
class Analysis:
    """Everything `analyze` found out. Shares and quantiles are over the pairs looked at."""

    config: AnalyzeConfig
    num_rows: int
    """Rows of the dataset (after --limit)."""
    num_looked_at: int
    num_pairs: int
    quantiles: dict[str, dict[str, int]]
    """prompt, chosen, rejected, longer side -> p50, p90, p95, p99, max; tokens. chosen and rejected without their prompt; of a choice of turns what is
    scored of them, too."""
    at: tuple[AtMaxLength, ...]
    formats: dict[str, int]
    counts: dict[str, int]
    """store.schema.COUNTS and `repeated`: rows whose content occurs before."""
    examples: dict[str, str]
    unscorable: dict[str, int]
    """Reason -> rows, at any max_length."""
    malformed: tuple[str, ...]
    """One line per row that precompute would refuse."""
    recommended: int | None
    """None: nothing looked at qualifies."""
    longer_side: np.ndarray
    """int64 [num_pairs], tokens of prompt + the longer completion."""
    parts: dict[str, np.ndarray]
    """prompt, chosen, rejected: int64 [num_pairs], for the histogram."""

    def scaled(self, tokens: int) -> float:
        """Tokens of the rows looked at, as tokens of the whole dataset."""
        return tokens * self.num_rows / max(1, self.num_looked_at)

    def to_json(self) -> dict:
        """Without the per-pair arrays."""
        skipped = ("longer_side", "parts", "config")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.config).items()}
        return plain | {"at": [asdict(each) for each in self.at], "config": config}


def analyze(config: AnalyzeConfig, progress: Callable[[int, int], None] | None = None) -> Analysis:
    """Tokenize the dataset's rows (or a sample) and measure them; `progress(done, total)` counts rows.

    Raises InputError for a dataset or tokenizer that cannot be read, and when not one row can be tokenized. Single malformed rows
    are listed.
    """
    rows = load_rows(
        config.dataset,
        split=config.split,
        config=config.dataset_config,
        revision=config.dataset_revision,
        limit=config.limit,
        options=config.columns,
    )
    tokenizer = load_tokenizer(config.tokenizer, revision=config.revision, chat_template=config.chat_template)
    Clock(tokenizer, date.today().isoformat())  # any day will do: one date is as long as another
    indices = _sampled(len(rows), config.sample)
    blocks = [indices[start : start + ROWS_PER_BLOCK] for start in range(0, len(indices), ROWS_PER_BLOCK)]
    measured = []
    done = 0
    for block in _in_processes((config, rows, tokenizer), blocks, len(indices)):
        measured.append(block)
        done += block.num_rows
        if progress is not None:
            progress(done, len(indices))
    return _add_up(config, len(rows), measured)


def _sampled(num_rows: int, sample: int | None) -> np.ndarray:
    """Row indices, ascending: all, or `sample` evenly spaced ones, since datasets are often sorted by their source."""
    if sample is None or sample >= num_rows:
        return np.arange(num_rows)
    return (np.arange(sample) * num_rows) // sample


LENGTHS = ("prompt", "chosen", "rejected", "same", "first", "chosen_scored", "rejected_scored")
"""Of a pair: tokens of its parts; that both full sequences begin with; before the first scored one, of the side that has more of them; scored ones."""


@dataclass
class _Block:
    """What a worker process sends back for one block of rows."""

    num_rows: int
    lengths: np.ndarray  # int64 [pairs, 7]: LENGTHS
    tokens_packed: list[int]  # one per max_length
    formats: Counter
    counts: Counter
    examples: dict[str, str]
    unscorable: Counter
    malformed: list[tuple[int, str]]
    pair_ids: list[str]


def _in_processes(work: tuple, blocks: list[np.ndarray], num_rows: int):
    """Measure the blocks, in order; in this process where others would not pay."""
    global _worker
    config = work[0]
    wanted = config.num_workers or min(os.cpu_count() or 1, max(1, num_rows // ROWS_PER_PROCESS))
    if wanted == 1:
        _worker = work
        yield from map(_measure_block, blocks)
        return
    # fork starts at once, as datasets.map does it; spawn would import torch again in every process
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(wanted, len(blocks)), mp_context=context, initializer=_start_worker, initargs=(work,)) as pool:
        yield from pool.map(_measure_block, blocks, chunksize=max(1, min(8, len(blocks) // (4 * wanted))))


_worker: tuple | None = None  # (config, rows, tokenizer) of this process


def _start_worker(work: tuple) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = work


def _measure_block(indices: np.ndarray) -> _Block:
    config, rows, tokenizer = _worker
    block_rows = rows.select(indices).to_list()
    tokens, malformed = _tokenize(tokenizer, block_rows, indices, config.scored_turns)
    full = [tuple(sequence.ids for sequence in pair.sequences) for pair in tokens.pairs]
    scored = [tuple(sequence.scored for sequence in pair.sequences) for pair in tokens.pairs]
    lengths = [
        (
            *(len(part) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)),
            common_prefix(*both),
            max(int(places[0]) for places in counted),
            *map(len, counted),
        )
        for pair, both, counted in zip(tokens.pairs, full, scored, strict=True)
    ]
    lengths = np.array(lengths, np.int64).reshape(-1, len(LENGTHS))
    packed = []
    for max_length in config.max_lengths:
        ids = [
            side[:max_length]
            for before, both in zip(lengths[:, LENGTHS.index("first")], full, strict=True)
            if before < max_length
            for side in both
        ]
        packed.append(sum(len(ids[index]) - 1 - shared for batch in plan(ids, config.tokens_per_batch) for index, shared in batch))
    return _Block(
        num_rows=len(indices),
        lengths=lengths,
        tokens_packed=packed,
        formats=Counter(trait for row in block_rows for trait in traits(row)),
        counts=tokens.counts,
        examples=tokens.examples,
        unscorable=Counter(each["reason"] for each in tokens.unscorable),
        malformed=malformed,
        pair_ids=[pair.pair_id for pair in tokens.pairs],
    )


def _tokenize(
    tokenizer, rows: list[dict], indices: np.ndarray, scored_turns: ScoredTurns | None
) -> tuple[TokenizedRows, list[tuple[int, str]]]:
    """The rows, tokenized whole. A malformed row stops precompute; here it is set aside with its message, and the others go on."""
    consecutive = len(indices) > 0 and indices[-1] - indices[0] == len(indices) - 1
    if consecutive:
        try:
            return tokenize_rows(tokenizer, rows, int(indices[0]), WHOLE, scored_turns), []
        except InputError:
            pass
    result, malformed = TokenizedRows(), []
    for index, row in zip(indices.tolist(), rows, strict=True):
        try:
            one = _tokenize_row(tokenizer, row, index, scored_turns)
        except InputError as error:
            malformed.append((index, str(error)))
            continue
        result.pairs += one.pairs
        result.unscorable += one.unscorable
        result.counts.update(one.counts)
        result.examples = one.examples | result.examples
    return result, malformed


def _tokenize_row(tokenizer, row: dict, index: int, scored_turns: ScoredTurns | None) -> TokenizedRows:
    for name in ("chosen", "rejected"):
        if not row[name] and row[name] != "":
            raise InputError(f"`{name}` is {'null' if row[name] is None else 'an empty list of turns'}", where=f"row {index}")
    return tokenize_rows(tokenizer, [row], index, WHOLE, scored_turns)


def traits(row: dict) -> list[str]:
    """How a row is written: its format and what makes rows harder than the plain case. Any row that loads has a format."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if not isinstance(chosen, list):
        return ["plain text, explicit prompt" if isinstance(prompt, str) else "plain text, implicit prompt"]
    if isinstance(prompt, list):
        found = ["conversation, explicit prompt"]
    elif isinstance(prompt, str):
        found = ["conversation that repeats a string prompt (Dolci-Think)"]
    else:
        found = ["conversation, implicit prompt"]
    turns = [turn for turn in [*(prompt if isinstance(prompt, list) else []), *chosen] if isinstance(turn, dict)]
    roles = Counter(turn.get("role") for turn in turns)
    marks = {
        "multi-turn": roles["user"] > 1,
        "system turn": roles["system"] > 0 or roles["developer"] > 0,
        "tool turns": any(roles[role] for role in ("tool", "function", "ipython", "environment")),
        "tools": bool(row.get("tools")),
        "chat_template_kwargs": bool(row.get("chat_template_kwargs")),
    }
    return found + [name for name, holds in marks.items() if holds]


def _add_up(config: AnalyzeConfig, num_rows: int, blocks: list[_Block]) -> Analysis:
    lengths = np.concatenate([block.lengths for block in blocks])
    malformed = [line for block in blocks for _, line in block.malformed]
    if not len(lengths) and malformed:
        raise InputError(f"not one row can be tokenized; the first: {malformed[0]}", where=f"--dataset {config.dataset}")
    if not len(lengths):
        reasons = sum((block.unscorable for block in blocks), Counter())
        raise InputError(f"no row has anything to score: {reasons.most_common(1)[0][0]}", where=f"--dataset {config.dataset}")
    counts, formats, unscorable = (
        sum((getattr(block, name) for block in blocks), Counter()) for name in ("counts", "formats", "unscorable")
    )
    examples: dict[str, str] = {}
    for block in blocks:
        examples = block.examples | examples
    repeated = sum(count - 1 for count in Counter(id_ for block in blocks for id_ in block.pair_ids).values())
    if repeated:
        counts["repeated"] = repeated
    packed = np.sum([block.tokens_packed for block in blocks], axis=0).tolist()
    at = _at_each(config, lengths, packed, unscorable.total())
    fitting = [each for each in at if each.fits >= ENOUGH and each.lost <= LOST * len(lengths)]
    longer = lengths[:, 0] + lengths[:, 1:3].max(axis=1)
    return Analysis(
        config=config,
        num_rows=num_rows,
        num_looked_at=sum(block.num_rows for block in blocks),
        num_pairs=len(lengths),
        quantiles=_quantiles(lengths, QUANTILES | (QUANTILES_OF_TURNS if config.scored_turns else {})),
        at=at,
        formats=dict(formats.most_common()),
        counts=dict(counts.most_common()),
        examples=examples,
        unscorable=dict(unscorable.most_common()),
        malformed=tuple(malformed),
        recommended=fitting[0].max_length if fitting else None,
        longer_side=longer,
        parts={name: lengths[:, column] for column, name in enumerate(("prompt", "chosen", "rejected"))},
    )


AT_MAX_LENGTH = """
select
    avg((prompt + greatest(chosen, rejected) <= $max_length)::int) as fits,
    count(*) filter (first < $max_length and prompt + chosen > $max_length) as chosen_truncated,
    count(*) filter (first < $max_length and prompt + rejected > $max_length) as rejected_truncated,
    count(*) filter (first >= $max_length) + $never as unscorable,
    count(*) filter (first >= $max_length) as lost,
    count(*) filter (first < $max_length and same >= $max_length) as cut_to_the_same,
    coalesce(sum(least(prompt + chosen, $max_length) + least(prompt + rejected, $max_length))
        filter (first < $max_length), 0)::bigint as tokens_unshared,
    coalesce(sum(2 * least(prompt + greatest(chosen, rejected), $max_length)) filter (first < $max_length), 0)::bigint as tokens_padded
from pairs
"""

QUANTILES = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "longer side": "prompt + greatest(chosen, rejected)"}

QUANTILES_OF_TURNS = {"chosen, scored": "chosen_scored", "rejected, scored": "rejected_scored"}


def _query(lengths: np.ndarray, sql: str, values: dict) -> list[dict]:
    with duckdb.connect() as connection:
        connection.register("pairs", pa.table(dict(zip(LENGTHS, lengths.T.copy(), strict=True))))
        cursor = connection.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _quantiles(lengths: np.ndarray, parts: dict[str, str]) -> dict[str, dict[str, int]]:
    """`parts`: what each is called -> SQL."""
    asked = ", ".join(f"quantile_disc({sql}, [0.5, 0.9, 0.95, 0.99, 1])" for sql in parts.values())
    found = _query(lengths, f"select [{asked}] as at from pairs", {})[0]["at"]
    return {part: dict(zip(("p50", "p90", "p95", "p99", "max"), at, strict=True)) for part, at in zip(parts, found, strict=True)}


def _at_each(config: AnalyzeConfig, lengths: np.ndarray, packed: list[int], never: int) -> tuple[AtMaxLength, ...]:
    return tuple(
        AtMaxLength(
            max_length=max_length,
            tokens_packed=tokens,
            **_query(lengths, AT_MAX_LENGTH, {"max_length": max_length, "never": never})[0],
        )
        for max_length, tokens in zip(config.max_lengths, packed, strict=True)
    )
