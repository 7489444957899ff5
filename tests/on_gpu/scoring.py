"""Phase 1's scoring and phase 2's gradients on a GPU: test_on_gpu.py runs this file on made-up ones, `make gpu` on a real one.

The device is never number 0 where there are several: what forgets to say which device it means goes to 0.
"""

import atexit
import gc
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import tiny
import torch
from test_attention_cuda import gradients
from test_scoring import pairs
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config

import precompute.scorer.self_test
import train.self_test
from precompute.scorer import attention, budget
from precompute.scorer.attention import packed_attention, packed_hidden
from precompute.scorer.compiled import compiler_wanted, use_compiler
from precompute.scorer.model import weights_sha256
from precompute.scorer.norms import fused_norms
from precompute.scorer.packing import Sequence, pack
from precompute.scorer.scoring import ready_to_score, score, score_packed
from precompute.worker import self_test
from store.errors import InputError
from train.self_test import self_test_policy

DEVICE = torch.device("cuda", torch.cuda.device_count() - 1)
DTYPES = ("bfloat16", "float16", "float32")
TOKENS_PER_BATCH = 400
MIB = 2**20

NOISE = {"bfloat16": 0.06, "float16": 0.008, "float32": 1e-5}
"""Nats per token, mean. Four times what two kernels differ by with these models (0.015, 0.002, 1e-6 seen); their weights are large."""

made_up = sys.modules.get("made_up_gpu.load")
counted = pytest.mark.skipif(made_up is None, reason="a real GPU does not count")


def on_gpu(kind: str, dtype: str):
    return tiny.make_model(kind).to(getattr(torch, dtype)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_scores_of_both_layouts_agree_with_each_other_and_with_the_cpu(kind, dtype):
    model = on_gpu(kind, dtype)
    on_cpu = tiny.make_model(kind).to(getattr(torch, dtype))
    sequences = pairs(seed=5)
    assert weights_sha256(model) == weights_sha256(on_cpu)
    self_test(model, dtype)
    packed, padded = (
        np.concatenate(score(model, sequences, layout=layout, tokens_per_batch=TOKENS_PER_BATCH)) for layout in ("packed", "padded")
    )
    expected = np.concatenate(score(on_cpu, sequences, layout="padded", tokens_per_batch=1))
    for found in (packed, padded):
        assert np.isfinite(found).all()
        assert np.abs(found - expected).mean() < NOISE[dtype]
    assert np.abs(packed - padded).mean() < NOISE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("llama", "olmo3"))
def test_gradients_of_a_packed_row_are_those_of_its_sequences(kind, dtype):
    """Each parameter's, relative to its norm."""
    packed, alone = gradients(on_gpu(kind, dtype))
    bound = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-4}[dtype]
    for name, expected in alone.items():
        assert packed[name].device == DEVICE
        difference = (packed[name].float() - expected.float()).norm() / expected.float().norm()
        assert difference < bound, f"{name}: {difference:.2g}"


@pytest.mark.parametrize(
    "dtype", ("bfloat16", "float32")
)  # PyTorch's CPU kernels, which a made-up GPU uses, lack a softmax from float16
@pytest.mark.parametrize("kind", tiny.UNUSUAL)
def test_kinds_that_llama_is_not(kind, dtype):
    """Against the CPU's plain forward; training's self-test compares gradients on this device with the plain ones."""
    model = tiny.make_unusual(kind).to(getattr(torch, dtype)).to(DEVICE)
    sequences = pairs(seed=5, num=4)
    self_test(model, dtype)
    self_test_policy(model, dtype, "packed")
    expected = np.concatenate(score(tiny.make_unusual(kind), sequences, layout="padded", tokens_per_batch=1))
    found = np.concatenate(score(model, sequences, layout="packed", tokens_per_batch=TOKENS_PER_BATCH))
    assert np.abs(found - expected).mean() < 4 * NOISE[dtype]  # now against float32, and granite's logits are large


# ---- what only made-up GPUs show


@counted
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layer_is_one_call_of_flash_attention_in_its_dtypes(dtype):
    from made_up_gpu.flash import calls

    model, before = on_gpu("olmo3", dtype), calls["forward"]
    num_batches = len(list(pack(pairs(seed=5), TOKENS_PER_BATCH)))
    score(model, pairs(seed=5), layout="packed", tokens_per_batch=TOKENS_PER_BATCH)
    assert calls["forward"] - before == (0 if dtype == "float32" else num_batches * model.config.num_hidden_layers)


