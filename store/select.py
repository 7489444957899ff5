"""Which pairs of a store to train on, in which order, and which to hold back: SQL over the store's views, and a hash of the
pair_id.

select(Path("store/think"), where="num_chosen_tokens < 4096", order_by="num_chosen_tokens", eval_fraction=0.01)
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from store.errors import InputError
from store.sql import connect, fetch, sums_only
from store.text import Decode


@dataclass(frozen=True)
class Selection:
    """Positions in the store (0 … num_pairs - 1, in the order of rows) to train and to evaluate on."""

    train: tuple[int, ...]
    """In the order asked for; the store's order without `order_by`. A pair whose weight asks for it stands there several times, one after another."""
    eval: tuple[int, ...]
    """In the store's order."""
    num_pairs: int
    """Pairs of the store."""
    where: str | None
    order_by: str | None
    eval_fraction: float | None
    pair_ids_sha256: str
    """Of the training pairs' ids, one a line, in this order: equal hashes mean the same pairs in the same order."""
    eval_pair_ids_sha256: str
    where_file: str | None = None
    """What the file of a further condition is called and holds."""
    weight: str | None = None
    """SQL: how many times a pair is trained on in an epoch."""

    @property
    def everything(self) -> bool:
        return all(getattr(self, name) is None for name in ("where", "where_file", "order_by", "eval_fraction", "weight"))

    def to_json(self) -> dict:
        """For a run's records: conditions, counts and hashes instead of the positions."""
        plain = {name: value for name, value in vars(self).items() if name not in ("train", "eval")}
        for name in ("where_file", "weight"):
            if plain[name] is None:
                del plain[name]
        return {"num_train": len(self.train), "num_eval": len(self.eval), **plain}

    def __str__(self) -> str:
        chosen = len({*self.train, *self.eval})
        text = f"{chosen:,} of {self.num_pairs:,} pairs"
        text += f" where {self.where}" if self.where is not None else ""
        text += f"{' and' if self.where is not None else ' where'} {self.where_file} says so" if self.where_file is not None else ""
        text += f"; {len(self.eval):,} of them held back to evaluate on" if self.eval_fraction is not None else ""
        text += f"; {len(self.train):,} to train on in an epoch, by the weight {self.weight}" if self.weight is not None else ""
        text += f"; in the order of {self.order_by}" if self.order_by is not None else ""
        return f"{text} (pair_ids sha256 {self.pair_ids_sha256[:12]})"


def select(
    store: Path,
    where: str | None = None,
    order_by: str | None = None,
    eval_fraction: float | None = None,
    decode: Decode | None = None,
    where_file: Path | None = None,
    weight: str | None = None,
) -> Selection:
    """Choose pairs of the sealed store at `store`. With `decode`, conditions may ask for text. `where_file` holds a condition more, or one pair_id a
    line.

    `where` and `order_by` are what follows these words in SQL over the view `pairs`; ties keep the store's order. A pair is held back if the
    hash of its pair_id falls into `eval_fraction`: the same pairs whatever the order, the condition or the store, and equal content never
    stands on both sides. `weight`: SQL for how many times a pair is trained on; the part of it behind the point, and whether a pair with 0.5 is
    trained on at all, is decided by that hash too. InputError for SQL that fails, gives another answer the second time, or leaves nothing.
    """
    listed = _Listed.read(where_file) if where_file is not None else None
    everything, weighed = _answers(store, where, order_by, decode, listed, weight)
    chosen = [(row, pair_id) for row, pair_id, _ in weighed]
    held_back = [eval_fraction is not None and _unit(f"held back? {pair_id}") < eval_fraction for _, pair_id in chosen]
    times = [_times(of_pair, pair_id, row) for row, pair_id, of_pair in weighed]
    train = [pair for pair, held, number in zip(chosen, held_back, times, strict=True) if not held for _ in range(number)]
    evaluate = sorted(pair for pair, held in zip(chosen, held_back, strict=True) if held)
    if not train and not all(held_back):
        raise InputError("no pair is left", where=f'--weight "{weight}"', found=f"{len(chosen):,} pairs of too little weight")
    if eval_fraction is not None and not (train and evaluate):
        raise InputError(
            f"no pair is left to {'evaluate' if train else 'train'} on",
            where=f"--eval-fraction {eval_fraction:g}",
            found=f"{len(chosen):,} pairs to split",
            next=f"Use a {'larger' if train else 'smaller'} fraction.",
        )
    position = {row: index for index, (row, _) in enumerate(everything)}
    return Selection(
        train=tuple(position[row] for row, _ in train),
        eval=tuple(position[row] for row, _ in evaluate),
        num_pairs=len(everything),
        where=where,
        order_by=order_by,
        eval_fraction=eval_fraction,
        pair_ids_sha256=_hash(train),
        eval_pair_ids_sha256=_hash(evaluate),
        where_file=None if listed is None else listed.described({pair_id for _, pair_id in everything}),
        weight=weight,
    )


