"""Open a sealed store and read from it: whole columns, or any pairs in any order.

    store = open_store(Path("store/think"), check="sha256")
    store.read([7, 3, 100_000])            # a table of these pairs, in this order
    store.lengths()                        # the short columns of all pairs

A pair's position counts the pairs of the store in the order of their source rows.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError
from store.folder import identity_of, missing_shards, refuse_non_store
from store.integrity import Check, advice, damage
from store.manifest import Identity, Manifest, manifest_path
from store.schema import DATASET, SCHEMA, SPANS, SourceColumn, schema_of, without_token_logps
from store.seal import unsealed
from store.shard import in_stretches

TOKEN_COUNTS = ("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")

SHORT_COLUMNS = tuple(name for name in SCHEMA.names if not pa.types.is_list(SCHEMA.field(name).type))
"""The columns of one value per pair: everything but ids and per-token values."""


def open_store(path: Path, check: Check = "footers") -> "Store":
    """Open a sealed store, refusing anything else.

    Always: the manifest is intact and the shards beside it are those it lists, of the sizes it lists. `check="footers"` also reads
    every footer and compares it with the manifest; `check="sha256"` reads every byte. InputError for a path that is no store,
    StoreError for one that is unsealed or altered.
    """
    path = Path(path)
    store = Store(path, load_manifest(path))
    if found := damage(path, store.manifest, check):
        raise found[0] if len(found) == 1 else _combined(path, store.manifest, found)
    return store


def load_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`. InputError if that is no store, StoreError if it is unsealed or its manifest broken."""
    refuse_non_store(path)
    if not manifest_path(path).exists():
        identity = identity_of(path)
        raise unsealed(path, identity, missing_shards(path, identity))
    return Manifest.load(manifest_path(path))


def _combined(path: Path, manifest: Manifest, found: list[StoreError]) -> StoreError:
    """One error for several damaged files; names the first ten."""
    names = [Path(str(error.where)).name for error in found]
    listed = ", ".join(f"{name} ({error.what.partition(':')[0]})" for name, error in list(zip(names, found, strict=True))[:10])
    shards = {shard.name for shard in manifest.shards}  # a file beside them is not ours to remove
    what = f"{len(found)} files are not as sealed: {listed}{', …' if len(found) > 10 else ''}"
    return StoreError(what, where=path, next=advice(path, manifest, *(name for name in names if name in shards)))


@dataclass(frozen=True)
class Store:
    """A sealed store. Holds no open files, so it may be pickled, forked and used from several threads."""

    path: Path
    manifest: Manifest

    def __getstate__(self) -> dict:
        return {"path": self.path, "manifest": self.manifest}  # not what is cached: every process makes that for itself

    @property
    def identity(self) -> Identity:
        """What the store was made of: model, tokenizer, dataset, lengths."""
        return self.manifest.identity

    @property
    def num_pairs(self) -> int:
        """Scored pairs: positions are below it."""
        return self.manifest.num_pairs

    @cached_property
    def _starts(self) -> list[int]:
        """Position of each shard's first pair."""
        return list(accumulate((shard.num_pairs for shard in self.manifest.shards), initial=0))

    @cached_property
    def token_counts(self) -> pa.Table:
        """TOKEN_COUNTS of all pairs, in the order of positions. Kept: a million pairs are 12 MB."""
        return self.columns(TOKEN_COUNTS)

    @property
    def source_columns(self) -> tuple[SourceColumn, ...]:
        """The dataset's own columns that the store keeps."""
        return self.manifest.source_columns or ()

    def lengths(self) -> pa.Table:
        """SHORT_COLUMNS of all pairs, in the order of positions; the long columns are not touched."""
        return self.columns(SHORT_COLUMNS)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all pairs, in the order of positions."""

        def of_shard(shard: int) -> pa.Table:
            with self._opened(shard) as file:
                return self._known(file.read(columns=list(names), use_threads=False))

        def of_stretch(shards: Sequence[int]) -> pa.Table:
            # One chunk: thousands of small tables take more memory than what is in them.
            return self._joined(names, map(of_shard, shards)).combine_chunks()

        return self._joined(names, in_stretches(of_stretch, range(len(self.manifest.shards))))

    def read(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """The pairs at `positions` (0 … num_pairs - 1, in the order of rows), in the order asked; a position may repeat.

        Reads only the row groups concerned. IndexError for a position outside the store.
        """
        names = list(columns) if columns is not None else schema_of(self.identity, self.source_columns).names
        wanted: dict[int, list[tuple[int, int]]] = {}  # shard -> [(row in shard, place in the answer)]
        for place, position in enumerate(positions):
            shard, row = self._locate(int(position))
            wanted.setdefault(shard, []).append((row, place))
        tables: list[pa.Table] = []
        places: list[int] = []
        for shard, rows in sorted(wanted.items()):
            tables += self._rows(shard, sorted(rows), names)
            places += [place for _, place in sorted(rows)]
        order = sorted(range(len(places)), key=places.__getitem__)
        return self._joined(names, tables).take(pa.array(order, pa.int64())).combine_chunks()

    def _locate(self, position: int) -> tuple[int, int]:
        """(shard, row inside the shard) of one pair."""
        if not 0 <= position < self.num_pairs:
            raise IndexError(f"{self.path}: no pair {position}; there are {self.num_pairs}")
        shard = bisect_right(self._starts, position) - 1
        return shard, position - self._starts[shard]

    def _rows(self, shard: int, rows: list[tuple[int, int]], names: list[str]) -> Iterator[pa.Table]:
        """Some rows of one shard, rising, as one table per row group: only one group is decoded at a time."""
        with self._opened(shard) as file:
            first = 0
            for group in range(file.num_row_groups):
                stop = first + file.metadata.row_group(group).num_rows
                here = [row - first for row, _ in rows if first <= row < stop]
                if here:
                    rows_here = file.read_row_groups([group], columns=names, use_threads=False).take(pa.array(here, pa.int64()))
                    yield self._known(rows_here)
                first = stop
        if rows[-1][0] >= first:
            path = self._path_of(shard)
            raise StoreError("fewer rows than the manifest says", where=path, next=advice(self.path, self.manifest, path.name))

    def _known(self, table: pa.Table) -> pa.Table:
        """Without the token log-probs that earlier versions made up for imported stores."""
        return without_token_logps(table) if self.identity.sums_only else table

    def _joined(self, names: Sequence[str], tables: Iterable[pa.Table]) -> pa.Table:
        """The tables below each other; an empty table of the right columns if there are none."""
        found = [table.select(names).replace_schema_metadata() for table in tables]
        known = pa.schema([*SCHEMA, *SPANS, DATASET, *(column.field for column in self.source_columns)])
        return pa.concat_tables(found) if found else pa.schema([known.field(name) for name in names]).empty_table()

    def _path_of(self, shard: int) -> Path:
        return self.path / self.manifest.shards[shard].name

    @contextmanager
    def _opened(self, shard: int) -> Iterator[pq.ParquetFile]:
        """One shard's file. No thread and no background read: callers may have forked. Its footer is not kept: those of a store of
        thousands of shards would be hundreds of MB in every process that reads."""
        path = self._path_of(shard)
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                yield file
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0][:160]
            raise StoreError(
                "cannot be read", where=path, found=reason, next=advice(self.path, self.manifest, path.name)
            ) from error
