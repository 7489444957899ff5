"""`verify --model`: the model that made the store, and every other, in one line and without a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import store_samples
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typed import call

from store.manifest import MANIFEST, Manifest
from store.reader import open_store


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rescore") / "rows.jsonl"
    turn = lambda role, text: [{"role": role, "content": text}]
    pairs = [
        {"prompt": turn("user", "why " * (i + 1))} | {side: turn("assistant", f"{side} {i}" * 5) for side in ("chosen", "rejected")}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="module")
def stores(rows, tiny_llama) -> dict[str, Path]:
    made = {}
    for layout in ("packed", "padded"):
        made[layout] = rows.parent / layout
        options = (
            "--model",
            tiny_llama,
            "--max-length",
            128,
            "--dtype",
            "float32",
            "--layout",
            layout,
            "--ref-store",
            made[layout],
        )
        call("precompute", "--dataset", rows, *options)
    return made


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_layout_is_the_stores_own(stores, tiny_llama, layout):
    output = call("verify", "--ref-store", stores[layout], "--model", tiny_llama)
    assert f"scored again in other batches, {layout}: " in output and "the weights that made the store" in output
    other = "padded" if layout == "packed" else "packed"
    assert f", {other}: " in call("verify", "--ref-store", stores[layout], "--model", tiny_llama, "--layout", other)


def changed(model: Path, folder: Path, **changes) -> Path:
    """The same weights under another configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_other_models_are_told_apart(stores, tiny_llama, tmp_path):
    """Smaller vocabulary, shorter context, other weights, other configuration: exit code and one line each."""
    for name, sizes in (("vocabulary", {"vocab_size": 80}), ("context", {"max_position_embeddings": 32})):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**tiny.SMALL | sizes, tie_word_embeddings=True)).save_pretrained(tmp_path / name)
        output = call("verify", "--ref-store", stores["packed"], "--model", tmp_path / name, code=2)
        assert f"its {name} is s" in output and str(tiny_llama) in output
    other = tiny.save(tmp_path / "other", seed=1)
    assert "NOT the weights that made the store" in call("verify", "--ref-store", stores["packed"], "--model", other, code=1)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    turned = changed(tiny_llama, tmp_path / "turned", **rope)
    assert "NOT the configuration that made the store" in call("verify", "--ref-store", stores["packed"], "--model", turned, code=1)
    assert "no configuration can be loaded" in call("verify", "--ref-store", stores["packed"], "--model", tmp_path / "no", code=2)


def test_a_store_of_other_numbers_than_its_model_gives_fails(stores, tiny_llama, monkeypatch):
    """As of a machine that computes wrongly: the weights are right, the numbers are not."""
    from precompute.scorer import rescore

    score = rescore.score
    monkeypatch.setattr(rescore, "score", lambda *args, **options: [logps - 0.01 for logps in score(*args, **options)])
    output = call("verify", "--ref-store", stores["packed"], "--model", tiny_llama, code=1)
    assert "give other numbers here than the store has" in output and "at most 0.001 nats per token" in output


def test_an_empty_store_and_options_without_a_model(stores, tiny_llama, tmp_path):
    store_samples.make_empty_store(tmp_path / "empty", 4)
    assert "no pair to score" in call("verify", "--ref-store", tmp_path / "empty", "--model", tiny_llama, code=2)
    assert "--seed, --layout: belongs to --model" in call(
        "verify", "--ref-store", stores["packed"], "--seed", 3, "--layout", "padded", code=2
    )
    assert "--attention-kernel: belongs to --model" in call(
        "verify", "--ref-store", stores["packed"], "--attention-kernel", "FA3", code=2
    )
    assert "0" in call("verify", "--ref-store", stores["packed"], "--model", tiny_llama, "--seed", "-1", code=2)
    path = stores["packed"] / MANIFEST
    assert (
        Manifest.load(path).provenance["layout"] == "packed"
        and open_store(stores["padded"]).manifest.provenance["layout"] == "padded"
    )
