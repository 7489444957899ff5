"""Packing is pure: checked against definitions, over random forests of shared prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precompute.scorer.packing import MIN_SHARED, Sequence, pack


@st.composite
def sequence_lists(draw):
    """Sequences over a small alphabet, many of which continue a prefix of an earlier one."""
    sequences: list[Sequence] = []
    for _ in range(draw(st.integers(1, 12))):
        base = draw(st.sampled_from(sequences)).ids if sequences and draw(st.booleans()) else np.empty(0, np.int32)
        kept = base[: draw(st.integers(0, len(base)))]
        tail = draw(st.lists(st.integers(0, 3), min_size=2 if len(kept) < 2 else 0, max_size=40))
        ids = np.concatenate([kept, np.array(tail, dtype=np.int32)]).astype(np.int32)
        sequences.append(Sequence(ids, draw(st.integers(1, len(ids) - 1))))
    return sequences


@settings(max_examples=150)
@given(sequence_lists(), st.integers(1, 120))
def test_every_score_sees_exactly_its_own_context(sequences, budget):
    """Following branches back from a predictor must give the sequence's own prefix, and the target its next token."""
    seen = []
    for batch in pack(sequences, budget):
        context_of = {}  # packed position -> tokens up to and including it
        for branch in batch.branches:
            path = [token for start, stop in branch.context for token in batch.input_ids[start:stop]]
            for position in range(branch.start, branch.stop):
                path = [*path, batch.input_ids[position]]
                context_of[position] = path
                assert batch.position_ids[position] == len(path) - 1
        assert len(context_of) == len(batch.input_ids)  # every position belongs to one branch
        for member, slots in zip(batch.members, batch.slots, strict=True):
            sequence = sequences[member]
            assert len(slots) == sequence.num_scored
            for place, slot in enumerate(slots, start=sequence.num_prompt):
                assert context_of[batch.predictors[slot]] == sequence.ids[:place].tolist()
                assert batch.targets[slot] == sequence.ids[place]
        seen += batch.members.tolist()
        assert len(batch.members) == 1 or len(batch.input_ids) <= budget
    assert sorted(seen) == list(range(len(sequences)))


def test_prompts_and_responses_are_computed_once():
    """Two pairs on one prompt with one response in common: the model computes prompt + 3 distinct responses."""
    rng = np.random.default_rng(0)
    prompt, good, bad, worse = (rng.integers(0, 1000, n).astype(np.int32) for n in (50, 30, 20, 40))
    sequences = [Sequence(np.concatenate([prompt, response]), 50) for response in (good, bad, good, worse)]
    (batch,) = pack(sequences, 10_000)
    # the last token of each distinct response predicts nothing
    assert len(batch.input_ids) == 50 + 29 + 19 + 39
    assert len(batch.targets) == 30 + 20 + 40
    np.testing.assert_array_equal(batch.slots[batch.members.tolist().index(0)], batch.slots[batch.members.tolist().index(2)])


def test_short_common_prefixes_are_not_worth_a_branch():
    rng = np.random.default_rng(1)
    common = rng.integers(0, 9, MIN_SHARED - 1).astype(np.int32)
    tails = [np.array([first, 5, 6, 7], dtype=np.int32) for first in (10, 11)]
    (batch,) = pack([Sequence(np.concatenate([common, tail]), 1) for tail in tails], 1000)
    assert len(batch.input_ids) == 2 * (MIN_SHARED - 1 + 3)


@pytest.mark.parametrize("num_prompt", [0, 3])
def test_a_sequence_without_prompt_or_completion_is_refused(num_prompt):
    with pytest.raises(ValueError, match="needs a prompt and a completion"):
        list(pack([Sequence(np.array([1, 2, 3], dtype=np.int32), num_prompt)], 100))
