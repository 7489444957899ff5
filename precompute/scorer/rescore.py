"""Score some pairs of a sealed store again: the noise floor of `verify --model`, and the gate before training."""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from transformers import PreTrainedModel

from precompute.scorer import Layout
from precompute.scorer.packing import Sequence, mask_of
from precompute.scorer.scoring import score
from store.errors import InputError
from store.reader import Store
from store.spans import SCORED

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest mean over tokens of |now - stored|, nats. The mean, because single tokens are noisy: bfloat16 moves one by 0.3.

Measured on SmolLM2-135M, 769 tokens of real chats, mean (largest) |difference| per token:
    same weights, alone against in a padded batch      float32 8e-8 (7e-6)    float16 1e-4 (1e-2)    bfloat16 1e-3 (8e-2)
    same weights, eager attention against SDPA         bfloat16 0.04 (0.29)
    same weights, packed precompute against padded   float32 7e-6            bfloat16 0.04          (2,255 tokens)
    every weight off by 0.1 % / 1 % (normal)           float32 0.01 / 0.12    bfloat16 0.05 / 0.12
The tolerance is 2.5 times what another kernel does in bfloat16 (8 times finer for float16's three more bits, rounded up), and far above the
rounding of any float32 kernel while far below TF32. Weights that differ less than that are caught by their hash.
"""


@dataclass(frozen=True)
class Rescored:
    """How far newly computed log-probs are from the stored ones, in nats."""

    num_pairs: int
    num_tokens: int
    mean_token_difference: float
    """Mean over tokens of |now - stored|; of an imported store, which has sums only, mean over completions of |mean now - mean stored|."""
    max_token_difference: float
    max_sum_difference: float
    """Largest |now - stored| of a completion's sum."""
    worst_row: int
    """Source row of the pair with the largest mean difference per token, and that mean."""
    worst_row_difference: float


def rescore(
    model: PreTrainedModel, store: Store, *, num_pairs: int, seed: int, layout: Layout = "packed", tokens_per_batch: int = 16384
) -> Rescored:
    """Score `num_pairs` random pairs (all, if there are fewer) with `model` and compare them with the store.

    The random choice composes other batches than precompute did, so for the same model the result is the noise of its dtype.
    InputError for a store without a pair, and for a model that does not know the store's ids or is too short for its sequences.
    """
    if not store.num_pairs:
        raise InputError("there is no pair to score", where=store.path)
    chosen_pairs = np.random.default_rng(seed).choice(store.num_pairs, size=min(num_pairs, store.num_pairs), replace=False)
    pairs = store.read(sorted(chosen_pairs.tolist())).to_pylist()
    sequences, stored, sums = [], [], []
    for pair in pairs:
        for side, spans in SCORED.items():
            ids = np.array(pair["prompt_ids"] + pair[f"{side}_ids"], dtype=np.int32)
            mask = mask_of(pair[spans], len(pair[f"{side}_ids"])) if store.identity.scored_turns else None
            sequences.append(Sequence(ids, len(pair["prompt_ids"]), mask))
            logps = np.array(pair[f"{side}_token_logps"], dtype=np.float64)
            stored.append(logps if mask is None else logps[mask])
            sums.append(pair[f"ref_{side}_logps"])
    _refuse_other_kind(model, sequences, store)
    now = score(model, sequences, layout=layout, tokens_per_batch=tokens_per_batch)
    if store.identity.sums_only:  # only a completion's mean can be compared
        differences = [np.abs([new.mean(dtype=np.float64) - old / len(new)]) for new, old in zip(now, sums, strict=True)]
    else:
        differences = [np.abs(new.astype(np.float64) - old) for new, old in zip(now, stored, strict=True)]
    of_pair = [float(np.concatenate(differences[2 * i : 2 * i + 2]).mean()) for i in range(len(pairs))]
    worst = int(np.argmax(of_pair))
    tokens = np.concatenate(differences)
    return Rescored(
        num_pairs=len(pairs),
        num_tokens=sum(map(len, now)),
        mean_token_difference=float(tokens.mean()),
        max_token_difference=float(tokens.max()),
        max_sum_difference=max(abs(float(new.sum(dtype=np.float64)) - old) for new, old in zip(now, sums, strict=True)),
        worst_row=pairs[worst]["row"],
        worst_row_difference=of_pair[worst],
    )


def _refuse_other_kind(model: PreTrainedModel, sequences: list[Sequence], store: Store) -> None:
    """A model that cannot even be asked. On a GPU an id too large would end the process."""

    def refuse(what: str, expected: str, found: int) -> NoReturn:
        raise InputError(
            f"not the model that made the store: its {what}",
            where=model.name_or_path,
            expected=expected,
            found=f"{found:,}",
            next=f"The store was made with {store.identity.model}.",
        )

    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(int(sequence.ids.max()) for sequence in sequences)
    if largest >= vocabulary:
        refuse("vocabulary is smaller", f"more than {largest:,} entries, for the ids in {store.path}", vocabulary)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = max(len(sequence.ids) for sequence in sequences)
    if longest is not None and needed > longest:
        refuse("context is shorter", f"at least {needed:,} tokens, as sequences in {store.path} have", longest)
