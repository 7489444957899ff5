"""What a store says about itself: the identity that makes its numbers, one report per shard, and the manifest that seals it.

Identity is compared, field by field, whenever two things must agree. Reports are facts that the identity determines. Provenance
(hosts, devices, times) is recorded and never compared.
"""

import hashlib
import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from store import DTYPES, SCORED_TURNS, record
from store.command import Command, cli
from store.errors import StoreError
from store.schema import FORMAT_VERSION, SUMS_ONLY, SourceColumn

MANIFEST = "_manifest.json"
"""File whose presence means: this store is sealed. Readers of whole folders (pandas, pyarrow, Spark, …) skip names that begin with `_` or `.`; any other name
would be taken for a Parquet file."""

FORMER_MANIFEST = "manifest.json"
"""Its name in stores made before: they open as ever, and become readable as a folder once it is renamed."""


MAX_SHARDS = 1_000_000
"""More files than a folder should hold; also what keeps a forged identity from making its reader count without end."""


@dataclass(frozen=True)
class DatasetPart:
    """One of several datasets of a store."""

    dataset: str
    num_rows: int


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
    # of stores that need them
    dataset_config: str | None = field(default=None, metadata=record.OPTIONAL)
    """A name, not compared: the configuration of the dataset, where one was asked for."""
    template_date: str | None = field(default=None, metadata=record.OPTIONAL)
    """The day, YYYY-MM-DD, on which a chat template that asks for the date was told to be."""

    scored_turns: str | None = field(default=None, metadata=record.OPTIONAL)
    """Which turns of a conversation are scored; None: what follows the common prompt, as in TRL."""
    datasets: tuple[DatasetPart, ...] | None = field(default=None, metadata=record.OPTIONAL)
    """Of a store of several datasets: which rows are whose, in order. Names, not compared: the fingerprint covers the rows."""

    def __post_init__(self) -> None:
        if self.datasets is not None and sum(each.num_rows for each in self.datasets) != self.num_rows:
            raise ValueError(f"datasets have {sum(each.num_rows for each in self.datasets)} rows, not {self.num_rows}")
        if self.scored_turns not in (None, *SCORED_TURNS):
            raise ValueError(f"scored_turns must be one of {', '.join(SCORED_TURNS)}, is {self.scored_turns!r}")
        for name in ("num_rows", "max_length", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.num_shards > MAX_SHARDS:
            raise ValueError(f"{self.num_rows} rows in shards of {self.shard_size} are more than {MAX_SHARDS:,} shards")
        if self.truncation != "keep_start":
            raise ValueError(f"truncation must be keep_start, is {self.truncation!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, is {self.dtype!r}")

    def dataset_of(self, row: int) -> str:
        """The name of the dataset that a source row is from."""
        for each in self.datasets or ():
            if row < each.num_rows:
                return each.dataset
            row -= each.num_rows
        return self.dataset

    @property
    def sums_only(self) -> bool:
        """Is this an imported store, whose token log-probs are not known?"""
        return self.scorer_version == SUMS_ONLY

    @property
    def num_shards(self) -> int:
        """Of a whole store: every row belongs to one."""
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Source rows of one shard: a fixed block, whoever scores it."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def to_json(self) -> dict:
        return record.plain(self)

    @classmethod
    def from_json(cls, value: object, where: object) -> "Identity":
        """Strict: StoreError, naming `where` and the field, for a missing or unknown field or a wrong type."""
        return record.build(cls, value, where)

    def differences(self, other: "Identity") -> list[tuple[str, object, object]]:
        """(field, mine, other's) for every compared field that differs."""
        mine, others = asdict(self), asdict(other)
        return [(name, mine[name], others[name]) for name in mine if name not in NAMES and mine[name] != others[name]]


NAMES = frozenset({"model", "revision", "tokenizer", "dataset", "split", "dataset_revision", "dataset_config", "datasets"})
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
    source_columns: tuple[SourceColumn, ...] | None = field(default=None, kw_only=True, metadata=record.OPTIONAL)
    """The dataset's own columns, kept beside the numbers: the last ones of the table, in this order. The same in every shard."""


@dataclass(frozen=True)
class ShardReport(Totals):
    """The facts of one shard, which stand in its Parquet footer, and which it is."""

    index: int
    first_row: int
    num_rows: int
    """Source rows of the block."""


def totals_of(reports: list[ShardReport]) -> Totals:
    """Sums and lists in the order of `reports`; the first example of each kind stays."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for report in reports:
        counts.update(report.counts)
        examples = {**report.examples, **examples}
    sums = ("num_pairs", "num_prompt_tokens", "num_completion_tokens", "model_tokens")
    return Totals(
        unscorable=tuple(each for report in reports for each in report.unscorable),
        counts=dict(counts),
        examples=examples,
        source_columns=reports[0].source_columns if reports else None,
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

    @property
    def command(self) -> Command | None:
        """What was typed to make the store, if that was recorded."""
        value = self.provenance.get("command")
        return record.build(Command, value, MANIFEST) if _is_command(value) else None

    def to_bytes(self) -> bytes:
        """The file's bytes: readable JSON that carries its own checksum."""
        value = {"format_version": FORMAT_VERSION, **record.plain(self)}
        value["sha256"] = hashlib.sha256(record.canonical(value)).hexdigest()
        return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check `path`. StoreError if it is malformed, of another format version, or one byte is not as it was sealed."""
        data = record.read(path)
        value = record.parse(data, path)
        if not isinstance(value, dict) or "format_version" not in value:
            raise StoreError(
                "not a manifest of refdpo",
                where=path,
                expected="an object with format_version",
                next="Restore the file, or delete it and run precompute again to seal the shards.",
            )
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
    again = f"rm {shlex.quote(str(path))} && {rerun(manifest.identity, path.parent, manifest.command)}"
    return StoreError(what, where=path, next=f"Restore the file, or delete it and re-run to seal the shards again: {again}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e18


def _is_command(value: object) -> bool:
    try:
        record.build(Command, value, MANIFEST)
    except StoreError:
        return False
    return True


_READ_PROVENANCE = {
    "seconds": ("a number", _is_number),
    "waited": ("a number", _is_number),
    "tokens_per_second": ("a number or null", lambda value: value is None or _is_number(value)),
    "shards_by_worker": ("an object", lambda value: isinstance(value, dict)),
    "shards_by_device": ("an object", lambda value: isinstance(value, dict)),
    "layout": ("packed or padded", lambda value: value in ("packed", "padded")),
    "command": ("a command as store/command.py records it", _is_command),
}
"""Entries of the provenance that refdpo itself reads, as sealing writes them; all others are free."""


def check_same(stored: Identity, now: Identity, where: object, then: Command | None = None, asked: Command | None = None) -> None:
    """StoreError unless the identity found at `where` is that of this run; names what was asked for otherwise, both values, the remedy.

    `then` and `asked` are the commands behind the two, where they are known: they tell a `--limit` from a file that has changed.
    """
    if not stored.differences(now):
        return
    names = causes(stored, now, then, asked)
    raise StoreError(
        f"made with another {', '.join(_TITLES[name] for name in names)}",
        where=where,
        expected="; ".join(_shown(name, now, asked) for name in names) + " (this run)",
        found="; ".join(_shown(name, stored, then) for name in names) + " (there)",
        next=_remedy(stored, now, names, then),
    )


def causes(stored: Identity, now: Identity, then: Command | None = None, asked: Command | None = None) -> list[str]:
    """Why two identities differ: what was asked for otherwise (names of _TITLES), without the fields that only follow from it."""
    found = {name for name, _, _ in stored.differences(now)}
    _explain_model(found, stored, now, then, asked)
    _explain_rows(found, stored, now, then, asked)
    return [name for name in _TITLES if name in found]


def _explain_model(found: set[str], stored: Identity, now: Identity, then: Command | None, asked: Command | None) -> None:
    """Weights are hashed as loaded, so in another dtype the hash differs; configuration and tokenizer come with the model, a template with the
    tokenizer."""
    other_tokenizer = "tokenizer_sha256" in found
    if "dtype" in found:
        found.discard("weights_sha256")
    if "weights_sha256" in found:
        found.discard("config_sha256")
    other_model = {"weights_sha256", "config_sha256"} & found and _renamed(stored, now, "model", "revision")
    if other_model and stored.tokenizer == stored.model and now.tokenizer == now.model:
        found.discard("tokenizer_sha256")
        other_tokenizer = True
    if other_tokenizer and not any(command is not None and command.chat_template for command in (then, asked)):
        found.discard("chat_template_sha256")


def _explain_rows(found: set[str], stored: Identity, now: Identity, then: Command | None, asked: Command | None) -> None:
    """Which rows there are follows from split, columns and limit, and the default shard size from their number."""
    other_number = "num_rows" in found
    commands = (then, asked) if then is not None and asked is not None else None
    if "dataset_fingerprint" in found:
        limited = commands is not None and other_number and _one_limit_is_seen(stored, now, *commands)
        if (source := _other_source(stored, now)) or (commands is not None and commands[0].columns != commands[1].columns):
            if "dataset" not in source:
                found -= {"dataset_fingerprint", "num_rows"}
                found |= source or {"columns"}
        elif limited and commands is not None and (limited := _one_file_has_both(stored, now, *commands)):
            found -= {"num_rows", "dataset_fingerprint"}
        elif other_number and commands is None:  # a limit, most likely; a file that has changed is not ruled out
            found -= {"dataset_fingerprint"}
        if limited:
            found |= {"limit"}
    if other_number and asked is not None and not any(command is not None and command.shard_size for command in (then, asked)):
        found.discard("shard_size")


def _one_limit_is_seen(stored: Identity, now: Identity, then: Command, asked: Command) -> bool:
    """Whether limits differ, and one of them is the number of rows that a dataset then has."""
    return then.limit != asked.limit and (then.limit in _parts(stored) or asked.limit in _parts(now))


def _one_file_has_both(stored: Identity, now: Identity, then: Command, asked: Command) -> bool:
    """Whether limits explain both numbers of rows: a run without limit, or with fewer rows than that, has read all there were."""

    def one_has(*runs: tuple[int, int | None]) -> bool:
        whole = {num_rows for num_rows, limit in runs if limit is None or num_rows < limit}
        return not whole or whole == {max(num_rows for num_rows, _ in runs)}

    return all(one_has((one, then.limit), (other, asked.limit)) for one, other in zip(_parts(stored), _parts(now), strict=True))


def _parts(identity: Identity) -> list[int]:
    """Rows of each dataset."""
    return [each.num_rows for each in identity.datasets or ()] or [identity.num_rows]


def _other_source(stored: Identity, now: Identity) -> set[str]:
    """What the rows are read from, as far as it is named otherwise."""
    found = _renamed(stored, now, "dataset", "dataset_config", "dataset_revision", "split")
    names = [[each.dataset for each in identity.datasets or ()] for identity in (stored, now)]
    return found | ({"dataset"} if names[0] != names[1] else set())


def _renamed(stored: Identity, now: Identity, *names: str) -> set[str]:
    return {name for name in names if getattr(stored, name) != getattr(now, name)}


def rerun(identity: Identity, store: Path, command: Command | None = None) -> str:
    """What to type to make or complete `store`: the command that was typed, or what the identity knows of it where that is not known."""
    if command is not None and (line := command.line(store)) is not None:
        return line
    options = {
        "--dataset": None if identity.datasets else identity.dataset,
        "--dataset-config": identity.dataset_config,
        "--dataset-revision": identity.dataset_revision,
        "--split": identity.split,
        "--limit": command and command.limit,
        "--model": identity.model,
        "--revision": identity.revision,
        "--tokenizer": identity.tokenizer if identity.tokenizer != identity.model else None,
        "--chat-template": command and command.chat_template,
        "--template-date": identity.template_date,
        "--score-turns": identity.scored_turns,
        "--max-length": identity.max_length,
        "--dtype": identity.dtype,
        "--shard-size": identity.shard_size,
        "--ref-store": store,
    }
    given: list[object] = [word for each in identity.datasets or () for word in ("--dataset", each.dataset)]
    given += [word for option, value in options.items() if value is not None for word in (option, value)]
    return cli("precompute", *given)


_TITLES = {
    "weights_sha256": "model (its weights differ)",
    "config_sha256": "model configuration",
    "tokenizer_sha256": "tokenizer",
    "chat_template_sha256": "chat template",
    "dataset_fingerprint": "dataset (its rows differ)",
    "dataset_config": "dataset configuration",
    "dataset_revision": "dataset revision",
    "split": "split",
    "columns": "choice of columns",
    "limit": "limit",
    "num_rows": "number of rows",
    "max_length": "max length",
    "truncation": "truncation",
    "dtype": "dtype",
    "shard_size": "shard size",
    "scorer_version": "version of the scorer",
    "template_date": "date in the chat template",
    "scored_turns": "choice of turns that are scored",
}
"""What is told apart, in the order of the message: fields of Identity, and the options behind them."""

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
    "dataset_config": "--dataset-config",
    "dataset_revision": "--dataset-revision",
    "split": "--split",
    "columns": "--prompt-column and the like",
    "limit": "--limit",
    "num_rows": "--limit",
    "max_length": "--max-length",
    "dtype": "--dtype",
    "shard_size": "--shard-size",
    "template_date": "--template-date",
    "scored_turns": "--score-turns",
}

assert _TITLES.keys() | NAMES == {field.name for field in fields(Identity)} | {"columns", "limit"}


def _shown(name: str, identity: Identity, command: Command | None) -> str:
    """A field with its value, and with what a command says of it."""
    if name == "limit" and command is not None:
        return f"limit {command.limit or 'none'} ({identity.num_rows:,} rows)"
    if name == "columns" and command is not None:
        return f"columns {command.columns or 'as they are'}"
    text = f"{name} {shown(name, identity)}"
    if name == "chat_template_sha256" and command is not None:
        return f"{text} ({command.chat_template or f'that of {identity.tokenizer}'})"
    return text


def shown(name: str, identity: Identity) -> str:
    """The value of a field as a person reads it: the beginning of a hash, and the name behind it."""
    value = getattr(identity, name)
    if name == "scored_turns":
        return value or "completion"
    text = str(value)[:12] if name.endswith(("sha256", "fingerprint")) else str(value)
    if name not in _NAMED_BY:
        return text
    label, revision = _NAMED_BY[name]
    label, revision = getattr(identity, label), revision and getattr(identity, revision)
    return f"{text} ({label}@{revision})" if revision else f"{text} ({label})"


def _remedy(stored: Identity, now: Identity, names: list[str], then: Command | None) -> str:
    if stored.sums_only != now.sums_only:
        way = "there TRL's sums were imported, here" if stored.sums_only else "there every token was scored, here"
        return f"Not the same kind: {way} it is the other way round. Choose another --ref-store."
    if names == ["scorer_version"]:
        return "Another version of refdpo wrote it: use that version, or make a new store with another --ref-store."
    changed = _changed_under_its_name(stored, now, names)
    followed = {"num_rows"} if "dataset_fingerprint" in names else set()
    options = dict.fromkeys(_OPTIONS[name] for name in names if name in _OPTIONS and name not in {*changed, *followed})
    go_on = f"To go on with this store repeat its {', '.join(options)}; for" if options else "For"
    parts = [f"{go_on} other numbers choose another --ref-store.", *dict.fromkeys(changed.values())]
    if "dtype" in names and "config_sha256" not in names and _renamed(stored, now, "model", "revision"):
        parts.append(
            f"The model was {stored.model}, now it is {now.model}: whether the weights differ too shows in one dtype only."
        )
    if set(names) <= {"dataset_fingerprint", "num_rows"}:
        parts.append("To keep the pairs that are the same add --reuse with this store, and another --ref-store.")
    if then is not None:
        parts.append(f"Its command was: {then.text()}")
    return " ".join(parts)


def _changed_under_its_name(stored: Identity, now: Identity, names: list[str]) -> dict[str, str]:
    """The causes that no option can change, as the name is the same, and what is said about them."""
    model, rows = (
        f"The weights behind {now.model} have changed since: pin a --revision.",
        f"The rows of {now.dataset} have changed since.",
    )
    told: dict[str, tuple[str, tuple[str, ...]]] = {
        "weights_sha256": (model, ("model", "revision")),
        "config_sha256": (f"The configuration of {now.model} has changed since.", ("model", "revision")),
        "tokenizer_sha256": (f"The tokenizer {now.tokenizer} has changed since.", ("tokenizer", "revision")),
    }
    if "dataset_fingerprint" in names and not _other_source(stored, now):
        told |= {"dataset_fingerprint": (rows, ()), "num_rows": (rows, ())}
    return {name: text for name, (text, named) in told.items() if name in names and not _renamed(stored, now, *named)}
