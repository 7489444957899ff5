"""One worker of phase 1: load the frozen model, then shard by shard: tokenize ahead, score, write behind.

    rows of shard 7 ──tokenize (thread)──► pairs ──score (this thread)──► log-probs ──publish (thread)──► store/think/part-00007.parquet

Any number of workers may run this on the same store, at the same time or one after another: each takes the most expensive
shard that nobody holds (plan.py), and whoever completes the set seals it.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import devices
from launch import Process, place_among_all
from precompute.config import PrecomputeConfig
from precompute.inputs import load_inputs
from precompute.pairs import TokenizedRows, tokenize_rows
from precompute.plan import claiming_order, shard_costs
from precompute.progress import Progress, say_where_it_goes_on
from precompute.reuse import Reused, noted
from precompute.rows.dataset import JoinedRows, Rows
from precompute.rows.source_columns import Beside, SourceColumns
from precompute.scorer.adapter import adapter_of
from precompute.scorer.api import (
    enough_memory,
    give_back_freed_memory,
    keep_freed_memory,
    largest_budget,
    more_room,
    named_compiler,
    named_kernel,
    score_batches,
    self_test,
    use_compiler,
    use_kernel,
    versions,
)
from precompute.scorer.packing import Sequence
from precompute.sealed import checkpoint_stamp, is_complete, weights_known
from precompute.shard import shard_of
from presets import PRESETS
from stop import StopRequest, listening
from store.claim import Claim, claim, claim_sealing
from store.folder import missing_shards, prepare_store, refuse_non_store, settle_source_columns, stored_identity
from store.manifest import Identity, Manifest, ShardReport, manifest_path
from store.seal import seal
from store.shard import part_name, parts_in, publish_shard

Say = Callable[[object], None]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between two looks at the shards that other workers hold, growing: hundreds of workers may be waiting for the last one."""


def run(config: PrecomputeConfig, process: Process) -> Manifest:
    """Score what is missing from the store, wait for the shards that others hold, seal; returns the manifest.

    Should another worker die meanwhile, its shards are taken over: whoever returns leaves a sealed store behind. Raises InputError for
    unusable input, StoreError for a store that is damaged or of another identity, Stopped when told to stop; what is published stays.
    """
    budget = "--tokens-per-batch auto, which measures" if config.tokens_per_batch != "auto" else "--tokens-per-batch with a number"
    with listening() as stop, enough_memory("while scoring", lambda: f"Use {budget}, or {more_room(config.gpus_per_worker)}"):
        return _run(config, process, stop)


def _run(config: PrecomputeConfig, process: Process, stop: StopRequest) -> Manifest:
    mine = devices.devices(process.local_rank, config.gpus_per_worker)
    text = config.show == "text"
    says = text and process.local_rank == 0
    say = _say if says else _silent
    _set_up(config, mine, _say if text and process.rank == 0 else _silent, process.world)
    # What an earlier run left, seen before this run's other workers can add to it: they do not wait for this one.
    before, sealed = parts_in(config.ref_store), manifest_path(config.ref_store).exists()
    for store in config.reuse:
        refuse_non_store(store)
    # Before the weights are read, for files may change meanwhile; a hub's do not, and asking for a model that is not there takes its time.
    early = Path(config.model).is_dir() or manifest_path(config.ref_store).exists()
    stamp = checkpoint_stamp(config.model, config.revision) if early else None
    rows, tokenizer, model, identity = load_inputs(config, mine, weights_known(config.ref_store, stamp), say)
    if mine[0].type == "cpu":
        keep_freed_memory()  # from here on: what loading took and freed goes back
    command = config.command()
    known = Reused(config.reuse, identity, config.ref_store)
    prepare_store(config.ref_store, identity, command)
    if identity.datasets is not None:  # in the store's own words, should this run spell a path otherwise
        identity = replace(identity, datasets=stored_identity(config.ref_store).datasets)
    complete = is_complete(config.ref_store, identity)
    if says and not (sealed and complete):
        say_where_it_goes_on(config.ref_store, identity, before)
    if complete:
        say(f"{config.ref_store}: sealed {'already' if sealed else 'by other workers'}, nothing to score")
        return Manifest.load(manifest_path(config.ref_store))

    if (adapter := adapter_of(config.model, config.revision)) is not None:
        say(adapter)
    offered = SourceColumns.of(rows)
    beside = Beside(rows, offered, settle_source_columns(config.ref_store, offered.columns))
    if notice := offered.notice(beside.kept):
        say(notice)
    config = _try_model(config, model, process, say)
    checked = _check_reused(config, model, identity, known, say)
    progress = Progress(config.ref_store, identity, process, config.show)
    if progress.nothing_to_score and len(before) < identity.num_shards:
        say(f"{config.ref_store}: scored by other workers meanwhile, sealing")
    provenance = {
        "worker": f"{socket.gethostname()}:{process.rank}",
        "host": socket.gethostname(),
        "device": _device_name(mine[0]),
        "tokens_per_batch": config.tokens_per_batch,
        "attention_kernel": config.attention_kernel,
        "attn_implementation": model.config._attn_implementation,
        "versions": versions(),
    }
    costs = shard_costs(rows, identity.shard_size, identity.max_length)
    missing = claiming_order(costs, missing_shards(config.ref_store, identity), *place_among_all(process))
    missing = _Shards(config, identity, rows, tokenizer, model, known, beside, progress, provenance, stop).score(missing)
    for store in known.stores if text else ():
        _say(f"{store.num_found:,} pairs were taken from {store.store}, as they are the same there")
    if missing:
        done = identity.num_shards - len(missing_shards(config.ref_store, identity))
        raise stop.error(f"{done} of {identity.num_shards} shards are done", config.ref_store)
    give_back_freed_memory()  # sealing holds every shard's footer
    recorded = {
        "layout": config.layout,
        "attention_kernel": config.attention_kernel,
        "torch_compile": config.torch_compile,
        "gpus_per_worker": config.gpus_per_worker,
        "threads_per_worker": torch.get_num_threads(),
        "command": command.to_json(),
        **({"reuse_checked": checked} if checked else {}),
        "checkpoint_stamp": stamp or checkpoint_stamp(config.model, config.revision),
    }
    return _seal(config, identity, recorded, stop)


