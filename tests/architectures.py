"""A tiny random model of every causal language model of the installed transformers, and of the variants that people train.

Sizes are given by the name of the config's field, so that an architecture that transformers adds is made without a word here. Every length at
which an architecture changes what it does (window, chunk, top-k, original context) is shorter than some of the sequences and longer than others.
"""

import dataclasses
from itertools import cycle, islice

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW, ORIGINAL_CONTEXT = 24, 48
"""Tokens: of every sliding window, and of the context before RoPE was stretched."""

NOISE = 0.1
"""Share of what is dropped, and of every other disturbance in training mode, which the policy must not feel."""

LARGEST = 4_000_000
"""Parameters of a tiny model: what makes a test slow has a size of a name that SIZES does not know."""

SIZES = {
    384: "vocab_size n_vocab decoder_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner ffn_hidden_size feed_forward_size dim_ff intermediate_size_mlp",
    64: "hidden_size n_embd d_model dim emb_dim embedding_size input_embedding_size output_embedding_size attention_hidden_size",
    # Many heads that choose keys: where all of them are negative the scores tie at zero, and which of these keys is chosen is chance.
    32: "index_n_heads moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank",
    16: "chunk_size mamba_chunk_size ssm_state_size mamba_d_state state_size linear_key_head_dim linear_value_head_dim index_head_dim "
    "swa_head_dim head_dim v_head_dim qk_nope_head_dim d_kv dim_head attention_head_size attention_head_dim",
    8: "mamba_n_heads qk_rope_head_dim rotary_dim",
    4: "linear_num_value_heads num_attention_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    28: "image_size",
    14: "patch_size",
    1: "topk_group",
    2: "n_group depth linear_num_key_heads num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok moe_topk top_k_experts",
}
"""Value: the fields that get it, in every config that has them."""

THRESHOLDS = {
    WINDOW: "sliding_window sliding_window_size attention_window_size window_size keep_window_size",
    2 * WINDOW: "local_attention",
    32: "attention_chunk_size floor_scale",
    16: "index_topk",
    ORIGINAL_CONTEXT: "original_max_position_embeddings",
}

SWITCHES = {
    "use_sliding_window": True,
    "max_window_layers": 1,
    "use_cache": False,
    "is_decoder": True,
    "add_cross_attention": False,
}

OVERRIDES: dict[str, dict] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere": {"logit_scale": 2.0},
    "cohere2": {"logit_scale": 2.0},
    "cohere2_moe": {"logit_scale": 2.0},
    "cohere_compass_text": {
        "logit_scale": 2.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "ctrl": {"dff": 96},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_window_layers": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "shared_experts_intermediate_size": 32,
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_out_dim": 64, "adapter_in_dim": 64},
    # With another dropout the self-test before training refuses it: some of it is not turned off.
    **{name: {"dropout": 0.0} for name in ("blt_patcher", "blt_local_encoder", "blt_local_decoder", "blt_global_transformer")},
    "diffllama": {"attention_dropout": 0.0},  # it refuses another
    "doge": {"sliding_window": None},
    "falcon_h1": {"lm_head_multiplier": 2.0},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 8, "output_proj_dims": 64, "patch_size": 4},
    "gemma4_vision": {"position_embedding_size": 64},
    "phi4_multimodal_audio": {"nemo_conv_channels": 16, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 0.5, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "granitemoe": {"logits_scaling": 0.5},
    "granitemoeshared": {"logits_scaling": 0.5},
    "granitemoehybrid": {"logits_scaling": 0.5},
    "granite_swa": {"logits_scaling": 0.5},
    "granitemoe_swa": {"logits_scaling": 0.5},
    "hyperclovax": {"logits_scaling": 2.0},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "ngram_vocab_size_base": 1000,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "attn_layers": ("local", "lsh")},
    "roc_bert": {"pronunciation_vocab_size": 100, "shape_vocab_size": 100, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": None,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}
"""What a config needs besides, because its fields must fit each other or because their defaults would switch off what is to be tried."""


def _rope(kind: str, **values) -> dict:
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL_CONTEXT} | values
    }


LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + index for index in range(8)], "factor": 16.0}

