"""TRL's loss on values from a store: equal to TRL with its own reference, for every loss type, and without what TRL does besides."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import EXPERTS, SMALL
from train_setup import MAX_LENGTH, make_rows, make_store, make_world
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PhimoeConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer import base_trainer, dpo_trainer
from trl.trainer.utils import hash_module

from store.errors import InputError
from store.reader import open_store
from train.choices import LOSS_TYPES, SMOOTHED
from train.data import dataset_of, lengths_of
from train.dropout import turn_off
from train.trainer import StoreDPOTrainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_rows=24)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {
        "output_dir": str(tmp_path_factory.mktemp("unused")),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": MAX_LENGTH,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }


def policy(world) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(world.model)


def moved(world) -> PreTrainedModel:
    """A policy that is not the reference, so that no value stands where it starts."""
    model = policy(world)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def tokenizer(world) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(world.model)


def from_store(world, settings, model=None, **changes) -> StoreDPOTrainer:
    args = DPOConfig(**(settings | {"precompute_ref_log_probs": True} | changes))
    dataset = dataset_of(open_store(world.store), args.max_length, args.ld_alpha)
    return StoreDPOTrainer(model=model or policy(world), args=args, train_dataset=dataset, processing_class=tokenizer(world))


def stock(world, settings, model=None, **changes) -> DPOTrainer:
    """TRL's own trainer on the same rows as text, with its own reference: online, or its precompute pass."""
    args = DPOConfig(**(settings | changes))
    reference = None if args.precompute_ref_log_probs else policy(world)
    rows = Dataset.from_list(list(world.rows))
    return DPOTrainer(
        model=model or policy(world), ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer(world)
    )


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_starts(world, settings, loss_type):
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    (loss,) = losses(from_store(world, settings, loss_type=[loss_type], max_steps=1, **smoothing))
    assert math.isfinite(loss)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": ["sigmoid_norm"], "beta": 5.0},
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"ld_alpha": 0.3},
        {"max_length": 40},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "loss_type": ["sigmoid_norm"]},
    ],
    ids=lambda loss: " ".join(f"{name}={value}" for name, value in loss.items()),
)
def test_losses_equal_trls_with_an_online_reference(world, settings, loss):
    ours, theirs = losses(from_store(world, settings, **loss)), losses(stock(world, settings, **loss))
    assert len(set(theirs)) == 3  # it moves
    # ipo's is a square, about 25: an error of the margin counts tenfold.
    assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_a_run_that_diverges_ends_with_one_error(world, settings):
    trainer = from_store(world, settings, learning_rate=1e30, optim="sgd")
    with pytest.raises(InputError, match=r"step 2 of 3: .* diverged; found .*, gradient norm nan. .*lower --learning-rate"):
        trainer.train()


def test_weights_that_are_no_numbers_are_not_saved(world, settings):
    """Steps between two logged ones: nobody looks at their loss, and the last good checkpoint must not be the oldest of many."""
    trainer = from_store(world, settings, learning_rate=1e30, optim="sgd", logging_steps=100, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=r"step \d of 3: .* diverged; found weights that are no numbers. .*lower --learning-rate"):
        trainer.train()
    for checkpoint in Path(trainer.args.output_dir).glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_a_step_that_the_engine_left_out_is_no_step(world, settings):
    trainer = from_store(world, settings, max_steps=1)
    trainer.train()
    trainer.model_wrapped.skipped_steps = 2  # DeepSpeed's name, after two gradients without end
    with pytest.raises(InputError, match="loss 0.5, gradient norm 1, 2 step.s. without effect"):
        trainer.log({"loss": 0.5, "grad_norm": 1.0})
    trainer.log({"loss": 0.5, "grad_norm": 1.0})
    with pytest.raises(InputError, match="gradient norm inf"):
        trainer.log({"loss": 0.5, "grad_norm": math.inf})
    trainer.args.fp16 = True  # there they are part of the search for a scale
    trainer.log({"loss": 0.5, "grad_norm": math.inf})


