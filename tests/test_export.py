"""`export` and `import`: each format read by that project's own code where it is installed (TRL), else by its published rules."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import store_samples
import tiny
import torch
from datasets import Dataset, load_from_disk
from typed import call

from store.errors import InputError
from store.export import export
from store.manifest import NAMES
from store.reader import open_store
from train.data import dataset_of

MAX_LENGTH = 48


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama) -> Path:
    """rows.jsonl (one prompt fills max_length: unscorable; some sides truncated) and its store."""
    folder = tmp_path_factory.mktemp("export")
    answers = ("yes because it is so", "no")
    rows = [
        {"prompt": [{"role": "user", "content": "why " * (60 if i == 5 else i % 7 + 1)}]}
        | {
            side: [{"role": "assistant", "content": f"{answer} {i} " * (i % 9 + 1)}]
            for side, answer in zip(("chosen", "rejected"), answers, strict=True)
        }
        for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("precompute", *inputs(folder, tiny_llama), "--ref-store", folder / "store")
    return folder


def inputs(folder: Path, model: Path) -> list:
    return [
        "--dataset",
        folder / "rows.jsonl",
        "--model",
        model,
        "--max-length",
        MAX_LENGTH,
        "--dtype",
        "float32",
        "--shard-size",
        8,
    ]


def test_jsonl_has_every_column_of_every_pair(world, tmp_path):
    export(world / "store", "jsonl", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert lines == open_store(world / "store").read(range(19)).to_pylist() and len(lines) == 19


def trl_trainer(folder: Path, tiny_llama: Path, dataset: Dataset, **methods):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        report_to="none",
        precompute_ref_log_probs=True,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=2,
        bf16=False,
    )
    kind = type("Trainer", (DPOTrainer,), methods)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return kind(model=model, args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(tiny_llama))


@pytest.fixture(scope="module")
def by_trl(world, tiny_llama):
    """What stock TRL computes from the raw rows: (its dataset with the reference columns, its cache file)."""
    caches = []
    original = Dataset.from_file

    def spy(file, *args, **kwargs):
        caches.append(file)
        return original(file, *args, **kwargs)

    Dataset.from_file = staticmethod(spy)
    try:
        rows = Dataset.from_json(str(world / "rows.jsonl"), cache_dir=str(world / "cache"))
        return trl_trainer(world, tiny_llama, rows).train_dataset, Path(caches[-1])
    finally:
        Dataset.from_file = original


def test_trl_folder_equals_what_trl_computes_itself(world, by_trl, tmp_path):
    export(world / "store", "trl", tmp_path / "out")
    ours, theirs = load_from_disk(str(tmp_path / "out" / "dataset")), by_trl[0]
    assert len(ours) == len(theirs) == 19
    for mine, other in zip(ours, theirs, strict=True):
        room = MAX_LENGTH - len(other["prompt_ids"])  # TRL truncates in its collator
        assert mine["prompt_ids"] == other["prompt_ids"]
        for side in ("chosen", "rejected"):
            assert mine[f"{side}_ids"] == other[f"{side}_ids"][:room]
            assert mine[f"ref_{side}_logps"] == pytest.approx(other[f"ref_{side}_logps"], abs=1e-3)


def test_trl_reads_our_cache_instead_of_scoring(world, tiny_llama, tmp_path):
    """Stock TRL, its cache at the path it asks for replaced by ours: it takes the values and runs no reference forward."""
    export(world / "store", "trl", tmp_path / "out")
    ids = load_from_disk(str(tmp_path / "out" / "dataset")).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])

    def cache_path(fingerprint):
        shutil.copy(tmp_path / "out" / "ref_logps.arrow", tmp_path / "cached.arrow")
        return str(tmp_path / "cached.arrow")

    ids._get_cache_file_path = cache_path

    def forbidden(*args):
        pytest.fail("TRL scored the reference itself")

    trainer = trl_trainer(
        tmp_path, tiny_llama, ids, _prepare_dataset=lambda self, dataset, *args: dataset, compute_ref_log_probs=forbidden
    )
    table = open_store(world / "store").lengths()
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert list(trainer.train_dataset[name]) == torch.tensor(table[name].to_pylist(), dtype=torch.float32).tolist()
    trainer._prepare_dataset = None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert batch["ref_chosen_logps"].tolist() == table["ref_chosen_logps"].to_numpy()[:3].astype("float32").tolist()


def test_open_instruct_cache(world, tmp_path):
    """Its TensorCache.from_disk is torch.load(weights_only=True) of a dict, indexed by the pair's place."""
    table = open_store(world / "store").lengths()
    for loss_type, mean in (("dpo", False), ("dpo_norm", True)):
        export(world / "store", "open-instruct", tmp_path / loss_type, loss_type=loss_type, accept_other_tokens=True)
        tensors = torch.load(tmp_path / loss_type / "reference_logprobs.pt", weights_only=True, map_location="cpu")
        assert list(tensors) == ["chosen_logps", "rejected_logps"]
        for side in ("chosen", "rejected"):
            expected = [
                v / (n if mean else 1)
                for v, n in zip(table[f"ref_{side}_logps"].to_pylist(), table[f"num_{side}_tokens"].to_pylist(), strict=True)
            ]
            assert (
                tensors[f"{side}_logps"].dtype == torch.float32
                and tensors[f"{side}_logps"].tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
            )