VARIANTS: dict[str, tuple[str, dict]] = {
    "llama, RoPE dynamic": ("llama", _rope("dynamic", factor=4.0) | {"max_position_embeddings": ORIGINAL_CONTEXT}),
    "llama, RoPE linear": ("llama", _rope("linear", factor=4.0)),
    "llama, RoPE llama3": ("llama", _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama, RoPE longrope": ("llama", _rope("longrope", **LONG)),
    "llama, RoPE yarn": ("llama", _rope("yarn", factor=4.0)),
    "deepseek_v3, RoPE yarn": ("deepseek_v3", _rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0)),
    "gpt_oss, RoPE yarn": ("gpt_oss", _rope("yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False)),
    "phi3, RoPE longrope": ("phi3", _rope("longrope", **LONG) | {"sliding_window": None}),
    "phimoe, RoPE longrope": (
        "phimoe",
        _rope("longrope", **LONG, short_mscale=1.2, long_mscale=1.3) | {"sliding_window": None},
    ),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, alibi in sequence": (
        "falcon",
        {"alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True},
    ),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gemma4_text, MoE": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_text, keys as values": ("gemma4_text", {"attention_k_eq_v": True}),
    "gpt_bigcode, many keys": ("gpt_bigcode", {"multi_query": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "olmoe, window in config.json": ("olmoe", {"sliding_window": WINDOW}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 32}),
    "phimoe, no window": ("phimoe", {"sliding_window": None}),
    "qwen2, no window": ("qwen2", {"layer_types": ["full_attention"] * 2}),
    "qwen2_moe, no window": ("qwen2_moe", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    "qwen3, no window": ("qwen3", {"layer_types": ["full_attention"] * 2}),
    "qwen3_moe, no window": ("qwen3_moe", {"use_sliding_window": False}),
    "smollm3, no window": ("smollm3", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}
"""Settings of config.json that change the forward: name -> (model type, fields)."""

KNOWN_AS = {
    "bloom": "BLOOM",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1",
    "deepseek_v32": "DeepSeek-V3.2",
    "ernie4_5": "ERNIE 4.5",
    "exaone4": "EXAONE 4.0",
    "falcon": "Falcon",
    "falcon, alibi in sequence": "Falcon-RW",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B and larger",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n_text": "Gemma 3n",
    "gemma4": "Gemma 4",
    "glm4": "GLM-4",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neox": "Pythia",
    "gpt_oss": "gpt-oss",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 4",
    "hyperclovax": "HyperCLOVA X",
    "jamba": "Jamba",
    "lfm2": "LFM2",
    "llama": "Llama, SmolLM2, Tulu 3",
    "llama, RoPE llama3": "Llama 3.1, 3.2, 3.3",
    "llama4": "Llama 4",
    "mamba": "Mamba",
    "mistral": "Mistral 7B v0.1",
    "mistral, no window": "Mistral 7B v0.2, v0.3",
    "mixtral": "Mixtral with a window",
    "mixtral, no window": "Mixtral",
    "mpt": "MPT",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron 3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "phi": "Phi-1, Phi-2",
    "phi3": "Phi-3-mini-4k, Phi-4",
    "phi3, RoPE longrope": "Phi-3-128k, Phi-3.5, Phi-4-mini",
    "phimoe, RoPE longrope": "Phi-3.5-MoE",
    "qwen2": "Qwen2.5 with a window",
    "qwen2, no window": "Qwen2, Qwen2.5",
    "qwen2_moe, no window": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3, no window": "Qwen3",
    "qwen3_5": "Qwen3.5",
    "qwen3_moe, no window": "Qwen3-30B-A3B",
    "qwen3_next": "Qwen3-Next",
    "recurrent_gemma": "RecurrentGemma",
    "smollm3, no window": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
    "zamba2": "Zamba2",
}
"""What people call some of them."""

UNFELT = {
    ("moshi", "sliding_window"): "its code does not read it",
    ("nemotron_h", "sliding_window"): "its code does not read it",
    ("olmoe, window in config.json", "sliding_window"): "its plain forward does not use it",
    ("phi3", "original_max_position_embeddings"): "for RoPE longrope",
    ("phi4_multimodal", "original_max_position_embeddings"): "for RoPE longrope",
    ("qwen2, no window", "sliding_window"): "no layer has one",
    ("qwen3, no window", "sliding_window"): "no layer has one",
    ("smollm3, no window", "sliding_window"): "no layer has one",
}
"""(name, threshold) that changes nothing, and why."""

NOT_MADE = {
    "emu3": "its language model has no folder of its own; the whole model generates pictures",
    "mllama": "its language model has no folder of its own; the whole model is no causal language model",
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "a draft model: reads another model's hidden states",
    "gemma4_unified_assistant": "a draft model: reads another model's hidden states",
    "musicgen": "a decoder of audio codebooks that its config cannot make",
    "musicgen_melody": "a decoder of audio codebooks that its config cannot make",
}
"""Architectures without a tiny model here, and why."""


def field_names(config_class: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def names() -> list[str]:
    """Every causal language model of the installed transformers, then the variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def model_type(name: str) -> str:
    """Of a model type or variant."""
    return VARIANTS.get(name, (name, {}))[0]


def config_of(name: str) -> PreTrainedConfig:
    """The tiny config of a model type or variant."""
    model_type, given = VARIANTS.get(name, (name, {}))
    return tiny_config(model_type, **given)


def thresholds(config: PreTrainedConfig) -> list[str]:
    """The fields of THRESHOLDS that the config of the text has."""
    text = vars(config.get_text_config())
    return [name for fields in THRESHOLDS.values() for name in fields.split() if type(text.get(name)) is int and text[name]]


def tiny_config(model_type: str, **given) -> PreTrainedConfig:
    """The config of `model_type` in small, with the values of OVERRIDES and then `given` on top."""
    return _small(CONFIG_MAPPING[model_type], given)


def _small(config_class: type[PreTrainedConfig], given: dict) -> PreTrainedConfig:
    names = field_names(config_class)
    given = OVERRIDES.get(config_class.model_type, {}) | given
    values = {name: size for size, text in (*SIZES.items(), *THRESHOLDS.items()) for name in text.split() if name in names}
    values |= {name: value for name, value in SWITCHES.items() if name in names}
    values |= {name: NOISE for name in names if _is_noise(name, getattr(config_class, name, None))}
    values |= _kinds_of_layers(config_class, names)
    if {"kv_lora_rank", "num_key_value_heads"} <= names:  # latent attention has a key and a value for every query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= {name: token for token, name in enumerate(("bos_token_id", "pad_token_id", "eos_token_id")) if name in names}
    for name, sub_class in config_class.sub_configs.items():
        if not dataclasses.is_dataclass(sub_class):  # any: as released
            sub_class = type(getattr(config_class(), name))
        if sub_class is not type(None):
            values[name] = _small(sub_class, given.get(name, {}))
    values |= {name: value for name, value in given.items() if name not in config_class.sub_configs}
    return config_class(**values)


def _is_noise(name: str, value) -> bool:
    return isinstance(value, float) and any(word in name for word in ("drop", "jitter", "noise"))


def _kinds_of_layers(config_class: type[PreTrainedConfig], names: set[str]) -> dict:
    """One layer of each kind that the architecture has as released, and a sliding one where it may have those."""
    lists = [name for name in ("layer_types", "layers_block_type", "mlp_layer_types") if name in names]
    if not lists:
        return {}
    released = config_class(**{name: value for name, value in SWITCHES.items() if name == "use_sliding_window" and name in names})
    kinds = {name: list(dict.fromkeys(getattr(released, name, None) or ())) for name in lists}
    if kinds.get("layer_types") == ["full_attention"] and "sliding_window" in names:
        kinds["layer_types"].insert(0, "sliding_attention")
    num_layers = max(2, *map(len, kinds.values()))
    layers = next((name for name in ("num_hidden_layers", "num_layers", "n_layer") if name in names), None)
    filled = {name: list(islice(cycle(found), num_layers)) for name, found in kinds.items() if found}
    return filled | ({layers: num_layers} if layers else {})


def make_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Float32, on the CPU, with weights so large that log-probs differ by whole nats. ValueError for a config that is not small."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{config.model_type} has {size:,} parameters, more than {LARGEST:,}: give its sizes in OVERRIDES")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
        else:  # norms, biases, sinks, decays: around what they are initialized to
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
