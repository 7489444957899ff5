"""Open a sealed store and read from it: whole columns, or any pairs in any order.

    store = open_store(Path("store/think"), check="sha256")
    store.read([7, 3, 100_000])            # a table of these pairs, in this order
    store.lengths()                        # the short columns of all pairs

A pair's position counts the pairs of the store in the order of their source rows.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError
from store.folder import missing_shards, refuse_non_store, stored_identity
from store.integrity import Check, advice, damage
from store.manifest import MANIFEST, Identity, Manifest
from store.schema import SCHEMA
from store.seal import unsealed

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
        raise found[0] if len(found) == 1 else _combined(path, found)
    return store


def load_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`. InputError if that is no store, StoreError if it is unsealed or its manifest broken."""
    refuse_non_store(path)
    if not (path / MANIFEST).exists():
        identity = stored_identity(path)
        raise unsealed(path, identity, missing_shards(path, identity))
    return Manifest.load(path / MANIFEST)


def _combined(path: Path, found: list[StoreError]) -> StoreError:
    """One error for several damaged files; names the first ten."""
    listed = ", ".join(f"{error.where.name} ({error.what.partition(':')[0]})" for error in found[:10])
    what = f"{len(found)} files are not as sealed: {listed}{', …' if len(found) > 10 else ''}"
    return StoreError(what, where=path, next=advice(path))


@dataclass(frozen=True)
class Store:
    """A sealed store. Holds no open files, so it may be pickled, forked and used from several threads."""

    path: Path
    manifest: Manifest
    _footers: dict[int, pq.FileMetaData] = field(default_factory=dict, repr=False, compare=False)
    """Parquet footers read so far, by shard; a cache that every process fills for itself."""

    def __getstate__(self) -> dict:
        return {"path": self.path, "manifest": self.manifest, "_footers": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)  # past the frozen dataclass's guard

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def num_pairs(self) -> int:
        return self.manifest.num_pairs

    @cached_property
    def _starts(self) -> list[int]:
        """Position of each shard's first pair."""
        return list(accumulate((shard.num_pairs for shard in self.manifest.shards), initial=0))

    def lengths(self) -> pa.Table:
        """SHORT_COLUMNS of all pairs, in the order of positions; the long columns are not touched."""
        return self.columns(SHORT_COLUMNS)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all pairs, in the order of positions."""
        with ThreadPoolExecutor() as threads:
            return _table(names, threads.map(lambda shard: self._read(shard, names), range(len(self.manifest.shards))))

    def read(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """The pairs at `positions` (0 … num_pairs - 1, in the order of rows), in the order asked; a position may repeat.

        Reads only the row groups concerned. IndexError for a position outside the store.
        """
        names = list(columns) if columns is not None else SCHEMA.names
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (shard, row group) -> [(row in group, place in the answer)]
        for place, position in enumerate(positions):
            shard, group, row = self._locate(int(position))
            wanted.setdefault((shard, group), []).append((row, place))
        tables, places = [], []
        for (shard, group), rows in sorted(wanted.items()):
            table = self._read(shard, names, group)
            tables.append(table.take(pa.array([row for row, _ in rows], pa.int64())))
            places += [place for _, place in rows]
        order = sorted(range(len(places)), key=places.__getitem__)
        return _table(names, tables).take(pa.array(order, pa.int64())).combine_chunks()

    def _locate(self, position: int) -> tuple[int, int, int]:
        """(shard, row group, row inside the group) of one pair."""
        if not 0 <= position < self.num_pairs:
            raise IndexError(f"{self.path}: no pair {position}; there are {self.num_pairs}")
        shard = bisect_right(self._starts, position) - 1
        row = position - self._starts[shard]
        footer = self._footer(shard)
        for group in range(footer.num_row_groups):
            if row < footer.row_group(group).num_rows:
                return shard, group, row
            row -= footer.row_group(group).num_rows
        raise StoreError("fewer rows than the manifest says", where=self._path_of(shard), next=advice(self.path))

    def _path_of(self, shard: int) -> Path:
        return self.path / self.manifest.shards[shard].name

    def _footer(self, shard: int) -> pq.FileMetaData:
        if shard not in self._footers:
            with self._reading(shard) as path:
                self._footers[shard] = pq.read_metadata(path)
        return self._footers[shard]

    def _read(self, shard: int, names: Sequence[str], group: int | None = None) -> pa.Table:
        """Columns of one shard, or of one of its row groups. One thread and no background reads: callers may have forked."""
        footer = self._footer(shard)
        with self._reading(shard) as path, pq.ParquetFile(path, metadata=footer, pre_buffer=False) as file:
            groups = range(footer.num_row_groups) if group is None else [group]
            return file.read_row_groups(list(groups), columns=list(names), use_threads=False)

    @contextmanager
    def _reading(self, shard: int) -> Iterator[Path]:
        path = self._path_of(shard)
        try:
            yield path
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0][:160]
            raise StoreError("cannot be read", where=path, found=reason, next=advice(self.path)) from error


def _table(names: Sequence[str], tables: Iterable[pa.Table]) -> pa.Table:
    """The tables below each other; an empty table of the right columns if there are none."""
    found = [table.select(names).replace_schema_metadata() for table in tables]
    return pa.concat_tables(found) if found else pa.schema([SCHEMA.field(name) for name in names]).empty_table()