@pytest.mark.parametrize(
    "derived", [{"max_length": 40}, {"max_length": 24}, {"ld_alpha": 0.3}, {"max_length": 40, "ld_alpha": 0.7}]
)
def test_derived_rows_equal_trls_own_precompute(world, settings, derived):
    """TRL tokenizes, drops, truncates and scores the text rows itself, at that max_length."""
    ours = from_store(world, settings, **derived)
    theirs = stock(world, settings, precompute_ref_log_probs=True, **derived)
    assert len(ours.train_dataset) == len(theirs.train_dataset)
    assert len(ours.train_dataset) < 24 or derived.get("max_length") != 24  # the shortest length drops some
    batch = list(range(len(ours.train_dataset)))
    one = ours.data_collator(ours.train_dataset.__getitems__(batch))
    other = theirs.data_collator(theirs.train_dataset.__getitems__(batch))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(one[name], other[name])
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert one[name].dtype == torch.float32
        assert torch.allclose(one[name], other[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("divergence", "dtype"), [("reverse_kl", torch.float64), ("alpha_divergence", torch.float32)])
def test_packed_log_probs_are_summed_in_float64(world, settings, monkeypatch, divergence, dtype):
    """In TRL's loss, in training and evaluation, but under the divergence that knows no float64."""
    seen = []
    logsigmoid = dpo_trainer.F.logsigmoid
    monkeypatch.setattr(dpo_trainer.F, "logsigmoid", lambda margins: seen.append(margins.dtype) or logsigmoid(margins))
    store = open_store(world.store)
    dataset = dataset_of(store, MAX_LENGTH)
    args = DPOConfig(**settings | {"precompute_ref_log_probs": True, "f_divergence_type": divergence, "max_steps": 1})
    trainer = StoreDPOTrainer(
        model=policy(world),
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer(world),
        lengths=lengths_of(dataset, store, MAX_LENGTH),
    )
    trainer.train()
    assert set(seen) == {dtype}
    seen.clear()
    trainer.evaluate(dataset)
    assert set(seen) == {dtype}


def test_sliding_window_models_start_at_ln_2(tmp_path, settings):
    world = make_world(tmp_path, num_rows=12, architecture="olmo3")
    (loss,) = losses(from_store(world, settings, loss_type=["sigmoid_norm"], beta=5.0, max_steps=1))
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_evaluate_takes_a_store_at_any_time(world, settings, tmp_path):
    held_out = make_store(tmp_path / "held-out", world.model, make_rows(9, seed=5))
    dataset = dataset_of(held_out, MAX_LENGTH)
    trainer = from_store(world, settings)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    after = trainer.evaluate({"a": dataset, "b": dataset}, metric_key_prefix="late")
    assert after["late_a_loss"] == after["late_b_loss"] != pytest.approx(math.log(2), abs=1e-4)


EVALUATED = {
    **{name: {"loss_types": [name]} for name in LOSS_TYPES},
    "sigmoid + sft": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "aot + sft": {"loss_types": ["aot", "sft"], "loss_weights": [0.5, 0.3]},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.3},
}
PLAIN = {"loss_types": ["sigmoid"], "use_weighting": False, "ld_alpha": None, "label_smoothing": 0.0}


def test_evaluation_is_that_of_stock_trl_with_all_pairs_in_one_batch(world, settings, tmp_path):
    """Each loss type and each metric, whatever the batch size: 7 pairs in batches of 3 leave one alone, which TRL's mean of batches would
    count three times. A policy that is not the reference, so that no value stands where it starts."""
    rows = make_rows(7, seed=5)
    held_out = make_store(tmp_path / "held-out", world.model, rows)
    shared = settings | {"use_weighting": True, "discopop_tau": 1.0}  # as in packed_cases.py

    args = DPOConfig(**shared | {"per_device_eval_batch_size": 7})
    texts = {"train_dataset": Dataset.from_list(list(world.rows)), "eval_dataset": Dataset.from_list(list(rows))}
    theirs = DPOTrainer(model=moved(world), ref_model=policy(world), args=args, processing_class=tokenizer(world), **texts)
    args = DPOConfig(**shared | {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 3})
    dataset = dataset_of(open_store(world.store), MAX_LENGTH)
    ours = [
        StoreDPOTrainer(model=moved(world), args=args, train_dataset=dataset, processing_class=tokenizer(world), lengths=lengths)
        for lengths in (None, lengths_of(dataset, open_store(world.store), MAX_LENGTH))
    ]
    for name, loss in EVALUATED.items():
        smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
        for trainer in (theirs, *ours):
            vars(trainer).update(PLAIN | {"loss_weights": [1.0] * len(loss.get("loss_types", [1]))} | smoothing | loss)
        evaluated = dataset_of(held_out, MAX_LENGTH, ours[0].ld_alpha)
        expected, *found = (trainer.evaluate(data) for trainer, data in ((theirs, None), *((each, evaluated) for each in ours)))
        values = {key for key in expected if not key.endswith(("_runtime", "_per_second", "_time"))}
        assert {"eval_loss", "eval_entropy", "eval_rewards/accuracies", "eval_logits/chosen", "eval_logps/rejected"} <= values
        for each in found:
            assert {key: each[key] for key in values} == pytest.approx(
                {key: expected[key] for key in values}, rel=2e-5, abs=1e-5
            ), name


