"""Score some pairs of a sealed store again: the noise floor of `verify --model`, and the gate before training."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from precompute.packing import Sequence
from precompute.scoring import Layout, score
from store.reader import Store
from store.schema import SUMS_ONLY


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
    """
    chosen_pairs = np.random.default_rng(seed).choice(store.num_pairs, size=min(num_pairs, store.num_pairs), replace=False)
    pairs = store.read(sorted(chosen_pairs.tolist())).to_pylist()
    sequences, stored, sums = [], [], []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids = np.array(pair["prompt_ids"] + pair[f"{side}_ids"], dtype=np.int32)
            sequences.append(Sequence(ids, len(pair["prompt_ids"])))
            stored.append(np.array(pair[f"{side}_token_logps"], dtype=np.float64))
            sums.append(pair[f"ref_{side}_logps"])
    now = score(model, sequences, layout=layout, tokens_per_batch=tokens_per_batch)
    if store.identity.scorer_version == SUMS_ONLY:  # only a completion's mean can be compared
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
