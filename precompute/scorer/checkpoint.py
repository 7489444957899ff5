"""What a checkpoint says of itself against what is loaded from it: code of its own, quantized weights, weights too many, files left over.

transformers goes on in each of these cases, with a warning at most: it runs its own class, computes in another precision, or leaves weights out.
Here what changes the numbers is an error, before the weights are read where that is possible, and what does not is said in one line.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.hub import cached_file

from store.errors import InputError

CLASSES: dict[str, Any] = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModel": MODEL_MAPPING_NAMES,
    "AutoConfig": CONFIG_MAPPING_NAMES,
}
"""Entries of `auto_map` that decide what a causal language model computes, the most telling first: transformers' classes by model type."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""

OLD_BUFFERS = re.compile(r"(^|\.)(attn\.bias|attention\.bias|masked_bias|rotary_emb\.inv_freq|position_ids|causal_mask)$")
"""What earlier versions of transformers saved though it follows from the configuration: causal masks (as a `bias` of all of an attention), positions."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""safetensors' names of the types that can be computed in another of them."""


@dataclass
class Checkpoint:
    """A whole model, of which nothing but its configuration is read yet."""

    name: str
    revision: str | None
    raw: dict[str, Any]
    """config.json."""
    options: dict[str, Any] = field(default_factory=dict)
    """What `from_pretrained` is to be given for it."""
    notices: list[str] = field(default_factory=list)
    """Lines for the user."""


def read(name: str, revision: str | None) -> Checkpoint:
    """Raises InputError for a checkpoint whose own code computes something else than the class of transformers that would run in its place, and
    for quantized weights that cannot be turned back; what config.json cannot say is left to whoever loads the model."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except Exception:  # noqa: BLE001 - the same comes from loading it, and is said there
        raw = {}
    found = Checkpoint(name, revision, raw)
    _own_code(found)
    _quantized(found)
    return found


def _own_code(found: Checkpoint) -> None:
    kind, own = found.raw.get("model_type"), found.raw.get("auto_map") or {}
    auto = next((auto for auto in CLASSES if own.get(auto)), None)
    if auto is None:
        named = (found.raw.get("architectures") or [None])[0]
        ours = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind))
        if named and ours and not _same(named, ours) and "text_config" not in found.raw:
            found.notices.append(
                f"config.json names the class {named}; transformers' {ours[0]} is loaded, as its model_type is {kind}"
            )
        return
    theirs, ours = own[auto].rpartition(".")[2], _names(CLASSES[auto].get(kind))
    if not _same(theirs, ours):
        raise InputError(
            f"this checkpoint brings code of its own, {own[auto]}, which is never run here",
            where=f"{found.name}, auto_map in config.json",
            expected="a class of transformers",
            found=f"{theirs}; transformers' {ours[0]}, for model_type {kind}, may compute something else"
            if ours
            else f"{theirs}, and transformers {'has no class' if kind else 'no class can be chosen'} for model_type {kind}",
            next="Where transformers' class computes the same, take auto_map out of config.json in a copy of the model."
            if ours
            else "Use a model that transformers has, or a newer transformers.",
        )
    found.notices.append(f"the checkpoint's own code ({own[auto]}) is not run: transformers' {ours[0]} is")


def _names(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _same(name: str, others: tuple[str, ...]) -> bool:
    """Whether the name is one of these, written PhiMoE or Phimoe, Ernie4_5_ or Ernie4_5."""
    return name.lower().replace("_", "") in {other.lower().replace("_", "") for other in others}


def _quantized(found: Checkpoint) -> None:
    """Weights in few bits are computed with in the dtype that was asked for: a policy could not be trained otherwise, and a reference must compute
    what its policy does."""
    text = found.raw.get("text_config")
    given = [
        each.get(key)
        for each in (found.raw, text if isinstance(text, dict) else {})
        for key in ("quantization_config", "compression_config")
    ]
    asked = next((each for each in given if each is not None), None)
    if asked is None:
        return
    method = asked.get("quant_method") if isinstance(asked, dict) else asked
    try:
        quantization = AutoQuantizationConfig.from_dict({**asked, "dequantize": True})
        back = quantization.get_loading_attributes().get("dequantize") is True
    except Exception:  # noqa: BLE001 - a method that transformers does not know, or whose package is not here
        back = False
    if not back:
        raise InputError(
            "its weights are quantized, by a method that transformers cannot turn back at loading here",
            where=f"{found.name}, quantization_config in config.json",
            expected="weights in bfloat16, float16 or float32",
            found=f"quant_method {method or 'not named'}",
            next="Use the checkpoint that it was quantized from, or a copy that was dequantized and saved.",
        )
    found.options["quantization_config"] = quantization
    found.notices.append(f"its weights are stored in {method} and computed with as their values in the dtype: nothing is quantized")


def check(found: Checkpoint, model: PreTrainedModel, loading: dict[str, Any], *, in_few_bits: bool = False) -> None:
    """After loading: raises InputError where the checkpoint has weights that the model would need to be what was saved, or has one twice, or
    weights that are no numbers without a scale. `in_few_bits`: it was asked for so."""
    unexpected = sorted(key for key in loading["unexpected_keys"] if not _is_buffer(key, model))
    beside = [key for key in unexpected if _is_beside(key, model, found.raw)]
    if inside := [key for key in unexpected if key not in beside]:
        raise _too_many(
            found,
            f"the checkpoint has {len(inside)} weights that {type(model).__name__} does not use, so that it is another model",
            inside,
            "Check model_type and the sizes in config.json. If it is meant without them, save it so:",
        )
    if beside:
        parts = sorted({key.split(".")[0] for key in beside})
        found.notices.append(
            f"{len(beside)} weights of the checkpoint are not used, for they belong to parts beside the language model: {', '.join(parts)}"
        )
    untied = model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()
    if untied:
        raise InputError(
            "config.json ties weights together that the checkpoint has with other values",
            where=f"{found.name}, tie_word_embeddings in config.json",
            found=f"{', '.join(sorted(untied)[:3])} of its own",
            next="Say tie_word_embeddings false in a copy if they are meant; or leave the weight out of it.",
        )
    files = files_of(found.name, found.revision)
    if files is None:
        return
    types = dict(_types(files.read))
    prefix = model.base_model_prefix + "."
    if twice := sorted(key for key in types if prefix + key in types):
        raise _too_many(
            found,
            f"the checkpoint has {len(twice)} weights twice, with {prefix} before their names and without",
            twice,
            "Take one of the two. What transformers takes of them can be saved so:",
        )
    weights = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    wrong = sorted(
        key for key, kind in types.items() if kind not in FLOATS and weights & {key, prefix + key, key.removeprefix(prefix)}
    )
    if wrong and not in_few_bits and not found.options:
        raise InputError(
            f"{len(wrong)} of its weights are stored in {types[wrong[0]]}, and config.json has no quantization_config that says what they stand for",
            where=found.name,
            expected="weights in bfloat16, float16 or float32",
            found=", ".join(wrong[:3]),
            next="Use the checkpoint that it was quantized from.",
        )
    if files.left:
        found.notices.append(
            f"the weights are read from {files.first.name}; {', '.join(files.left)} beside it {'is' if len(files.left) == 1 else 'are'} not"
        )


def in_one_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights that were turned back from few bits, and those beside them, which transformers leaves as they were stored or as their scales were."""
    kept = set(model._keep_in_fp32_modules_strict or ()) | set((dtype == torch.float16 and model._keep_in_fp32_modules) or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if kept & set(name.split(".")) else dtype)


