"""What a training run is told is checked before anything is loaded."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig

from store.errors import InputError
from train.beta import beta_notice, default_beta
from train.choices import F_DIVERGENCES, F_LOSSES, LOSS_TYPES, ONE_OF, OPTIMIZERS, REPORTERS, SCHEDULES
from train.config import FREE_ON_RESUME, ZERO2, TrainConfig
from train.zero import refuse_contradictions

GOOD = TrainConfig(
    ref_store=Path("store/think"),
    output_dir=Path("runs/think"),
    loss_type=("sigmoid_norm",),
    beta=5.0,
    learning_rate=1e-6,
    per_device_train_batch_size=1,
    effective_batch_size=128,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_type": ("sigmoid", "dpo")}, ["unknown loss type", "dpo", "sigmoid_norm", "discopop"]),
        ({"loss_type": ()}, ["unknown loss type"]),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, ["2 weights", "found 1"]),
        ({"loss_weights": (float("nan"),)}, ["--loss-weights", "found nan"]),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (0.0, 0.0)}, ["--loss-weights", "not all 0", "found 0.0,0.0"]),
        ({"loss_type": ("ipo", "ipo")}, ["given twice", "--loss-weights"]),
        ({"seed": -1}, ["--seed", "found -1"]),
        ({"seed": 2**32}, ["--seed", "4,294,967,295"]),
        ({"max_grad_norm": float("inf")}, ["--max-grad-norm"]),
        ({"beta": 0.0}, ["--beta", "positive"]),
        ({"beta": float("nan")}, ["--beta"]),
        ({"label_smoothing": 0.1}, ["no effect on sigmoid_norm", "exo_pair, robust, aot, aot_unpaired"]),
        ({"loss_type": ("exo_pair",)}, ["exo_pair", "above 0"]),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, ["--label-smoothing", "below 0.5"]),
        ({"ld_alpha": 1.5}, ["--ld-alpha"]),
        ({"learning_rate": -1.0}, ["--learning-rate"]),
        ({"warmup_ratio": 1.0}, ["--warmup-ratio"]),
        ({"num_train_epochs": float("inf")}, ["--num-train-epochs"]),
        ({"max_steps": 0}, ["--max-steps"]),
        ({"max_length": 0}, ["--max-length"]),
        ({"weight_decay": -0.1}, ["--weight-decay"]),
        ({"gradient_accumulation_steps": 4}, ["both are given"]),
        ({"effective_batch_size": None}, ["neither is given"]),
        ({"lr_scheduler_type": "linaer"}, ["linaer", "cosine"]),
        ({"save_strategy": "best"}, ["--save-strategy"]),
        ({"dtype": "bf16"}, ["bf16", "bfloat16"]),
        ({"eval_steps": 10}, ["--eval-ref-store"]),
        ({"report_to": ("mlfow",)}, ["mlfow", "wandb", "mlflow"]),
        ({"report_to": ("neptune",)}, ["--report-to neptune: not installed"]),
        ({"warmup_steps": 10}, ["--warmup-steps, --warmup-ratio", "one of the two"]),
        ({"warmup_steps": -1, "warmup_ratio": 0.0}, ["--warmup-steps", "0 or more"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["reduce_lr_on_plateau", "cosine"]),
        ({"lr_scheduler_kwargs": {"power": 2}}, ["linear has no power", "none: it has no arguments"]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, ["no cycles", "num_cycles"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["needs min_lr or min_lr_rate", """'{"min_lr_rate": 0.1}'"""]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["needs num_decay_steps"]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-8, "min_lr_rate": 0.1}},
            ["min_lr and min_lr_rate", "only one"],
        ),
        ({"lr_scheduler_type": "constant"}, ["--warmup-ratio 0.1: the schedule constant has no warm-up", "constant_with_warmup"]),
        ({"loss_type": ("sigmoid", "hinge"), "use_weighting": True}, ["--use-weighting, --loss-type hinge"]),
        ({"optim": "adafactor"}, ["--optim", "adamw_torch"]),
        ({"optim": "lion_32bit"}, ["--optim lion_32bit", "pip install bitsandbytes"]),
        ({"optim": "sgd", "adam_beta2": 0.95}, ["--adam-beta2: has no effect on sgd"]),
        ({"adam_beta1": 1.0}, ["--adam-beta1", "below 1"]),
        ({"adam_epsilon": 0.0}, ["--adam-epsilon", "positive"]),
        ({"f_divergence_type": "kl"}, ["--f-divergence-type", "forward_kl"]),
        ({"loss_type": ("aot",), "f_divergence_type": "forward_kl"}, ["aot under reverse_kl alone", "sigmoid_norm"]),
        ({"f_alpha_divergence_coef": 0.3}, ["belongs to --f-divergence-type alpha_divergence"]),
        ({"load_best_model_at_end": True}, ["nothing to evaluate on"]),
        ({"load_best_model_at_end": True, "eval_fraction": 0.1}, ["expected --save-strategy epoch", "saved by steps, every 500"]),
        (
            {"load_best_model_at_end": True, "eval_fraction": 0.1, "eval_steps": 200},
            ["--save-steps a multiple of 200", "evaluated every 200 steps"],
        ),
        (
            {"load_best_model_at_end": True, "eval_fraction": 0.1, "save_strategy": "epoch", "save_only_model": True},
            ["whole checkpoints alone"],
        ),
        ({"metric_for_best_model": "loss"}, ["belongs to --load-best-model-at-end"]),
        (
            {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "eval_fraction": 0.1},
            ["--metric-for-best-model", "rewards/accuracies"],
        ),
        ({"push_to_hub": True}, ["--hub-model-id"]),
        ({"hub_model_id": "me/x"}, ["--push-to-hub"]),
        ({"revision": "main"}, ["--policy"]),
        ({"zero_config": Path("nowhere.json")}, ["--zero-config nowhere.json"]),
    ],
)
def test_contradictions_are_refused_by_name(changes, words):
    with pytest.raises(InputError) as refusal:
        replace(GOOD, **changes)
    for word in words:
        assert word in str(refusal.value)


def test_beta_belongs_to_the_loss():
    """TRL's 0.1 but for mean log-probs; a beta ten times off is named, the usual ones are not."""
    assert default_beta(("sigmoid_norm",)) == default_beta(("sft", "sigmoid_norm")) == 5.0
    assert (
        {default_beta((name,)) for name in LOSS_TYPES if name != "sigmoid_norm"}
        == {0.1}
        == {DPOConfig.__dataclass_fields__["beta"].default}
    )
    with pytest.raises(InputError, match=r"--beta: must be given.*sigmoid 0.1, sigmoid_norm 5"):
        default_beta(("sigmoid", "sigmoid_norm"))
    for loss, beta, named in (
        (("sigmoid",), 5.0, "usual 0.1 of --loss-type sigmoid"),
        (("sigmoid_norm",), 0.1, "usual 5 of --loss-type sigmoid_norm"),
        (("sft", "hinge"), 5.0, "usual 0.1 of --loss-type hinge"),
        (("sigmoid",), 0.01, None),
        (("sigmoid_norm",), 2.0, None),
        (("sft",), 5.0, None),
    ):
        notice = beta_notice(loss, beta)
        assert notice is None if named is None else named in notice


