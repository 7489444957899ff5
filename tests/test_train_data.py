"""A store as TRL's dataset: nothing copied, nothing but the right rows, whoever reads."""

import pickle
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from store_samples import make_identity, make_store
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from store.errors import InputError
from store.manifest import ShardFile
from store.reader import Store, open_store
from train.data import COLUMNS, dataset_of, lengths_of

MAX_LENGTH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("data") / "store"
    make_store(path, make_identity(num_rows=30, shard_size=8, max_length=MAX_LENGTH))
    return open_store(path)


def test_rows_are_the_stores(store):
    dataset = dataset_of(store, MAX_LENGTH)
    assert len(dataset) == store.num_pairs == 30
    table = store.read(range(30), COLUMNS)
    assert dataset[:] == table.to_pydict()
    assert dataset[7] == table.slice(7, 1).to_pylist()[0]
    assert dataset.__getitems__([5, 3]) == [dataset[5], dataset[3]]
    assert next(iter(dataset)) == dataset[0]


def test_a_shorter_max_length_cuts_and_drops(store):
    shorter = 20
    dataset = dataset_of(store, shorter)
    whole = store.read(range(30)).to_pylist()
    kept = [pair for pair in whole if pair["num_prompt_tokens"] < shorter]
    assert 0 < len(dataset) == len(kept) < 30
    for row, pair in zip(dataset, kept, strict=True):
        room = shorter - pair["num_prompt_tokens"]
        assert row["prompt_ids"] == pair["prompt_ids"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == pair[f"{side}_ids"][:room]
            assert row[f"ref_{side}_logps"] == sum(pair[f"{side}_token_logps"][:room])  # exact: see store_samples


def test_a_run_reads_the_lengths_of_all_pairs_once(store, monkeypatch):
    asked, real = [], Store.columns
    monkeypatch.setattr(Store, "columns", lambda self, names: asked.append(tuple(names)) or real(self, names))
    opened, shorter = open_store(store.path), 20
    lengths = lengths_of(dataset_of(opened, shorter), opened, shorter)
    assert asked == [("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")]
    kept = [pair for pair in store.read(range(30)).to_pylist() if pair["num_prompt_tokens"] < shorter]
    assert lengths.prompt.tolist() == [pair["num_prompt_tokens"] for pair in kept]
    assert lengths.longer.tolist() == [
        min(shorter, pair["num_prompt_tokens"] + max(pair["num_chosen_tokens"], pair["num_rejected_tokens"])) for pair in kept
    ]


def test_ld_alpha_weighs_the_tail(store):
    for row, pair in zip(dataset_of(store, MAX_LENGTH, ld_alpha=0.25), store.read(range(30)).to_pylist(), strict=True):
        shared = min(pair["num_chosen_tokens"], pair["num_rejected_tokens"])
        for side in ("chosen", "rejected"):
            logps = pair[f"{side}_token_logps"]
            assert row[f"ref_{side}_logps"] == sum(logps[:shared]) + 0.25 * sum(logps[shared:])


def test_impossible_lengths_are_refused(store):
    with pytest.raises(InputError, match=r"expected at most 64 .*found 65"):
        dataset_of(store, MAX_LENGTH + 1)
    with pytest.raises(InputError, match="no pair is left"):
        dataset_of(store, 1)


def test_worker_processes_read_the_same_batches(store):
    dataset = dataset_of(store, MAX_LENGTH)
    options = {"batch_size": 4, "collate_fn": DataCollatorForPreference(pad_token_id=0), "shuffle": False}
    alone = list(DataLoader(dataset, **options))
    workers = list(DataLoader(dataset, **options, num_workers=2))
    assert len(alone) == len(workers) == 8
    for one, other in zip(alone, workers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["ref_chosen_logps"].dtype == torch.float32


def test_ranks_share_the_pairs(store):
    loader = DataLoader(
        dataset_of(store, MAX_LENGTH), batch_size=5, collate_fn=lambda rows: [tuple(row["prompt_ids"]) for row in rows]
    )
    prompts = [tuple(pair["prompt_ids"]) for pair in store.read(range(30)).to_pylist()]
    of_ranks = [
        [
            prompt
            for batch in prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
            for prompt in batch
        ]
        for rank in (0, 1)
    ]
    assert [len(prompts) for prompts in of_ranks] == [15, 15]
    assert sorted(of_ranks[0] + of_ranks[1]) == sorted(prompts)


def test_dataset_can_be_pickled_and_keeps_its_fingerprint(store):
    dataset = dataset_of(store, 40)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[3] == dataset[3]
    assert dataset_of(store, 40)._fingerprint == dataset._fingerprint
    others = (dataset_of(store, 41), dataset_of(store, 40, ld_alpha=0.5), dataset_of(store, 40, positions=[2, 1]))
    assert len({each._fingerprint for each in (dataset, *others)}) == 4


def test_a_million_pairs_open_at_once(store):
    shards = tuple(ShardFile(f"part-{i:05d}.parquet", 1, "0" * 64, 1000, 1000 * i, 1000) for i in range(1000))
    million = Store(store.path, replace(store.manifest, num_pairs=1_000_000, shards=shards))
    started = time.process_time()  # not the clock: other processes may keep the machine busy
    dataset_of(million, MAX_LENGTH)
    seconds = time.process_time() - started
    tracemalloc.start()
    dataset = dataset_of(million, MAX_LENGTH)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 1_000_000
    assert seconds < 1
    assert peak < 50e6