MOST = 1000
"""Times that a pair can be trained on in an epoch: more is a mistake in the SQL."""


def _times(weight: float | None, pair_id: str, row: int) -> int:
    """2.25: three times for a quarter of the pairs, twice for the others."""
    if weight is None or not 0 <= weight <= MOST:
        raise InputError(
            "not a number of times to train on a pair",
            where=f"--weight, row {row}",
            expected=f"0 to {MOST:,}",
            found="null" if weight is None else weight,
        )
    return int(weight) + (_unit(f"once more? {pair_id}") < weight % 1)


def _answers(
    store: Path, where: str | None, order_by: str | None, decode: Decode | None, listed: "_Listed | None", weight: str | None
) -> tuple[list[tuple[int, str]], list[tuple[int, str, float | None]]]:
    """(row, pair_id) of all pairs in the store's order, and with their weights of those asked for in the order asked for."""
    connection = connect(store, threads=1, decode=decode)  # with several, `limit` among equals picks another row each time
    everything = fetch(connection, "select row, pair_id from pairs order by row", store)
    given = " ".join(
        f'--{name} "{sql}"' for name, sql in (("where", where), ("order-by", order_by), ("weight", weight)) if sql is not None
    )
    if listed is not None:
        given = f"--where-file {listed.path} {given}".strip()
        connection.execute("create temp table listed as select unnest(?::varchar[]) as pair_id", [list(listed.pair_ids)])
    asked = f"{given} {listed.condition if listed is not None else ''}"
    if sums_only(store) and re.search(r"token_logps|\blogp\b", asked, re.IGNORECASE):
        raise InputError(
            f"asks for log-probs of single tokens, which {store} does not have: it was imported and has sums only",
            where=given,
            next="Use ref_chosen_logps, ref_rejected_logps and the counts.",
        )
    chosen: list[tuple[int, str, float | None]] = [(row, pair_id, 1.0) for row, pair_id in everything]
    if given:
        conditions = [sql for sql in (where, listed.condition if listed is not None else None) if sql is not None]
        both = "\n) and (".join(conditions) if conditions else None
        times = "1" if weight is None else f"({weight}\n)"  # inside the cast: one expression, not two columns
        query = f"select row, pair_id, nullif(cast({times} as double), 'nan') from pairs {_clause('where', both)} order by {_part(order_by, ', ')}row"
        chosen = fetch(connection, query, given)
        if chosen != fetch(connection, query, given):
            raise InputError(
                "this SQL gives another answer each time, so the processes of a run would not agree",
                where=given,
                next="For a random part use hash(pair_id) % 10 = 0; add row to an inner order by.",
            )
    if not chosen:
        raise InputError("no pair is left", where=given or store, found=f"{len(everything):,} pairs in {store}")
    return everything, chosen


@dataclass(frozen=True)
class _Listed:
    """What a file of --where-file holds."""

    path: Path
    sha256: str
    condition: str
    pair_ids: tuple[str, ...] = ()

    def described(self, known: set[str]) -> str:
        """`known`: the store's pair_ids."""
        if not self.pair_ids:
            return f"{self.path.name} (sha256 {self.sha256[:12]})"
        absent = len(set(self.pair_ids) - known)
        return f"{self.path.name} ({len(self.pair_ids):,} pair_ids, {absent:,} of them not in the store; sha256 {self.sha256[:12]})"

    @classmethod
    def read(cls, path: Path) -> "_Listed":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", where=f"--where-file {path}") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError("holds nothing", where=f"--where-file {path}", expected="one pair_id a line, or a SQL condition")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if all(re.fullmatch("[0-9a-f]{32}", line) for line in lines):
            ids = tuple(dict.fromkeys(lines))
            return cls(path, sha256, "pair_id in (select pair_id from listed)", ids)
        return cls(path, sha256, text)


def _clause(word: str, sql: str | None) -> str:
    # the line break ends a comment that the condition may end with
    return f"{word} ({sql}\n)" if sql is not None else ""


def _part(sql: str | None, after: str) -> str:
    return f"{sql}\n{after}" if sql is not None else ""


def _unit(question: str) -> float:
    """A number in [0, 1) that depends on the question alone. Hashed again, so that no other use of pair_id's digits is correlated."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


def _hash(pairs: list[tuple[int, str]]) -> str:
    return hashlib.sha256("".join(f"{pair_id}\n" for _, pair_id in pairs).encode()).hexdigest()