def test_sft_is_not_weighted():
    with pytest.raises(InputError, match="--use-weighting.*sft"):
        replace(GOOD, loss_type=("sigmoid", "sft"), use_weighting=True)


@pytest.mark.parametrize(
    ("values", "ours", "theirs"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "--per-device-train-batch-size 1", "train_micro_batch_size_per_gpu 4"),
        ({"gradient_accumulation_steps": 2}, "--gradient-accumulation-steps 32", "gradient_accumulation_steps 2"),
        ({"train_batch_size": 64}, "--effective-batch-size 128", "train_batch_size 64"),
        ({"gradient_clipping": 0.5}, "--max-grad-norm 1.0", "gradient_clipping 0.5"),
        ({"bf16": {"enabled": False}}, "--dtype bfloat16", "bf16.enabled false"),
        ({"fp16": {"enabled": True}}, "--dtype bfloat16", "fp16.enabled true"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "--learning-rate 1e-06", "optimizer.params.lr 1e-05"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "[0.9, 0.999]", "betas [0.9, 0.95]"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "--adam-epsilon 1e-08", "optimizer.params.eps 1e-06"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "--weight-decay 0.0", "optimizer.params.weight_decay 0.1"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "--lr-scheduler-type linear", "scheduler WarmupLR"),
        (
            {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype bf16, with --dtype bfloat16 and stage 0",
            "fp32",
        ),
    ],
)
def test_deepspeeds_file_and_the_options_say_the_same_or_are_refused(tmp_path, values, ours, theirs):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    with pytest.raises(InputError) as refusal:
        refuse_contradictions(replace(GOOD, zero_config=path), "bfloat16", accumulation=32, batch=128)
    expected, found = str(refusal.value).split("; found ")
    assert ours in expected and theirs in found


