"""Which tokens of a completion were scored, where not all were: spans. In memory they are a mask (precompute/scorer/packing.py).

completion   a0 a1 <end> u0 u1 <assistant> b0 b1     a conversation's turns from the first that is scored
mask          1  1   1    0  0      0       1  1
spans        [0, 3, 6, 8]                             start, stop, start, stop, …
"""

from collections.abc import Iterator, Sequence

SCORED = {"chosen": "chosen_scored", "rejected": "rejected_scored"}
"""Side -> the column that holds its spans, in stores of scored turns."""

TURNS = {"last": "each side's last assistant turn", "all": "the assistant's turns"}
"""What was scored, as a person reads it."""


def pairs_of(spans: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop), …"""
    return zip(spans[::2], spans[1::2], strict=True)


def cut_spans(spans: Sequence[int], length: int) -> list[int]:
    """The spans of the first `length` tokens."""
    return [min(edge, length) for start, stop in pairs_of(spans) if start < length for edge in (start, stop)]


def num_scored(spans: Sequence[int]) -> int:
    """How many tokens they are."""
    return sum(stop - start for start, stop in pairs_of(spans))


def num_scored_sql(side: str, scored_turns: str | None) -> str:
    """SQL over the columns of a store: how many tokens of a side were scored."""
    column = SCORED[side]
    return f"num_{side}_tokens" if scored_turns is None else f"(list_sum({column}[2:-:2]) - list_sum({column}[1:-:2]))::int"
