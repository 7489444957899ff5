"""Random models of OLMo 3's shape, for GPUs without a checkpoint: their numbers mean nothing, their FLOPs do."""

from pathlib import Path

import torch
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerBase

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
"""Olmo3Config; 7B is allenai/Olmo-3-7B's. Every fourth layer sees all tokens."""


def make_model(shape: str, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path) -> None:
    """Write a model of SHAPES[shape] with the tokenizer's vocabulary, and the tokenizer, to `folder`."""
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
        Olmo3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
