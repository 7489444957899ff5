"""`verify --model`: score a random sample of a store again, and say whether these are the weights that made it and give its numbers."""

from pathlib import Path

import devices
from precompute.scorer import Layout
from precompute.scorer.api import TOLERANCE, load_model, refuse_without_kernels, rescore, self_test, weights_sha256
from store.errors import StoreError
from store.reader import open_store


def verify_model(
    ref_store: Path, model: str, revision: str | None, config: str, *, num_pairs: int, seed: int, layout: Layout | None
) -> None:
    """Print what is found. `config`: sha256 of the model's configuration; `layout` None: the one that made the store.

    StoreError for weights or a configuration that are not the store's, and where they give other numbers here.
    """
    store = open_store(ref_store, check="none")
    identity = store.identity
    layout = layout or store.manifest.provenance.get("layout", "packed")  # what made it; an imported store does not say
    where = devices.device(0)
    if layout == "packed":
        refuse_without_kernels(where, identity.dtype)
    loaded = load_model(model, revision=revision, dtype=identity.dtype, device=where)
    checked = (("weights", weights_sha256(loaded), identity.weights_sha256), ("configuration", config, identity.config_sha256))
    others = [what for what, now, stored in checked if now != stored]
    print(self_test(loaded, identity.dtype, layout=layout))
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
