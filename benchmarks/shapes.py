"""Random models of OLMo 3's shape, for GPUs without a checkpoint: their numbers mean nothing, their FLOPs do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who wants SHAPES alone imports no torch
    import torch
    from transformers import Olmo3ForCausalLM, PreTrainedTokenizerBase

    from precompute.scorer.packing import PackedBatch

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "sliding_window": 64},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "sliding_window": 4096,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "sliding_window": 4096,
    },
}
SHAPES["7B/4"] = SHAPES["7B"] | {"num_hidden_layers": 8}
SHAPES["1B/4"] = SHAPES["1B"] | {"num_hidden_layers": 4}
"""Olmo3Config; 7B is allenai/Olmo-3-7B's, of which 7B/4 has a quarter of the layers: one GPU can train it. Every fourth layer sees all tokens."""

VOCABULARY = 100_352
"""Of OLMo's tokenizer, in full rows of 128."""


def num_parameters(shape: str) -> int:
    """Linear layers, embeddings and head; the norms are next to nothing."""
    width, inner, layers = (SHAPES[shape][name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return layers * (4 * width**2 + 3 * width * inner) + 2 * VOCABULARY * width


def random_model(shape: str, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Olmo3ForCausalLM:
    """A model of SHAPES[shape] with the tokenizer's vocabulary, on the first GPU or the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, Olmo3Config

    config = Olmo3Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def make_model(shape: str, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path) -> None:
    """Write such a model and the tokenizer to `folder`."""
    random_model(shape, tokenizer, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forward_flops(config, layers: list[torch.nn.Linear], head: torch.Tensor, batch: PackedBatch) -> float:
    """2 per multiply-add: linear layers on every computed token, head on scored ones, attention's two products on visible keys."""
    import numpy as np

    flops = 2.0 * len(batch.input_ids) * sum(layer.weight.numel() for layer in layers) + 2.0 * len(batch.targets) * head.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else float("inf")
        for branch in batch.branches:
            seen = np.minimum(np.arange(branch.num_context + 1, branch.num_context + branch.stop - branch.start + 1), window)
            flops += 4.0 * float(seen.sum()) * config.num_attention_heads * width
    return flops
