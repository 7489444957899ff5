"""Micro-batches by tokens: how many micro-steps a budget gives, and what every bin then holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import InputError
from train.balance import pairs_of_steps
from train.bins import MOST_EPOCHS, Bins, deal_into_bins, num_micro_steps, refuse_endless
from train.data import Lengths
from train.metrics import tokens_before


@pytest.mark.parametrize(
    ("tokens", "world", "budget", "steps"),
    [
        ([1000, 10, 10], 1, 20, 2),  # the long one alone, the others together
        ([1000, 900], 2, 20, 1),
        ([30] * 8, 1, 1, 8),  # no more micro-steps than pairs
        ([30] * 8, 4, 1, 2),
        ([30] * 9, 4, 29, 3),
        ([30] * 8, 4, 60, 1),
        ([30] * 8, 1, 10**20, 1),
        ([9, 1, 8, 2, 7, 3, 6, 4], 2, 12, 2),
    ],
)
def test_micro_steps_by_hand(tokens, world, budget, steps):
    assert num_micro_steps(np.array(tokens), world, budget) == steps


def fits(tokens: np.ndarray, num_bins: int, budget: int) -> bool:
    return all(len(each) < 2 or tokens[each].sum() <= budget for each in deal_into_bins(tokens, num_bins))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=24), st.integers(1, 4), st.integers(1, 600))
@settings(max_examples=150)
def test_they_are_the_least_that_the_budget_allows(tokens, world, budget):
    """One step fewer, and two pairs that share a bin exceed it; so it is for every smaller number. And no step is empty on all ranks."""
    tokens = np.array(tokens)
    steps = num_micro_steps(tokens, world, budget)
    assert fits(tokens, steps * world, budget)
    assert not any(fits(tokens, fewer * world, budget) for fewer in range(1, steps))
    assert steps <= -(-len(tokens) // world)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.integers(1, 900), st.booleans())
@settings(max_examples=60)
def test_every_step_is_the_mean_over_its_pairs(num_pairs, pairs_per_step, world, budget, shuffle):
    """Each pair stands in one bin of its step, weights add up to one a bin, and no bin of two pairs has more than the budget: in every epoch and on
    every rank, the incomplete last step among them."""
    rng = np.random.default_rng(num_pairs)
    tokens = rng.integers(3, 400, num_pairs)
    chosen = np.maximum(1, tokens // 3)
    given = {"pairs_per_step": pairs_per_step, "world": world, "budget": budget, "seed": 1, "shuffle": shuffle, "epochs": 2}
    ranks = [Bins(tokens, chosen, rank=rank, **given) for rank in range(world)]
    for epoch in (0, 1):
        for rank in ranks:
            rank.set_epoch(epoch)
        handed = [[each for (each,) in rank] for rank in ranks]
        assert {len(each) for each in handed} == {len(ranks[0])}
        for number, pairs in enumerate(ranks[0].steps(epoch)):
            first = number * ranks[0].num_micro_steps
            bins = [each for rank in handed for each in rank[first : first + ranks[0].num_micro_steps]]
            counted = [each for each in bins if each.weight]
            assert sorted(index for each in counted for index in each.pairs) == sorted(pairs.tolist())
            assert sum(each.weight for each in bins) == pytest.approx(len(bins))
            assert sum(each.token_weight for each in bins) == pytest.approx(len(bins))
            for each in counted:
                assert each.weight == pytest.approx(len(each.pairs) * len(bins) / len(pairs))
                assert len(each.pairs) == 1 or tokens[[*each.pairs]].sum() <= budget


def test_what_is_said_names_pairs_that_exceed_the_budget():
    tokens = np.array([3000, 10, 10, 10])
    given = {"pairs_per_step": 4, "world": 2, "rank": 0, "seed": 1}
    said = Bins(tokens, tokens, budget=2000, **given).describe()
    assert said == (
        "micro-batches of at most 2,000 tokens but for 1 of 4 pairs, which have up to 3,000 and go alone: "
        "1 per optimizer step on each of 2 ranks, 2 pairs each on average"
    )
    assert Bins(tokens, tokens, budget=3000, **given).describe().startswith("micro-batches of at most 3,000 tokens: 1 per")


def test_a_run_without_end_is_refused():
    refuse_endless(MOST_EPOCHS * 3, 3, "--max-steps")
    with pytest.raises(InputError, match=r"--max-steps: .* at most 10,000 epochs, of 3 step\(s\) each; found 30,001 steps"):
        refuse_endless(MOST_EPOCHS * 3 + 1, 3, "--max-steps")


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_resumed_run_goes_on_counting_tokens(shuffle):
    """Seven pairs in steps of three: checkpoint after step 5, in the second epoch, with step 2 logged last, or nothing."""
    rng = np.random.default_rng(0)
    lengths = Lengths(*(rng.integers(1, 50, 7) for _ in range(3)))
    bins = Bins(lengths.packed, lengths.chosen, pairs_per_step=3, world=1, rank=0, budget=60, seed=9, shuffle=shuffle, epochs=2)
    of_steps = [
        int((2 * lengths.prompt + lengths.chosen + lengths.rejected)[pairs].sum())
        for epoch in (0, 1)
        for pairs in bins.steps(epoch)
    ]
    assert len(of_steps) == 6 and len(set(of_steps)) == (6 if shuffle else 3)
    logged = [{"step": 2, "loss": 1.0, "num_tokens": sum(of_steps[:2])}, {"step": 4, "eval_loss": 1.0, "eval_num_tokens": 0}]
    for history in (logged, []):
        state = {"global_step": 5, "log_history": history}
        assert tokens_before(state, lengths, 3, 9 if shuffle else None) == sum(of_steps[:5])


def test_pairs_of_steps_by_hand():
    assert [pairs_of_steps(steps, 7, 3) for steps in range(7)] == [0, 3, 6, 7, 10, 13, 14]
    assert pairs_of_steps(2, 1, 4) == 2
