"""The self-test catches what the scorer would get wrong: each case with what makes it right, or refuses it, taken out."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.masking_utils import AttentionMaskInterface

from precompute.scorer import attention
from precompute.scorer.head import Head, head_of
from precompute.scorer.rope import Group
from precompute.scorer.self_test import self_test
from precompute.scorer.twin import twin_of
from store.errors import InputError
from train.self_test import self_test_policy

KINDS = (*tiny.CONFIGS, *tiny.UNUSUAL)


def make(kind: str):
    return tiny.make_model(kind) if kind in tiny.CONFIGS else tiny.make_unusual(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_where_scoring_and_training_are_right(kind):
    """The packed row's gradients too, against those of each sequence alone."""
    for seen in (self_test(make(kind), "float32"), self_test_policy(make(kind), "float32", "packed")):
        assert seen.of_twin < 1e-4
        assert seen.of_model < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_padded_layouts_pass(kind):
    for seen in (self_test(make(kind), "float32", layout="padded"), self_test_policy(make(kind), "float32", "padded")):
        assert max(seen.of_twin, seen.of_model) < 1e-4


def one_row(model, sequences):
    return [Group(np.arange(len(sequences)), whole=False)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_body_called_in_parts_and_biases_without_a_gradient(layout):
    """OPT calls its body's decoder, and a bias of its keys changes no score."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **tiny.SMALL, ffn_dim=64, word_embed_proj_dim=64)).eval()
    for seen in (self_test(model, "float32", layout=layout), self_test_policy(model, "float32", layout)):
        assert max(seen.of_twin, seen.of_model) < 1e-4


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_shorter_than_any_sequence(window):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **tiny.SMALL, sliding_window=window)).eval()
    for seen in (self_test(model, "float32"), self_test_policy(model, "float32", "packed")):
        assert max(seen.of_twin, seen.of_model) < 1e-4


def test_what_a_backward_cannot_do_is_one_error(monkeypatch):
    def broken(*given):
        raise RuntimeError("no such backward")

    monkeypatch.setattr("train.self_test._gradients_differ", broken)
    with pytest.raises(InputError, match="packed training cannot run this architecture: RuntimeError: no such backward"):
        self_test_policy(make("llama"), "float32", "packed")


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_catches_rope_that_follows_the_row(layout, dtype, monkeypatch):
    for module in ("precompute.scorer.scoring", "train.rows", "train.self_test"):
        monkeypatch.setattr(f"{module}.together", one_row)
    model = tiny.make_unusual("phi3").to(getattr(torch, dtype))
    with pytest.raises(InputError, match=f"{layout} scoring disagrees"):
        self_test(model, dtype, layout=layout)
    with pytest.raises(InputError, match=f"{layout} training disagrees"):
        self_test_policy(model, dtype, layout)


@pytest.mark.parametrize("kind", ["qwen2_moe", "olmo3"])
def test_catches_a_window_that_is_not_applied(kind, monkeypatch):
    made = attention.packed_mask
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, lambda **given: replace(made(**given), window=None))
    for test in (lambda: self_test(make(kind), "float32"), lambda: self_test_policy(make(kind), "float32", "packed")):
        with pytest.raises(InputError, match="disagrees"):
            test()


@pytest.mark.parametrize("kind", ["modernbert", "granite", "gemma2"])
def test_catches_a_head_that_does_more(kind, monkeypatch):
    """ModernBERT's decoder has a layer between body and head; Granite scales its logits, Gemma 2 caps them."""
    model = modernbert() if kind == "modernbert" else make(kind)
    if kind == "modernbert":
        with pytest.raises(InputError, match="between this model's body and its head"):
            self_test(model, "float32")
    for module in ("precompute.scorer.scoring", "train.packed"):
        monkeypatch.setattr(f"{module}.head_of", lambda any_model: Head())
    with pytest.raises(InputError, match="packed scoring disagrees"):
        self_test(model, "float32")
    with pytest.raises(InputError, match="packed training disagrees"):
        self_test_policy(model, "float32", "packed")


def modernbert():
    changes = {"local_attention": 24, "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder", **tiny.SMALL | changes)).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_catches_soft_caps_and_sinks_that_are_not_applied(dtype, monkeypatch):
    """In bfloat16 too, where the noise of a model hides much."""
    whole = attention._softmax_block
    monkeypatch.setattr(attention, "_softmax_block", lambda *block: whole(*block[:-2], None, None))
    for kind in ("gemma2", "gpt_oss"):
        model = make(kind).to(getattr(torch, dtype))
        with pytest.raises(InputError, match="disagrees"):
            self_test(model, dtype)


