"""A model over several GPUs, three at most: test_on_gpu.py runs this file on made-up ones, where whatever meets from two devices is an error,
and `make gpu` on real ones."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch
from test_scoring import pairs
from train_setup import make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from launch import Process
from precompute.config import PrecomputeConfig
from precompute.scorer import budget
from precompute.scorer.model import load_model, weights_sha256
from precompute.scorer.scoring import score
from precompute.scorer.self_test import self_test
from precompute.scorer.spread import devices_of, spread
from precompute.scorer.twin import twin_of
from precompute.worker import run
from store.errors import InputError
from store.reader import open_store
from train.self_test import self_test_policy

ALL = tuple(torch.device("cuda", index) for index in range(min(3, torch.cuda.device_count())))
MIB = 2**20
NEXT = 2 if torch.cuda.device_count() % 2 == 0 else 3
"""GPUs to a worker after one, so that none is left over: of two to four."""

made_up = sys.modules.get("made_up_gpu.load")

if len(ALL) < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)


def made(kind: str, dtype: str):
    make = tiny.make_unusual if kind in tiny.UNUSUAL else tiny.make_model
    return make(kind).to(getattr(torch, dtype))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in ("llama", "qwen2", "gemma2", "gpt_oss", "phi3", "granite")]
    + [("olmo3", "bfloat16"), ("llama", "bfloat16")],
)
def test_scores_are_those_of_one_device(kind, dtype):
    """Heads that are the embeddings too, windows, sinks, RoPE that follows the row; the twin lies on all devices as the model does."""
    one, several = made(kind, dtype).to(ALL[0]), spread(made(kind, dtype), ALL)
    assert devices_of(several) == ALL
    assert devices_of(twin_of(several).model) == ALL
    assert weights_sha256(several) == weights_sha256(one)
    self_test(several, dtype)
    sequences = pairs(seed=5)
    for layout in ("packed", "padded"):
        found, expected = (np.concatenate(score(each, sequences, layout=layout, tokens_per_batch=400)) for each in (several, one))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.02)


def test_a_layer_on_the_wrong_device_is_seen():
    """What these tests rest on."""
    model = spread(made("llama", "float32"), ALL)
    model.model.layers[-1]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        score(model, pairs(seed=5, num=2), layout="packed", tokens_per_batch=400)


def test_auto_measures_every_device(monkeypatch):
    """A layer of 6 kB per token on each; the one with the least room decides, which is not the first."""
    tight = 1
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 1024,
        "num_hidden_layers": len(ALL),
        "num_attention_heads": 1,
        "vocab_size": 384,
    }
    config = LlamaConfig(**sizes, max_position_embeddings=1 << 14, tie_word_embeddings=False)
    model = spread(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False), ALL)
    monkeypatch.setattr(budget, "free_memory", lambda device: (16 if device.index == tight else 256) * MIB)
    largest = budget.largest_budget(model, layout="packed", max_length=512, num_workers=1)
    assert 1024 <= largest <= 4096
    assert 0.4 < budget._peak(model, "packed", largest)[tight] / (16 * MIB) <= 0.9


@pytest.mark.skipif(made_up is None, reason="the memory of a real GPU is what it is")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_too_little_memory_for_the_self_test_names_the_option_that_helps(layout):
    """Not the layout, whose fault it is not. First too little for the model's own sequences, then for the small twin."""
    model = made("llama", "float32").to(ALL[0])
    text = f"out of memory in the self-test: .*CUDA out of memory.*: --gpus-per-worker {NEXT}$"
    for room in (1000, 10):
        made_up.library.gpu_make(len(ALL), made_up.library.gpu_held(0) + room * 1024)
        try:
            with pytest.raises(InputError, match=text):
                self_test(model, "float32", layout=layout)
            with pytest.raises(InputError, match="out of memory in the self-test: .*GPUs that have more"):
                self_test_policy(model, "float32", layout)
        finally:
            made_up.library.gpu_make(len(ALL), made_up.MEMORY)


@pytest.mark.skipif(made_up is None, reason="the memory of a real GPU is what it is")
def test_too_little_memory_while_scoring_names_the_options_that_help(tmp_path, monkeypatch):
    config = world(tmp_path, 1)
    monkeypatch.setattr("precompute.worker.self_test", lambda model, *args, **options: short_of_memory(model))
    try:
        with pytest.raises(
            InputError, match=f"out of memory while scoring; .*--tokens-per-batch auto.*: --gpus-per-worker {NEXT}$"
        ):
            run(config, Process(0, 1, 0))
    finally:
        made_up.library.gpu_make(len(ALL), made_up.MEMORY)


@pytest.mark.skipif(made_up is None, reason="the memory of a real GPU is what it is")
def test_memory_that_another_process_takes_while_the_model_is_loaded(tmp_path):
    """After its weights were counted: verify and train load it too."""
    AutoModelForCausalLM.from_config(LlamaConfig(**tiny.SMALL)).save_pretrained(tmp_path)
    made_up.library.gpu_make(len(ALL), made_up.library.gpu_held(0) + 1000)
    try:
        with pytest.raises(InputError, match="out of memory while the model was loaded; found CUDA out of memory.*other processes"):
            load_model(str(tmp_path), revision=None, dtype="float32", device=ALL[0])
    finally:
        made_up.library.gpu_make(len(ALL), made_up.MEMORY)


def short_of_memory(model) -> None:
    made_up.library.gpu_make(len(ALL), made_up.library.gpu_held(0) + 1000)


def test_a_model_with_fewer_parts_than_devices(tmp_path):
    config = LlamaConfig(**tiny.SMALL | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--gpus-per-worker 4: this model has fewer parts.*at most 3 for LlamaForCausalLM"):
        load_model(str(tmp_path), revision=None, dtype="float32", device=(*ALL, torch.device("cpu"))[:4])


def world(tmp_path, number: int) -> PrecomputeConfig:
    """Twelve rows and a model, to be scored by one worker of `number` GPUs."""
    tiny.make_model("olmo3").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    return PrecomputeConfig(
        dataset=(str(tmp_path / "rows.jsonl"),),
        model=str(tmp_path / "model"),
        tokenizer=str(tmp_path / "model"),
        split="train",
        max_length=96,
        dtype="bfloat16",
        shard_size=4,
        show="nothing",
        ref_store=tmp_path / f"store-{number}",
        gpus_per_worker=number,
    )


def test_the_store_has_one_identity_and_the_same_bytes(tmp_path):
    manifests = []
    for number in (1, len(ALL)):
        manifests.append(run(config := world(tmp_path, number), Process(0, 1, 0)))
        assert open_store(config.ref_store).manifest.provenance["gpus_per_worker"] == number
    one, several = manifests
    assert one.identity == several.identity
    assert [each.sha256 for each in one.shards] == [each.sha256 for each in several.shards]
