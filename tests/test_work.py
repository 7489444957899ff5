"""Phase 1's work, counted instead of timed: positions the model computes against the distinct (context, token) that exist.

The yardstick is an independent one: a set of every prefix of every sequence. Whoever makes packing, batching or shards waste more than the
bounds here sees it without a stopwatch.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from precompute.pairs import tokenize_rows
from precompute.scorer.head import head_of
from precompute.scorer.packing import MIN_SHARED, Sequence, pack
from precompute.scorer.scoring import score_batches

DEMO = Path(__file__).parent.parent / "demo" / "pairs.jsonl"


@pytest.fixture(scope="module")
def demo_pairs():
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").split("\n") if line]
    return tokenize_rows(tiny.make_tokenizer(), rows, 0, 2048).pairs


def distinct_prefixes(sequences: list[Sequence]) -> int:
    """Positions that no amount of sharing can avoid: distinct prefixes, the whole sequence (it predicts nothing) left out."""
    return len({sequence.ids[:length].tobytes() for sequence in sequences for length in range(1, len(sequence.ids))})


def ranked_replies(seed: int = 0) -> list[Sequence]:
    """Eight prompts, four replies each, every reply against every other: the same reply stands in three pairs."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(8):
        prompt = rng.integers(2, 384, rng.integers(20, 60))
        replies = [rng.integers(2, 384, rng.integers(20, 60)) for _ in range(4)]
        for i in range(4):
            for j in range(4):
                if i != j:
                    for reply in (replies[i], replies[j]):
                        sequences.append(Sequence(np.concatenate([prompt, reply]).astype(np.int32), len(prompt)))
    return sequences


def test_real_pairs_cost_what_is_distinct_in_them(demo_pairs):
    sequences = [sequence for pair in demo_pairs for sequence in pair.sequences]
    computed = sum(len(batch.input_ids) for batch in pack(sequences, 16384))
    distinct = distinct_prefixes(sequences)
    assert distinct <= computed <= distinct + MIN_SHARED * len(sequences)  # short common beginnings are not shared
    assert computed < 1.02 * distinct
    assert computed < 0.84 * sum(len(sequence.ids) for sequence in sequences)  # with every prompt twice it would be 1


def test_prompts_and_repeated_replies_are_computed_and_scored_once():
    sequences = ranked_replies()
    batches = list(pack(sequences, 100_000))
    assert sum(len(batch.input_ids) for batch in batches) == distinct_prefixes(sequences)
    scored = {
        (sequence.ids[:end].tobytes()) for sequence in sequences for end in range(sequence.num_prompt + 1, len(sequence.ids) + 1)
    }
    assert sum(len(batch.targets) for batch in batches) == len(scored)  # the head, too, sees each once


@pytest.mark.parametrize("tokens_per_batch", [512, 1024, 4096])
def test_cutting_into_batches_repeats_little(tokens_per_batch):
    """A batch begins with the whole path to its first branch: at most one path per cut is computed again."""
    sequences = ranked_replies()
    batches = list(pack(sequences, tokens_per_batch))
    computed, longest = sum(len(batch.input_ids) for batch in batches), max(len(sequence.ids) for sequence in sequences)
    assert computed <= distinct_prefixes(sequences) + longest * (len(batches) - 1)
    assert len(batches) <= computed / (tokens_per_batch - longest) + 1  # and batches are full


def test_the_model_sees_no_padding_and_the_head_no_prompt(demo_pairs):
    """What runs, not what was planned: rows of the embedding and of the head's product, seen by the model itself."""
    model = tiny.make_model("llama")
    sequences = [sequence for pair in demo_pairs[:12] for sequence in pair.sequences]
    head_of(model)  # once per model, by a forward of two tokens
    embedded, head = [], []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out.shape[:-1].numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "precompute.scorer.scoring.linear",
            lambda x, w, b: (head.append(len(x) * len(w)), torch.nn.functional.linear(x, w, b))[1],
        )
        reported = [batch.num_model_tokens for batch in score_batches(model, sequences, layout="packed", tokens_per_batch=4096)]
    handle.remove()
    batches = list(pack(sequences, 4096))
    assert embedded == reported == [len(batch.input_ids) for batch in batches]
    assert sum(head) == sum(len(batch.targets) for batch in batches) * model.config.vocab_size
