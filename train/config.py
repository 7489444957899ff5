"""Everything a training run is told, as options (options.py), checked before anything is loaded. Contradictions are refused, nothing is adjusted in silence."""

import importlib.util
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from options import FILE, STORE_TO_READ, IntegerOrAuto, JsonObject, Numbers, Option, StorePath
from precompute.scorer import AttentionKernel, Layout
from presets import Preset
from store import DTYPES
from store.errors import InputError
from train.choices import ADAMS, F_DIVERGENCES, F_LOSSES, METRICS, ONE_OF, OPTIMIZERS, REPORTERS, SCHEDULES

ZERO2 = Path(__file__).with_name("zero2.json")
"""The DeepSpeed configuration used unless another is given: stage 2, `auto` where the other options already say it."""

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
"""TRL 1.16's, in its order. OLMo 3 and Tulu call `sigmoid_norm` dpo_norm."""

SORT_PAIRS = ("aot", "aot_unpaired")
"""Losses that sort the pairs of a micro-batch: their value depends on its size."""

BETA = {"sigmoid_norm": 5.0}
"""Usual values of losses that compare means of log-probs: OLMo 3's and Tulu's."""

BETA_ELSE = 0.1
"""TRL's default, for all other losses: most compare sums over completions of some hundred tokens."""

PAIRS, MODEL, LORA, LOSS, OPTIMIZATION, MACHINE, RECORDS = (
    "Pairs",
    "Policy",
    "LoRA",
    "Loss",
    "Optimization",
    "Speed and memory",
    "Output and logs",
)


def usual(name: str) -> str:
    """A value of most presets, in words."""
    value = getattr(Preset, name)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


LORA_R, LORA_ALPHA = 16, 32
"""TRL's defaults."""

OF_FRESH_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
"""Options that an adapter that is trained on has decided."""


