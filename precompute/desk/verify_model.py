"""`verify --model`: score a random sample of a store again, and say whether these are the weights that made it and give its numbers."""

from pathlib import Path

import torch

import devices
from precompute.scorer import AttentionKernel, Layout
from precompute.scorer.api import (
    TOLERANCE,
    enough_memory,
    load_model,
    more_room,
    named_kernel,
    refuse_too_large,
    rescore,
    self_test,
    use_kernel,
    weights_sha256,
)
from store.errors import StoreError
from store.reader import open_store


def devices_for(
    ref_store: Path,
    model: str,
    revision: str | None,
    layout: Layout | None,
    attention_kernel: AttentionKernel,
    gpus_per_worker: int,
) -> tuple[tuple[torch.device, ...], Layout]:
    """Where and in which layout the sample will be scored; `layout` None: the one that made the store.

    InputError where layout, devices, dtype, kernel and the model's size do not fit: known before every byte of the store is read.
    """
    store = open_store(ref_store, check="none")
    layout = layout or store.manifest.provenance.get("layout", "packed")  # what made it; an imported store does not say
    where = devices.devices(0, gpus_per_worker)
    print(devices.describe(where[0], 1, len(where)), flush=True)
    use_kernel(attention_kernel, layout=layout, device=where[0], dtype=store.identity.dtype)
    refuse_too_large(model, revision=revision, dtype=store.identity.dtype, devices=where)
    return where, layout


def verify_model(
    ref_store: Path,
    model: str,
    revision: str | None,
    config: str,
    *,
    num_pairs: int,
    seed: int,
    where: tuple[torch.device, ...],
    layout: Layout,
    attention_kernel: AttentionKernel = "default",
) -> None:
    """Print what is found. `config`: sha256 of the model's configuration; `where` and `layout`: devices_for's.

    StoreError for weights or a configuration that are not the store's, and where they give other numbers here.
    """
    store = open_store(ref_store, check="none")
    identity = store.identity
    loaded = load_model(model, revision=revision, dtype=identity.dtype, device=where)
    checked = (("weights", weights_sha256(loaded), identity.weights_sha256), ("configuration", config, identity.config_sha256))
    others = [what for what, now, stored in checked if now != stored]
    with named_kernel(attention_kernel):
        print(self_test(loaded, identity.dtype, layout=layout))
    with enough_memory("while scoring again", f"Free memory (other processes?), or {more_room(len(where))}"):
        result = rescore(loaded, store, num_pairs=num_pairs, seed=seed, layout=layout)
    of = "completion's mean" if identity.sums_only else "token"
    print(
        f"{result.num_pairs} pairs ({result.num_tokens:,} tokens) scored again in other batches, {layout}: |difference| per {of} "
        f"mean {result.mean_token_difference:.2e}, max {result.max_token_difference:.2e} nats; per sum max {result.max_sum_difference:.2e} nats"
    )
    if others:
        raise StoreError(
            f"{model} has NOT the {' and '.join(others)} that made the store",
            where=ref_store,
            next=f"It was made with {identity.model}{f'@{identity.revision}' if identity.revision else ''}.",
        )
    print(f"{model}: the weights that made the store")
    if not result.mean_token_difference <= TOLERANCE[identity.dtype]:  # also true for NaN
        raise StoreError(
            "these weights give other numbers here than the store has",
            where=ref_store,
            expected=f"at most {TOLERANCE[identity.dtype]:g} nats per {of} in {identity.dtype}",
            found=f"{result.mean_token_difference:.2g}, most on row {result.worst_row}",
            next="Either this machine computes wrongly (try the other --layout) or the one that made the store did.",
        )
