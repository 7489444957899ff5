"""What a store says about itself: the identity that makes its numbers, one report per shard, and the manifest that seals it.

Identity is compared, field by field, whenever two things must agree. Reports are facts that the identity determines. Provenance
(hosts, devices, times) is recorded and never compared.
"""

import hashlib
import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from store import DTYPES, record
from store.errors import StoreError
from store.schema import FORMAT_VERSION

MANIFEST = "_manifest.json"
"""File whose presence means: this store is sealed. Readers of whole folders (pandas, pyarrow, Spark, …) skip names that begin with `_` or `.`; any other name
would be taken for a Parquet file."""

FORMER_MANIFEST = "manifest.json"
"""Its name in stores made before: they open as ever, and become readable as a folder once it is renamed."""


MAX_SHARDS = 1_000_000
"""More files than a folder should hold; also what keeps a forged identity from making its reader count for ever."""


@dataclass(frozen=True)
class Identity:
    """Everything that makes the numbers of a store. Two runs of equal identity make equal shards."""

    # names, for people: recorded and shown, not compared, because the same content under another name makes the same numbers
    model: str
    revision: str | None
    tokenizer: str
    dataset: str
    split: str | None
    dataset_revision: str | None
    # content, compared
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    """"none" where the rows are plain text and no template is applied."""
    dataset_fingerprint: str
    num_rows: int
    """Source rows covered, scorable or not."""
    max_length: int
    """Longest prompt + completion, tokens."""
    truncation: str
    dtype: str
    shard_size: int
    """Source rows per shard; the last shard has the rest."""
    scorer_version: int

    def __post_init__(self):
        for name in ("num_rows", "max_length", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.num_shards > MAX_SHARDS:
            raise ValueError(f"{self.num_rows} rows in shards of {self.shard_size} are more than {MAX_SHARDS:,} shards")
        if self.truncation != "keep_start":
            raise ValueError(f"truncation must be keep_start, is {self.truncation!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, is {self.dtype!r}")

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Source rows of one shard: a fixed block, whoever scores it."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: object) -> "Identity":
        """Strict: StoreError, naming `where` and the field, for a missing or unknown field or a wrong type."""
        return record.build(cls, value, where)

    def differences(self, other: "Identity") -> list[tuple[str, object, object]]:
        """(field, mine, other's) for every compared field that differs."""
        mine, others = asdict(self), asdict(other)
        return [(name, mine[name], others[name]) for name in mine if name not in NAMES and mine[name] != others[name]]


NAMES = frozenset({"model", "revision", "tokenizer", "dataset", "split", "dataset_revision"})
"""Fields of Identity that are recorded and shown but never compared."""


@dataclass(frozen=True)
class Unscorable:
    """A source row without a pair in the store, and why."""

    row: int
    pair_id: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Facts that the identity determines, about one shard or all of them."""

    num_pairs: int
    """Scored pairs; the other rows are in `unscorable`."""
    unscorable: tuple[Unscorable, ...]
    counts: dict[str, int]
    """How many rows something worth knowing happened to: "chosen_truncated", "identical", "prompt_not_prefix", …"""
    examples: dict[str, str]
    """One decoded example per count."""
    num_prompt_tokens: int
    num_completion_tokens: int
    model_tokens: int
    """Positions the model computed for them; fewer than prompt + chosen + prompt + rejected where the prompt is shared."""


@dataclass(frozen=True)
class ShardReport(Totals):
    """The facts of one shard, which stand in its Parquet footer, and which it is."""

    index: int
    first_row: int
    num_rows: int
    """Source rows of the block."""


def totals_of(reports: list[ShardReport]) -> Totals:
    """Sums and lists in the order of `reports`; the first example of each kind stays."""
    counts, examples = Counter(), {}
    for report in reports:
        counts.update(report.counts)
        examples = {**report.examples, **examples}
    sums = ("num_pairs", "num_prompt_tokens", "num_completion_tokens", "model_tokens")
    return Totals(
        unscorable=tuple(each for report in reports for each in report.unscorable),
        counts=dict(counts),
        examples=examples,
        **{name: sum(getattr(report, name) for report in reports) for name in sums},
    )


@dataclass(frozen=True)
class ShardFile:
    """One shard as the manifest lists it."""

    name: str
    size: int
    sha256: str
    num_pairs: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Manifest(Totals):
    """`_manifest.json`: written last, atomically, exactly once. Its totals are those of all shards."""

    identity: Identity
    shards: tuple[ShardFile, ...]
    """In order of rows; the file names count up from part-00000.parquet."""
    preset: str | None
    """The preset whose training defaults suit this store: think, instruct, demo."""
    provenance: dict[str, Any]
    """What the numbers do not depend on: workers, devices, versions, seconds, tokens_per_second, layout, …"""

    def to_bytes(self) -> bytes:
        """The file's bytes: readable JSON that carries its own checksum."""
        value = {"format_version": FORMAT_VERSION, **asdict(self)}
        value["sha256"] = hashlib.sha256(record.canonical(value)).hexdigest()
        return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check `path`. StoreError if it is malformed, of another format version, or one byte is not as it was sealed."""
        data = record.read(path)
        value = record.parse(data, path)
        if not isinstance(value, dict) or "format_version" not in value:
            raise StoreError("not a manifest of refdpo", where=path, expected="an object with format_version")
        if value.pop("format_version") != FORMAT_VERSION:
            found = json.loads(data)["format_version"]
            raise StoreError(
                "store of another format",
                where=path,
                expected=f"format_version {FORMAT_VERSION}",
                found=found,
                next="Read it with the version of refdpo that wrote it, or make the store again.",
            )
        value.pop("sha256", None)
        manifest = record.build(cls, value, path)
        if manifest.to_bytes() != data:
            raise _altered("altered after sealing: its content does not match its checksum", manifest, path)
        for name, (expected, holds) in _READ_PROVENANCE.items():
            if name in manifest.provenance and not holds(found := manifest.provenance[name]):
                raise _altered(f"malformed: provenance.{name} should be {expected}, is {str(found)[:80]}", manifest, path)
        return manifest


def manifest_path(store: Path) -> Path:
    """Where the manifest of `store` is, under either name; where it will be, if there is none."""
    former = store / FORMER_MANIFEST
    return former if former.exists() and not (store / MANIFEST).exists() else store / MANIFEST


def _altered(what: str, manifest: Manifest, path: Path) -> StoreError:
    again = rerun(manifest.identity, path.parent)
    return StoreError(what, where=path, next=f"Restore the file, or delete it and re-run to seal the shards again: {again}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e18


_READ_PROVENANCE = {
    "seconds": ("a number", _is_number),
    "waited": ("a number", _is_number),
    "tokens_per_second": ("a number or null", lambda value: value is None or _is_number(value)),
    "shards_by_worker": ("an object", lambda value: isinstance(value, dict)),
    "shards_by_device": ("an object", lambda value: isinstance(value, dict)),
    "layout": ("packed or padded", lambda value: value in ("packed", "padded")),
}
"""Entries of the provenance that refdpo itself reads, as sealing writes them; all others are free."""


def check_same(stored: Identity, now: Identity, where: object) -> None:
    """StoreError unless the identity found at `where` is that of this run; names each differing field, both values, the remedy."""
    differing = stored.differences(now)
    if not differing:
        return
    raise StoreError(
        f"made with another {', '.join(_TITLES[name] for name, _, _ in differing)}",
        where=where,
        expected="; ".join(f"{name} {_shown(value, name, now)}" for name, _, value in differing) + " (this run)",
        found="; ".join(f"{name} {_shown(value, name, stored)}" for name, value, _ in differing) + " (there)",
        next=_remedy(stored, now, [name for name, _, _ in differing]),
    )


def rerun(identity: Identity, store: Path) -> str:
    """The command that makes or completes `store`, as far as the identity knows it."""
    options = {
        "--dataset": identity.dataset,
        "--dataset-revision": identity.dataset_revision,
        "--split": identity.split,
        "--model": identity.model,
        "--revision": identity.revision,
        "--tokenizer": identity.tokenizer if identity.tokenizer != identity.model else None,
        "--max-length": str(identity.max_length),
        "--dtype": identity.dtype,
        "--shard-size": str(identity.shard_size),
        "--ref-store": str(store),
    }
    given = [word for option, value in options.items() if value is not None for word in (option, value)]
    return shlex.join(["python", "cli.py", "precompute", *given])


_TITLES = {
    "weights_sha256": "model (its weights differ)",
    "config_sha256": "model configuration",
    "tokenizer_sha256": "tokenizer",
    "chat_template_sha256": "chat template",
    "dataset_fingerprint": "dataset (its rows differ)",
    "num_rows": "number of rows",
    "max_length": "max length",
    "truncation": "truncation",
    "dtype": "dtype",
    "shard_size": "shard size",
    "scorer_version": "version of the scorer",
}

_NAMED_BY = {
    "weights_sha256": ("model", "revision"),
    "config_sha256": ("model", "revision"),
    "tokenizer_sha256": ("tokenizer", None),
    "dataset_fingerprint": ("dataset", "dataset_revision"),
}
"""Which names a user knows a hash by."""

_OPTIONS = {
    "weights_sha256": "--model and --revision",
    "config_sha256": "--model and --revision",
    "tokenizer_sha256": "--tokenizer",
    "chat_template_sha256": "--chat-template",
    "dataset_fingerprint": "--dataset and --split",
    "num_rows": "--limit",
    "max_length": "--max-length",
    "dtype": "--dtype",
    "shard_size": "--shard-size",
}

assert _TITLES.keys() | NAMES == {field.name for field in fields(Identity)}


def _shown(value: object, name: str, identity: Identity) -> str:
    """A value as a person wants it: a short hash, and the name behind it."""
    text = value[:12] if name.endswith(("sha256", "fingerprint")) else str(value)
    if name not in _NAMED_BY:
        return text
    label, revision = _NAMED_BY[name]
    label, revision = getattr(identity, label), revision and getattr(identity, revision)
    return f"{text} ({label}@{revision})" if revision else f"{text} ({label})"


def _remedy(stored: Identity, now: Identity, names: list[str]) -> str:
    if names == ["scorer_version"]:
        return "Another version of refdpo wrote it: use that version, or make a new store with another --ref-store."
    options = dict.fromkeys(_OPTIONS[name] for name in names if name in _OPTIONS)
    advice = f"To go on with this store repeat its {', '.join(options)}; for other numbers choose another --ref-store."
    if "weights_sha256" in names and (stored.model, stored.revision) == (now.model, now.revision):
        advice += f" The weights behind {now.model} have changed since: pin a --revision."
    if "dataset_fingerprint" in names and (stored.dataset, stored.dataset_revision) == (now.dataset, now.dataset_revision):
        advice += f" The rows of {now.dataset} have changed since."
    return advice
