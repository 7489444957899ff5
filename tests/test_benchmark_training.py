"""What the training benchmark says of its sample, and that it compares only what is the same."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from training import choose, refuse_other_pairs, shown, tokens_per_pair


def test_tokens_per_pair_by_hand():
    """Longer sides 3+2, 1+4, 2+2, 6+1 = 5, 5, 4, 7; packed 6, 6, 5, 8. Rows of a micro-batch are as long as its longest, two to a pair."""
    lengths = np.array([[3, 2, 1], [1, 4, 1], [2, 1, 2], [6, 1, 1]])
    packed, *padded = tokens_per_pair(lengths, [1, 2, 4])
    assert packed == 25 / 4
    assert padded == [2 * 21 / 4, 2 * (2 * 5 + 2 * 7) / 4, 2 * 7]


def test_the_sample_is_nearer_to_the_set_than_chance():
    lengths = np.random.default_rng(0).lognormal(5, 1, (300, 3)).astype(np.int64) + 1
    rows, of_sample, of_set = choose(lengths, 8, [1, 2, 4, 8], seed=0)
    assert len(set(rows.tolist())) == 8
    assert of_sample.tolist() == tokens_per_pair(lengths[rows], [1, 2, 4, 8]).tolist()
    by_chance = np.array([tokens_per_pair(lengths[i : i + 8], [1, 2, 4, 8]) for i in range(0, 296, 8)])
    distance = np.abs(np.log(by_chance / of_set)).max(axis=1)
    assert np.abs(np.log(of_sample / of_set)).max() < np.quantile(distance, 0.1)


def test_other_pairs_are_not_compared():
    runs = {"online:1": {"seen": [["a"], ["b", "c"]]}, "packed:2": {"seen": [["a"], ["b", "c"]]}}
    refuse_other_pairs(runs, "packed:2")
    runs["packed:4"] = {"seen": [["a"], ["b", "d"]]}
    with pytest.raises(SystemExit, match="step 1: packed:4 trained on other pairs than online:1"):
        refuse_other_pairs(runs, "packed:4")


def test_seconds_of_a_pair_have_digits_on_any_device():
    assert [shown(seconds) for seconds in (0.0, 0.00712, 0.0213, 0.634, 19.53, 123.4)] == [
        "0.00",
        "0.00712",
        "0.0213",
        "0.634",
        "19.53",
        "123.40",
    ]
