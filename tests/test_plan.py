"""The claiming order: costs by hand, every shard asked for once, the most expensive first, and workers that begin apart and end together."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import Process, place_among_all
from precompute.plan import BYTES_PER_TOKEN, claiming_order, default_shard_size, row_costs, shard_costs
from precompute.rows.dataset import load_rows


def turns(*contents: str | None) -> list[dict]:
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize("kind", ["text", "turns"])
def test_costs_are_the_bytes_of_text_up_to_max_length(kind, tmp_path, monkeypatch):
    """Row i has 3 i bytes of chosen, 1 of rejected, 2 of prompt ("ü"); turns add 4 bytes of role each. max_length cuts at 40 bytes."""
    texts = [("ü", "abc" * i, "x") for i in range(23)]
    role = 4 if kind == "turns" else 0
    if kind == "turns":
        texts = [tuple(turns(text) for text in row) for row in texts]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=5)
    monkeypatch.setattr("precompute.plan.ROWS_AT_A_TIME", 7)
    loaded = load_rows(str(tmp_path / "rows.parquet"), split="train", limit=22)
    expected = [(2 + role) + min(3 * i + role, 10 * BYTES_PER_TOKEN) + (1 + role) for i in range(22)]
    assert shard_costs(loaded, 4, 10).tolist() == [sum(expected[start : start + 4]) for start in range(0, 22, 4)]


def test_missing_text_and_slices_cost_nothing():
    column = pa.array([turns("a"), turns("bcd", None), [], turns("ef", "g")]).slice(1)
    table = pa.table({"chosen": column, "rejected": pa.array(["", "12", "3"])})
    assert row_costs(table, 100).tolist() == [4 + 3 + 4, 2, 4 + 2 + 4 + 1 + 1]


@pytest.mark.parametrize(
    ("num_rows", "shard_size"), [(1, 16), (38_400, 16), (38_401, 17), (150_000, 63), (1_000_000, 417), (10_000_000, 1024)]
)
def test_a_shard_is_a_2400th_of_the_rows_within_limits(num_rows, shard_size):
    assert default_shard_size(num_rows) == shard_size


def test_each_missing_shard_once_the_most_expensive_first_and_workers_begin_apart():
    costs = np.array([3, 7, 5, 9, 1, 8, 2, 6.0])
    assert claiming_order(costs, range(8), 0, 1) == [3, 5, 1, 7, 2, 0, 6, 4]
    assert claiming_order(costs, [0, 4, 5, 7], 1, 3) == [5, 4, 7, 0]  # own: 5, 2, 4; 2 is done
    orders = [claiming_order(costs, range(8), place, 4) for place in range(4)]
    assert [order[:2] for order in orders] == [[3, 2], [5, 0], [1, 6], [7, 4]]
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_a_worker_knows_its_place_among_the_tasks_of_an_array(monkeypatch):
    assert place_among_all(Process(1, 4, 1)) == (1, 4)
    for name, value in {"ID": "7", "COUNT": "3", "MIN": "5"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert place_among_all(Process(3, 4, 1)) == (2 * 4 + 3, 12)
