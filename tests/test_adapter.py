"""An adapter as reference model: merged when it is loaded, and then the same model as the merge that peft saves; what is no such model is refused."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_rescore import call
from transformers import AutoModelForCausalLM

from precompute.scorer.adapter import adapter_of
from precompute.scorer.api import config_sha256, load_model, load_tokenizer, weights_sha256
from store.errors import InputError
from store.manifest import MANIFEST, Manifest
from store.reader import open_store
from train import gate

CPU = torch.device("cpu")


def randomize(model: peft.PeftModel, seed: int = 0) -> None:
    """A fresh adapter adds nothing; this one moves log-probs by whole nats."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def make_adapter(base: Path, folder: Path, tokenizer: bool = True, **options) -> Path:
    """A LoRA adapter as peft writes it, on the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | options))
    randomize(adapted)
    adapted.save_pretrained(folder)
    if tokenizer:
        tiny.make_tokenizer().save_pretrained(folder)
    return folder


def merged_by_peft(adapter: Path, folder: Path, dtype: str = "float32") -> Path:
    """A whole checkpoint, made by peft's own loader and merge."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=getattr(torch, dtype))
    model.merge_and_unload().save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama) -> Path:
    return make_adapter(tiny_llama, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copy")


def changed(folder: Path, **entries) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    sides = {
        side: [{"role": "user", "content": "why"}, {"role": "assistant", "content": side * 3}] for side in ("chosen", "rejected")
    }
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(sides) + "\n" for _ in range(3)))
    return path


def precompute(rows: Path, model: Path, store: Path, *more: object, code: int = 0) -> str:
    options = ("--model", model, "--ref-store", store, "--max-length", 64, "--dtype", "float32")
    return call("precompute", "--dataset", rows, *options, *more, code=code)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_it_is_the_model_that_peft_merges(tiny_olmo3, tmp_path, dtype, options):
    adapter = make_adapter(tiny_olmo3, tmp_path / "lora", **{"target_modules": ["q_proj", "up_proj"]} | options)
    whole = merged_by_peft(adapter, tmp_path / "whole", dtype)
    ours = load_model(str(adapter), revision=None, dtype=dtype, device=CPU)
    theirs = load_model(str(whole), revision=None, dtype=dtype, device=CPU)
    assert weights_sha256(ours) == weights_sha256(theirs)
    assert weights_sha256(ours) != weights_sha256(load_model(str(tiny_olmo3), revision=None, dtype=dtype, device=CPU))
    assert config_sha256(str(adapter)) == config_sha256(str(tiny_olmo3)) == config_sha256(str(whole))
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training


def test_its_store_has_the_adapters_numbers_and_is_that_of_the_merge(adapter, rows, tiny_llama, tmp_path):
    """Numbers against a forward of base and adapter side by side, which merges nothing."""
    output = precompute(rows, adapter, tmp_path / "store")
    assert f"{adapter} is an adapter; its base is {tiny_llama}" in output
    whole = merged_by_peft(adapter, tmp_path / "whole")
    precompute(rows, whole, tmp_path / "of_whole")
    store, of_whole = open_store(tmp_path / "store"), open_store(tmp_path / "of_whole")
    pair, same = (each.read([0]).to_pylist()[0] for each in (store, of_whole))
    assert pair["chosen_token_logps"] == same["chosen_token_logps"]
    for name in ("weights_sha256", "config_sha256", "tokenizer_sha256"):
        assert getattr(store.identity, name) == getattr(of_whole.identity, name)
    ids = torch.tensor([[*pair["prompt_ids"], *pair["chosen_ids"]]])
    with torch.no_grad():
        for folder, near in ((adapter, True), (tiny_llama, False)):
            kind = peft.AutoPeftModelForCausalLM if near else AutoModelForCausalLM
            logps = kind.from_pretrained(folder).eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
            assert torch.allclose(logps, torch.tensor(pair["chosen_token_logps"]), atol=1e-4) == near

    for model in (adapter, whole):
        assert "the weights that made the store" in call("verify", "--ref-store", tmp_path / "store", "--model", model)
    assert "NOT the weights" in call("verify", "--ref-store", tmp_path / "store", "--model", tiny_llama, code=1)

    tokenizer = load_tokenizer(str(adapter))
    for folder in (adapter, whole):
        model = load_model(str(folder), revision=None, dtype="float32", device=CPU)
        assert not gate.check(model, tokenizer, store, policy=str(folder)).different
    base = load_model(str(tiny_llama), revision=None, dtype="float32", device=CPU)
    with pytest.raises(InputError, match="is not the reference of this store"):
        gate.check(base, tokenizer, store, policy=str(tiny_llama))


