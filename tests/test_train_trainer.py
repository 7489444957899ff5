"""TRL's loss on values from a store: equal to TRL with its own reference, for every loss type, and without what TRL does besides."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from train_setup import MAX_LENGTH, make_rows, make_store, make_world
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer import base_trainer, dpo_trainer
from trl.trainer.utils import hash_module

from store.reader import open_store
from train.config import LOSS_TYPES
from train.data import dataset_of
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
    ],
    ids=lambda loss: " ".join(f"{name}={value}" for name, value in loss.items()),
)
def test_losses_equal_trls_with_an_online_reference(world, settings, loss):
    ours, theirs = losses(from_store(world, settings, **loss)), losses(stock(world, settings, **loss))
    assert len(set(theirs)) == 3  # it moves
    # ipo's is a square, about 25: an error of the margin counts tenfold.
    assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


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
