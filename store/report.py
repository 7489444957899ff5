"""A store as one HTML page that needs no network, with the pictures it is made of beside it; alone, or compared with another store.

    runs/report/think/index.html, lengths.png, margins.png, …

The questions are SQL over the store's columns. Text to read is decoded by a function the caller brings: a store holds ids, no
tokenizer. Each token of it is shaded by its log-prob, or by how far the other store's is from it.
"""

import base64
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from store.disk import refusal
from store.errors import InputError
from store.manifest import NAMES, Identity
from store.reader import SHORT_COLUMNS, Store, open_store
from store.report_page import render
from store.report_pictures import compared, pictures
from store.schema import COUNTS, SUMS_ONLY_NOTE
from store.spans import SCORED, TURNS, num_scored, num_scored_sql
from store.sql import quoted
from store.text import Decode, pieces

TOKENS_SAMPLED = 2048
"""Pairs whose per-token values are looked at, in blocks of one row group, evenly spaced: all tokens of a large store are
gigabytes."""

BLOCK = 64

EXTREMES = 3
"""Pairs shown at each end."""

SHOWN = 1500
"""Characters of a text shown."""

VALUES = """
create view pairs as select *,
    ref_chosen_logps - ref_rejected_logps as margin,
    ref_chosen_logps / {num_chosen} as chosen_mean, ref_rejected_logps / {num_rejected} as rejected_mean,
    chosen_mean - rejected_mean as mean_margin
from short
"""

SUMMARY = """
select count(*) as num_pairs,
    quantile_cont(margin, [0.05, 0.25, 0.5, 0.75, 0.95]) as margins,
    quantile_cont(mean_margin, [0.05, 0.25, 0.5, 0.75, 0.95]) as mean_margins,
    avg((margin > 0)::int) as prefers, avg((mean_margin > 0)::int) as mean_prefers,
    avg(chosen_truncated::int) as chosen_truncated, avg(rejected_truncated::int) as rejected_truncated,
    avg((num_chosen_tokens > num_rejected_tokens)::int) as chosen_longer,
    corr(margin, num_chosen_tokens - num_rejected_tokens) as margin_with_length,
    quantile_disc(num_prompt_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as prompt,
    quantile_disc(num_chosen_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as chosen,
    quantile_disc(num_rejected_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as rejected
from pairs
"""

GROUPS = 12
"""Values of a column of the source that are shown, the most frequent first. A column with more than GROUPS_AT_MOST is no grouping."""

GROUPS_AT_MOST = 100

BY_SOURCE = """
select beside.{column}::varchar as value, count(*) as num_pairs, median(num_chosen_tokens) as chosen, median(num_rejected_tokens) as rejected,
    avg((margin > 0)::int) as prefers, avg((mean_margin > 0)::int) as mean_prefers, median(margin) as margin, median(mean_margin) as mean_margin
from pairs join beside using (row) group by all order by num_pairs desc, value
"""

JOINED = """
create table joined as
with mine as (select * from pairs qualify row_number() over (partition by pair_id order by row) = 1),
    others as (select * from other_pairs qualify row_number() over (partition by pair_id order by row) = 1)
select pair_id, mine.row as row, others.row as other_row, mine.margin as margin, others.margin as other_margin,
    mine.mean_margin as mean_margin, others.mean_margin as other_mean_margin,
    others.ref_chosen_logps - mine.ref_chosen_logps as chosen_difference,
    others.ref_rejected_logps - mine.ref_rejected_logps as rejected_difference,
    mine.num_chosen_tokens = others.num_chosen_tokens and mine.num_rejected_tokens = others.num_rejected_tokens as same_counts
from mine join others using (pair_id)
"""