def is_pattern(name: str) -> bool:
    """Whether this is a regular expression for whole names of layers, rather than a name or the end of one."""
    return re.fullmatch(r"[\w.,-]+", name) is None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run; each field is an option. What changes the numbers and depends on the data set or the loss has no default here: presets.py
    has such values."""

    ref_store: Annotated[Path, replace(STORE_TO_READ, group=PAIRS)]
    """Sealed store with the pairs and their reference log-probs."""
    eval_ref_store: Annotated[
        Path | None,
        Option("A second store, made with the same model, to evaluate on.", PAIRS, type=StorePath(), instead_of=("eval_fraction",)),
    ] = None
    where: Annotated[
        str | None, Option("Train only on pairs for which this SQL condition over the store's columns holds.", PAIRS)
    ] = None
    """Evaluation with `eval_fraction` is on these alone too."""
    where_file: Annotated[
        Path | None,
        Option("File with one pair_id per line, or with an SQL condition. It must hold as well as --where.", PAIRS, type=FILE),
    ] = None
    order_by: Annotated[str | None, Option("SQL order to train in, such as 'num_chosen_tokens', instead of shuffling.", PAIRS)] = (
        None
    )
    eval_fraction: Annotated[
        float | None,
        Option(
            "Hold back this share of the pairs to evaluate on; the same pairs in every order and subset.",
            PAIRS,
            instead_of=("eval_ref_store",),
        ),
    ] = None
    """Chosen by the hash of their pair_id."""
    policy: Annotated[
        str | None,
        Option(
            "Model to train: folder or hub id, of an adapter too.",
            MODEL,
            default="the store's reference model",
            instead_of=("revision", "tokenizer"),
        ),
    ] = None
    """None: where the store's model was loaded from then."""
    revision: Annotated[str | None, Option("Revision of --policy on the hub.", MODEL)] = None
    """Without `policy` the store's own revision holds."""
    tokenizer: Annotated[
        str | None,
        Option("Folder or hub id.", MODEL, default="the one the store was made with, or the policy's"),
    ] = None
    chat_template: Annotated[Path | None, Option("The template file precompute was given, if any.", MODEL, type=FILE)] = None
    max_length: Annotated[int | None, Option("Any value up to the store's.", PAIRS, default="the store's", at_least=2)] = None
    """Tokens of prompt + completion."""
    loss_type: Annotated[
        tuple[str, ...],
        Option(
            "TRL's names; give it several times to add losses up.",
            LOSS,
            default=usual("loss_type"),
            instead_of=("beta", "loss_weights"),
        ),
    ]
    """Any of LOSS_TYPES, added up with `loss_weights`."""
    loss_weights: Annotated[
        tuple[float, ...] | None, Option("Comma-separated weights, one per --loss-type.", LOSS, type=Numbers())
    ] = None
    beta: Annotated[float, Option("Its scale belongs to the loss type.", LOSS, default="5 with sigmoid_norm, else 0.1")]
    """Means of log-probs (sigmoid_norm) are smaller than sums: `default_beta`."""
    label_smoothing: Annotated[float, Option("For robust and exo_pair.", LOSS)] = 0.0
    ld_alpha: Annotated[float | None, Option("LD-DPO: weight of the tokens beyond the shorter completion.", LOSS)] = None
    """None: plain sums."""
    f_divergence_type: Annotated[
        str, Option("Divergence of policy and reference, for the losses for which TRL has it.", LOSS, choices=F_DIVERGENCES)
    ] = "reverse_kl"
    f_alpha_divergence_coef: Annotated[float, Option("Alpha of alpha_divergence.", LOSS)] = 0.5
    use_weighting: Annotated[bool, Option("WPO: weight pairs by how likely their completions are under the policy.", LOSS)] = False
    learning_rate: Annotated[float, Option(group=OPTIMIZATION, default=usual("learning_rate"))]
    lr_scheduler_type: Annotated[str, Option(group=OPTIMIZATION, default=usual("lr_scheduler_type"))] = Preset.lr_scheduler_type
    lr_scheduler_kwargs: Annotated[
        dict[str, Any] | None,
        Option("Arguments of the schedule: '{\"min_lr_rate\": 0.1}' of cosine_with_min_lr.", OPTIMIZATION, type=JsonObject()),
    ] = None
    warmup_ratio: Annotated[float, Option(group=OPTIMIZATION, default=usual("warmup_ratio"), instead_of=("warmup_steps",))] = (
        Preset.warmup_ratio
    )
    """Share of all steps."""
    warmup_steps: Annotated[
        int | None, Option("Instead of --warmup-ratio.", OPTIMIZATION, at_least=0, instead_of=("warmup_ratio",))
    ] = None
    """With it `warmup_ratio` is 0."""
    num_train_epochs: Annotated[float, Option(group=OPTIMIZATION, default=usual("num_train_epochs"))] = Preset.num_train_epochs
    max_steps: Annotated[int | None, Option("Stop after N optimizer steps.", OPTIMIZATION, at_least=1)] = None
    """Whatever `num_train_epochs` says."""
    optim: Annotated[
        str | None,
        Option(
            "transformers' name of the optimizer.",
            OPTIMIZATION,
            default="adamw_torch_fused, or --zero-config's",
            choices=tuple(OPTIMIZERS),
        ),
    ] = None
    adam_beta1: Annotated[float, Option(group=OPTIMIZATION)] = 0.9
    adam_beta2: Annotated[float, Option(group=OPTIMIZATION)] = 0.999
    adam_epsilon: Annotated[float, Option(group=OPTIMIZATION)] = 1e-8
    weight_decay: Annotated[float, Option(group=OPTIMIZATION)] = 0.0
    max_grad_norm: Annotated[float, Option("0: no clipping.", OPTIMIZATION, default="1, or the preset's")] = 1.0
    tokens_per_batch: Annotated[
        int | Literal["auto"] | None,
        Option(
            "Tokens per forward on each device, each prompt once: as many pairs as fit.",
            MACHINE,
            default="auto, which measures what fits a GPU's memory; 16,384 on a CPU",
            type=IntegerOrAuto(),
            instead_of=("per_device_train_batch_size",),
        ),
    ] = None
    """A pair with more goes alone. With the next given, and where `refuse_tokens` says so, None: micro-batches of as many pairs each."""
    per_device_train_batch_size: Annotated[
        int | None,
        Option(
            "Instead of --tokens-per-batch: pairs per forward on each device, as in TRL.",
            OPTIMIZATION,
            at_least=1,
            instead_of=("tokens_per_batch",),
        ),
    ] = None
    effective_batch_size: Annotated[
        int | None,
        Option(
            "Pairs per step over all devices; accumulation follows.",
            OPTIMIZATION,
            default=usual("effective_batch_size"),
            at_least=1,
            instead_of=("gradient_accumulation_steps",),
        ),
    ] = None
    """Accumulation must come out whole. This or the next, not both."""
    gradient_accumulation_steps: Annotated[
        int | None, Option("Instead of --effective-batch-size.", OPTIMIZATION, at_least=1, instead_of=("effective_batch_size",))
    ] = None
    dtype: Annotated[str | None, Option(group=MACHINE, default="the store's", choices=DTYPES)] = None
    """Of weights and activations; optimizer states are float32 in any case."""
    layout: Annotated[Layout, Option("padded: stock TRL.", MACHINE)] = "packed"
    """packed: without padding, prompts once, ranks evenly loaded."""
    attn_implementation: Annotated[
        str | None,
        Option("With --layout padded; packed has its own.", MACHINE, default="sdpa, or eager where a model has no sdpa"),
    ] = None
    """By transformers' name."""
    router_aux_loss_coef: Annotated[
        float | None,
        Option("Weight of a mixture of experts' load-balancing loss.", LOSS, default="none; TRL's is the model's own", at_least=0),
    ] = None
    attention_kernel: Annotated[
        AttentionKernel,
        Option("Attention of the packed layout on a GPU: PyTorch's own, or FlashAttention 3 or 4 from its package.", MACHINE),
    ] = "default"
    gradient_checkpointing: Annotated[
        bool | None,
        Option(
            "Compute each layer again in the backward, for less memory.",
            MACHINE,
            default="on; on GPUs --tokens-per-batch auto leaves it out where there is room",
        ),
    ] = None
    torch_compile: Annotated[
        bool,
        Option(
            "Compile the model; in the packed layout its layers, once for rows of any length. The first steps take minutes.",
            MACHINE,
        ),
    ] = False
    seed: Annotated[int, Option(group=OPTIMIZATION)] = 42
    output_dir: Annotated[Path, Option("Checkpoints, model and run.json.", RECORDS, default="runs/<store>")]
    """Must not hold another run."""
    logging_steps: Annotated[int, Option(group=RECORDS, at_least=1)] = 1
    save_strategy: Annotated[str, Option(group=RECORDS, choices=("no", "steps", "epoch"))] = "steps"
    """When a checkpoint to resume from is written. The trained model is saved in any case."""
    save_steps: Annotated[int, Option(group=RECORDS, at_least=1)] = 500
    save_total_limit: Annotated[int | None, Option("Keep only the newest N checkpoints.", RECORDS, at_least=1)] = None
    """None: all."""
    save_only_model: Annotated[
        bool, Option("Checkpoints without optimizer states: smaller, but --resume cannot use them.", RECORDS)
    ] = False
    load_best_model_at_end: Annotated[
        bool, Option("Save the model of the checkpoint that evaluated best, instead of the last.", RECORDS)
    ] = False
    metric_for_best_model: Annotated[
        str | None, Option("What decides which evaluation is best.", RECORDS, default="loss", choices=METRICS)
    ] = None
    eval_steps: Annotated[int | None, Option("Evaluate every N steps.", RECORDS, default="once per epoch", at_least=1)] = None
    report_to: Annotated[tuple[str, ...], Option(group=RECORDS, default="none", choices=(*REPORTERS, "none"))] = ()
    run_name: Annotated[str | None, Option("Name of the run, for --report-to.", RECORDS)] = None
    resume: Annotated[
        bool | Path,
        Option("Go on from the last checkpoint in --output-dir; a finished run stays as it is.", RECORDS),
    ] = False
    """A path: from that checkpoint."""
    push_to_hub: Annotated[
        bool,
        Option(
            "Copy the trained model to the Hub; access is tried before training. With --resume and a finished run: only copy.",
            RECORDS,
        ),
    ] = False
    hub_model_id: Annotated[str | None, Option("Repository for --push-to-hub.", RECORDS)] = None
    dataloader_num_workers: Annotated[int, Option("Processes that read pairs ahead, per device.", MACHINE, at_least=0)] = 0
    zero_config: Annotated[Path, Option("DeepSpeed JSON of stage 0, 1 or 2.", MACHINE, default="train/zero2.json", type=FILE)] = (
        ZERO2
    )
    allow_different_policy: Annotated[bool, Option("Train a policy that is not the store's reference.", MODEL)] = False
    """The loss then does not start at that of an untrained model."""
    use_peft: Annotated[
        bool, Option("Freeze the policy and train a LoRA adapter; if --policy is an adapter, train that one further.", LORA)
    ] = False
    lora_r: Annotated[int | None, Option("Rank.", LORA, default=str(LORA_R), at_least=1)] = None
    """These four None: as said, or those of the adapter that is trained on."""
    lora_alpha: Annotated[
        int | None, Option("The adapter's output is multiplied by alpha / r.", LORA, default=str(LORA_ALPHA), at_least=1)
    ] = None
    lora_dropout: Annotated[float | None, Option("Dropout before the adapter, while it trains.", LORA, default="0")] = None
    """TRL takes the number and trains without; here it counts."""
    lora_target_modules: Annotated[
        tuple[str, ...],
        Option(
            "Layers that get one: names with commas or several times, all-linear, or a regular expression.",
            LORA,
            default="peft's choice for the architecture",
        ),
    ] = ()
    use_rslora: Annotated[bool, Option("Scale by alpha / sqrt(r) instead of alpha / r.", LORA)] = False
    load_in_4bit: Annotated[bool, Option("Keep the frozen weights in 4 bits (QLoRA), with bitsandbytes.", LORA)] = False

    def __post_init__(self):
        for name in ("ref_store", "output_dir", "eval_ref_store", "chat_template", "zero_config"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("loss_type", "loss_weights", "report_to", "lora_target_modules"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_loss()
        self._check_schedule()
        self._check_environment()
        self._check_adapter()

    def _check_loss(self) -> None:
        unknown = [name for name in self.loss_type if name not in LOSS_TYPES]
        if unknown or not self.loss_type:
            found = ", ".join(unknown) or "none"
            raise InputError(
                "unknown loss type", where="--loss-type", expected=f"one or more of {', '.join(LOSS_TYPES)}", found=found
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise InputError(
                "every loss type needs its weight",
                where="--loss-weights",
                expected=f"{len(self.loss_type)} weights for {', '.join(self.loss_type)}",
                found=len(self.loss_weights),
            )
        _require(self.beta > 0 and math.isfinite(self.beta), "--beta", "a positive number", self.beta)
        smoothed = [name for name in self.loss_type if name in ("robust", "exo_pair")]
        if self.label_smoothing and not smoothed:
            raise InputError(
                f"label smoothing has no effect on {', '.join(self.loss_type)}",
                where=f"--label-smoothing {self.label_smoothing}",
                next="Use it with robust or exo_pair.",
            )
        _require(0 <= self.label_smoothing < 0.5, "--label-smoothing", "at least 0 and below 0.5", self.label_smoothing)
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise InputError("exo_pair needs label smoothing above 0", where="--label-smoothing", next="The EXO paper uses 0.001.")
        sorting = [name for name in self.loss_type if name in SORT_PAIRS]
        if self.use_weighting and sorting:
            raise InputError(
                f"weighting pairs has no meaning for {', '.join(sorting)}",
                where="--use-weighting",
                next="It sorts the pairs of a batch; use another loss.",
            )
        if self.use_weighting and "sft" in self.loss_type:
            raise InputError(
                "weighting pairs has no meaning for sft",
                where="--use-weighting",
                next="It is a mean over tokens; leave out one of the two.",
            )
        _require_one_of(self.f_divergence_type, F_DIVERGENCES, "--f-divergence-type")
        others = [name for name in self.loss_type if name not in F_LOSSES]
        if self.f_divergence_type != "reverse_kl" and others:
            raise InputError(
                f"TRL knows {', '.join(others)} under reverse_kl alone",
                where=f"--f-divergence-type {self.f_divergence_type}",
                expected=f"losses of {', '.join(F_LOSSES)}",
                next="Leave it out, or use another --loss-type.",
            )
        if self.f_alpha_divergence_coef != DEFAULTS["f_alpha_divergence_coef"] and self.f_divergence_type != "alpha_divergence":
            raise InputError(
                "belongs to --f-divergence-type alpha_divergence", where="--f-alpha-divergence-coef", next="Leave it out."
            )
        _require(math.isfinite(self.f_alpha_divergence_coef), "--f-alpha-divergence-coef", "a number", self.f_alpha_divergence_coef)
        _require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "--ld-alpha", "a number from 0 to 1", self.ld_alpha)

    def _check_schedule(self) -> None:
        positive = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps")
        optional = (
            "per_device_train_batch_size",
            "effective_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "max_steps",
            "eval_steps",
            "save_total_limit",
        )
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), _option(name), "a positive number", value)
        for name in ("weight_decay", "max_grad_norm", "dataloader_num_workers"):
            _require(getattr(self, name) >= 0, _option(name), "0 or more", getattr(self, name))
        _require(0 <= self.warmup_ratio < 1, "--warmup-ratio", "at least 0 and below 1", self.warmup_ratio)
        if (self.effective_batch_size is None) == (self.gradient_accumulation_steps is None):
            both = "both are given" if self.effective_batch_size is not None else "neither is given"
            raise InputError(f"{both}", where="--effective-batch-size, --gradient-accumulation-steps", expected="one of the two")
        self._check_scheduler()
        self._check_optimizer()
        if (self.tokens_per_batch is None) == (self.per_device_train_batch_size is None):
            both = "neither is given" if self.tokens_per_batch is None else "both are given"
            raise InputError(both, where="--tokens-per-batch, --per-device-train-batch-size", expected="one of the two")
        if self.tokens_per_batch is not None and (why := self.refuses_tokens) is not None:
            raise InputError(
                f"micro-batches have a fixed number of pairs with {why}",
                where=f"--tokens-per-batch {self.tokens_per_batch}",
                next="Give --per-device-train-batch-size instead.",
            )
        _require_one_of(self.save_strategy, ("no", "steps", "epoch"), "--save-strategy")
        if self.dtype is not None:
            _require_one_of(self.dtype, DTYPES, "--dtype")
        _require(
            self.eval_fraction is None or 0 < self.eval_fraction < 1,
            "--eval-fraction",
            "a number between 0 and 1",
            self.eval_fraction,
        )
        if self.eval_fraction is not None and self.eval_ref_store is not None:
            raise InputError("both are given", where="--eval-fraction, --eval-ref-store", expected="one of the two")
        if self.eval_steps is not None and not self.evaluates:
            raise InputError(
                "there is nothing to evaluate on", where="--eval-steps", next="Give --eval-ref-store or --eval-fraction too."
            )
        self._check_saving()

    def _check_scheduler(self) -> None:
        kind, given = self.lr_scheduler_type, self.lr_scheduler_kwargs or {}
        _require_one_of(kind, tuple(SCHEDULES), "--lr-scheduler-type")
        if unknown := [name for name in given if name not in SCHEDULES[kind]]:
            raise InputError(
                f"the schedule {kind} has no {', '.join(unknown)}",
                where="--lr-scheduler-kwargs",
                expected=", ".join(SCHEDULES[kind]) or "none: it has no arguments",
            )
        if kind in ONE_OF and not set(ONE_OF[kind]) & given.keys():
            raise InputError(
                f"the schedule {kind} needs {' or '.join(ONE_OF[kind])}",
                where="--lr-scheduler-kwargs",
                next=f"""Add --lr-scheduler-kwargs '{{"{ONE_OF[kind][-1]}": {"100" if "steps" in ONE_OF[kind][-1] else "0.1"}}}', say.""",
            )
        if self.warmup_steps is not None and self.warmup_ratio:
            raise InputError("both are given", where="--warmup-steps, --warmup-ratio", expected="one of the two")
        _require(self.warmup_steps is None or self.warmup_steps >= 0, "--warmup-steps", "0 or more", self.warmup_steps)

    def _check_optimizer(self) -> None:
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, _option(name), "at least 0 and below 1", getattr(self, name))
        _require(
            self.adam_epsilon > 0 and math.isfinite(self.adam_epsilon), "--adam-epsilon", "a positive number", self.adam_epsilon
        )
        if self.optim is None:
            return
        _require_one_of(self.optim, tuple(OPTIMIZERS), "--optim")
        changed = [_option(name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(self, name) != DEFAULTS[name]]
        if changed and self.optim not in ADAMS:
            raise InputError(f"has no effect on {self.optim}", where=", ".join(changed), next="Leave it out.")
        if (package := OPTIMIZERS[self.optim]) is not None and importlib.util.find_spec(package) is None:
            raise InputError("its package is not installed", where=f"--optim {self.optim}", next=f"pip install {package}")

    def _check_saving(self) -> None:
        if self.metric_for_best_model is not None:
            _require_one_of(self.metric_for_best_model, METRICS, "--metric-for-best-model")
            if not self.load_best_model_at_end:
                raise InputError("belongs to --load-best-model-at-end", where="--metric-for-best-model", next="Give both.")
        if not self.load_best_model_at_end:
            return
        where = "--load-best-model-at-end"
        if not self.evaluates:
            raise InputError("there is nothing to evaluate on", where=where, next="Give --eval-ref-store or --eval-fraction too.")
        if self.save_only_model:
            raise InputError("DeepSpeed loads whole checkpoints alone", where=f"{where}, --save-only-model", next="Leave one out.")
        matching = (
            self.save_strategy == "epoch"
            if self.eval_steps is None
            else self.save_strategy == "steps" and self.save_steps % self.eval_steps == 0
        )
        if not matching:
            evaluated = "once per epoch" if self.eval_steps is None else f"every {self.eval_steps} steps"
            raise InputError(
                "every checkpoint must have been evaluated",
                where=where,
                expected="--save-strategy epoch"
                if self.eval_steps is None
                else f"--save-strategy steps, --save-steps a multiple of {self.eval_steps}",
                found=f"saved by {self.save_strategy}{f', every {self.save_steps}' if self.save_strategy == 'steps' else ''}, evaluated {evaluated}",
                next="Change --save-strategy, --save-steps or --eval-steps.",
            )

    def _check_environment(self) -> None:
        for name in self.report_to:
            _require_one_of(name, tuple(REPORTERS), "--report-to")
            if importlib.util.find_spec(REPORTERS[name]) is None:
                raise InputError("not installed", where=f"--report-to {name}", next=f"pip install {REPORTERS[name]}")
        if self.push_to_hub != (self.hub_model_id is not None):
            raise InputError("belong together", where="--push-to-hub, --hub-model-id", next="Give both or neither.")
        if self.revision is not None and self.policy is None:
            raise InputError(
                "belongs to --policy", where="--revision", next="Without --policy the store's model and revision are used."
            )
        _require_one_of(self.layout, get_args(Layout), "--layout")
        if self.layout == "packed" and self.attn_implementation is not None:
            raise InputError(
                "the packed layout brings its own attention",
                where=f"--attn-implementation {self.attn_implementation}",
                next="Leave it out, or use --layout padded.",
            )
        _require_one_of(self.attention_kernel, get_args(AttentionKernel), "--attention-kernel")
        zero_stage(self.zero_config)

    def _check_adapter(self) -> None:
        modules = tuple(name for each in self.lora_target_modules for name in ([each] if is_pattern(each) else each.split(",")))
        object.__setattr__(self, "lora_target_modules", modules)
        _require(
            len(modules) < 2 or not any(name == "all-linear" or is_pattern(name) for name in modules),
            "--lora-target-modules",
            "names of layers, or all-linear alone, or one regular expression",
            ", ".join(modules),
        )
        if self.lora_dropout is not None:
            _require(0 <= self.lora_dropout < 1, "--lora-dropout", "at least 0 and below 1", self.lora_dropout)
        if not self.use_peft:
            if given := [
                _option(name) for name in (*OF_FRESH_ADAPTER, "load_in_4bit") if getattr(self, name) not in (None, False, ())
            ]:
                raise InputError("belongs to --use-peft", where=", ".join(given), next="Give --use-peft too.")
            return
        for option, package in (("--use-peft", "peft"), ("--load-in-4bit", "bitsandbytes")):
            if importlib.util.find_spec(package) is None and getattr(self, option[2:].replace("-", "_")):
                raise InputError(f"needs {package}, which is not installed", where=option, next=f"pip install {package}")

    @property
    def evaluates(self) -> bool:
        return self.eval_ref_store is not None or self.eval_fraction is not None

    @property
    def by_tokens(self) -> bool:
        """Are micro-batches of as many pairs as fit, rather than of a fixed number?"""
        return self.tokens_per_batch is not None

    @property
    def refuses_tokens(self) -> str | None:
        """What, of the options, needs micro-batches of a fixed number of pairs."""
        return fixed_pairs(self.layout, self.loss_type, self.router_aux_loss_coef, self.gradient_accumulation_steps)

    def pairs_per_step(self, world_size: int) -> int:
        """Over all of `world_size` devices. Raises InputError where micro-batches of a fixed number of pairs do not divide it."""
        if self.by_tokens:
            return self.effective_batch_size
        return self.per_device_train_batch_size * self.accumulation_steps(world_size) * world_size

    def accumulation_steps(self, world_size: int) -> int | None:
        """Micro-batches per optimizer step on each of `world_size` devices; None by tokens, as lengths decide. Raises InputError where
        the batch does not divide."""
        if self.by_tokens:
            return None
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        together = self.per_device_train_batch_size * world_size
        if self.effective_batch_size % together:
            fitting = [
                size for size in range(1, self.effective_batch_size + 1) if self.effective_batch_size % (size * world_size) == 0
            ]
            raise InputError(
                f"an effective batch of {self.effective_batch_size} pairs does not divide over {world_size} devices"
                f" with {self.per_device_train_batch_size} each",
                where="--effective-batch-size",
                expected=f"a multiple of {together}",
                found=self.effective_batch_size,
                next=f"Use --per-device-train-batch-size {' or '.join(map(str, fitting[-4:]))}."
                if fitting
                else "Use another number of devices.",
            )
        return self.effective_batch_size // together

    def to_json(self) -> dict:
        """For run.json; paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def fixed_pairs(
    layout: str, loss_type: tuple[str, ...], router_aux_loss_coef: float | None, gradient_accumulation_steps: int | None
) -> str | None:
    """What, of these options, needs micro-batches of a fixed number of pairs; None: nothing does."""
    if layout == "padded":
        return "--layout padded"
    if sorting := [name for name in loss_type if name in SORT_PAIRS]:
        return f"--loss-type {sorting[0]}, which sorts the pairs of each"
    if router_aux_loss_coef:
        return "--router-aux-loss-coef, which balances the tokens of each"
    if gradient_accumulation_steps is not None:
        return "--gradient-accumulation-steps"
    return None


def default_beta(loss_type: tuple[str, ...]) -> float:
    """The usual beta of these losses. Raises InputError where they have not got the same."""
    usual = {BETA.get(name, BETA_ELSE) for name in loss_type if name != "sft"} or {BETA_ELSE}
    if len(usual) > 1:
        raise InputError(
            "must be given: these losses have betas of different scales",
            where="--beta",
            found=", ".join(f"{name} {BETA.get(name, BETA_ELSE):g}" for name in loss_type if name != "sft"),
        )
    return usual.pop()


def beta_notice(config: TrainConfig) -> str | None:
    """What is said of a beta more than ten times larger or smaller than the usual one of its loss."""
    for name in config.loss_type:
        usual = BETA.get(name, BETA_ELSE)
        if name != "sft" and not usual / 10 <= config.beta <= usual * 10:
            scale = f"{name} compares {'means' if name in BETA else 'sums'} of log-probs" if name != "ipo" else "ipo's own"
            return f"beta {config.beta:g} is far from the usual {usual:g} of --loss-type {name} ({scale}): is it meant for another loss?"
    return None


FREE_ON_RESUME = frozenset(
    {
        *(
            "ref_store",
            "output_dir",
            "eval_ref_store",
            "policy",
            "revision",
            "tokenizer",
            "chat_template",
            "allow_different_policy",
        ),
        *(
            "tokens_per_batch",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "torch_compile",
            "attn_implementation",
            "attention_kernel",
            "layout",
        ),
        *(
            "dataloader_num_workers",
            "zero_config",
            "logging_steps",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "eval_steps",
        ),
        *("report_to", "run_name", "resume", "push_to_hub", "hub_model_id", "effective_batch_size"),
        *("save_only_model", "load_best_model_at_end", "metric_for_best_model"),
    }
)
"""Settings that a resumed run may change: paths, speed and bookkeeping. The rest decide where the run goes, and must be the same.
The store is compared by its identity and the batch by its size in pairs, whatever the paths and the number of devices."""

DEFAULTS = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}

assert {field.name for field in fields(TrainConfig)} >= FREE_ON_RESUME


def zero_stage(path: Path) -> int:
    """The ZeRO stage of a DeepSpeed configuration: 0, 1 or 2. Raises InputError for a file that is none, or stage 3."""
    where = f"--zero-config {path}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=where) from error
    except (KeyError, TypeError) as error:
        raise InputError("names no ZeRO stage", where=where, expected='{"zero_optimization": {"stage": 2, …}, …}') from error
    if stage not in (0, 1, 2):
        raise InputError(
            "this trains with whole parameters on every device",
            where=where,
            expected="ZeRO stage 0, 1 or 2",
            found=f"stage {stage}",
            next="The gate rescores with the live policy before step 1, which needs them whole.",
        )
    return stage


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise InputError("out of range", where=where, expected=expected, found=found)


def _require_one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise InputError("unknown value", where=where, expected=f"one of {', '.join(allowed)}", found=value)