def test_an_evaluations_auxiliary_loss_does_not_depend_on_the_batch_size(world, settings, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **(SMALL | EXPERTS | {"num_hidden_layers": 1})))
    evaluated = dataset_of(make_store(tmp_path / "held-out", world.model, make_rows(5, seed=5)), MAX_LENGTH)
    seen = []
    for size in (1, 3):
        args = settings | {"precompute_ref_log_probs": True, "router_aux_loss_coef": 0.5, "per_device_eval_batch_size": size}
        store = open_store(world.store)
        dataset = dataset_of(store, MAX_LENGTH)
        trainer = StoreDPOTrainer(
            model=copy.deepcopy(model),
            args=DPOConfig(**args),
            train_dataset=dataset,
            processing_class=tokenizer(world),
            lengths=lengths_of(dataset, store, MAX_LENGTH),
        )
        seen.append(trainer.evaluate(evaluated))
    assert seen[0]["eval_aux_loss"] > 1
    for name in ("eval_loss", "eval_aux_loss"):
        assert seen[0][name] == pytest.approx(seen[1][name], rel=1e-6)


def test_label_smoothing_is_accepted_for_the_losses_that_trl_smooths(world, settings, tmp_path):
    """Those whose value it changes; it is refused for the others, which would ignore it."""
    trainer = from_store(world, settings)
    evaluated = dataset_of(make_store(tmp_path / "held-out", world.model, make_rows(4, seed=5), shift=3.0), MAX_LENGTH)

    def loss(name: str, smoothing: float) -> float:
        vars(trainer).update(PLAIN | {"loss_types": [name], "loss_weights": [1.0], "label_smoothing": smoothing})
        return trainer.evaluate(evaluated)["eval_loss"]

    changed = [name for name in LOSS_TYPES if abs(loss(name, 0.1) - loss(name, 0.3)) > 1e-3]
    assert sorted(changed) == sorted(SMOOTHED)