@counted
def test_kernels_that_launch_on_the_current_device_find_it_right(monkeypatch):
    """Triton's and other packages', of a worker whose GPU is not number 0 and was never made the current one."""
    from trl.kernels import chunked_logprob

    seen = []

    def recording(function, device_of):
        def run(*arguments, **options):
            seen.append((function.__name__, torch.cuda.current_device(), device_of(arguments).index))
            return function(*arguments, **options)

        return run

    head = recording(chunked_logprob._forward_tile, lambda arguments: arguments[0].device)
    monkeypatch.setattr(chunked_logprob, "_forward_tile", head)
    monkeypatch.setattr(attention, "_varlen", recording(attention._varlen, lambda arguments: arguments[0].device))
    score(on_gpu("olmo3", "bfloat16"), pairs(seed=5), layout="packed", tokens_per_batch=TOKENS_PER_BATCH)
    assert {name for name, *_ in seen} == {"_forward_tile", "_varlen"}
    assert all(current == device == DEVICE.index for _, current, device in seen)
    assert torch.cuda.current_device() == 0


@counted
@pytest.mark.parametrize(("kind", "launches"), [("llama", 230), ("olmo3", 310)])
def test_launches_and_waits_of_a_batch(kind, launches):
    """The host waits for nothing but the scores, however long the batch; more of either is a slower GPU."""
    model = on_gpu(kind, "bfloat16")
    (batch,) = pack(pairs(seed=5), 100_000)
    with ready_to_score(model):
        score_packed(model, batch)
        made_up.clear_counts()
        scores = score_packed(model, batch)
        seen = made_up.counts()
        scores.cpu()
    assert seen.get("waits", 0) == 0
    assert made_up.counts()["waits"] == 1
    assert seen["launches"] <= launches
    assert seen["to device"] <= 8  # ids, positions, predictors, targets, and what attention needs


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("kind", ("gpt_oss", "qwen2_moe"))
def test_experts_of_one_product_as_checkpoints_load_them(kind, dtype):
    """transformers' default: all experts' tokens in one grouped product."""
    model = tiny.make_unusual(kind).to(getattr(torch, dtype)).to(DEVICE)
    model.set_experts_implementation("grouped_mm")
    sequences = pairs(seed=5, num=4)
    self_test(model, dtype)
    self_test_policy(model, dtype, "packed")
    expected = np.concatenate(score(tiny.make_unusual(kind), sequences, layout="padded", tokens_per_batch=1))
    found = np.concatenate(score(model, sequences, layout="packed", tokens_per_batch=TOKENS_PER_BATCH))
    assert np.abs(found - expected).mean() < 4 * NOISE[dtype]


