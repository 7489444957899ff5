"""Scores against a plain Hugging Face forward of the single, unpadded sequence: logits, log_softmax, gather."""

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from precompute.scorer import attention
from precompute.scorer.attention import packed_attention, packed_hidden
from precompute.scorer.packing import Sequence, pack
from precompute.scorer.scoring import score
from store.errors import InputError

TOLERANCE = 1e-4
"""Nats per token in float32, the contract's; seen here: 5e-6."""


def plain(model: PreTrainedModel, sequence: Sequence) -> np.ndarray:
    """The independent reference: one sequence, no padding, no mask, no cache."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[sequence.num_prompt - 1 :, 0].numpy()


def pairs(seed: int, num: int = 8, longest: int = 90) -> list[Sequence]:
    """Pairs with prompts of one token and more, shared prompts, shared responses, and completions that begin alike."""
    rng = np.random.default_rng(seed)
    sequences = []
    for index in range(num):
        num_prompt = 1 if index == 0 else int(rng.integers(1, longest))
        prompt = rng.integers(2, 384, num_prompt)
        for _ in range(2):
            sequences.append(
                Sequence(np.concatenate([prompt, rng.integers(2, 384, rng.integers(1, longest))]).astype(np.int32), num_prompt)
            )
        if index % 2:  # begins like the last one, then leaves it
            sequences.append(
                Sequence(
                    np.concatenate([sequences[-1].ids[: num_prompt + 9], rng.integers(2, 384, 7)]).astype(np.int32), num_prompt
                )
            )
        if index % 3 == 0:
            sequences.append(sequences[-1])
    return sequences


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_both_layouts_equal_the_plain_forward(kind, tokens_per_batch, layout):
    model = tiny.make_model(kind)
    sequences = pairs(seed=tokens_per_batch)
    scored = score(model, sequences, layout=layout, tokens_per_batch=tokens_per_batch)
    for sequence, logps in zip(sequences, scored, strict=True):
        assert logps.dtype == np.float32
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)
    assert max(np.ptp(logps) for logps in scored) > 5  # the model is not flat, so agreement means something


@pytest.mark.parametrize("kind", tiny.UNUSUAL)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_what_llama_does_not_do(kind, layout):
    """Together in one batch, shorter and longer than every length at which the model changes."""
    model = tiny.make_unusual(kind)
    sequences = pairs(seed=3)
    scored = score(model, sequences, layout=layout, tokens_per_batch=100_000)
    for sequence, logps in zip(sequences, scored, strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)
    assert max(np.ptp(logps) for logps in scored) > 2


@pytest.mark.parametrize(("length", "rope"), [(64, "short"), (65, "long"), (66, "long")])
def test_longrope_changes_with_the_last_token(length, rope):
    """The last token predicts nothing, but with it the sequence is longer than the original context of 64."""
    model = tiny.make_unusual("phi3")
    ids = np.random.default_rng(0).integers(2, 384, length).astype(np.int32)
    (logps,) = score(model, [Sequence(ids, 12)], layout="packed", tokens_per_batch=1000)
    np.testing.assert_allclose(logps, plain(model, Sequence(ids, 12)), atol=TOLERANCE, rtol=0)
    (shorter,) = score(model, [Sequence(ids[:60], 12)], layout="packed", tokens_per_batch=1000)
    assert (np.abs(shorter - logps[: len(shorter)]).max() < TOLERANCE) == (rope == "short")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rope_that_follows_the_longest_row_of_the_past_is_refused(layout):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**(tiny.SMALL | {"max_position_embeddings": 64}), rope_parameters=rope)
    ).eval()
    sequences = pairs(seed=3)
    with pytest.raises(InputError, match="dynamic.*--max-length 64"):
        score(model, sequences, layout=layout, tokens_per_batch=1000)
    short = [Sequence(each.ids[:64], min(each.num_prompt, 63)) for each in sequences if len(each.ids) > 1]
    for sequence, logps in zip(short, score(model, short, layout=layout, tokens_per_batch=1000), strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)


def test_the_head_in_tiles(monkeypatch):
    """Tiles that cut the completion and the vocabulary unevenly."""
    monkeypatch.setattr("precompute.scorer.scoring.HEAD_TILE", {"cpu": (37, 100)})
    model = tiny.make_model("qwen2")
    sequences = pairs(seed=7)
    for sequence, logps in zip(sequences, score(model, sequences, layout="packed", tokens_per_batch=300), strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "block"), [("llama", 256), ("olmo3", 7), ("olmo3", 64)])
def test_the_forward_of_training_on_a_cpu(kind, block, monkeypatch):
    """Outside inference PyTorch's kernels run, which have gradients. Branches longer than one block of windowed attention, and windows that end
    inside prompt, context and branch."""
    monkeypatch.setattr("precompute.scorer.attention.BLOCK", block)
    model = tiny.make_model(kind)
    sequences = pairs(seed=5, num=3, longest=200)
    (batch,) = pack(sequences, 100_000)
    with packed_attention(model), torch.no_grad():
        hidden = packed_hidden(model, batch)[torch.from_numpy(batch.predictors)]
        logps = model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, torch.from_numpy(batch.targets)[:, None])[:, 0]
    for index, slots in zip(batch.members, batch.slots, strict=True):
        np.testing.assert_allclose(logps.numpy()[slots], plain(model, sequences[index]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "olmo3"])
def test_masked_attention_for_float32_on_gpus(kind, monkeypatch):
    """The path that GPUs take in float32, here on the CPU."""
    monkeypatch.setattr("precompute.scorer.attention._attend_cpu", attention._attend_in_blocks)
    model = tiny.make_model(kind)
    sequences = pairs(seed=11, longest=60)
    for sequence, logps in zip(sequences, score(model, sequences, layout="packed", tokens_per_batch=400), strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_the_plain_forward_is():
    """The packed layout may not add noise: mean |bf16 - float32| per token within 1.5 times that of the plain bf16 forward."""
    model = tiny.make_model("llama")
    sequences = pairs(seed=3)
    exact = [plain(model, sequence) for sequence in sequences]
    model.to(torch.bfloat16)
    packed = score(model, sequences, layout="packed", tokens_per_batch=300)
    noise = np.concatenate([np.abs(a - b) for a, b in zip(packed, exact, strict=True)]).mean()
    plain_noise = np.concatenate([np.abs(plain(model, each) - b) for each, b in zip(sequences, exact, strict=True)]).mean()
    assert 0 < noise < 1.5 * plain_noise


def test_the_model_keeps_its_own_attention_afterwards():
    model = tiny.make_model("llama")
    with pytest.raises(RuntimeError, match="inside"), packed_attention(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"


def test_architectures_that_packing_gets_wrong_are_refused():
    model = tiny.make_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention", "full_attention"]
    with pytest.raises(InputError, match="linear_attention.*--layout padded"):
        score(model, pairs(0), layout="packed", tokens_per_batch=100)