def _set_up(config: PrecomputeConfig, mine: tuple[torch.device, ...], say: Say, world: int) -> None:
    """Say what scores, and choose attention and compiler for it. InputError for a kernel that cannot run here."""
    say(devices.describe(mine[0], world, len(mine)))
    if (preset := PRESETS.get(config.preset or "")) is not None and preset.note:
        say(preset.note)
    for each in mine:
        use_kernel(config.attention_kernel, layout=config.layout, device=each, dtype=config.dtype)
    use_compiler(config.torch_compile, layout=config.layout)


def _try_model(config: PrecomputeConfig, model: PreTrainedModel, process: Process, say: Say) -> PrecomputeConfig:
    """`config` with the measured number where --tokens-per-batch is auto. InputError where the layout gives this model other log-probs than a
    plain forward."""
    budget = 16384 if config.tokens_per_batch == "auto" else config.tokens_per_batch
    with named_kernel(config.attention_kernel), named_compiler():
        say(self_test(model, config.dtype, layout=config.layout, tokens_per_batch=budget))
    if config.tokens_per_batch == "auto":
        budget = largest_budget(model, layout=config.layout, max_length=config.max_length, num_workers=process.world)
        say(f"--tokens-per-batch auto: {budget:,}")
    return replace(config, tokens_per_batch=budget)


def _check_reused(config: PrecomputeConfig, model: PreTrainedModel, identity: Identity, known: Reused, say: Say) -> list[dict]:
    """For the manifest: how far the stores of --reuse are off, by pairs scored again. InputError where it is too far."""
    checked = known.check(model, identity, layout=config.layout, tokens_per_batch=config.tokens_per_batch)
    for each in checked:
        if each["num_pairs"]:
            say(
                f"--reuse {each['store']}: {each['num_pairs']} of its pairs scored again are off by {each['mean_token_difference']:.1e} nats per "
                f"token, {each['max_token_difference']:.1e} at most"
            )
    return checked


def _seal(config: PrecomputeConfig, identity: Identity, recorded: dict, stop: StopRequest) -> Manifest:
    """One worker seals, the others wait for it: sealing reads every footer. Without the claim all of them would, at the same moment."""
    held = None
    while not manifest_path(config.ref_store).exists() and (held := claim_sealing(config.ref_store)) is None:
        stop.sleep(FIRST_PAUSE_S)
        if stop.now:
            raise stop.error("all shards are done, another worker is sealing", config.ref_store)
    try:
        return seal(config.ref_store, identity, recorded, config.preset)
    finally:
        if held is not None:  # left behind by an error: the next who seals need not wait for it to expire
            held.release()