def test_megatron_bridge_artifact(world, tiny_llama, tmp_path):
    """Its rules: every pair_id from 0 to rows - 1 exactly once with four columns, and a fingerprint equal to the training
    configuration's."""
    notes = export(
        world / "store",
        "megatron-bridge",
        tmp_path / "out",
        metadata={"split": None, "tensor_model_parallel_size": 2},
        accept_other_tokens=True,
    )
    assert f"dataset.ref_artifact={tmp_path / 'out'} " in notes[0] and Path(notes[0].split("ref_artifact=")[1].split()[0]).is_dir()
    lines = [json.loads(line) for line in (tmp_path / "out" / "ref_logprobs.jsonl").read_text().splitlines()]
    assert [line["pair_id"] for line in lines] == list(range(20))
    stored = {pair["row"]: pair for pair in open_store(world / "store").lengths().to_pylist()}
    for line in lines:
        pair = stored.get(line["pair_id"])
        for side in ("chosen", "rejected"):
            values = (line[f"ref_{side}_logprob_sum"], line[f"ref_{side}_num_tokens"])
            assert values == ((0.0, 1) if pair is None else (pair[f"ref_{side}_logps"], pair[f"num_{side}_tokens"]))
    metadata = json.loads((tmp_path / "out" / "scoring_metadata.json").read_text())
    fingerprint = {
        "dataset": str(world / "rows.jsonl"),
        "split": None,
        "tokenizer": str(tiny_llama),
        "max_seq_length": MAX_LENGTH,
        "prompt_key": None,
    }
    fingerprint |= {
        "tools_key": None,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": False,
        "chat_template_kwargs": None,
        "tokenization_version": 2,
    }
    assert {name: metadata.get(name, "missing") for name in fingerprint} == fingerprint


