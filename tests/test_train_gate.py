"""The gate before step 1: it lets the store's own model through and nothing else, and says what differs and by how much."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model
from train_setup import make_rows, make_store, make_tokenizer, make_world
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train.run
from precompute.scorer.rescore import Rescored
from store.errors import InputError, StoreError
from store.reader import open_store
from train import gate
from train.plan import compare_stores


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("gate"), num_rows=20)


@pytest.fixture(scope="module")
def store(world):
    return open_store(world.store)


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world.model).eval()


@pytest.fixture(scope="module")
def tokenizer(world):
    return PreTrainedTokenizerFast.from_pretrained(world.model)


def check(model, tokenizer, store, world, **options) -> gate.GateReport:
    return gate.check(model, tokenizer, store, policy=str(world.model), **options)


def test_the_stores_own_model_passes(model, tokenizer, store, world):
    report = check(model, tokenizer, store, world)
    assert not report.different
    assert report.rescored.num_pairs == gate.NUM_PAIRS
    assert report.rescored.mean_token_difference < 1e-5
    assert "8 random pairs" in str(report)


def test_bfloat16_store_and_model_pass(tokenizer, world, tmp_path):
    store = make_store(tmp_path / "store", world.model, world.rows, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16).eval()
    assert not check(model, tokenizer, store, world).different


def test_one_changed_weight_is_named(model, tokenizer, store, world):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4
    with pytest.raises(InputError) as refusal:
        check(model, tokenizer, store, world)
    text = str(refusal.value)
    assert "is not the reference of this store" in text
    assert f"expected weights_sha256 {store.identity.weights_sha256[:12]} ({world.model})" in text
    assert "--allow-different-policy" in text
    assert "dtype" not in text.split("Train from")[0].split("expected")[1].split("found")[0]


def test_perturbed_weights_say_by_how_much(model, tokenizer, store, world):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    with pytest.raises(
        InputError, match=r"differ from the store by 0\.\d+ nats per token \(tolerance 0.001\), most on source row \d+"
    ):
        check(model, tokenizer, store, world)


def test_same_weights_with_other_numbers_stop_too(model, tokenizer, store, world, tmp_path):
    """What no hash can see: here the store's values are off, elsewhere a kernel or a library may be."""
    shifted = make_store(tmp_path / "shifted", world.model, world.rows, shift=2.0)
    with pytest.raises(StoreError, match="same weights, other numbers: 8 random pairs"):
        check(model, tokenizer, shifted, world)


def test_other_dtype_is_named(tokenizer, store, world):
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16).eval()
    with pytest.raises(InputError, match=r"expected dtype float32; found dtype bfloat16\..* Give --dtype float32"):
        check(model, tokenizer, store, world)


def test_other_tokenizer_is_named_and_not_scored(model, store, world, tokenizer):
    other = make_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(
        InputError, match=r"expected tokenizer_sha256 .* Not scored again, as the tokenizer differs.* Give --tokenizer"
    ):
        check(model, other, store, world)
    assert check(model, other, store, world, allow_different_policy=True).rescored is None


def test_other_template_is_named(model, store, world):
    other = make_tokenizer()
    other.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match=r"expected chat_template_sha256 .* Give the --chat-template that precompute was given"):
        check(model, other, store, world)


def test_other_config_is_named(model, tokenizer, store, world, tmp_path):
    """The same weights under another RoPE are another model."""
    model.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    path.write_text(json.dumps(config))
    other = AutoModelForCausalLM.from_pretrained(path.parent).eval()
    with pytest.raises(InputError, match=r"expected config_sha256 .* found config_sha256 .* nats per token"):
        gate.check(other, tokenizer, store, policy=str(path.parent))


def test_allowed_policy_passes_with_a_loud_notice(tokenizer, store, world):
    other = make_model("llama", seed=1)
    report = check(other, tokenizer, store, world, allow_different_policy=True)
    notice = gate.notice(report, store, "runs/other")
    assert "runs/other is NOT the reference" in notice
    assert "weights_sha256: the store has" in notice
    assert "nats per token" in notice
    assert notice.count("!!!!!!!!!!") > 2


def test_too_few_embeddings_cannot_be_allowed(tokenizer, store, world):
    small = make_model("llama")
    small.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(InputError, match=f"expected {len(tokenizer)} tokens; found {len(tokenizer) - 1}"):
        check(small, tokenizer, store, world, allow_different_policy=True)


def test_nan_is_never_within_tolerance():
    rescored = Rescored(1, 1, math.nan, math.nan, math.nan, 0, math.nan)
    report = gate.GateReport((), rescored, gate.TOLERANCE["float32"])
    assert report.different
    close = replace(rescored, mean_token_difference=1e-9)
    assert not replace(report, rescored=close).different
    assert gate._farthest_off([close, rescored]) is rescored
    assert gate._farthest_off([replace(close, mean_token_difference=0.5), close]).mean_token_difference == 0.5


def test_eval_store_must_come_from_the_same_model(store, world, tmp_path):
    same = make_store(tmp_path / "same", world.model, make_rows(5, seed=3), dataset="held out", max_length=128)
    compare_stores(same, store)
    other = make_store(tmp_path / "other", world.model, make_rows(5, seed=3), "bfloat16")
    with pytest.raises(StoreError, match=r"another weights_sha256, dtype than .* --dtype float32"):
        compare_stores(other, store)


def test_too_little_memory_for_the_gate(monkeypatch):
    """It scores each pair alone by the plain forward, with all logits."""

    def check(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.06 GiB.")

    monkeypatch.setattr(gate, "check", check)
    rank = SimpleNamespace(config=SimpleNamespace(seed=0, allow_different_policy=False))
    planned = SimpleNamespace(checkpoint=None, store=None, policy=SimpleNamespace(name="policy", revision=None))
    with pytest.raises(InputError, match="out of memory in the gate, .*found CUDA out of memory.*GPUs that have more"):
        train.run._pass_gate(rank, planned, None, None)
