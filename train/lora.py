"""LoRA (arXiv 2106.09685): the policy is a frozen base, and beside some of its layers a small adapter that is trained, as peft computes it.

y = W x + s B A x, with W frozen, s = alpha / r (rsLoRA, arXiv 2312.03732: alpha / sqrt(r)). A fresh adapter has B = 0 (of embeddings
A = 0), so that the policy starts as its base, which is then the store's reference. An adapter that is trained on starts as what it is: its merge is
the reference.

peft is imported where it is used: who trains all weights does not need it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, set_seed

from precompute.scorer.adapter import Adapter, attached
from store.errors import InputError
from train.checks import OF_FRESH_ADAPTER, is_pattern
from train.config import LORA_ALPHA, LORA_R, TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def kind_of(config: TrainConfig, adapter: Adapter | None, *, revision: str | None = None) -> "LoraConfig":
    """What is trained, in peft's terms: a fresh adapter as the options say, or `adapter` as it was saved.

    `revision` of a fresh one's base, kept with it so that it finds that one again. Raises InputError where `adapter` has decided what an option
    says, and where it is not plain LoRA.
    """
    from peft import LoraConfig, PeftConfig

    if adapter is None:
        modules: str | list[str] | None = [*config.lora_target_modules] or None
        if modules is not None and (modules == ["all-linear"] or is_pattern(modules[0])):
            (modules,) = modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r or LORA_R,
            lora_alpha=config.lora_alpha or LORA_ALPHA,
            lora_dropout=config.lora_dropout or 0.0,
            target_modules=modules,
            use_rslora=config.use_rslora,
            bias="none",
            revision=revision,
        )
    if given := [name for name in OF_FRESH_ADAPTER if getattr(config, name) not in (None, False, ())]:
        raise InputError(
            f"{adapter.name} is an adapter, which is trained on and has decided this",
            where=", ".join(f"--{name.replace('_', '-')}" for name in given),
            next="Leave it out; or merge that adapter into a whole model, and train another one on it.",
        )
    saved = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
    unusual = None if isinstance(saved, LoraConfig) else saved.peft_type.value
    for name in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias"):
        if unusual is None and getattr(saved, name, None):
            unusual = name
    if unusual is not None or saved.bias != "none":
        raise InputError(
            "only a plain LoRA adapter is trained on",
            where=adapter.name,
            found=unusual or f"bias {saved.bias}",
            next="Leave out --use-peft: all weights of its merge are then trained.",
        )
    return saved


def fresh(model: PreTrainedModel, kind: "LoraConfig", *, seed: int) -> "PeftModel":
    """`model`, changed in place, with an adapter that adds nothing yet: the same for the same seed, and TRL's own.

    Raises InputError where no layer or the head would get one.
    """
    from peft import get_peft_model

    set_seed(seed)
    try:
        policy = get_peft_model(model, kind)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"no adapter can be made: {' '.join(str(error).split())[:200]}",
            where="--lora-target-modules",
            found=type(model).__name__,
            next="Give --lora-target-modules all-linear, or names of layers such as q_proj,v_proj.",
        ) from error
    _refuse_at_head(policy, "--lora-target-modules")
    _refuse_shared(policy)
    if not adds_nothing(policy):
        raise InputError("peft's fresh adapter changes the policy at once, so that it is not the reference", where="--use-peft")
    return policy


def adds_nothing(policy: "PeftModel") -> bool:
    """Whether every B is zero, and of embeddings every A, which peft starts the other way round: base + 0 is the base, to the bit."""
    at_zero = [weight for name, weight in policy.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    return bool(at_zero) and not any(bool(weight.any()) for weight in at_zero)


def going_on(base: PreTrainedModel, adapter: Adapter) -> "PeftModel":
    """`base`, frozen, changed in place, and beside it the adapter as it was saved, to be trained on."""
    policy = attached(base, adapter, trainable=True)
    _refuse_at_head(policy, adapter.name)
    return policy


def _refuse_at_head(policy: "PeftModel", where: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "the head cannot have an adapter: log-probs are computed from its own weights",
            where=where,
            next="Leave the head out; all-linear does.",
        )


def _refuse_shared(policy: "PeftModel") -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = policy.get_base_model()
    if base.config.get_text_config().tie_word_embeddings and isinstance(base.get_input_embeddings(), BaseTunerLayer):
        raise InputError(
            "the head shares the embeddings, and would not get what their adapter adds: the trained model would have no merge",
            where="--lora-target-modules",
            next="Leave the embeddings out; all-linear does.",
        )


def on_twin(kind: "LoraConfig") -> Callable[[PreTrainedModel], PreTrainedModel]:
    """For the self-test: gives a small twin of the policy an adapter of that kind, without dropout, that adds something and is trained."""
    kind = replace(kind, lora_dropout=0.0, inference_mode=False, init_lora_weights=True, layers_to_transform=None)

    def adapt(twin: PreTrainedModel) -> PreTrainedModel:
        untouched = copy.deepcopy(twin)
        try:
            policy = fresh(twin, kind, seed=0)
        except InputError:  # it has fewer layers, and none of those that were named
            policy = fresh(untouched, replace(kind, target_modules="all-linear"), seed=0)
        generator = torch.Generator().manual_seed(0)
        for weight in (each for each in policy.parameters() if each.requires_grad):
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator).to(weight)
        return policy.get_base_model().eval()

    return adapt


def described(policy: "PeftModel") -> dict:
    """For run.json: what the adapter is, and how much of the policy is trained."""
    kind = policy.peft_config["default"]
    trained, everything = policy.get_nb_trainable_parameters()
    return {
        "r": kind.r,
        "lora_alpha": kind.lora_alpha,
        "lora_dropout": kind.lora_dropout,
        "use_rslora": kind.use_rslora,
        "target_modules": kind.target_modules if isinstance(kind.target_modules, str) else sorted(kind.target_modules),
        "base": kind.base_model_name_or_path,
        "trained_weights": trained,
        "all_weights": everything,
    }


def notice(of_adapter: dict) -> str:
    """`LoRA: 921,600 of 135,436,608 weights are trained (0.68 %): r 16, alpha 32, on q_proj, v_proj`"""
    modules = of_adapter["target_modules"]
    trained, everything = of_adapter["trained_weights"], of_adapter["all_weights"]
    said = (
        f"LoRA: {trained:,} of {everything:,} weights are trained ({100 * trained / everything:.2f} %): r {of_adapter['r']}, alpha"
    )
    return f"{said} {of_adapter['lora_alpha']}, on {modules if isinstance(modules, str) else ', '.join(modules)}"
