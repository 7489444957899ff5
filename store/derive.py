"""What a store of a shorter max_length would hold, made from one of a longer.

A causal model's log-prob of a token does not depend on what follows it, so cutting the end off a completion leaves the rest as is.
"""

import pyarrow as pa
import pyarrow.compute as pc

from store.errors import InputError
from store.schema import SCHEMA, SPANS
from store.spans import SCORED, cut_spans


def fits(lengths: pa.Table, max_length: int) -> pa.Array:
    """bool per pair: does `max_length` leave at least one scored token of each completion? Needs the column num_prompt_tokens, and those of the
    spans in a store that has them."""
    before = lengths["num_prompt_tokens"].combine_chunks()
    firsts = [pc.list_element(lengths[name].combine_chunks(), 0) for name in SCORED.values() if name in lengths.column_names]
    if firsts:
        before = pc.add(before, pc.max_element_wise(*firsts))
    return pc.less(before, max_length)


def derive(table: pa.Table, max_length: int | None = None, ld_alpha: float | None = None) -> pa.Table:
    """The rows of `table` as a store of `max_length` would hold them, as a table of the same columns.

    Any subset of the store's columns will do that keeps the num_* columns, the truncated flags, and the token_logps if something is
    to be cut or `ld_alpha` given. keep_start: a completion keeps its first max_length - num_prompt_tokens tokens; ids, token
    log-probs, counts, truncated flags and the sums (nats, float64) follow. With `ld_alpha` the sums are LD-DPO's, as TRL defines
    them: the first n tokens plus alpha times the rest, n being the shorter completion's number of tokens after the cut.
    Of a store of scored turns the spans are cut too; they must be in the table wherever something else is cut.
    ValueError for a pair whose prompt alone fills max_length: drop those first (`fits`). InputError where a new sum is needed and the
    tokens' log-probs are not known: those of an imported store; for `ld_alpha` where turns were scored.
    """
    if ld_alpha is not None and set(SCORED.values()) & set(table.column_names):
        raise InputError(
            "LD-DPO is about completions as a whole, and only some turns were scored",
            where=f"--ld-alpha {ld_alpha:g}",
            next="Leave it out, or make a store with --score-turns completion.",
        )
    table = table.combine_chunks()
    prompts = table["num_prompt_tokens"].to_pylist()
    if max_length is not None and any(prompt >= max_length for prompt in prompts):
        raise ValueError(f"a prompt of {max(prompts)} tokens leaves no completion within max_length {max_length}")
    stored = {side: table[f"num_{side}_tokens"].to_pylist() for side in ("chosen", "rejected")}
    kept = {
        side: counts if max_length is None else [min(n, max_length - prompt) for n, prompt in zip(counts, prompts, strict=True)]
        for side, counts in stored.items()
    }
    shared = list(map(min, kept["chosen"], kept["rejected"]))
    for side in ("chosen", "rejected"):
        cut = kept[side] != stored[side]
        if cut or ld_alpha is not None:
            table = _set(table, f"ref_{side}_logps", _sums(table, side, stored[side], kept[side], ld_alpha, shared))
        if cut:
            shorter = [n < m for n, m in zip(kept[side], stored[side], strict=True)]
            for name in {f"{side}_ids", f"{side}_token_logps"} & set(table.column_names):
                table = _set(table, name, _heads(_list(table, name), kept[side]))
            if SCORED[side] in table.column_names:
                spans = zip(table[SCORED[side]].to_pylist(), kept[side], strict=True)
                table = _set(table, SCORED[side], [cut_spans(each, n) for each, n in spans])
            table = _set(table, f"num_{side}_tokens", kept[side])
            table = _set(table, f"{side}_truncated", pc.or_(table[f"{side}_truncated"], pa.array(shorter, pa.bool_())))
    return table


def _sums(table: pa.Table, side: str, stored: list[int], kept: list[int], ld_alpha: float | None, shared: list[int]) -> list[float]:
    """The side's sum of each pair, float64. A pair that loses nothing keeps its stored value, whatever the others in the table."""
    tokens, sums = _list(table, f"{side}_token_logps"), table[f"ref_{side}_logps"].to_pylist()
    some = SCORED[side] in table.column_names  # whose nulls are tokens that were not scored
    for i, n in enumerate(kept):
        if ld_alpha is not None:
            sums[i] = _sum(tokens[i], 0, shared[i]) + ld_alpha * _sum(tokens[i], shared[i], n)
        elif n < stored[i]:
            sums[i] = _sum(tokens[i], 0, n, some)
    return sums


def _sum(tokens: pa.ListScalar, start: int, stop: int, some: bool = False) -> float:
    """Sum of some values of one list; Arrow sums float32 in float64. `some`: nulls are left out."""
    values = tokens.values.slice(start, stop - start)
    if values.null_count and not some:
        raise InputError(
            "the log-probs of single tokens are not known: an imported store has sums only",
            next="Use its sums as they are, without another max_length or ld_alpha, or score the rows with precompute.",
        )
    return pc.sum(values, min_count=0).as_py()


def _heads(lists: pa.ListArray, lengths: list[int]) -> pa.ListArray:
    """The first `lengths[i]` values of each list."""
    heads = [lists[i].values.slice(0, n) for i, n in enumerate(lengths)]
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] + n)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.concat_arrays(heads))


def _list(table: pa.Table, name: str) -> pa.ListArray:
    return table[name].combine_chunks()


def _set(table: pa.Table, name: str, values: list | pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace a column."""
    field = pa.schema([*SCHEMA, *SPANS]).field(name)
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, field.type)
    return table.set_column(table.column_names.index(name), field, column)