def test_rows_of_a_padded_batch_that_change_each_other_are_refused(monkeypatch):
    """A model that counts positions from the end of the longest row. Its sequences alone are scored."""
    forward = GPT2Model.forward

    def careless(self, input_ids=None, attention_mask=None, **kwargs):
        shift = 0 if attention_mask is None else attention_mask.shape[1] - attention_mask.sum(dim=1, keepdim=True)
        kwargs["position_ids"] = torch.arange(input_ids.shape[1])[None] + shift
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", careless)
    config = GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with pytest.raises(InputError, match="padded scoring disagrees.*--tokens-per-batch 1"):
        self_test(model, "float32", layout="padded")
    assert self_test(model, "float32", layout="padded", tokens_per_batch=1).of_twin < 1e-4
    with pytest.raises(InputError, match="padded training disagrees"):
        self_test_policy(model, "float32", "padded")


def test_a_model_whose_own_forward_is_not_finite():
    model = tiny.make_model("llama")
    model.model.norm.weight[3] = float("inf")
    for layout in ("packed", "padded"):
        with pytest.raises(InputError, match="not finite"):
            self_test(model, "float32", layout=layout)


@pytest.mark.parametrize("kind", ["llama", "olmo3", "gemma2", "gpt_oss", "phi3", "mixtral", "qwen3_moe"])
def test_the_twin_of_a_released_size_is_small_and_keeps_its_kinds_of_layers(kind, monkeypatch):
    """Configurations of billions of weights, as transformers has them by default, never allocated."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    assert sum(each.numel() for each in model.parameters()) > 2e9
    twin = twin_of(model)
    assert sum(each.numel() for each in twin.model.parameters()) < 1e7
    kinds = set(getattr(config, "layer_types", None) or ())
    assert set(getattr(twin.model.config, "layer_types", None) or ()) == kinds
    assert all(length <= 96 for length in twin.lengths)
    assert bool(twin.lengths) == (kind not in ("llama", "mixtral", "qwen3_moe"))


@pytest.mark.parametrize(
    ("kind", "kind_of"),
    [
        ("flint", lambda layer: (layer.self_attn.sliding_window is None, type(layer.mlp))),
        ("modernbert-decoder", lambda layer: type(layer.attn_norm)),
        ("jamba", lambda layer: type(layer)),
    ],
)
def test_the_twin_has_a_layer_of_each_kind_where_every_nth_is_another(kind, kind_of, monkeypatch):
    """Kinds that no list of the configuration tells: full attention in every fourth layer of Flint, no first norm in ModernBERT's first layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    twin = twin_of(model)
    assert not twin.num_missing
    assert set(map(kind_of, twin.model.base_model.layers)) == set(map(kind_of, model.base_model.layers))


@pytest.mark.parametrize("kind", ["granitemoehybrid", "bamba"])
def test_the_twin_of_a_hybrid_whose_states_follow_the_hidden_size(kind, monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    assert sum(each.numel() for each in twin_of(model).model.parameters()) < 1e7


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("granite", {"logits_scaling": 3.0}, Head(1 / 3)),
        ("gemma2", {}, Head(1.0, 3.0)),
    ],
)
def test_the_head_is_measured(kind, changes, expected):
    for dtype in (torch.float32, torch.bfloat16):
        measured = head_of(tiny.make_unusual(kind, **changes).to(dtype))
        assert measured.scale == pytest.approx(expected.scale, rel=1e-6)
        assert measured.softcap == expected.softcap


@pytest.mark.parametrize(("kind", "scale"), [("cohere", {"logit_scale": 0.3}), ("hyperclovax", {"logits_scaling": 3.0})])
def test_factors_of_other_names_and_directions(kind, scale):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tiny.SMALL, **scale)).eval()
    assert head_of(model) == Head(pytest.approx(*scale.values()))