def test_what_is_logged_every_second_step_is_what_trl_logs(world, settings):
    """The mean of steps, each of them the mean over its pairs or its tokens: of 10, 10 and 4 pairs, and 10 of the next epoch; here in three micro-batches,
    in TRL in one."""
    changes = settings | {"logging_steps": 2, "max_steps": 4}
    theirs = stock(world, changes, moved(world), per_device_train_batch_size=10)
    dataset = dataset_of(open_store(world.store), MAX_LENGTH)
    lengths = lengths_of(dataset, open_store(world.store), MAX_LENGTH)
    ours = StoreDPOTrainer(
        model=moved(world),
        args=DPOConfig(**(changes | {"precompute_ref_log_probs": True})),
        train_dataset=dataset,
        processing_class=tokenizer(world),
        lengths=lengths,
        tokens_per_batch=int(lengths.packed.sum()) // 5,
        pairs_per_step=10,
    )
    assert ours.bins.num_micro_steps > 1
    (mine, speed), (trls, _) = (
        [[entry for entry in trainer.state.log_history if name in entry] for name in ("loss", "train_runtime")]
        for trainer in (ours, theirs)
        if trainer.train()
    )
    assert [entry["step"] for entry in mine] == [entry["step"] for entry in trls] == [2, 4]
    for one, other in zip(mine, trls, strict=True):
        expected = {name: value for name, value in other.items() if name != "loss"}
        assert {name: one[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=2e-5)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert speed[0]["train_samples_per_second"] * speed[0]["train_runtime"] == pytest.approx(34, rel=0.02)


def test_sft_is_a_mean_over_the_global_batch(world, settings):
    """Whatever the micro-batches: four steps of eight pairs, in one micro-batch, in two and in eight."""
    histories = []
    for size in (8, 4, 1):
        micro = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        histories.append(losses(from_store(world, settings, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **micro)))
    assert len(set(histories[0])) == 3  # it moves
    for other in histories[1:]:
        assert other == pytest.approx(histories[0], rel=1e-5)


def test_a_checkpoints_dropout_is_not_used_and_its_configuration_is_saved_as_it_was(world, settings, tmp_path):
    changed = policy(world)
    changed.config.attention_dropout, changed.config.use_cache = 0.2, True
    changed.save_pretrained(tmp_path / "dropout")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dropout")
    assert model.model.layers[0].self_attn.attention_dropout == 0.2
    trainer = from_store(world, settings, model, max_steps=1)
    assert trainer.without_dropout == ("attention_dropout 0.2",)
    assert losses(trainer) == pytest.approx([math.log(2)], abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dropout", "saved"))
    assert (after["attention_dropout"], after["use_cache"]) == (0.2, True)
    # transformers takes those of the tokenizer.
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {
        "pad_token_id",
        "eos_token_id",
    }


@pytest.mark.parametrize("kind", [GPT2Config, PhimoeConfig])
def test_all_that_is_random_in_a_forward_is_turned_off(kind):
    """GPT-2 has `nn.Dropout` modules, Phi-MoE shares that are plain numbers, router jitter among them."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shares = (
        {"resid_pdrop": 0.3, "attn_pdrop": 0.3} if kind is GPT2Config else {"attention_dropout": 0.3, "router_jitter_noise": 0.3}
    )
    more = {} if kind is GPT2Config else {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(kind(**small, **shares, **more)).train()
    ids = torch.arange(20)[None]

    def same_twice() -> bool:
        with torch.no_grad():
            return torch.equal(*(model(input_ids=ids, use_cache=False).logits for _ in range(2)))

    assert not same_twice()
    assert turn_off(model)
    assert same_twice() and turn_off(model) == ()


NOISY = {
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "persimmon": {"attention_dropout": 0.3, "intermediate_size": 32},
    "phimoe": {"router_jitter_noise": 0.2, "input_jitter_noise": 0.1, "intermediate_size": 32, "num_local_experts": 4},
}
"""Falcon's and Persimmon's layers read the configuration itself; Phi-MoE's jitter is a distance in evaluation too."""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NOISY)
def test_training_computes_what_was_scored(kind, checkpointing):
    """Log-probs and gradients of training mode are those of evaluation mode, when layers are computed again too."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **NOISY[kind])).eval()
    for weight in (each for each in model.parameters() if each.dim() > 1):
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.arange(1, 41)[None]

    def seen() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits[:, :, 0].sum().backward()
        return [logits.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]

    expected = seen()
    assert turn_off(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.train().training
    torch.testing.assert_close(seen(), expected, rtol=1e-4, atol=1e-4)
    assert {type(each).__name__ for each in model.eval().modules() if each.training} == set()


def test_weights_are_not_hashed_and_nothing_stays_patched(world, settings):
    """hash_module reads the weights through state_dict(); that TRL's own trainer does shows that this test would see it."""
    read = []

    def watched() -> PreTrainedModel:
        model = policy(world)
        weights = model.state_dict
        model.state_dict = lambda *args, **kwargs: read.append("weights") or weights(*args, **kwargs)
        return model

    ours = from_store(world, settings, watched())
    assert read == []
    assert ours.ref_model is None
    assert dpo_trainer.hash_module is hash_module
    stock(world, settings, watched(), precompute_ref_log_probs=True)
    assert read == ["weights"]


def test_a_failing_constructor_leaves_nothing_patched(world, settings):
    with pytest.raises(ValueError, match="Label smoothing"):
        from_store(world, settings, loss_type=["exo_pair"])
    assert dpo_trainer.hash_module is hash_module


def test_no_telemetry(world, settings, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **kwargs: pytest.fail("telemetry was sent"))
    from_store(world, settings)


def test_wrong_arguments_are_refused(world, settings):
    for wrong in ({"precompute_ref_log_probs": False}, {"remove_unused_columns": True}):
        with pytest.raises(ValueError, match="a store needs"):
            from_store(world, settings, **wrong)


def test_reference_sums_are_rounded_once(world, settings):
    """float64 in the store, float32 in the loss, nothing in between."""
    trainer = from_store(world, settings)
    batch = trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset.__getitems__([2, 9])))
    stored = open_store(world.store).read([2, 9])
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert batch[name].numpy().tobytes() == stored[name].to_numpy().astype(np.float32).tobytes()
