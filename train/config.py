"""Everything a training run is told, as options (options.py). Contradictions are refused (checks.py), nothing is adjusted in silence."""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from options import FILE, STORE_TO_READ, IntegerOrAuto, JsonObject, NamedStore, Numbers, Option, named
from precompute.scorer import AttentionKernel, Layout
from presets import Preset
from store import DTYPES
from store.errors import InputError
from train.checks import check, is_pattern
from train.choices import F_DIVERGENCES, METRICS, OPTIMIZERS, REPORTERS, SMOOTHED, SORT_PAIRS

ZERO2 = Path(__file__).with_name("zero2.json")
"""The DeepSpeed configuration used unless another is given: stage 2, `auto` where the other options already say it."""

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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run; each field is an option. What changes the numbers and depends on the data set or the loss has no default here: presets.py
    has such values."""

    ref_store: Annotated[Path, replace(STORE_TO_READ, group=PAIRS)]
    """Sealed store with the pairs and their reference log-probs."""
    eval_ref_store: Annotated[
        tuple[str, ...],
        Option(
            "Another store, made with the same model, to evaluate on. Repeatable: each is then evaluated by its NAME, or its folder's.",
            PAIRS,
            type=NamedStore(),
            instead_of=("eval_fraction",),
        ),
    ] = ()
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
    weight: Annotated[
        str | None,
        Option("SQL for how many times a pair counts in an epoch: \"if(dataset = 'a', 2, 0.5)\".", PAIRS, default="1"),
    ] = None
    """Of 0.5 a pair is in or out by the hash of its pair_id."""
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
    label_smoothing: Annotated[float, Option(f"For {', '.join(SMOOTHED)}.", LOSS)] = 0.0
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
    warmup_ratio: Annotated[
        float,
        Option(
            "Share of all steps; 0 with the schedule constant.",
            OPTIMIZATION,
            default=usual("warmup_ratio"),
            instead_of=("warmup_steps",),
        ),
    ] = Preset.warmup_ratio
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
        str | None,
        Option(
            "What decides which evaluation is best; of several stores, that of the first.", RECORDS, default="loss", choices=METRICS
        ),
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
        for name in ("ref_store", "output_dir", "chat_template", "zero_config"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("loss_type", "loss_weights", "report_to", "lora_target_modules"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        stores = self.eval_ref_store or ()
        if isinstance(stores, (str, Path)):  # as earlier run.json have the one
            stores = (stores,)
        object.__setattr__(self, "eval_ref_store", tuple(map(str, stores)))
        modules = tuple(name for each in self.lora_target_modules for name in ([each] if is_pattern(each) else each.split(",")))
        object.__setattr__(self, "lora_target_modules", modules)
        check(self)

    @property
    def evaluates(self) -> bool:
        """Is there anything to evaluate on?"""
        return bool(self.eval_ref_store) or self.eval_fraction is not None

    @property
    def eval_stores(self) -> dict[str, Path]:
        """`eval_ref_store` by name; one store alone needs none, and then has none."""
        stores = [named(each) for each in self.eval_ref_store]
        if len(stores) > 1:
            stores = [(name or Path(path).name, path) for name, path in stores]
        return {name: Path(path) for name, path in stores}

    @property
    def deciding_metric(self) -> str | None:
        """What decides which evaluation is best, as it is logged, without `eval_`; of several stores the first one's."""
        if not self.load_best_model_at_end:
            return None
        name, metric = next(iter(self.eval_stores), ""), self.metric_for_best_model or "loss"
        return f"{name}_{metric}" if name else metric

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
