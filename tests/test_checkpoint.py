"""What a checkpoint says of itself and transformers passes over: an error where it changes the numbers, a line where it does not."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from precompute.scorer.model import load_model, load_tokenizer
from precompute.scorer.self_test import self_test
from store.errors import InputError

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    """A copy to change: four layers, head and embeddings tied."""
    return shutil.copytree(tiny_llama, tmp_path / "llama")


def say_in(folder: Path, name: str = "config.json", **entries) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def weights_in(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    weights = change(weights) or weights
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def load(folder: Path, dtype: str = "float32"):
    """The model, and what was said of it."""
    lines: list[str] = []
    return load_model(str(folder), revision=None, dtype=dtype, device=CPU, say=lines.append), "\n".join(lines)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(folder)


def test_nothing_is_said_of_a_plain_one(folder):
    assert load(folder)[1] == ""


# Code of its own.


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        (
            {"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"},
            "modeling_mine.MyForCausalLM.*never run.*LlamaForCausalLM, for model_type llama",
        ),
        ({"AutoModel": "acme/mine--modeling_mine.MyModel"}, "found MyModel; transformers' LlamaModel"),
        ({"AutoConfig": "configuration_mine.MyConfig"}, "found MyConfig; transformers' LlamaConfig"),
    ],
)
def test_code_of_its_own_under_a_known_model_type(folder, auto_map, message):
    """transformers runs its own class and says nothing."""
    say_in(folder, auto_map=auto_map)
    refused(folder, message)


def test_code_of_its_own_under_an_unknown_model_type(folder):
    say_in(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"})
    refused(folder, "transformers has no class for model_type mine")


def test_the_repositorys_copy_of_a_class_of_transformers_is_said(folder):
    say_in(
        folder,
        auto_map={"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.LLaMAForCausalLM"},
    )
    assert "own code (modeling_llama.LLaMAForCausalLM) is not run: transformers' LlamaForCausalLM is" in load(folder)[1]


def test_another_class_in_config_json_is_said(folder):
    say_in(folder, architectures=["LlamaForSequenceClassification"])
    assert "names the class LlamaForSequenceClassification; transformers' LlamaForCausalLM is loaded" in load(folder)[1]


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}, ["tokenization_mine.MyTokenizer", "t.MyTokenizerFast"]]
)
def test_a_tokenizer_with_code_of_its_own(folder, auto_map):
    say_in(folder, "tokenizer_config.json", auto_map=auto_map)
    with pytest.raises(InputError, match="MyTokenizer.*never run here.*other ids"):
        load_tokenizer(str(folder))
    say_in(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.TokenizersBackend", None]})
    assert load_tokenizer(str(folder)).encode("fox")


# Weights too many, too few, or of other kinds.


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.embed_positions.weight",
        "lm_head.bias",
        "model.layers.0.self_attn.bias",
        "logit_scale",
    ],
)
def test_a_weight_that_the_class_does_not_use(folder, extra):
    """transformers leaves it out, with a warning."""
    weights_in(folder, lambda weights: weights.update({extra: torch.randn(64)}))
    refused(folder, f"1 weights that LlamaForCausalLM does not use.*found {extra}.*save_pretrained")


def test_fewer_layers_in_config_json_than_in_the_weights(folder):
    say_in(folder, num_hidden_layers=3)
    refused(folder, "9 weights that LlamaForCausalLM does not use")


@pytest.mark.parametrize("extra", ["v_head.summary.weight", "score.weight", "value_head.0.bias"])
def test_a_head_beside_the_language_model_is_said(folder, extra):
    weights_in(folder, lambda weights: weights.update({extra: torch.randn(1, 64)}))
    assert load(folder)[1].endswith(
        f"1 weights of the checkpoint are not used, for they belong to parts beside the language model: {extra.split('.')[0]}"
    )


def test_towers_for_pictures_of_a_larger_model_are_said(tmp_path):
    from architectures import config_of
    from transformers import Llama4ForConditionalGeneration

    Llama4ForConditionalGeneration(config_of("llama4")).save_pretrained(tmp_path)
    model, lines = load(tmp_path)
    assert type(model).__name__ == "Llama4ForCausalLM" and lines.count("\n") <= 1
    assert "parts beside the language model: multi_modal_projector, vision_model" in lines


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "gptj", "gpt_neox"])
def test_buffers_that_older_versions_saved_are_no_weights(kind, tmp_path):
    from architectures import config_of

    AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(tmp_path)
    place = {
        "gpt2": "transformer.h.0.attn",
        "gpt_neo": "transformer.h.0.attn.attention",
        "gptj": "transformer.h.0.attn",
        "gpt_neox": "gpt_neox.layers.0.attention",
    }
    old = {f"{place[kind]}.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), f"{place[kind]}.masked_bias": torch.tensor(-1e9)}
    weights_in(tmp_path, lambda weights: weights.update(old))
    assert "not used" not in load(tmp_path)[1]


def test_every_weight_under_two_names(folder):
    """transformers takes those without the prefix."""
    weights_in(
        folder, lambda weights: weights.update({name.removeprefix("model."): weight + 1 for name, weight in weights.items()})
    )
    refused(folder, "38 weights twice, with model. before their names and without")


def test_a_head_of_its_own_where_config_json_ties_it(folder):
    weights_in(folder, lambda weights: weights.update({"lm_head.weight": torch.randn(384, 64)}))
    refused(folder, "ties weights together that the checkpoint has with other values; found lm_head.weight")
    weights_in(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert load(folder)[1] == ""


def test_a_weight_of_another_shape(folder):
    weights_in(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight": torch.randn(120, 64)}))
    refused(
        folder,
        r"1 of the checkpoint's weights have another shape.*expected \(128, 64\) for model.layers.0.mlp.up_proj.weight; found \(120, 64\)",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_without_their_scale(folder, dtype):
    """transformers casts them."""
    weights_in(folder, lambda weights: {name: weight.to(dtype) if "q_proj" in name else weight for name, weight in weights.items()})
    refused(folder, "4 of its weights are stored in (I8|F8_E4M3)")


def shards(folder: Path) -> list[Path]:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


def test_other_files_of_weights_beside_those_that_are_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    assert "the weights are read from model.safetensors; pytorch_model.bin beside it is not" in load(folder)[1]
    shutil.copy(folder / WEIGHTS, folder / "whole")
    names = [path.name for path in shards(folder)]
    (folder / "whole").rename(folder / WEIGHTS)
    assert f"read from model.safetensors; {', '.join(names)}, pytorch_model.bin beside it are not" in load(folder)[1]


def test_shards_that_are_not_there_or_not_whole(folder):
    *_, last = shards(folder)
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    refused(folder, "no causal language model can be loaded.*Safetensor")
    last.unlink()
    refused(folder, f"no causal language model can be loaded.*{last.name}")


# Few bits.


@pytest.mark.parametrize("entry", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "modelopt", "a new one"])
def test_quantized_weights_that_cannot_be_turned_back(folder, method, entry):
    """transformers computes with them, or passes over a method that it does not know."""
    say_in(folder, **{entry: {"quant_method": method, "load_in_8bit": method == "bitsandbytes", "bits": 4}})
    refused(folder, f"its weights are quantized.*found quant_method {method}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_are_turned_back_and_said(folder, dtype):
    """Against their definition: a block's scale times its values."""
    expected = {}

    def to_fp8(weights):
        for name in [name for name in weights if "proj" in name]:
            rows, columns = weights[name].shape
            scale = weights[name].reshape(rows // 32, 32, columns // 32, 32).abs().amax((1, 3)) / 448
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            weights[name], weights[f"{name}_scale_inv"] = (weights[name] / spread).to(torch.float8_e4m3fn), scale
            expected[name] = weights[name].float() * spread

    weights_in(folder, to_fp8)
    say_in(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"})
    model, lines = load(folder, dtype)
    assert "stored in fp8" in lines and {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight.to(model.dtype)), name
    assert not hasattr(model.config, "quantization_config")  # so that what is trained from it is not saved as fp8
    assert self_test(model, dtype).of_twin < 1e-4


def test_mxfp4_weights_are_turned_back_and_said(tmp_path):
    """gpt-oss as it is released. Against the definition of the format (OCP Microscaling, version 1.0): 32 values of a sign, two bits of exponent and
    one of mantissa share a power of two."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = {}

    def to_mxfp4(weights):
        for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            rows = weights.pop(name).transpose(1, 2).contiguous()
            blocks = rows.view(*rows.shape[:2], -1, 32)
            exponent = blocks.abs().amax(-1).log2().floor() - 2
            nearest = (blocks[..., None] / 2 ** exponent[..., None, None] - values).abs().argmin(-1)
            weights[f"{name}_blocks"] = (nearest[..., 0::2] | nearest[..., 1::2] << 4).to(torch.uint8)
            weights[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
            expected[name] = (values[nearest] * 2 ** exponent[..., None]).view(rows.shape).transpose(1, 2)

    tiny.make_unusual("gpt_oss").save_pretrained(tmp_path)
    weights_in(tmp_path, to_mxfp4)
    say_in(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    model, lines = load(tmp_path, "bfloat16")
    assert "stored in mxfp4" in lines and len(expected) == 8
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16()), name