def test_refusals_leave_nothing_behind(world, tmp_path):
    store = world / "store"
    bad = [
        (("open-instruct",), {"accept_other_tokens": True}, "--loss-type"),
        (("jsonl",), {"loss_type": "dpo"}, "--loss-type"),
        (("open-instruct",), {"loss_type": "orpo", "accept_other_tokens": True}, "unknown loss type"),
        (("open-instruct",), {"loss_type": "dpo"}, "every assistant turn.*--accept-other-tokens"),
        (("megatron-bridge",), {}, "header of the assistant turn.*--accept-other-tokens"),
        (("jsonl",), {"metadata": {"a": 1}}, "--metadata"),
        (("xml",), {}, "unknown format"),
    ]
    for (format_,), options, message in bad:
        with pytest.raises(InputError, match=message):
            export(store, format_, tmp_path / "out", **options)
    store_samples.make_empty_store(tmp_path / "empty", 2)
    for format_ in ("jsonl", "trl"):
        with pytest.raises(InputError, match="no pair to export"):
            export(tmp_path / "empty", format_, tmp_path / "out")
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(store, "jsonl", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    argv = ("export", "--ref-store", store, "--format", "megatron-bridge", "--output", tmp_path / "out", "--accept-other-tokens")
    for wrong in ("split=nul", "=1", "split=NaN", "split"):
        call(*argv, "--metadata", wrong, code=2)
    assert "scoring_metadata.json" in call(*argv, "--metadata", "split=null", "--quiet")


def test_import_of_trls_own_cache(world, by_trl, tiny_llama, tmp_path):
    """The file stock TRL left behind becomes a store with the same sums, ids and identity as ours, but for the scorer version."""
    output = call("import", "--cache", by_trl[1], *inputs(world, tiny_llama), "--ref-store", tmp_path / "store")
    assert "19 pairs of 20 rows" in output
    imported, scored = open_store(tmp_path / "store", check="sha256"), open_store(world / "store")
    assert asdict(imported.identity) == asdict(scored.identity) | {"scorer_version": 0}
    for mine, other in zip(imported.read(range(19)).to_pylist(), scored.read(range(19)).to_pylist(), strict=True):
        assert {name: mine[name] for name in mine if "logps" not in name} == {
            name: other[name] for name in other if "logps" not in name
        }
        assert mine["ref_chosen_logps"] == pytest.approx(other["ref_chosen_logps"], abs=1e-3)
        assert mine["chosen_token_logps"] == [None] * mine["num_chosen_tokens"]
    sums = Dataset.from_file(str(by_trl[1]))
    assert imported.columns(["ref_chosen_logps"])["ref_chosen_logps"].to_pylist() == list(sums["ref_chosen_logps"])  # to the bit
    assert "sums only" in output and "sums only" in call("inspect", "--ref-store", tmp_path / "store")
    call("verify", "--ref-store", tmp_path / "store", "--model", tiny_llama)
    call("import", "--cache", by_trl[1], *inputs(world, tiny_llama), "--layout", "packed", "--ref-store", tmp_path / "packed")
    assert open_store(tmp_path / "packed").columns(["ref_chosen_logps"]) == imported.columns(["ref_chosen_logps"])
    assert len(dataset_of(imported, MAX_LENGTH)) == 19
    for wrong in ({"max_length": 40}, {"max_length": MAX_LENGTH, "ld_alpha": 0.5}):
        with pytest.raises(InputError, match="sums only"):
            dataset_of(imported, **wrong)
    assert NAMES < set(asdict(imported.identity))


def test_import_refuses_what_does_not_belong(world, by_trl, tiny_llama, tmp_path):
    cache, store = by_trl[1], tmp_path / "store"
    other = tiny.save(tmp_path / "other", seed=1)
    assert "not the log-probs of this model" in call(
        "import", "--cache", cache, *inputs(world, other), "--ref-store", store, code=2
    )
    assert "found 19" in call("import", "--cache", cache, *inputs(world, tiny_llama), "--limit", 9, "--ref-store", store, code=2)
    for name, column in (("text", ["-1.0"] * 19), ("lists", [[-1.0]] * 19), ("counts", [-1] * 19)):
        Dataset.from_dict(dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), column)).save_to_disk(tmp_path / name)
        arrow = next((tmp_path / name).glob("*.arrow"))
        argv = ("import", "--cache", arrow, *inputs(world, tiny_llama), "--ref-store", store)
        assert "expected columns of floating-point numbers" in call(*argv, code=2)
    (tmp_path / "no.arrow").write_text("x")
    assert "cannot be read" in call(
        "import", "--cache", tmp_path / "no.arrow", *inputs(world, tiny_llama), "--ref-store", store, code=2
    )
    assert not store.exists()