@dataclass
class _Shards:
    """The shards of a store, as one worker scores them: one ahead is tokenized and one behind is written while this thread keeps the model busy."""

    config: PrecomputeConfig
    identity: Identity
    rows: Rows | JoinedRows
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    known: Reused
    beside: Beside
    progress: Progress
    provenance: dict
    """Of every shard that this worker publishes."""
    stop: StopRequest
    claims: list[Claim] = field(default_factory=list)
    """In the order in which they were made, published shards' too."""

    def score(self, missing: list[int]) -> list[int]:
        """Score these shards, in this order, but for those that others hold, for which it waits. Returns what is missing when told to stop."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            writing: Future | None = None
            pause = FIRST_PAUSE_S
            try:
                while missing and not self.stop.soon:
                    for held, index, tokens in self._tokenized(ahead, missing):
                        report, columns, timing = self._scored(index, tokens)
                        if writing is not None:
                            writing.result()
                        writing = behind.submit(self._publish, held, report, columns, timing)
                        self.progress.shard_done(report)
                        pause = FIRST_PAUSE_S
                    if writing is not None:
                        writing.result()
                    missing = [index for index in missing if not (self.config.ref_store / part_name(index)).exists()]
                    if missing:  # others hold them
                        self.stop.sleep(pause)
                        pause = min(1.5 * pause, LONGEST_PAUSE_S)
            finally:
                ahead.shutdown(cancel_futures=True)  # or it might claim one more
                for held in self.claims:  # of this worker's shards only those not published still have one
                    held.release()
        self.progress.close()
        return missing

    def _tokenized(self, ahead: ThreadPoolExecutor, missing: list[int]) -> Iterator[tuple[Claim, int, TokenizedRows]]:
        """Claim and tokenize the missing shards, one ahead of the caller, until each is done or held by somebody alive, or until told to stop."""
        candidates = iter(missing)

        def next_shard() -> tuple[Claim, int, TokenizedRows] | None:
            for index in candidates:
                if self.stop.soon:
                    return None
                if (held := claim(self.config.ref_store, index)) is not None:
                    self.claims.append(held)
                    block, config = self.identity.rows_of(index), self.config
                    read = self.rows.select(block).to_list()
                    return held, index, tokenize_rows(self.tokenizer, read, block.start, config.max_length, config.scored_turns)
            return None

        upcoming = ahead.submit(next_shard)
        while (current := upcoming.result()) is not None and not self.stop.soon:
            upcoming = ahead.submit(next_shard)
            yield current

    def _scored(self, index: int, tokens: TokenizedRows) -> tuple[ShardReport, pa.Table, dict]:
        """Report and table of a shard, and when it was made. Raises Stopped between two batches."""
        started, waited = time.time(), self.progress.shard_started()
        reused, by_store = self.known.find(tokens.pairs)
        if reused:
            tokens.counts["reused"], tokens.examples["reused"] = len(reused), noted(index, by_store)
        fresh = [place for place in range(len(tokens.pairs)) if place not in reused]
        token_logps, model_tokens = self._token_logps(index, [each for place in fresh for each in tokens.pairs[place].sequences])
        timing = {
            "seconds": time.time() - started,
            "waited": waited,
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "reused": by_store,
        }
        of_pair = reused | dict(zip(fresh, zip(token_logps[0::2], token_logps[1::2], strict=True), strict=True))
        sides = [of_pair[place] for place in range(len(tokens.pairs))]
        report, table = shard_of(
            self.identity,
            index,
            tokens,
            [each[0] for each in sides],
            [each[1] for each in sides],
            model_tokens,
            *self.beside.of([pair.row for pair in tokens.pairs]),
        )
        return report, table, timing

    def _token_logps(self, index: int, sequences: list[Sequence]) -> tuple[list[np.ndarray], int]:
        """float32 [completion tokens] of each sequence, in nats; and the tokens that the model computed for all of them."""
        token_logps: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        model_tokens = 0
        for batch in score_batches(self.model, sequences, layout=self.config.layout, tokens_per_batch=self.config.tokens_per_batch):
            for member, logps in zip(batch.members, batch.token_logps, strict=True):
                token_logps[member] = logps
            model_tokens += batch.num_model_tokens
            for held in self.claims[-3:]:  # the shards being written, scored and tokenized ahead
                held.refresh()
            self.progress.batch_done(batch.num_model_tokens)
            if self.stop.now:
                raise self.stop.error(f"shard {index} was dropped half-way, finished ones are kept", self.config.ref_store)
        return token_logps, model_tokens

    def _publish(self, held: Claim, report: ShardReport, columns: pa.Table, timing: dict) -> None:
        publish_shard(self.config.ref_store, self.identity, report, columns, self.provenance | timing)
        held.release()


def _device_name(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"cpu ({torch.get_num_threads()} threads)"


def _say(line: object) -> None:
    print(line, file=sys.stderr)


def _silent(line: object) -> None:
    pass