def cost_of_a_layer(norms, checkpointing: bool) -> tuple[float, float]:
    """Of a training forward and backward at OLMo 3's proportions: what is kept per token in units of its hidden state, and launches."""
    seen = []
    atexit.register(gc.unfreeze)  # libraries count what is left at the end
    gc.freeze()  # what was imported: collecting below then takes no time
    (batch,) = pack([Sequence(np.arange(2, 202, dtype=np.int32), 2)], 100_000)
    for num_layers in (1, 2):
        sizes = tiny.SMALL | {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
        }
        config = Olmo3Config(
            **sizes | {"num_key_value_heads": 2, "sliding_window": 64}, layer_types=["sliding_attention"] * num_layers
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with packed_attention(model), norms(model):
            before = torch.cuda.memory_allocated(DEVICE)
            made_up.clear_counts()
            hidden = packed_hidden(model, batch)
            kept = (torch.cuda.memory_allocated(DEVICE) - before) / (len(batch.input_ids) * 256 * 2)
            hidden.sum().backward()
        seen.append(np.array([kept, made_up.counts()["launches"]]))
        del hidden, model
        gc.collect()
    return tuple(seen[1] - seen[0])


@counted
@pytest.mark.parametrize("checkpointing", [False, True])
def test_norms_of_one_operator_keep_and_launch_less_in_training(checkpointing):
    """Counted: 34.0 units and 191 launches of a layer become 22.0 and 91; with checkpointing 246 launches become 116, and 2 units stay 2."""
    kept, launches = cost_of_a_layer(fused_norms, checkpointing)
    own_kept, own_launches = cost_of_a_layer(lambda model: nullcontext(), checkpointing)
    print(kept, launches, own_kept, own_launches)
    assert kept == pytest.approx(1.0 if checkpointing else 20.8, abs=0.1)
    assert own_kept == pytest.approx(1.0 if checkpointing else 32.8, abs=0.1)
    assert launches < 0.55 * own_launches


@counted
def test_auto_takes_what_fits_and_less_where_more_was_predicted(monkeypatch):
    """A model that takes 12 kB per token, on a device with room for some thousand."""
    sizes = {"hidden_size": 16, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 384}
    config = LlamaConfig(**sizes, max_position_embeddings=1 << 14)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False).to(DEVICE)
    taken = torch.empty(torch.cuda.mem_get_info(DEVICE)[0] - 64 * MIB, dtype=torch.uint8, device=DEVICE)
    largest = budget.largest_budget(model, layout="packed", max_length=512, num_workers=1)
    assert 2048 <= largest <= 8192
    assert 0.4 < budget._peak(model, "packed", largest) / (64 * MIB) <= 0.9

    measured, fits, tried = budget._peak, budget._fits, []
    monkeypatch.setattr(budget, "_peak", lambda *args: measured(*args) // 2)  # as if half the memory were needed
    monkeypatch.setattr(budget, "_fits", lambda *args: (tried.append(args[-1]), fits(*args))[1])
    again = budget.largest_budget(model, layout="packed", max_length=512, num_workers=1)
    assert len(tried) > 1 and tried[-1] == again < tried[0]  # CUDA out of memory, and less

    more = torch.empty(torch.cuda.mem_get_info(DEVICE)[0] - 16 * MIB, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(InputError, match="the measured batch itself does not fit"):
        budget.largest_budget(model, layout="packed", max_length=512, num_workers=1)
    del taken, more


@counted
@pytest.mark.parametrize(("vocabulary", "dtype"), [(32768, "bfloat16"), (384, "float32")])
def test_what_is_measured_is_enough_for_one_sequence_that_is_all_completion(monkeypatch, vocabulary, dtype):
    """Where a head's logits take most, 64 kB for a token that is scored, and where scores do: 256 queries at a time, for each key of a sequence."""
    # Triton's kernel takes no memory beside the logits.
    monkeypatch.setattr("trl.kernels.chunked_logprob._forward_tile", lambda *args, **flags: None)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, max_position_embeddings=1 << 14)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().requires_grad_(False).to(DEVICE)
    measured = budget._peak(model, "packed", 1088)[0]
    sequence = Sequence(np.random.default_rng(0).integers(0, 384, 1088).astype(np.int32), 1)
    watch = budget.MemoryWatch(DEVICE)
    needed = watch.most(lambda: score(model, [sequence], layout="packed", tokens_per_batch=1088))
    assert measured < 200 * MIB and budget.SHARE["cuda"] * needed < measured


def named(monkeypatch) -> None:
    """As if --attention-kernel FA4 were activated, which needs its package."""
    for module in (attention, precompute.scorer.self_test, train.self_test):
        monkeypatch.setattr(module, "active_kernel", lambda: "FA4")


def test_a_kernel_that_would_not_be_used(monkeypatch):
    """Capped scores are computed block by block, whatever was asked for."""
    model = tiny.make_unusual("gemma2").to(torch.bfloat16).to(DEVICE)
    named(monkeypatch)
    with (
        pytest.raises(
            InputError, match="--attention-kernel FA4: the kernel would not be used; .*found a Gemma2Attention with a cap"
        ),
        attention.named_kernel("FA4"),
    ):
        self_test(model, "bfloat16")


@counted
def test_a_kernel_whose_gradients_are_absent_or_wrong(monkeypatch):
    """In the dtype that it computes in: the twin's gradients in float32 are not its own."""
    model = on_gpu("olmo3", "bfloat16")
    named(monkeypatch)
    self_test_policy(model, "bfloat16", "packed")

    flash, before = made_up.flash, made_up.flash.calls["backward"]

    def refuse(*args):
        if flash.calls["backward"] > before:
            raise RuntimeError("FA4 flash_attention backward unsupported: heads")

    with monkeypatch.context() as patched:
        patched.setattr(flash, "check_arguments", refuse)
        with (
            pytest.raises(
                InputError, match="FA4: the kernel does not run this model: FA4 flash_attention backward unsupported: heads"
            ),
            attention.named_kernel("FA4"),
        ):
            self_test_policy(model, "bfloat16", "packed")
    varlen = attention._varlen
    monkeypatch.setattr(
        attention, "_varlen", lambda *args, **options: 3 * varlen(*args, **options).detach() - 2 * varlen(*args, **options)
    )
    with pytest.raises(InputError, match="--attention-kernel FA4: the kernel's gradients differ .*in torch.bfloat16"):
        self_test_policy(model, "bfloat16", "packed")


@counted
def test_a_compiler_without_triton_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--torch-compile: .*Triton, which is not installed.*uv pip install triton"):
        use_compiler(True, layout="packed")
    assert not compiler_wanted()


@counted
def test_the_made_up_gpu_refuses_what_a_gpu_refuses():
    here, there = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
    for other in (there, there.to("cuda:0")):
        for operator in (
            torch.add,
            lambda a, b: a @ b.T,
            lambda a, b: torch.cat([a, b]),
            lambda a, b: a.index_select(0, b[:, 0].long()),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                operator(here, other)
    assert (here + there.sum()).device == DEVICE  # a single number is taken along
    assert torch.empty(4, device=DEVICE).isnan().all()
    large = torch.empty(100 * MIB, dtype=torch.float32, device=DEVICE)
    assert large[: 2 * MIB].isnan().all() and large[-2 * MIB :].isnan().all()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device=f"cuda:{torch.cuda.device_count()}")
