"""Before step 1: is the policy the store's reference? Its files are compared by hash, and a few random pairs are scored again with it.

A DPO run with another starting policy, dtype or tokenizer than its reference log-probs runs without any error and learns something else. The
hashes catch another checkpoint exactly. The rescoring catches what no hash sees: an attention kernel or library that computes something else,
a store whose numbers are not what its identity claims.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import TypeVar

import torch
import torch.distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from precompute.scorer.api import (
    TOLERANCE,
    Rescored,
    chat_template_sha256,
    config_sha256,
    rescore,
    tokenizer_sha256,
    weights_sha256,
)
from store.command import cli
from store.errors import InputError, StoreError
from store.manifest import Identity, shown
from store.reader import Store
from train.plan import COMPARED

T = TypeVar("T")

NUM_PAIRS = 8
"""Random pairs rescored, the same on every rank. A mean over some thousand tokens; seconds for a 7B model."""


@dataclass(frozen=True)
class Difference:
    """A field of the identity that the policy does not share, as a person reads it."""

    field: str
    of_store: str
    of_policy: str


@dataclass(frozen=True)
class GateReport:
    """What the gate saw. `rescored` is that of the rank that is farthest off; None where the tokenizer differs: the store's ids then
    mean something else to the policy."""

    differences: tuple[Difference, ...]
    rescored: Rescored | None
    tolerance: float

    @property
    def within_tolerance(self) -> bool:
        """Are the log-probs those of the store, but for rounding?"""
        return self.rescored is not None and self.rescored.mean_token_difference <= self.tolerance  # false for NaN

    @property
    def different(self) -> bool:
        """Is the policy another model than the reference, by its files or by its numbers?"""
        return bool(self.differences) or not self.within_tolerance

    def __str__(self) -> str:
        seen = self.rescored
        if seen is None:
            return "not scored again, as the tokenizer differs"
        text = (
            f"{seen.num_pairs} random pairs ({seen.num_tokens:,} tokens) scored with the policy differ from the store by"
            f" {seen.mean_token_difference:.2g} nats per token (tolerance {self.tolerance:g})"
        )
        if not self.within_tolerance:
            text += f", most on source row {seen.worst_row}: {seen.worst_row_difference:.2g} per token; a completion's sum is off by up to"
            text += f" {seen.max_sum_difference:.3g}"
        return text


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    *,
    policy: str,
    revision: str | None = None,
    seed: int = 0,
    allow_different_policy: bool = False,
) -> GateReport:
    """Compare `model` (loaded from `policy`, in evaluation mode, before any checkpoint) and `tokenizer` with what made `store`.

    Every rank calls this with its own copy of the model and rescores the same pairs; all get the same report or the same error. Hashes
    are taken on rank 0. Raises InputError for another policy, StoreError for the same policy with other numbers, unless
    `allow_different_policy`.
    """
    differences = _from_first_rank(lambda: _differences(model, tokenizer, store.identity, policy, revision))
    _check_vocabulary(model, tokenizer, policy)
    mine = None
    if "tokenizer_sha256" not in {each.field for each in differences}:
        # Each sequence alone, by the plain forward and attention that training uses: no padding, no packing, little memory.
        mine = rescore(model, store, num_pairs=NUM_PAIRS, seed=seed, layout="padded", tokens_per_batch=1)
    report = GateReport(differences, _farthest_off(_from_all_ranks(mine)), TOLERANCE[store.identity.dtype])
    if not allow_different_policy:
        _stop_if_different(report, store, policy)
    return report


def check_start(model: PreTrainedModel, store: Store, how: str, *, seed: int = 0, may_differ: bool = False) -> str:
    """Rescore with what is trained where that is not what `check` saw: an adapter beside its base, of which `check` saw the merge, or weights in
    4 bits. `how` says which.

    `model`: the base with the adapter's layers in it. Every rank calls it. Returns what was seen. Raises StoreError beyond the tolerance unless
    it `may_differ`, as rounded weights do.
    """
    mine = rescore(model, store, num_pairs=NUM_PAIRS, seed=seed, layout="padded", tokens_per_batch=1)
    report = GateReport((), _farthest_off(_from_all_ranks(mine)), TOLERANCE[store.identity.dtype])
    if not report.within_tolerance and not may_differ:
        raise StoreError(
            f"{how}, as it is trained, the policy gives other numbers than were scored: {report}",
            where=store.path,
            next="Merge the adapter into a whole model and train another one on that, or insist with --allow-different-policy.",
        )
    return f"{how}, as it is trained: {report}"


def notice(report: GateReport, store: Store, policy: str) -> str:
    """What is printed when a different policy is trained on purpose."""
    lines = [
        "!" * 100,
        f"!! --allow-different-policy: {policy} is NOT the reference of {store.path} ({store.identity.model}).",
        *(f"!!   {each.field}: the store has {each.of_store}, the policy {each.of_policy}" for each in report.differences),
        f"!!   {report}",
        "!! The loss does not start at that of an untrained policy, and the implicit reward is relative to the store's model.",
        "!" * 100,
    ]
    return "\n".join(lines)


def _stop_if_different(report: GateReport, store: Store, policy: str) -> None:
    if report.differences:
        raise InputError(
            f"the policy {policy} is not the reference of this store",
            where=store.path,
            expected="; ".join(f"{each.field} {each.of_store}" for each in report.differences),
            found="; ".join(f"{each.field} {each.of_policy}" for each in report.differences),
            next=f"{str(report).capitalize()}. {_remedy(report, store)}",
        )
    if not report.within_tolerance:
        raise StoreError(
            f"same weights, other numbers: {report}",
            where=store.path,
            next="The store's numbers are not what this model computes here: check --attn-implementation and the library versions recorded in"
            f" its manifest, or score it again into another store. The noise: {cli('verify', '--ref-store', store.path, '--model', policy)}",
        )


def _differences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: Identity, policy: str, revision: str | None
) -> tuple[Difference, ...]:
    dtype = str(model.dtype).removeprefix("torch.")
    now = {
        "config_sha256": config_sha256(policy, revision),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "dtype": dtype,
    }
    if dtype == identity.dtype:  # weights hash as loaded: in another dtype they say nothing
        now["weights_sha256"] = weights_sha256(model)
    of_policy = replace(identity, model=policy, revision=revision, tokenizer=tokenizer.name_or_path, **now)
    return tuple(
        Difference(field, shown(field, identity), shown(field, of_policy))
        for field in COMPARED
        if getattr(of_policy, field) != getattr(identity, field)
    )


def _farthest_off(of_ranks: list[Rescored | None]) -> Rescored | None:
    """NaN is farther off than any number."""
    differences = [inf if each is None or isnan(each.mean_token_difference) else each.mean_token_difference for each in of_ranks]
    return of_ranks[differences.index(max(differences))]


def _remedy(report: GateReport, store: Store) -> str:
    identity, command = store.identity, store.manifest.command
    fields = {each.field for each in report.differences}
    ways = []
    if fields & {"weights_sha256", "config_sha256"}:
        ways.append(f"train from {identity.model}, or score this policy into a store of its own with precompute")
    if "tokenizer_sha256" in fields:
        ways.append(f"give --tokenizer {identity.tokenizer}")
    if "chat_template_sha256" in fields:
        template = command.chat_template if command is not None else None
        ways.append(f"give --chat-template {template}" if template else "give the --chat-template that precompute was given")
    if "dtype" in fields:
        ways.append(f"give --dtype {identity.dtype}")
    ways.append("insist with --allow-different-policy")
    text = "; ".join(ways)
    return text[0].upper() + text[1:] + "."


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
    """Too few embeddings for the store's ids cannot even be scored; nothing can allow that."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if embeddings < len(tokenizer):
        raise InputError(
            "the policy has too few embeddings", where=f"--policy {policy}", expected=f"{len(tokenizer)} tokens", found=embeddings
        )


def _from_all_ranks(mine: Rescored | None) -> list[Rescored | None]:
    if not torch.distributed.is_initialized():
        return [mine]
    gathered: list[Rescored | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def _from_first_rank(compute: Callable[[], T]) -> T:
    """The result of `compute` on rank 0, on every rank. An exception there ends the job."""
    if not torch.distributed.is_initialized():
        return compute()
    result = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(result, src=0)
    return result[0]
