"""--tokens-per-batch auto: what it measures, what it chooses, and that the choice changes no score."""

import gc
import mmap

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from precompute.scorer import budget
from precompute.scorer.packing import KEYS_PER_TOKEN, Sequence, pack
from precompute.scorer.scoring import score
from store.errors import InputError

MIB = 2**20


@pytest.fixture(scope="module")
def wide():
    """A model whose forward takes enough memory to be seen: 16 KiB per token in an MLP alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 384}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=1 << 16)).eval().requires_grad_(False)


def test_the_measured_peak_predicts_a_larger_batch(wide, monkeypatch):
    monkeypatch.setattr("precompute.scorer.cpu.MLP_TILE", 1 << 20)  # else the MLP, the largest part, is bounded already
    block = [bytearray(b"x" * 100_000) for _ in range(5000)]  # 500 MB that the allocator keeps when they are freed
    held = [bytearray(b"x" * 100_000)]  # at the heap's end, so that it cannot shrink by itself
    del block
    small, large, larger = (budget._peak(wide, "packed", tokens) for tokens in (1024, 4096, 12288))
    assert 16 * MIB < large < 400 * MIB
    assert held
    predicted = large + (large - small) / 3072 * 8192
    assert 0.6 * predicted < larger < 1.4 * predicted


@pytest.mark.parametrize("what", ["garbage", "pages of a mapped file"])
def test_memory_that_goes_meanwhile_hides_nothing(what, wide, monkeypatch, tmp_path):
    """200 MiB that are resident when measuring begins, and that the collector or the kernel takes just before the peak."""
    monkeypatch.setattr("precompute.scorer.cpu.MLP_TILE", 1 << 20)
    clean = budget._peak(wide, "packed", 4096)
    (tmp_path / "file").write_bytes(b"x" * 200 * MIB)
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE])  # now they are resident
        ring = {"block": bytearray(b"x" * 200 * MIB)} if what == "garbage" else {}
        ring["itself"] = ring
        del ring
        probe = budget._probe

        def taken_then_probed(model, layout, tokens):
            if tokens > 128:
                gc.collect() if what == "garbage" else mapped.madvise(mmap.MADV_DONTNEED)
            probe(model, layout, tokens)

        monkeypatch.setattr(budget, "_probe", taken_then_probed)
        gc.disable()
        try:
            littered = budget._peak(wide, "packed", 4096)
        finally:
            gc.enable()
    assert 0.7 * clean < littered < 1.3 * clean


def test_what_is_free_decides(wide, monkeypatch):
    monkeypatch.setattr(budget, "_peak", lambda model, layout, tokens: 10 * MIB + 1024 * 100 * tokens)

    def chosen(free: int, max_length: int = 2000, num_workers: int = 1):
        monkeypatch.setattr(budget, "free_memory", lambda device: int(free / budget.SHARE["cpu"]))
        return budget.largest_budget(wide, layout="packed", max_length=max_length, num_workers=num_workers)

    assert chosen(10 * MIB + 1024 * 100 * 8200) == 8192
    assert chosen(10 * MIB + 1024 * 100 * 8191) == 7168
    assert chosen(10 * MIB + 1024 * 100 * 2010) == 2000  # not a multiple of 1,024, but one sequence fits
    assert chosen(2 * (10 * MIB + 1024 * 100 * 8200), num_workers=2) == 8192
    assert chosen(1 << 50) == budget.MOST
    with pytest.raises(InputError, match="--tokens-per-batch auto: .*does not fit.*expected 0.2 GiB for 2,000 tokens"):
        chosen(10 * MIB + 1024 * 100 * 1990)


def test_any_budget_gives_the_same_scores():
    model = tiny.make_model("olmo3")
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 384, 60)
    sequences = [Sequence(np.concatenate([prompt, rng.integers(2, 384, 40)]).astype(np.int32), 60) for _ in range(6)]
    one_row, rows = (score(model, sequences, layout="packed", tokens_per_batch=tokens) for tokens in (budget.MOST, 128))
    for a, b in zip(one_row, rows, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)


def test_keys_are_bounded_too():
    """A long prompt under many short replies: few tokens, many keys."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 384, 500)
    sequences = [Sequence(np.concatenate([prompt, rng.integers(2, 384, 10)]).astype(np.int32), 500) for _ in range(40)]
    batches = list(pack(sequences, 1000))
    keys = [sum(branch.num_context + branch.stop - branch.start for branch in batch.branches) for batch in batches]
    assert max(keys) <= KEYS_PER_TOKEN * 1000 < sum(keys)
    assert sorted(np.concatenate([batch.members for batch in batches])) == list(range(40))


@pytest.mark.parametrize("num_tokens", [128, 1024, 4096, 65536])
def test_no_batch_needs_more_than_the_measured_one(monkeypatch, num_tokens):
    """It is one batch, and at each limit: tokens, keys, tokens that are scored, and the length of a sequence."""
    given = []
    monkeypatch.setattr(budget, "score_batches", lambda model, sequences, **_: given.extend(sequences) or [])
    budget._probe(tiny.make_model("llama"), "packed", num_tokens)
    (batch,) = pack(given, num_tokens)
    keys = sum(branch.num_context + branch.stop - branch.start for branch in batch.branches)
    assert num_tokens - 5 <= len(batch.input_ids) == len(batch.predictors) - 3 <= num_tokens
    assert 0.93 * KEYS_PER_TOKEN * num_tokens < keys <= KEYS_PER_TOKEN * num_tokens
    assert max(branch.num_context + branch.stop - branch.start for branch in batch.branches) > 0.94 * num_tokens
