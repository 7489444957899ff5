"""Round trips of random pairs, and shorter stores derived from longer ones, against numpy."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import PROVENANCE, make_identity

from store.derive import derive, fits
from store.folder import prepare_store
from store.manifest import ShardReport
from store.reader import open_store
from store.schema import SCHEMA
from store.seal import seal
from store.shard import publish_shard
from store.verify import verify

MAX_LENGTH = 24
SIDES = ("chosen", "rejected")


@st.composite
def pairs(draw) -> list[dict]:
    """Random pairs within MAX_LENGTH: any lengths, any int32 as id from 0, log-probs over all magnitudes of float32."""
    rows = []
    for row in range(draw(st.integers(1, 9))):
        numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
        prompt = draw(st.integers(1, MAX_LENGTH - 1))
        pair = {"pair_id": draw(st.text(max_size=8)), "row": row}
        pair |= {"prompt_ids": random_ids(numbers, prompt), "num_prompt_tokens": prompt}
        for side in SIDES:
            n = draw(st.integers(1, MAX_LENGTH - prompt))
            logps = -(np.float32(10) ** numbers.uniform(-44, 38, n).astype(np.float32))
            pair |= {
                f"{side}_ids": random_ids(numbers, n),
                f"{side}_token_logps": logps.tolist(),
                f"ref_{side}_logps": float(logps.sum(dtype=np.float64)),
                f"num_{side}_tokens": n,
                f"{side}_truncated": draw(st.booleans()),
            }
        rows.append(pair)
    return rows


def random_ids(numbers: np.random.Generator, n: int) -> list[int]:
    return numbers.integers(0, 2**31, n).tolist()


@settings(max_examples=20)
@given(pairs(), st.integers(1, 4))
def test_pairs_survive_the_disk(rows, shard_size):
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    identity = make_identity(num_rows=len(rows), shard_size=shard_size, max_length=MAX_LENGTH)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "s"
        prepare_store(path, identity)
        for index in range(identity.num_shards):
            block = identity.rows_of(index)
            report = ShardReport(len(block), (), {}, {}, 0, 0, 0, index, block.start, len(block))
            publish_shard(path, identity, report, table.slice(block.start, len(block)), PROVENANCE)
        seal(path, identity, {}, None)
        assert verify(path) == []
        read = open_store(path, check="sha256").read(range(len(rows)))
        assert read.equals(table)  # floats bit for bit
        for max_length in (MAX_LENGTH, MAX_LENGTH // 2, 2):
            check_derived(read, max_length, None)


def check_derived(table: pa.Table, max_length: int, ld_alpha: float | None) -> None:
    kept = table.filter(fits(table, max_length))
    assert kept["row"].to_pylist() == [pair["row"] for pair in table.to_pylist() if pair["num_prompt_tokens"] < max_length]
    derived = derive(kept, max_length, ld_alpha)
    assert derived.schema.equals(SCHEMA)
    for stored, got in zip(kept.to_pylist(), derived.to_pylist(), strict=True):
        assert got["prompt_ids"] == stored["prompt_ids"]
        # by the definition: the whole sequence is cut, what remains after the prompt is the completion
        cut = {side: (stored["prompt_ids"] + stored[f"{side}_ids"])[:max_length][len(stored["prompt_ids"]) :] for side in SIDES}
        shared = min(len(ids) for ids in cut.values())
        for side in SIDES:
            n = len(cut[side])
            logps = np.array(stored[f"{side}_token_logps"], np.float32)[:n].astype(np.float64)
            weights = np.where(np.arange(n) < shared, 1.0, 1.0 if ld_alpha is None else ld_alpha)
            assert got[f"{side}_ids"] == cut[side]
            assert got[f"{side}_token_logps"] == stored[f"{side}_token_logps"][:n]
            assert got[f"num_{side}_tokens"] == n
            assert got[f"{side}_truncated"] == (stored[f"{side}_truncated"] or n < stored[f"num_{side}_tokens"])
            assert got[f"ref_{side}_logps"] == pytest.approx(float(logps @ weights), rel=1e-12, abs=1e-12)


@settings(max_examples=60)
@given(pairs(), st.integers(2, MAX_LENGTH + 3), st.one_of(st.none(), st.floats(0, 1)))
def test_derive_is_the_definition(rows, max_length, ld_alpha):
    check_derived(pa.Table.from_pylist(rows, schema=SCHEMA), max_length, ld_alpha)


@settings(max_examples=30)
@given(pairs(), st.integers(2, MAX_LENGTH), st.integers(2, MAX_LENGTH))
def test_derive_in_two_steps_is_derive_in_one(rows, longer, shorter):
    shorter, longer = sorted((longer, shorter))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    table = table.filter(fits(table, shorter))
    assert derive(derive(table, longer), shorter).equals(derive(table, shorter))


def sample() -> pa.Table:
    pair = {
        "pair_id": "x", "row": 0, "prompt_ids": [1, 2], "num_prompt_tokens": 2,
        "chosen_ids": [3, 4, 5, 6], "num_chosen_tokens": 4, "chosen_truncated": False,
        "rejected_ids": [7, 8], "num_rejected_tokens": 2, "rejected_truncated": False,
        "chosen_token_logps": [-1.0, -2.0, -4.0, -8.0], "ref_chosen_logps": -15.0,
        "rejected_token_logps": [-16.0, -32.0], "ref_rejected_logps": -48.0,
    }  # fmt: skip
    return pa.Table.from_pylist([pair], schema=SCHEMA)


def test_by_hand():
    assert derive(sample(), 5)["ref_chosen_logps"].to_pylist() == [-7.0]
    assert derive(sample(), 5)["chosen_ids"].to_pylist() == [[3, 4, 5]]
    assert derive(sample(), ld_alpha=0.5)["ref_chosen_logps"].to_pylist() == [-3.0 + 0.5 * -12.0]
    assert derive(sample(), 5, ld_alpha=0.0)["ref_rejected_logps"].to_pylist() == [-48.0]
    assert derive(sample(), 3)["rejected_truncated"].to_pylist() == [True]


def test_nothing_to_do_changes_nothing():
    stored = sample().set_column(5, SCHEMA.field(5), pa.array([-15.000000000000002]))  # a sum in another order of addition
    assert derive(stored).equals(stored) and derive(stored, 6).equals(stored)
    longer = pa.Table.from_pylist([{**sample().to_pylist()[0], "prompt_ids": [1, 2, 9], "num_prompt_tokens": 3}], schema=SCHEMA)
    assert derive(pa.concat_tables([longer, stored]), 6)["ref_chosen_logps"].to_pylist() == [-7.0, -15.000000000000002]


def test_a_prompt_that_fills_max_length_must_be_dropped_first():
    assert fits(sample(), 2).to_pylist() == [False] and fits(sample(), 3).to_pylist() == [True]
    with pytest.raises(ValueError, match="prompt of 2 tokens leaves no completion within max_length 2"):
        derive(sample(), 2)


def test_some_columns_are_enough():
    names = ["num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens", "chosen_truncated", "rejected_truncated"]
    names += ["ref_chosen_logps", "ref_rejected_logps", "chosen_token_logps", "rejected_token_logps"]
    assert derive(sample().select(names), 4).equals(derive(sample(), 4).select(names))