def test_a_sealed_store_notices_another_adapter_or_base(rows, adapter, copy, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    changed(copy, base_model_name_or_path=str(base))
    precompute(rows, copy, tmp_path / "store")
    stamp = Manifest.load(tmp_path / "store" / MANIFEST).provenance["checkpoint_stamp"]
    assert stamp and "sealed already, nothing to score" in precompute(rows, copy, tmp_path / "store")
    weights = copy / "adapter_model.safetensors"
    kept = weights.read_bytes()
    save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights)
    assert "another model (its weights differ)" in precompute(rows, copy, tmp_path / "store", code=1)
    weights.write_bytes(kept)
    changed(copy, lora_alpha=1)
    assert "another model (its weights differ)" in precompute(rows, copy, tmp_path / "store", code=1)
    changed(copy, lora_alpha=8)
    tiny.make_model("llama", seed=5).save_pretrained(base)
    assert "another model (its weights differ)" in precompute(rows, copy, tmp_path / "store", code=1)


def test_without_a_tokenizer_its_base_is_named(rows, tiny_llama, tmp_path):
    adapter = make_adapter(tiny_llama, tmp_path / "lora", tokenizer=False)
    output = precompute(rows, adapter, tmp_path / "store", code=2)
    assert f"no tokenizer beside the adapter. Give --tokenizer {tiny_llama}" in output
    precompute(rows, adapter, tmp_path / "store", "--tokenizer", tiny_llama)


REFUSED = {
    "base_model_name_or_path": {
        "/no/such/base": "base of the adapter is not there; found base_model_name_or_path /no/such/base",
        None: "does not say which model it belongs to",
        "nobody/such-a-base-at-all": "base of the adapter: no causal language model can be loaded",
    },
    "peft_type": {"PREFIX_TUNING": "expected a change of weights, such as LORA.*found PREFIX_TUNING for CAUSAL_LM"},
    "task_type": {"SEQ_CLS": "found LORA for SEQ_CLS"},
    "r": {8: "adapter does not fit its base: RuntimeError"},
    "target_modules": {
        ("q_proj",): r"has 8 weights too many for its configuration; found .*v_proj",
        ("q_proj", "v_proj", "o_proj"): r"lacks 8 weights for its configuration; found .*o_proj",
        ("w9",): "adapter does not fit its base: NoMatching",
    },
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, value, message) for name, each in REFUSED.items() for value, message in each.items()]
)
def test_what_is_no_adapter_of_a_causal_model_is_refused(copy, name, value, message):
    changed(copy, **{name: list(value) if isinstance(value, tuple) else value})
    with pytest.raises(InputError, match=message):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)


def test_a_folder_that_could_mean_two_models_is_refused(copy, adapter, tiny_llama):
    """A merge saved over its adapter: transformers would add the adapter a second time."""
    shutil.copy(tiny_llama / "config.json", copy)  # alone it says nothing, some trainers leave it there
    assert adapter_of(str(copy)).base == str(tiny_llama)
    shutil.copy(tiny_llama / "model.safetensors", copy)
    with pytest.raises(InputError, match="both an adapter and a whole model"):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)
    (copy / "model.safetensors").unlink()
    changed(copy, base_model_name_or_path=str(adapter))
    with pytest.raises(InputError, match="is an adapter itself; expected a whole model"):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)


def test_embeddings_tied_to_the_head_have_no_merge(tiny_llama, tmp_path):
    """peft would change the head with the embeddings, which the adapter itself does not."""
    adapter = make_adapter(tiny_llama, tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="ties together"):
        load_model(str(adapter), revision=None, dtype="float32", device=CPU)


def test_damage_is_one_line(copy, tmp_path):
    (copy / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(InputError, match="does not fit its base: SafetensorError"):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="does not fit its base: "):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as an adapter's configuration"):
        adapter_of(str(copy))


def test_peft_missing_is_said_before_anything_is_loaded(rows, adapter, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    output = precompute(rows, adapter, tmp_path / "store", code=2)
    assert "an adapter needs peft, which is not installed. pip install peft" in output and not os.path.exists(tmp_path / "store")


def test_the_bases_own_revision_is_asked_for(copy, monkeypatch):
    changed(copy, base_model_name_or_path="some/base", revision="v2")
    asked = []

    def load(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("offline")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(
        InputError, match=r"base of the adapter: no causal language model can be loaded at revision v2.*found some/base"
    ):
        load_model(str(copy), revision=None, dtype="float32", device=CPU)
    assert asked == [("some/base", "v2")]