def test_deepspeeds_file_may_repeat_the_options(tmp_path):
    path = tmp_path / "zero.json"
    same = {"train_batch_size": 128, "gradient_clipping": 1, "bf16": {"enabled": True}, "gradient_accumulation_steps": "auto"}
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "weight_decay": "auto", "betas": [0.9, 0.999]}}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | same | adam))
    refuse_contradictions(replace(GOOD, zero_config=path), "bfloat16", accumulation=32, batch=128)
    refuse_contradictions(GOOD, "float32", accumulation=32, batch=128)
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}))
    refuse_contradictions(replace(GOOD, zero_config=path), "float32", accumulation=32, batch=128)


def test_the_padded_layout_may_be_compiled():
    assert replace(GOOD, torch_compile=True, layout="padded").torch_compile
    assert replace(GOOD, torch_compile=True).torch_compile


def test_missing_reporter_is_refused_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        replace(GOOD, report_to=("wandb",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ('{"bf16": {}}', "names no ZeRO stage"),
        ("[]", "names no ZeRO stage"),
        ('{"zero_optimization": {"stage": 3}}', "found stage 3"),
    ],
)
def test_zero_config_must_leave_parameters_whole(tmp_path, content, words):
    (tmp_path / "zero.json").write_text(content)
    with pytest.raises(InputError, match=words):
        replace(GOOD, zero_config=tmp_path / "zero.json")


def test_accumulation_is_derived_and_must_come_out_whole():
    assert GOOD.accumulation_steps(world_size=4) == 32
    assert replace(GOOD, per_device_train_batch_size=8).accumulation_steps(world_size=4) == 4
    assert replace(GOOD, effective_batch_size=None, gradient_accumulation_steps=5).accumulation_steps(world_size=3) == 5
    with pytest.raises(InputError, match="128 pairs does not divide over 3 devices"):
        GOOD.accumulation_steps(world_size=3)
    with pytest.raises(InputError, match="--per-device-train-batch-size 4 or 8 or 16 or 32"):
        replace(GOOD, per_device_train_batch_size=3).accumulation_steps(world_size=4)


def test_loss_types_are_those_of_trl():
    from trl.trainer import dpo_trainer

    source = inspect.getsource(dpo_trainer.DPOTrainer._compute_loss)
    branches = re.findall(r'loss_type == "(\w+)"', source)
    assert sorted(LOSS_TYPES) == sorted(branches)
    assert len(LOSS_TYPES) == 15


def test_schedules_are_those_of_transformers():
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULES) <= {schedule.value for schedule in SchedulerType}


def test_what_is_known_by_name_is_transformers_and_trls():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.training_args import OptimizerNames
    from trl import DPOTrainer

    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    assert set(OPTIMIZERS) <= {each.value for each in OptimizerNames}
    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    theirs = {kind.value: inspect.signature(function).parameters for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    for kind, names in SCHEDULES.items():
        assert set(names) == theirs[kind].keys() - common
        required = {name for name in names if theirs[kind][name].default is inspect.Parameter.empty}
        assert required <= set(ONE_OF.get(kind, ()))
    source = inspect.getsource(DPOTrainer)
    assert all(f'self.f_divergence_type == "{name}"' in source for name in F_DIVERGENCES)
    (listed,) = re.findall(r"f_divergence_loss_types = \{([^}]*)\}", source)
    assert set(re.findall(r'"(\w+)"', listed)) == set(F_LOSSES)


def test_every_setting_is_written_to_json_and_lists_become_tuples():
    config = replace(GOOD, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], report_to=[])
    assert config.loss_type == ("sigmoid", "sft")
    written = json.loads(json.dumps(config.to_json()))
    assert written["ref_store"] == "store/think"
    assert written.keys() >= FREE_ON_RESUME


def test_packaged_zero_config_is_stage_2_and_adapts_to_the_run():
    config = json.loads(ZERO2.read_text())
    assert config["zero_optimization"]["stage"] == 2
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[name] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_accelerate_config_names_nothing_that_the_zero_config_has():
    """accelerate refuses a config file whose fields also stand in the DeepSpeed file, mixed_precision among them."""
    config = yaml.safe_load(ZERO2.with_name("accelerate.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    assert config["num_processes"] == 4
    assert config["deepspeed_config"].keys() == {"deepspeed_config_file", "zero3_init_flag"}
    assert "mixed_precision" not in config
    assert (ZERO2.parent.parent / config["deepspeed_config"]["deepspeed_config_file"]).samefile(ZERO2)
