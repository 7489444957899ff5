"""What transformers and TRL know by name, known here without importing them; tests compare."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
}
"""transformers' schedules of the learning rate and their arguments, for --lr-scheduler-kwargs. Those that follow a metric are left out."""

ONE_OF = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Of these arguments a schedule needs one."""

WITHOUT_WARMUP = ("constant",)
"""Schedules that take no steps of warm-up."""

ADAMS: dict[str, str | None] = {
    "adamw_torch_fused": None,
    "adamw_torch": None,
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
}
"""transformers' optimizers that take --adam-beta1, --adam-beta2 and --adam-epsilon, and the package that each needs."""

OPTIMIZERS: dict[str, str | None] = ADAMS | {
    "sgd": None,
    "rmsprop": None,
    "lion_32bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
    "paged_lion_32bit": "bitsandbytes",
    "paged_lion_8bit": "bitsandbytes",
}
"""Those and others that ZeRO can split. Not adafactor: its states are of rows and columns, and ZeRO flattens parameters. Not adagrad: DeepSpeed
makes it anew with one group of parameters, where transformers has two."""

REPORTERS: dict[str, str] = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "neptune": "neptune",
    "azure_ml": "azureml",
    "codecarbon": "codecarbon",
    "dagshub": "dagshub",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
}
"""transformers' reporters, and the module that each needs."""

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

SMOOTHED = ("exo_pair", "robust", *SORT_PAIRS)
"""Losses in which TRL uses label smoothing."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

F_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses that TRL computes under another divergence than reverse KL."""

METRICS = ("loss", "rewards/accuracies", "rewards/margins")
"""Of an evaluation, by which one checkpoint is better than another."""