COMPARED = """
select count(*) as both, (select count(distinct pair_id) from pairs) - count(*) as only_here,
    (select count(distinct pair_id) from other_pairs) - count(*) as only_there,
    avg(same_counts::int) as same_counts,
    avg(((margin > 0) <> (other_margin > 0))::int) as flipped, avg(((mean_margin > 0) <> (other_mean_margin > 0))::int) as mean_flipped,
    corr(margin, other_margin) as correlation, corr(mean_margin, other_mean_margin) as mean_correlation,
    quantile_cont(other_margin - margin, [0.05, 0.25, 0.5, 0.75, 0.95]) as margin_change,
    quantile_cont(chosen_difference, [0.05, 0.25, 0.5, 0.75, 0.95]) as chosen_change,
    quantile_cont(rejected_difference, [0.05, 0.25, 0.5, 0.75, 0.95]) as rejected_change,
    max(abs(chosen_difference)) as largest_chosen, max(abs(rejected_difference)) as largest_rejected
from joined
"""

LOGP_STEPS = (math.log(0.5), math.log(0.1), math.log(0.01), math.log(0.001))
"""A token below one of these, in nats, is a shade darker: probabilities of a half, a tenth, a hundredth, a thousandth."""

CHANGE_STEPS = (0.25, 0.5, 1.0, 2.0)
"""The same for |difference| in nats. The first is above what rounding in bfloat16 moves most tokens by."""


@dataclass(frozen=True)
class Piece:
    """A token to read; several where they make one character."""

    text: str
    shade: str
    """Class in the page: "" or l1 … l4 by log-prob; u1 … u4 (higher there), d1 … d4 (lower there) by difference."""
    title: str
    """Its numbers."""


@dataclass(frozen=True)
class Extreme:
    """Pairs at one end, to read."""

    title: str
    pairs: tuple[dict, ...]
    """pair_id, row, value, the text `prompt`, and of chosen and rejected: the Pieces, and what was left out at the end."""
    by_difference: bool = False
    """Shades say how far the other store's log-probs are from these."""


@dataclass(frozen=True)
class Facts:
    """What the page says of one store."""

    store: Store
    summary: dict
    extremes: tuple[Extreme, ...]
    pictures: dict[str, bytes]
    """File name -> PNG."""
    groups: tuple[tuple[str, tuple[dict, ...], int], ...] = ()
    """(column of the source, its most frequent values with what is known of their pairs, how many values it has)."""


@dataclass(frozen=True)
class Comparison:
    """What the page says of two stores, joined by pair_id."""

    other: Store
    summary: dict
    identity: tuple[tuple[str, object, object, bool], ...]
    """(field, here, there, compared and different)."""
    extremes: tuple[Extreme, ...]


