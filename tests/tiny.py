"""Tiny random models and a byte-level tokenizer for tests; nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
"""As OLMo's thinking template: its generation prompt is no prefix of a conversation whose answer does not begin with <think>."""
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if style is defined %}{{ '<|im_start|>system\nStyle: ' + style + '<|im_end|>\n' }}{% endif %}"
) + CHATML
DROPS_TOOL_TURNS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Why does it jump? Because it can!\n\nHere is a list:\n1. one\n2. two\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. Warum? Weil er es kann.\n",
    "user assistant system think <think>\nOkay, the user asks\n</think> answer = 42; print(answer)\n",
]

SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    # three of four layers slide, as in OLMo 3, over less than the sequences of the tests
    "olmo3": lambda: Olmo3Config(**SMALL, sliding_window=24, tie_word_embeddings=False),
}


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + index for index in range(8)],
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

UNUSUAL = {
    "gemma2": {"head_dim": 16, "sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt_oss": {"head_dim": 16, "sliding_window": 24, **EXPERTS},
    "deepseek_v3": MLA,
    "phi3": {"sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 2,
        "shared_expert_intermediate_size": 32,
        **EXPERTS,
    },
    "granite": {"logits_scaling": 3.0},
    "nemotron": {"head_dim": 16},
}
"""What Llama does not do, on top of SMALL: soft-capped scores and logits; sinks; values narrower than keys; RoPE that follows the row; a sliding
window that stands in the mask alone; scaled logits; layers that pass on no arguments."""


def make_unusual(kind: str, seed: int = 0, **changes) -> PreTrainedModel:
    """As make_model, of one of UNUSUAL, with its own plain attention. `changes` of its configuration."""
    config = AutoConfig.for_model(kind, **(SMALL | UNUSUAL[kind] | changes))
    torch.manual_seed(seed)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **plain).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(
            torch.randn_like(parameter) * 0.15 if parameter.dim() > 1 else parameter + 0.3 * torch.randn_like(parameter)
        )
    return model


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of one of CONFIGS with weights large enough that log-probs differ by whole nats, float32, on the CPU."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="sdpa").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return model


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most 384 entries: <|endoftext|> 0, <|pad|> 1, ChatML marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = chat_template
    return fast


def save(folder: Path, kind: str = "llama", seed: int = 0, chat_template: str | None = CHATML) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    make_model(kind, seed).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


def gradients(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Of a loss over all logits, in every parameter; and how many bytes autograd was given to keep outside checkpointed layers."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=input_ids, use_cache=False).logits
    logits.log_softmax(-1)[..., ::7].sum().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}, sum(kept.values())