def _too_many(found: Checkpoint, what: str, keys: list[str], next: str) -> InputError:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    save = f'AutoModelForCausalLM.from_pretrained("{found.name}", dtype="auto").save_pretrained(...)'
    return InputError(what, where=found.name, found=", ".join(keys[:3]) + more, next=f"{next} {save}")


def _is_buffer(key: str, model: PreTrainedModel) -> bool:
    """What the model makes itself, from its configuration."""
    buffers = dict(model.named_buffers())
    return OLD_BUFFERS.search(key) is not None or key in buffers or f"{model.base_model_prefix}.{key}" in buffers


def _is_beside(key: str, model: PreTrainedModel, raw: dict[str, Any]) -> bool:
    """Whether it is of a part of its own (a value head, a tower for pictures) rather than of one that the model has: of another layer, a bias, an
    adapter."""
    first, *rest = key.split(".")
    body = model.base_model
    if first in dict(model.named_children()) or first in dict(body.named_children()) or first == model.base_model_prefix:
        return False
    if "text_config" in raw and "text_config" not in type(model.config).sub_configs:  # the language model of a larger one
        return True
    names = {part for name, _ in model.named_modules() for part in name.split(".") if not part.isdigit()}
    return bool(rest) and not names & set(rest)


@dataclass(frozen=True)
class Files:
    """The files of weights that transformers reads, and the names of others in their folder that could be meant."""

    first: Path
    read: tuple[Path, ...]
    left: tuple[str, ...]


def files_of(name: str, revision: str | None) -> Files | None:
    """None where there are none by the usual names."""
    quiet = {"revision": revision, "_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = next((path for each in WEIGHTS if (path := cached_file(name, each, **quiet)) is not None), None)
    if found is None:
        return None
    first = Path(found)
    shards = [first.name]
    if first.suffix == ".json":
        shards = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    others = {path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in first.parent.glob(pattern)}
    return Files(first, tuple(first.parent / shard for shard in shards), tuple(sorted(others - set(shards))))


def _types(files: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """Name and type of every weight, from the heads of the files; nothing of pickled ones."""
    for file in files:
        if file.suffix == ".safetensors" and file.is_file():
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    yield key, weights.get_slice(key).get_dtype()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> None:
    """InputError for a tokenizer with code of its own that would give other ids than what is loaded in its place may give."""
    own = get_tokenizer_config(name, revision=revision).get("auto_map") or {}
    theirs = [each for each in (own.get("AutoTokenizer") if isinstance(own, dict) else own) or () if each]
    loaded = type(tokenizer).__name__
    if theirs and not any(_same(each.rpartition(".")[2].removesuffix("Fast"), (loaded.removesuffix("Fast"),)) for each in theirs):
        raise InputError(
            f"this tokenizer brings code of its own, {theirs[-1]}, which is never run here",
            where=f"{name}, auto_map in tokenizer_config.json",
            expected="a class of transformers",
            found=f"transformers' {loaded}, which may give other ids",
            next="Where it gives the same ids, take auto_map out of tokenizer_config.json in a copy, and give it as --tokenizer.",
        )