def report(path: Path, folder: Path, decode: Decode | None = None, other: Path | None = None) -> Path:
    """Write the report on the sealed store at `path` into `folder`; return the page. `other` is a store to compare it with.

    InputError for stores without a common pair, StoreError for one that is unsealed or damaged or a folder that cannot be written.
    """
    store = open_store(path)
    other_store = open_store(other) if other is not None else None
    connection = _connect(store)
    facts = Facts(store, _one(connection, SUMMARY), (), {})
    note = SUMS_ONLY_NOTE if store.identity.sums_only else None
    comparison = None
    if store.num_pairs:
        facts = Facts(
            store,
            facts.summary,
            _extremes(connection, store, decode),
            pictures(connection, store.identity.max_length, note is None),
            tuple(_groups(connection, store)),
        )
    if other_store is not None:
        comparison = _compare(connection, store, other_store, decode)
        facts.pictures.update(compared(connection))
    embedded = {name: base64.b64encode(png).decode() for name, png in facts.pictures.items()}
    page = render(
        facts=facts,
        comparison=comparison,
        pictures=embedded,
        counts=COUNTS,
        decoded=decode is not None,
        sums_only=note,
        turns=TURNS.get(store.identity.scored_turns or ""),
        change_steps=CHANGE_STEPS,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in facts.pictures.items():
            (folder / name).write_bytes(png)
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise refusal(error, folder, "--output-dir") from error
    return folder / "index.html"


def _connect(store: Store) -> duckdb.DuckDBPyConnection:
    """Tables: `short` (the columns of one value per pair), `pairs` (with margins) and `sampled` (all columns of some pairs)."""
    connection = duckdb.connect()
    connection.register("short", _short(store))
    connection.register("sampled", store.read(_sampled(store.num_pairs), ["pair_id", "chosen_token_logps", "rejected_token_logps"]))
    connection.execute(_values(store))
    return connection


def _short(store: Store) -> pa.Table:
    """The columns of one value per pair, and the spans of what was scored."""
    return store.columns((*SHORT_COLUMNS, *SCORED.values())) if store.identity.scored_turns else store.lengths()


def _values(store: Store) -> str:
    return VALUES.format(**{f"num_{side}": num_scored_sql(side, store.identity.scored_turns) for side in SCORED})


def _groups(connection: duckdb.DuckDBPyConnection, store: Store) -> Iterator[tuple[str, tuple[dict, ...], int]]:
    """The columns of the source by which the pairs fall into groups: texts and truth values, of few kinds."""
    names = [column.name for column in store.source_columns if column.type in ("string", "bool")]
    if not names:
        return
    connection.register("beside", store.columns(["row", *names]))
    for name in names:
        column = quoted(name)
        (count,) = connection.execute(f"select count(distinct {column}) from beside").fetchall()[0]
        if 2 <= count <= GROUPS_AT_MOST and 2 * count <= store.num_pairs:
            yield name, tuple(_all(connection, f"{BY_SOURCE.format(column=column)} limit {GROUPS}")), count


def _sampled(num_pairs: int) -> list[int]:
    """Positions: everything in a small store, else whole row groups evenly spaced."""
    if num_pairs <= TOKENS_SAMPLED:
        return list(range(num_pairs))
    blocks = TOKENS_SAMPLED // BLOCK
    starts = [index * (num_pairs // BLOCK) // blocks * BLOCK for index in range(blocks)]
    return [start + offset for start in starts for offset in range(BLOCK)]


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> dict:
    return _all(connection, sql)[0]


def _all(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict]:
    cursor = connection.execute(sql)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _extremes(connection: duckdb.DuckDBPyConnection, store: Store, decode: Decode | None) -> tuple[Extreme, ...]:
    ends = {
        "The reference prefers chosen most (sum)": "margin desc",
        "The reference prefers rejected most (sum)": "margin",
        "The same per token: chosen most": "mean_margin desc",
        "The same per token: rejected most": "mean_margin",
    }
    return tuple(
        Extreme(
            title,
            _read(
                connection, store, decode, f"select row, {by.split()[0]} as value from pairs order by {by}, row limit {EXTREMES}"
            ),
        )
        for title, by in ends.items()
    )


def _read(
    connection: duckdb.DuckDBPyConnection, store: Store, decode: Decode | None, sql: str, other: Store | None = None
) -> tuple[dict, ...]:
    """The pairs that `sql` names (row, value, …), with their texts; of `other` (and other_row), what its tokens have."""
    found = _all(connection, sql)
    names = [
        "pair_id",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "num_chosen_tokens",
        "num_rejected_tokens",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_token_logps",
        "rejected_token_logps",
        *(SCORED.values() if store.identity.scored_turns else ()),
    ]
    beside = [column.name for column in store.source_columns]
    pairs = _pairs_of_rows(store, [each["row"] for each in found], [*names, *beside])
    others = [None] * len(pairs) if other is None else _pairs_of_rows(other, [each["other_row"] for each in found], names)
    return tuple(
        each
        | pair
        | {
            "source": {
                column.name: _end(str(pair[column.name])) for column in store.source_columns if pair[column.name] is not None
            }
        }
        | {f"num_{side}_tokens": num_scored(pair[spans]) for side, spans in SCORED.items() if spans in pair}
        | {"prompt": _end(decode(pair["prompt_ids"]) if decode is not None else " ".join(map(str, pair["prompt_ids"])))}
        | {side: _completion(pair, side, decode, there) for side in ("chosen", "rejected")}
        for each, pair, there in zip(found, pairs, others, strict=True)
    )


def _pairs_of_rows(store: Store, rows: list[int], names: list[str]) -> list[dict]:
    position = {row: index for index, row in enumerate(store.columns(["row"])["row"].to_pylist())}
    return store.read([position[row] for row in rows], names).to_pylist()


def _end(text: str) -> str:
    """Of a prompt the end matters most."""
    return text if len(text) <= SHOWN else "… " + text[-SHOWN:]


def _completion(pair: dict, side: str, decode: Decode | None, there: dict | None) -> dict:
    """{pieces, more}: the beginning of a completion, and what is said of the rest. `there`: the same pair in the other store."""
    ids, logps = pair[f"{side}_ids"], pair[f"{side}_token_logps"]
    same = there is not None and there["prompt_ids"] == pair["prompt_ids"] and _agree(there[f"{side}_ids"], ids)
    others = there[f"{side}_token_logps"] if there is not None and same else []
    if decode is not None:
        found = pieces(ids, decode, pair["prompt_ids"])
    else:
        found = ((1, f"{id_} ") for id_ in ids)
    shown, first, length = [], 0, 0
    for count, text in found:
        if length + len(text) > SHOWN:
            break
        tokens = slice(first, first + count)
        shown.append(Piece(text, *_shade(ids[tokens], logps[tokens], others[tokens] if there is not None else None)))
        first, length = first + count, length + len(text)
    more = f"… {len(ids) - first:,} more tokens" if first < len(ids) else ""
    if there is not None and not same:
        more += " (other tokens there: not compared)"
    return {"pieces": shown, "more": more}


def _agree(one: list[int], other: list[int]) -> bool:
    """Whether they are the same tokens, as far as both go: one store may have been cut earlier."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _shade(ids: list[int], logps: Sequence[float | None], others: Sequence[float | None] | None) -> tuple[str, str]:
    """(class, title) of one piece; several tokens count together. `others`: what the other store has, None where none is compared with."""
    tokens = "token " + " ".join(map(str, ids))
    known = [each for each in logps if each is not None]
    if len(known) < len(logps):
        return "", tokens
    logp = sum(known)
    if others is None:
        step = sum(logp < limit for limit in LOGP_STEPS)
        return (f"l{step}" if step else ""), f"{tokens}: {logp:.3f}"
    there = [each for each in others if each is not None]
    if len(there) < max(len(logps), len(others)):
        return "", f"{tokens}: {logp:.3f} here"
    change = sum(there) - logp
    step = bisect_right(CHANGE_STEPS, abs(change))
    shade = f"{'u' if change > 0 else 'd'}{step}" if step else ""
    return shade, f"{tokens}: {logp:.3f} here, {sum(there):.3f} there, {change:+.3f}"


def _compare(connection: duckdb.DuckDBPyConnection, store: Store, other: Store, decode: Decode | None) -> Comparison:
    connection.register("other_short", _short(other))
    connection.execute(_values(other).replace("view pairs", "view other_pairs").replace("from short", "from other_short"))
    connection.execute(JOINED)
    summary = _one(connection, COMPARED)
    if not summary["both"]:
        raise InputError(
            "the stores have no pair in common",
            where=f"{store.path}, --compare {other.path}",
            expected="equal pair_ids: the same rows of the same dataset",
            found=f"{store.identity.dataset} and {other.identity.dataset}",
        )
    changed = f"""select row, other_row, other_margin - margin as value from joined
        order by abs(other_margin - margin) desc, row limit {EXTREMES}"""
    return Comparison(
        other=other,
        summary=summary,
        identity=tuple(_identities(store.identity, other.identity)),
        extremes=(Extreme("The margin changes most", _read(connection, store, decode, changed, other), by_difference=True),),
    )


def _identities(here: Identity, there: Identity) -> Iterator[tuple[str, object, object, bool]]:
    for name, value in here.to_json().items():
        others = getattr(there, name)
        yield name, value, others, value != others and name not in NAMES
