"""A store in the files of other projects: TRL, open-instruct, Megatron-Bridge, and plain JSONL.

    trl               dataset/ (datasets.load_from_disk: TRL's columns) and ref_logps.arrow (what TRL's own precompute pass would
    cache)
    open-instruct     reference_logprobs.pt (its TensorCache: chosen_logps, rejected_logps; float32, one per pair)
    megatron-bridge   ref_logprobs.jsonl and scoring_metadata.json (its offline scorer's artifact; one line per source row)
    jsonl             pairs.jsonl: one object per pair with every column of the store

Formats as read from trl 1.16, allenai/open-instruct e6c3044a (August 2026) and NVIDIA-NeMo/Megatron-Bridge 0eca073e (2026).
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from store.disk import refusal
from store.errors import InputError
from store.reader import Store, open_store
from store.schema import SUMS_ONLY_NOTE, schema_of
from store.spans import TURNS

Progress = Callable[[int, int], None]
"""(pairs done, all)."""

FORMATS = ("trl", "open-instruct", "megatron-bridge", "jsonl")

OPEN_INSTRUCT_LOSSES = {"dpo": False, "wpo": False, "dpo_norm": True}
"""Does this loss of open-instruct take means per token instead of sums?"""

PAIRS_AT_A_TIME = 1024

TRL_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")

MEGATRON_VERSION = 2
"""Megatron-Bridge's PAIR_TOKENIZATION_VERSION; it refuses an artifact of another."""

MEGATRON_METADATA = {
    "prompt_key": None,
    "tools_key": None,
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "chat_template_kwargs": None,
}
"""What a training configuration of Megatron-Bridge is compared with, beside dataset, split, tokenizer and length. `metadata`
changes it."""


