"""An adapter folder, as peft writes it, in place of a model: which base it belongs to, and the two merged into one whole model.

A merged model has no trace of the adapter left: its weights are the base's plus the adapter's, in the base's dtype, under the base's names. So
its hash is that of the same merge saved as a whole checkpoint. peft merges it, on the CPU, wherever the model runs afterwards.
"""

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from store.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

WHOLE_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Files of a checkpoint that has all weights of a model."""

CANNOT_BE_MERGED = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
    "LILY",
    "XLORA",
}
"""Kinds of adapters that are no change of weights."""


@dataclass(frozen=True)
class Adapter:
    """Where an adapter and its base are loaded from."""

    name: str
    revision: str | None
    base: str
    """As `base_model_name_or_path` says: a folder or a hub id."""
    base_revision: str | None

    def __str__(self) -> str:
        base = f"{self.base}@{self.base_revision}" if self.base_revision else self.base
        return f"{self.name} is an adapter; its base is {base}, into which it is merged"


def adapter_of(name: str, revision: str | None = None) -> Adapter | None:
    """What stands in the adapter_config.json of a folder or hub id; None where there is none, so that it is a whole model.

    Reads no weights. Raises InputError for an adapter that is no change of a causal language model's weights, whose base is not there or is
    an adapter itself, for a folder that has a whole model as well, and where peft is not installed.
    """
    path = _config_path(name, revision)
    if path is None:
        return None
    where = Path(name) / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, base, task = content["peft_type"], content.get("base_model_name_or_path"), content.get("task_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("cannot be read as an adapter's configuration", where=where) from error
    if any(file for pattern in WHOLE_WEIGHTS for file in path.parent.glob(pattern)):
        raise InputError(
            "both an adapter and a whole model lie here, and either could be meant",
            where=name,
            found=f"{CONFIG} and weights of a whole model",
            next="Keep them in folders of their own.",
        )
    if kind in CANNOT_BE_MERGED or task not in (None, "CAUSAL_LM"):
        raise InputError(
            "this adapter does not make another causal language model of its base",
            where=where,
            expected="a change of weights, such as LORA, for CAUSAL_LM",
            found=f"{kind} for {task}",
        )
    if not base:
        raise InputError(
            "the adapter does not say which model it belongs to",
            where=where,
            next='Write the folder or hub id of its base as "base_model_name_or_path".',
        )
    if importlib.util.find_spec("peft") is None:
        raise InputError("an adapter needs peft, which is not installed", where=name, next="pip install peft")
    if _is_path(base) and not Path(base).is_dir():
        raise InputError(
            "the base of the adapter is not there",
            where=where,
            found=f"base_model_name_or_path {base}",
            next="Write its present place there.",
        )
    base_revision = content.get("revision")
    if _config_path(base, base_revision) is not None:
        raise InputError(
            "the base of the adapter is an adapter itself",
            where=where,
            expected="a whole model",
            found=base,
            next="Merge it into a whole model first (peft: merge_and_unload, then save_pretrained), and name that as the base.",
        )
    return Adapter(name, revision, str(base), base_revision)


def attached(base, adapter: Adapter, *, trainable: bool = False):
    """`base` (a PreTrainedModel on the CPU, changed in place) with the adapter, as peft's PeftModel, which computes base + adapter.

    `trainable`: the adapter's weights alone get gradients. Raises InputError where the adapter does not fit, or lacks a weight.
    """
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM

    with _one_line(adapter, "does not fit its base"):
        config = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
        config.inference_mode = not trainable
        kind = PeftModelForCausalLM if config.task_type is not None else PeftModel
        model = kind(base, config)
        loaded = model.load_adapter(
            adapter.name,
            "default",
            is_trainable=trainable,
            torch_device="cpu",
            revision=adapter.revision,
            key_mapping=getattr(base, "_checkpoint_conversion_mapping", {}),
        )
    if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
        lacks = f"lacks {len(loaded.missing_keys)} weights" if loaded.missing_keys else f"has {len(wrong)} weights too many"
        raise InputError(f"the adapter {lacks} for its configuration", where=adapter.name, found=", ".join(sorted(wrong)[:3]))
    return model


def merged(base, adapter: Adapter):
    """`base` (a PreTrainedModel on the CPU, changed in place) plus the adapter, in the base's dtype and class. Raises InputError as `attached`,
    and for one that cannot be merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = attached(base, adapter)
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(each, BaseTunerLayer) for each in embeddings):
        raise InputError(
            "the adapter changes one of two weights that the base ties together (embeddings and head), so that it has no merge",
            where=adapter.name,
        )
    with _one_line(adapter, "cannot be merged"):
        return model.merge_and_unload()  # with safe_merge, what is added is rounded before it is added, and the hash is another


def files_of(adapter: Adapter) -> list[Path]:
    """The files that decide what the adapter adds."""
    path = _config_path(adapter.name, adapter.revision)
    folder = path.parent if path is not None else Path(adapter.name)
    return [file for each in (CONFIG, *WEIGHTS) if (file := folder / each).is_file()]


def _config_path(name: str, revision: str | None) -> Path | None:
    if os.path.isdir(name):
        path = Path(name) / CONFIG
        return path if path.is_file() else None
    if _is_path(name):
        return None
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):  # no such repository: said by whoever loads a model from it
        return None
    return None if found is None else Path(found)


def _is_path(name: str) -> bool:
    """Rather than a hub id, which is owner/name at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextlib.contextmanager
def _one_line(adapter: Adapter, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # peft raises ValueError, RuntimeError, KeyError, OSError, ...
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the adapter {what}: {type(error).__name__}: {reason}", where=adapter.name, found=f"base {adapter.base}"
        ) from error
