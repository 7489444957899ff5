"""The frozen model and its tokenizer: loading them with clear errors, and hashing what they are."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig

from precompute.scorer import checkpoint
from precompute.scorer.adapter import Adapter, adapter_of, merged
from precompute.scorer.budget import SHARE, enough_memory, free_memory
from precompute.scorer.spread import devices_of, larger_numbers, largest_share, spread
from store.errors import InputError

VOLATILE_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
}
"""Entries of config.json that do not change what a model computes in a given dtype."""

GIB = 2**30

Say = Callable[[str], object] | None
"""Takes lines for the user; None: nothing is said."""


def load_tokenizer(name: str, *, revision: str | None = None, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template replaced by the text of the file `chat_template` if given. Raises InputError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same cause
        if (adapter := adapter_of(name, revision)) is not None:
            raise InputError(
                "there is no tokenizer beside the adapter", where=name, next=f"Give --tokenizer {adapter.base}"
            ) from error
        raise _not_loadable("tokenizer", name, revision, error) from error
    checkpoint.check_tokenizer(tokenizer, name, revision)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the chat template cannot be read: {error}", where=f"--chat-template {chat_template}") from error
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device | tuple[torch.device, ...],
    attn_implementation: str | None = None,
    say: Say = None,
) -> PreTrainedModel:
    """The causal language model in evaluation mode on `device`, or spread over several (spread.py), an adapter merged into its base. Raises
    InputError, also when a weight is missing from the checkpoint, or when it has more than the model can use (checkpoint.py).

    `attn_implementation`: of the plain forward, by transformers' name. None: PyTorch's scaled dot product attention (sdpa), or eager where
    transformers has no other for this architecture, which `say` is told, as all that is unusual about the checkpoint.
    """
    adapter = adapter_of(name, revision)
    if adapter is None:
        model = _whole_model(name, revision, dtype, attn_implementation, say)
    else:
        model = merged(load_base(adapter, dtype=dtype, attn_implementation=attn_implementation, say=say), adapter)
    if say is not None and (notice := _attention_notice(model, attn_implementation)) is not None:
        say(notice)
    devices = device if isinstance(device, tuple) else (device,)
    with enough_memory("while the model was loaded", "Free memory (other processes?), or take GPUs that have more."):
        spread(model, devices)
    if len(found := devices_of(model)) != len(devices):
        raise InputError(
            "this model has fewer parts that could lie on GPUs of their own",
            where=f"--gpus-per-worker {len(devices)}",
            expected=f"at most {len(found)} for {type(model).__name__}",
        )
    return model.eval().requires_grad_(False)


def refuse_too_large(name: str, *, revision: str | None, dtype: str, devices: tuple[torch.device, ...]) -> None:
    """InputError where the weights do not fit the free memory of the GPUs that they would be spread over; it names the number that is enough.
    To be asked before any weight is read: they are counted by the configuration."""
    if devices[0].type != "cuda":
        return
    model = without_weights(name, revision=revision, dtype=dtype)
    room = min(map(free_memory, devices)) * SHARE["cuda"]
    if (needed := largest_share(model, len(devices))) <= room:
        return
    there = torch.cuda.device_count()
    enough = next((number for number in larger_numbers(len(devices)) if largest_share(model, number) <= room), None)
    on = f"on each of {len(devices)} GPUs" if len(devices) > 1 else "on one GPU"
    raise InputError(
        f"the model's weights do not fit {on}",
        where=name,
        expected=f"{needed / GIB:.3g} GiB, for {model.num_parameters():,} parameters in {dtype}",
        found=f"{room / GIB:.3g} GiB, {SHARE['cuda']:.0%} of what is free",
        next=f"Spread it: --gpus-per-worker {enough}"
        if enough
        else f"It needs larger GPUs, or more than the {there} that are here; or free memory (other processes?).",
    )


def without_weights(name: str, *, revision: str | None, dtype: str) -> PreTrainedModel:
    """The model as its configuration says, on the meta device; of an adapter, its base. Raises InputError."""
    adapter = adapter_of(name, revision)
    base, base_revision = (name, revision) if adapter is None else (adapter.base, adapter.base_revision)
    try:
        config = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except Exception as error:
        raise _not_loadable("causal language model", base, base_revision, error) from error


def load_base(adapter: Adapter, *, dtype: str, attn_implementation: str | None = None, say: Say = None) -> PreTrainedModel:
    """The model that an adapter belongs to, without it, on the CPU. Raises InputError."""
    with _as_base_of(adapter):
        return _whole_model(adapter.base, adapter.base_revision, dtype, attn_implementation, say)


def load_in_4bit(
    name: str, *, revision: str | None, dtype: str, device: torch.device, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A whole model, or the base of an adapter without it, on `device` with its linear layers but for the head in 4 bits: NormalFloat, blocks of 64
    (QLoRA, arXiv 2305.14314), as bitsandbytes does it; they compute in `dtype`. Raises InputError."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))
    more = {"quantization_config": quantization, "device_map": {"": device}}
    adapter = adapter_of(name, revision)
    if adapter is None:
        return _whole_model(name, revision, dtype, attn_implementation, **more)
    with _as_base_of(adapter):
        return _whole_model(adapter.base, adapter.base_revision, dtype, attn_implementation, **more)


@contextmanager
def _as_base_of(adapter: Adapter) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(
            f"the base of the adapter: {error.what}", where=adapter.name, found=adapter.base, next=error.next
        ) from error


def _whole_model(
    name: str, revision: str | None, dtype: str, attn_implementation: str | None, say: Say = None, **options
) -> PreTrainedModel:
    try:
        found = checkpoint.read(name, revision)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below, with their names
            **(found.options | options),
        )
    except InputError:
        raise
    except Exception as error:
        raise _not_loadable("causal language model", name, revision, error) from error
    if loading["mismatched_keys"]:
        key, stored, needed = min(loading["mismatched_keys"])
        raise InputError(
            f"{len(loading['mismatched_keys'])} of the checkpoint's weights have another shape than config.json says",
            where=name,
            expected=f"{tuple(needed)} for {key}",
            found=tuple(stored),
            next="Use the config.json that belongs to these weights.",
        )
    if loading["missing_keys"]:
        absent = sorted(loading["missing_keys"])
        raise InputError(
            f"the checkpoint lacks {len(absent)} of the model's weights, which would be random",
            where=name,
            found=f"no {', '.join(absent[:3])}",
            next="Use a complete causal-language-model checkpoint.",
        )
    if found.options:
        checkpoint.in_one_dtype(model, getattr(torch, dtype))
    checkpoint.check(found, model, loading, in_few_bits="quantization_config" in options)
    if say is not None:
        for notice in found.notices:
            say(f"{name}: {notice}")
    return model


def _attention_notice(model: PreTrainedModel, asked: str | None) -> str | None:
    """A line for the user where nothing was asked for and transformers has no scaled dot product attention for this model."""
    found = model.config._attn_implementation
    if asked is not None or found == "sdpa":
        return None
    return f"{type(model).__name__} has no sdpa attention in transformers: its plain forward runs with {found}"


def _not_loadable(what: str, name: str, revision: str | None, error: Exception) -> InputError:
    detail = " ".join(str(error).split())
    if "attention implementation" in detail:
        return InputError(
            f"{what} {name} does not run with this attention: {detail[:200]}",
            where="--attn-implementation",
            next="Leave it out: what the model has is then taken.",
        )
    at = f" at revision {revision}" if revision else ""
    return InputError(
        f"no {what} can be loaded{at}: {type(error).__name__}: {detail[:300]}",
        where=name,
        next="Check the name or path and the revision; offline, download it first or pass a local folder.",
    )


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash of every weight's name, dtype, shape and bytes as loaded; independent of how the checkpoint is split into files."""
    weights = sorted(model.state_dict().items())

    def digest(weight: tuple[str, torch.Tensor]) -> str:
        name, tensor = weight
        data = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data)
        return f"{name} {data.dtype} {tuple(data.shape)} {content.hexdigest()}\n"

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter: one tensor per core at a time
        return hashlib.sha256("".join(pool.map(digest, weights)).encode()).hexdigest()


def config_sha256(name: str, revision: str | None = None) -> str:
    """Hash of config.json without the entries that do not change the numbers: a changed RoPE or window is another model. An adapter's is that of
    its base. Raises InputError."""
    if (adapter := adapter_of(name, revision)) is not None:
        name, revision = adapter.base, adapter.base_revision
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except Exception as error:
        raise _not_loadable("configuration", name, revision, error) from error
    return _sha256({key: value for key, value in raw.items() if key not in VOLATILE_CONFIG})


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges, normalization, splitting and special tokens. The chat template is hashed apart."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)  # state of the last call, not of the tokenizer
    content.pop("truncation", None)
    # An added token can be declared in either file; what it does shows in the backend. eos ends plain-text rows.
    return _sha256({"backend": content, "eos": tokenizer.eos_token, "bos": tokenizer.bos_token})


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template, or "none"."""
    return "none" if tokenizer.chat_template is None else _sha256(tokenizer.chat_template)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """What a store's provenance records of the software."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