def export(
    path: Path,
    format: str,
    output: Path,
    *,
    loss_type: str | None = None,
    metadata: dict[str, Any] | None = None,
    accept_other_tokens: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the sealed store at `path` as `format` into the new folder `output`; returns what its reader should know, a line each.

    `loss_type` (open-instruct only) says whether means or sums are written. `metadata` (megatron-bridge only) goes into its
    fingerprint.
    open-instruct and Megatron-Bridge score other tokens than the store where `accept_other_tokens` must say that this is
    understood.
    InputError for options that do not fit, an existing `output`; StoreError for an unsealed store or a folder that cannot be
    written.
    """
    _check_options(format, loss_type, metadata, accept_other_tokens)
    store = open_store(path, check="sha256")
    _refuse_turns(store, format)
    if not store.num_pairs:
        raise InputError("there is no pair to export", where=path)
    if output.exists() and not (overwrite and output.is_dir()):
        raise InputError(
            "exists already", where=f"--output {output}", next="Choose another --output, or add --overwrite for a folder."
        )
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    writers: dict[str, Callable[..., list[str]]] = {
        "trl": _trl,
        "open-instruct": _open_instruct,
        "megatron-bridge": _megatron,
        "jsonl": _jsonl,
    }
    options: tuple[Any, ...] = {"open-instruct": (loss_type,), "megatron-bridge": (metadata or {}, output)}.get(format, ())
    try:
        staging.mkdir(parents=True)
        notes = writers[format](store, staging, progress or (lambda done, total: None), *options)
        if output.exists():
            _drop_former(output, staging)
        os.replace(staging, output)
    except OSError as error:
        raise refusal(error, output, "--output") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return notes


def _drop_former(output: Path, staging: Path) -> None:
    """Remove an earlier export. InputError where the folder has anything that the new one, in `staging`, has not."""
    if others := sorted({entry.name for entry in output.iterdir()} - {entry.name for entry in staging.iterdir()}):
        raise InputError(
            "holds other files than this export",
            where=f"--output {output}",
            found=", ".join(others[:5]),
            next="Remove them yourself.",
        )
    shutil.rmtree(output)


def _refuse_turns(store: Store, format: str) -> None:
    if store.identity.scored_turns and format != "jsonl":
        raise InputError(
            f"the store has the log-probs of {TURNS[store.identity.scored_turns]} alone; what reads this format would take them for whole completions",
            where=f"--format {format}",
            next="Use --format jsonl, or make a store with --score-turns completion.",
        )


def _check_options(format: str, loss_type: str | None, metadata: dict | None, accept_other_tokens: bool) -> None:
    if format not in FORMATS:
        raise InputError("unknown format", where=f"--format {format}", expected=" | ".join(FORMATS))
    if (loss_type is not None) != (format == "open-instruct"):
        raise InputError(
            "belongs to --format open-instruct, and is needed there: its cache holds means for dpo_norm and sums for the others",
            where="--loss-type",
            expected=" | ".join(OPEN_INSTRUCT_LOSSES),
        )
    if loss_type is not None and loss_type not in OPEN_INSTRUCT_LOSSES:
        raise InputError("unknown loss type", where=f"--loss-type {loss_type}", expected=" | ".join(OPEN_INSTRUCT_LOSSES))
    if metadata and format != "megatron-bridge":
        raise InputError("belongs to --format megatron-bridge", where="--metadata")
    if format in OTHER_TOKENS and not accept_other_tokens:
        raise InputError(
            OTHER_TOKENS[format], where=f"--format {format}", next="Add --accept-other-tokens if that is so for your data and loss."
        )


OTHER_TOKENS = {
    "open-instruct": (
        "open-instruct scores each side's last turn (before 2025-06-26 every assistant turn), the store all that follows the common prompt: the same"
        " where the sides differ in their last turn alone, but for a token where an answer begins with a line break"
    ),
    "megatron-bridge": (
        "Megatron-Bridge also scores the header of the assistant turn, ends at the end-of-turn token and skips pairs longer than its length: with"
        " summed log-probs the header cancels between the sides, with preference_average_log_probs it does not"
    ),
}


def _blocks(store: Store, progress: Callable[[int, int], None], names: tuple[str, ...]) -> Iterator[pa.Table]:
    for start in range(0, store.num_pairs, PAIRS_AT_A_TIME):
        stop = min(start + PAIRS_AT_A_TIME, store.num_pairs)
        yield store.read(range(start, stop), names)
        progress(stop, store.num_pairs)


def _jsonl(store: Store, folder: Path, progress: Progress) -> list[str]:
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for table in _blocks(store, progress, tuple(schema_of(store.identity, store.source_columns).names)):
            file.writelines(json.dumps(pair, ensure_ascii=False, allow_nan=False) + "\n" for pair in table.to_pylist())
    (folder / "manifest.json").write_bytes(store.manifest.to_bytes())
    notes = [f"{store.num_pairs:,} lines with the columns of docs/store-format.md; manifest.json says what made them"]
    return notes + ([f"the store was {SUMS_ONLY_NOTE}"] if store.identity.sums_only else [])


def _trl(store: Store, folder: Path, progress: Progress) -> list[str]:
    from datasets import Dataset, Features, List, Value

    kinds = {name: List(Value("int32")) if name.endswith("ids") else Value("float64") for name in TRL_COLUMNS}
    features = Features({"pair_id": Value("string"), **kinds})

    def rows() -> Iterator[dict[str, Any]]:
        for table in _blocks(store, progress, ("pair_id", *TRL_COLUMNS)):
            yield from table.to_pylist()

    Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache")).save_to_disk(str(folder / "dataset"))
    shutil.rmtree(folder / "cache")
    _trl_cache(store, folder / "ref_logps.arrow")
    return [
        "dataset/: load_from_disk; a DPOTrainer whose _prepare_dataset and _precompute_ref_logps return the dataset trains on it as it is",
        "ref_logps.arrow: what TRL's precompute pass caches, in the order of the pairs; Dataset.from_file reads it",
    ]


def _trl_cache(store: Store, file: Path) -> None:
    """The Arrow stream that TRL's `dataset.map` over its computed float32 values leaves behind."""
    table = store.columns(["ref_chosen_logps", "ref_rejected_logps"])
    schema = pa.schema([pa.field(name, pa.float32()) for name in table.column_names])
    info = {"info": {"features": {name: {"dtype": "float32", "_type": "Value"} for name in table.column_names}}}
    table = table.cast(schema).replace_schema_metadata({"huggingface": json.dumps(info)})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)


