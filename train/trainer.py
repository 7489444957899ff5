"""TRL's DPOTrainer fed from a store: the reference log-probs come with the batch, and no reference model exists.

TRL's own loss, collator and metrics run unchanged. What is replaced, and why:
- `_prepare_dataset`, `_precompute_ref_logps`: the dataset already has token ids and reference sums; TRL would tokenize and score again.
- `hash_module`: with `precompute_ref_log_probs` TRL hashes every weight on every rank, to name a cache file that is never written here.
- `_prepare_inputs`: transformers casts every float of a batch to DeepSpeed's dtype. In bfloat16 a sum of -279.65 nats becomes -280.0.
- `forward`, `_get_train_sampler`: in the packed layout, train/packed.py and train/balance.py. In the padded one both are stock.
- `get_batch_samples`, `compute_loss`, `training_step`, `log`: the same, timed and counted  train/speed.py
- `_run_epoch`: resumed at its last step, a run takes none, transformers one more; resumed in a later epoch, it sees that epoch's order.
- `evaluation_loop`: TRL averages batches; here each pair counts once      train/evaluate.py
- `loss_weights` of `sft`: TRL's is a mean over the tokens of a micro-batch; weighted by its tokens it is the mean over the global batch.
- dropout: TRL turns `nn.Dropout` off, and not what a module keeps as a number     train/dropout.py
- `evaluate`: TRL refuses to score a new dataset after step 0, as the reference is gone by then; ours comes with its scores.
- telemetry is not sent.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from train import dropout
from train.balance import RELATE_PAIRS, BalancedSampler, Shape
from train.data import Lengths
from train.evaluate import REFERENCE, evaluate
from train.flops import PairFlops
from train.packed import pack_policy
from train.speed import Speed


class StoreDPOTrainer(DPOTrainer):
    """`train_dataset` and `eval_dataset` have the columns of train/data.py; `args.precompute_ref_log_probs` must be set.

    `lengths` of the training pairs: given, the policy runs in the packed layout with balanced batches; None: in TRL's padded one.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        lengths: Lengths | None = None,
    ):
        if not args.precompute_ref_log_probs or args.remove_unused_columns:
            raise ValueError("a store needs precompute_ref_log_probs=True and remove_unused_columns=False")
        use_cache = model.config.use_cache
        self.without_dropout = dropout.turn_off(model)
        with _unhashed_weights(), _watched_head() as outputs:
            super().__init__(
                model=model,
                ref_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
            )
        model.config.use_cache = use_cache  # TRL's loss asks for no cache; what is saved is about the model's next use
        self.lengths = lengths
        self.sft_tokens: torch.Tensor | None = None
        """Chosen tokens per micro-batch, on average over this step's micro-batches of all ranks."""
        self.speed = Speed(PairFlops.of(model), args.device, model.dtype)
        if lengths is not None:
            pack_policy(model, *outputs)

    def get_train_sampler(self) -> Sampler:
        """Pairs in the order in which accelerate hands them out, epoch 0."""
        return self._get_train_sampler()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        if self.lengths is None or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        shape = Shape(self.args.train_batch_size, self.args.world_size, self.args.gradient_accumulation_steps)
        return BalancedSampler(
            self.lengths.packed, shape, self.args.seed, keep_micro_batches=not RELATE_PAIRS.isdisjoint(self.loss_types)
        )

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device; reference sums float32 [pairs] in every training dtype, as TRL's fused head gives the policy's."""
        reference = {name: inputs[name].to(self.args.device) for name in REFERENCE}
        return {**super()._prepare_inputs(inputs), **reference}

    def _run_epoch(self, *args, **kwargs):
        # Where batches are skipped, accelerate's loader does not reach the sampler of two ranks and more: they would see epoch 0 again.
        kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        return super(DPOTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        loss, metrics = evaluate(self, dataloader.dataset, self.args.process_index, self.args.world_size)
        self._metrics["eval"].update(metrics)
        # TRL adds its metrics where they are logged; `metric_for_best_model` is looked up here.
        means = {f"{metric_key_prefix}_{name}": sum(values) / len(values) for name, values in metrics.items()}
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss} | means, len(dataloader.dataset))

    def get_batch_samples(self, *args, **kwargs):
        with self.speed.phase("data"):
            micro_batches, num_items = super().get_batch_samples(*args, **kwargs)
            if "sft" in self.loss_types:
                self.sft_tokens = self._mean_over_micro_batches([_chosen_tokens(each) for each in micro_batches])
            return micro_batches, num_items

    def _mean_over_micro_batches(self, counts: list[torch.Tensor]) -> torch.Tensor:
        """Of all ranks; every rank calls it at once."""
        total = torch.tensor([float(sum(counts)), len(counts)], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        return total[0] / total[1]

    def training_step(self, *args, **kwargs):
        forward = self.speed.recent.seconds["forward"]
        with self.speed.phase("backward_and_step"):
            loss = super().training_step(*args, **kwargs)
        self.speed.recent.seconds["backward_and_step"] -= self.speed.recent.seconds["forward"] - forward
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        with self.speed.phase("forward"):
            self.speed.count(inputs["attention_mask"], inputs["completion_mask"])
            if self.sft_tokens is None:
                return super()._compute_loss(model, inputs, return_outputs)
            weights = self.loss_weights
            share = _chosen_tokens(inputs) / self.sft_tokens
            self.loss_weights = [w * share if name == "sft" else w for name, w in zip(self.loss_types, weights, strict=True)]
            try:
                return super()._compute_loss(model, inputs, return_outputs)
            finally:
                self.loss_weights = weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.speed.recent_report()
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's, written at each checkpoint, knows no model that is a folder; train/card.py writes one at the end."""

    def _send_telemetry(self) -> None:
        pass


def _chosen_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """Completion tokens of the chosen side of a micro-batch."""
    mask = inputs["completion_mask"]
    return mask[: len(mask) // 2].sum()


@contextmanager
def _unhashed_weights():
    """TRL's module has no `hash_module` to speak of inside the block, and its own again after it."""
    original = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = original


@contextmanager
def _watched_head():
    """Yields a list that gets the `outputs` TRL asks its head for: what its loss and metrics will read."""
    original, asked = dpo_trainer.add_fused_lm_head, []

    def add_fused_lm_head(model: PreTrainedModel, outputs: tuple[str, ...]) -> None:
        asked.append(outputs)
        original(model, outputs=outputs)

    dpo_trainer.add_fused_lm_head = add_fused_lm_head
    try:
        yield asked
    finally:
        dpo_trainer.add_fused_lm_head = original


class LogLastStep(TrainerCallback):
    """Log the last step too, whatever `logging_steps` is: the summary and run.json end with its loss."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps
