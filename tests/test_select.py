"""Choosing the pairs to train on: against plain Python over the same rows; held-back pairs; what is recorded and refused."""

import hashlib
import json
from pathlib import Path

import pytest
import store_samples
from click.testing import CliRunner
from one_rank import one_rank

import cli
from store import select as module
from store.errors import InputError
from store.reader import open_store
from store.select import select
from train.config import TrainConfig
from train.data import dataset_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("select") / "sto're"
    store_samples.make_store(path, num_rows=200, shard_size=32, unscorable=(0, 31, 32, 77))
    return path


def margin(pair: dict) -> float:
    return pair["ref_chosen_logps"] - pair["ref_rejected_logps"]


def test_where_and_order_by_are_what_python_would_choose(store):
    """196 pairs; the condition of the issue; order with ties (truncated is a bool) keeps the store's order."""
    pairs = open_store(store).read(range(196)).to_pylist()
    found = select(
        store,
        "num_chosen_tokens < 20 and ref_chosen_logps - ref_rejected_logps between -90 and 50 -- short",
        "chosen_truncated desc",
    )
    wanted = [i for i, pair in enumerate(pairs) if pair["num_chosen_tokens"] < 20 and -90 <= margin(pair) <= 50]
    wanted.sort(key=lambda i: not pairs[i]["chosen_truncated"])
    assert 20 < len(wanted) < 180 and list(found.train) == wanted and found.num_pairs == 196
    ids = "".join(pairs[i]["pair_id"] + "\n" for i in wanted)
    assert found.pair_ids_sha256 == hashlib.sha256(ids.encode()).hexdigest()
    assert select(store, order_by="num_chosen_tokens, row desc").train == tuple(
        sorted(range(196), key=lambda i: (pairs[i]["num_chosen_tokens"], -i))
    )


def test_without_conditions_it_is_everything(store):
    found = select(store)
    assert found.everything and found.train == tuple(range(196)) and len(found.eval) == 0


def test_subqueries_and_token_views_work(store, monkeypatch):
    original = module.connect
    seen = []

    def connect(path, threads=None, **more):
        connection = original(path, threads, **more)
        seen.extend(connection.execute("select current_setting('threads')").fetchall())
        return connection

    monkeypatch.setattr(module, "connect", connect)
    few = [select(store, "row in (select row from pairs order by chosen_truncated limit 7)").pair_ids_sha256 for _ in range(5)]
    assert len(set(few)) == 1  # nearly all are equal here: what `limit` picks must be the same in every process
    assert set(seen) == {(1,)}  # with more threads it would be another pick, sometimes
    surprising = select(store, "pair_id in (select pair_id from tokens where logp < -9.9)").train
    pairs = open_store(store).read(range(196)).to_pylist()
    assert list(surprising) == [i for i, p in enumerate(pairs) if min(p["chosen_token_logps"] + p["rejected_token_logps"]) < -9.9]


def test_held_back_pairs_follow_their_id_alone(store, tmp_path):
    """The same pair is held back whatever the condition, the order, or the store it stands in; about the asked share is."""
    ids = open_store(store).columns(["pair_id"])["pair_id"].to_pylist()
    whole = select(store, eval_fraction=0.25)
    held = {ids[i] for i in whole.eval}
    assert 30 <= len(held) <= 70  # 49 expected, sd 6
    assert sorted([*whole.train, *whole.eval]) == list(range(196))
    part = select(store, "row % 3 = 0", "row desc", eval_fraction=0.25)
    assert {ids[i] for i in part.eval} == {id_ for id_ in held if int(id_, 16) % 3 == 0} and list(part.eval) == sorted(part.eval)
    store_samples.make_store(tmp_path / "other", num_rows=150, shard_size=50)  # pair_ids are the row numbers
    other_ids = open_store(tmp_path / "other").columns(["pair_id"])["pair_id"].to_pylist()
    other = {other_ids[i] for i in select(tmp_path / "other", eval_fraction=0.25).eval}
    assert other & set(ids) == {id_ for id_ in held if int(id_, 16) < 150}
    assert {ids[i] for i in select(store, eval_fraction=0.1).eval} < held  # a smaller share holds back a part of them


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"where": "num_choosen_tokens < 5"}, 'choosen_tokens.*--where "num_choosen|--where "num_choosen.*choosen_tokens'),
        ({"where": "num_chosen_tokens <"}, "--where"),
        ({"where": "true) union select 1, '2' where (true; drop view pairs"}, "--where"),
        ({"where": "true); drop view pairs; select row, pair_id from pairs where (true"}, "not one SQL expression"),
        ({"where": "row in (select 1 from read_csv('/etc/passwd'))"}, "--where"),
        ({"where": "row < 0"}, "no pair is left.*196 pairs"),
        ({"where": "random() < 0.5"}, "another answer each time.*hash\\(pair_id\\)"),
        ({"order_by": "nothing"}, "--order-by"),
        ({"weight": "row -"}, "--weight"),
        ({"weight": "1), (2"}, "--weight"),
        ({"weight": "-row"}, "--weight, row 1: not a number of times to train on a pair; expected 0 to 1,000; found -1"),
        ({"weight": "nullif(1, 1)"}, "not a number of times.*found null"),
        ({"weight": "'nan'::double"}, "not a number of times.*found null"),
        ({"weight": "random()"}, "another answer each time"),
        ({"weight": "0"}, '--weight "0": no pair is left; found 196 pairs of too little weight'),
        ({"eval_fraction": 1e-9}, "no pair is left to evaluate on.*larger"),
        ({"eval_fraction": 1 - 1e-9}, "no pair is left to train on.*smaller"),
    ],
)
def test_bad_conditions_are_refused(store, given, message):
    with pytest.raises(InputError, match=message):
        select(store, **given)


def test_dataset_has_the_selected_pairs_in_their_order(store):
    opened = open_store(store)
    found = select(store, "row % 2 = 1", "num_prompt_tokens desc")
    dataset = dataset_of(opened, 64, None, found.train)
    assert [len(row["prompt_ids"]) for row in dataset] == sorted((len(row["prompt_ids"]) for row in dataset), reverse=True)
    assert dataset[0]["ref_chosen_logps"] == opened.read([found.train[0]])["ref_chosen_logps"][0].as_py()
    shorter = dataset_of(opened, 20, None, found.train)  # prompts of 20 and more fall out, the order stays
    lengths = opened.read(found.train)["num_prompt_tokens"].to_pylist()
    assert [len(row["prompt_ids"]) for row in shorter] == [n for n in lengths if n < 20]


def test_a_weight_is_how_often_a_pair_is_trained_on(store):
    """Whole ones by hand; of a broken one each pair gets one of the two neighbours, by its id alone, and their mean is the weight."""
    found = select(store, "row < 40", "row desc", weight="case when row % 3 = 0 then 2 when row % 3 = 1 then 0 else 1 end")
    rows = [row for row in range(39, -1, -1) if row not in (0, 31, 32) for _ in range((2, 0, 1)[row % 3])]
    opened = open_store(store)
    assert opened.read(found.train)["row"].to_pylist() == rows
    assert str(found).startswith(
        f"{len(set(rows))} of 196 pairs where row < 40; {len(rows)} to train on in an epoch, by the weight case"
    )
    assert found.to_json()["weight"].startswith("case") and "weight" not in select(store, "row < 40").to_json()
    pairs = dataset_of(opened, 64, None, found.train)
    assert [len(row["prompt_ids"]) for row in pairs] == opened.read(found.train)["num_prompt_tokens"].to_pylist()

    times = [select(store, weight=weight).train.count(index) for weight in ("0.25", "2.25") for index in range(196)]
    assert [few + 2 for few in times[:196]] == times[196:] and 30 <= sum(times[:196]) <= 70  # 49 expected, sd 6
    held = select(store, eval_fraction=0.25)
    weighed = select(store, eval_fraction=0.25, weight="2")
    assert weighed.eval == held.eval and weighed.train == tuple(index for index in held.train for _ in range(2))
    few = select(store, "row >= 40", weight="0.5")
    assert {index for index in few.train} == {
        index for index in select(store, weight="0.5").train if opened.read([index])["row"][0].as_py() >= 40
    }


def test_contradictory_options_are_refused(store):
    base = {"ref_store": store, "output_dir": "x", "loss_type": ("sigmoid",), "beta": 0.1, "learning_rate": 1e-4}
    base |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    assert TrainConfig(**base, eval_fraction=0.1, eval_steps=5).evaluates
    for bad in ({"eval_fraction": 0.0}, {"eval_fraction": 1.0}, {"eval_fraction": 0.1, "eval_ref_store": store}, {"eval_steps": 5}):
        with pytest.raises(InputError, match="--eval"):
            TrainConfig(**base, **bad)


def test_training_records_what_it_chose(tiny_llama, tmp_path, monkeypatch):
    """A real run in one process: its record has condition, counts and hash; the pairs are not shuffled; the held-back ones are
    evaluated."""
    rows = [
        {
            side: [{"role": "user", "content": "why " * (i + 1)}, {"role": "assistant", "content": f"{side} {i}"}]
            for side in ("chosen", "rejected")
        }
        for i in range(24)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "precompute",
        "--dataset",
        data,
        "--model",
        tiny_llama,
        "--max-length",
        "128",
        "--dtype",
        "float32",
        "--ref-store",
        tmp_path / "store",
    ]
    assert CliRunner().invoke(cli.main, [str(word) for word in argv]).exit_code == 0
    from train.trainer import StoreDPOTrainer

    seen = []
    original = StoreDPOTrainer._prepare_inputs
    monkeypatch.setattr(
        StoreDPOTrainer, "_prepare_inputs", lambda self, inputs: seen.append(inputs["input_ids"].shape[1]) or original(self, inputs)
    )
    zero = tmp_path / "zero.json"
    zero.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 0},
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            }
        )
    )
    where, weight = "row < 20", "if(row < 5, 2, 1)"
    argv = [
        "train",
        "--ref-store",
        tmp_path / "store",
        "--output-dir",
        tmp_path / "run",
        "--where",
        where,
        "--order-by",
        "num_prompt_tokens",
        "--weight",
        weight,
        "--eval-fraction",
        "0.3",
    ]
    argv += [
        "--per-device-train-batch-size",
        "1",
        "--gradient-accumulation-steps",
        "4",
        "--save-strategy",
        "no",
        "--zero-config",
        zero,
        "--loss-type",
        "sigmoid",
        "--beta",
        "0.1",
    ]
    with one_rank():
        result = CliRunner().invoke(cli.main, [str(word) for word in argv], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = select(tmp_path / "store", where, "num_prompt_tokens", 0.3, weight=weight)
    assert (
        record["selection"] == expected.to_json()
        and record["num_pairs"] == len(expected.train)
        and record["num_eval_pairs"] == len(expected.eval) > 0
    )
    assert {"versions", "config", "store", "policy", "gate", "result", "log_history", "started", "finished"} <= record.keys()
    assert any("eval_loss" in entry for entry in record["log_history"])
    training = seen[: len(expected.train)]
    assert training == sorted(training) and len(set(training)) > 3
    assert expected.pair_ids_sha256[:12] in result.output