def _open_instruct(store: Store, folder: Path, progress: Progress, loss_type: str) -> list[str]:
    import torch

    table = store.lengths()
    tensors = {}
    for side in ("chosen", "rejected"):
        values = torch.tensor(table[f"ref_{side}_logps"].to_pylist(), dtype=torch.float64)
        if OPEN_INSTRUCT_LOSSES[loss_type]:
            values /= torch.tensor(table[f"num_{side}_tokens"].to_pylist())
        tensors[f"{side}_logps"] = values.to(torch.float32)
    torch.save(tensors, folder / "reference_logprobs.pt")
    progress(store.num_pairs, store.num_pairs)
    notes = [
        f"{'means per token' if OPEN_INSTRUCT_LOSSES[loss_type] else 'sums'} of {store.num_pairs:,} pairs, for --loss_type {loss_type}",
        "open-instruct logs the path it looks for ($REFERENCE_LOGPROBS_CACHE_PATH/<hash>.pt): copy reference_logprobs.pt there",
    ]
    if store.manifest.unscorable:
        notes.append(
            f"{len(store.manifest.unscorable):,} rows without a pair are left out, as its preference filter drops rows without a completion"
        )
    return notes


def _megatron(store: Store, folder: Path, progress: Progress, metadata: dict[str, Any], output: Path) -> list[str]:
    """`output` is what `folder` will be called. One line per source row: its reader demands every pair_id (there: the row's index) from 0 on. Rows without a pair are stubs
    there."""
    identity = store.identity
    table = store.lengths()
    lines = {
        pair["row"]: {
            "pair_id": pair["row"],
            "ref_chosen_logprob_sum": pair["ref_chosen_logps"],
            "ref_chosen_num_tokens": pair["num_chosen_tokens"],
            "ref_rejected_logprob_sum": pair["ref_rejected_logps"],
            "ref_rejected_num_tokens": pair["num_rejected_tokens"],
        }
        for pair in table.to_pylist()
    }
    names = ("ref_chosen_logprob_sum", "ref_chosen_num_tokens", "ref_rejected_logprob_sum", "ref_rejected_num_tokens")
    for each in store.manifest.unscorable:
        lines[each.row] = {"pair_id": each.row, **dict.fromkeys(names[0::2], 0.0), **dict.fromkeys(names[1::2], 1)}
    with open(folder / "ref_logprobs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(lines[row]) + "\n" for row in range(identity.num_rows))
    progress(store.num_pairs, store.num_pairs)
    about = {
        "dataset": identity.dataset,
        "split": identity.split,
        "tokenizer": identity.tokenizer,
        "max_seq_length": identity.max_length,
        **MEGATRON_METADATA,
        "tokenization_version": MEGATRON_VERSION,
        **metadata,
        "scored_by": {"program": "refdpo", "identity": identity.to_json(), "tokens": OTHER_TOKENS["megatron-bridge"]},
    }
    (folder / "scoring_metadata.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    notes = [
        f"{identity.num_rows:,} rows; dataset.ref_artifact={output} must be trained with the values of scoring_metadata.json (--metadata KEY=JSON sets them)"
    ]
    if store.manifest.unscorable:
        notes.append(
            f"{len(store.manifest.unscorable):,} rows without a pair have zeros: Megatron-Bridge emits zero-loss stubs where nothing can be scored"
        )
    return notes


def key_values(given: tuple[str, ...]) -> dict:
    """KEY=JSON words as a dict. InputError for one that is none."""
    values = {}
    for each in given:
        name, _, text = each.partition("=")
        try:
            values[name] = json.loads(text, parse_constant=int)  # NaN is no JSON
            if not name:
                raise ValueError
        except ValueError as error:
            raise InputError(
                "not KEY=JSON", where=f"--metadata {each}", expected="such as split=null or tensor_model_parallel_size=2"
            ) from error
    return values
