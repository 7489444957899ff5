"""TRL's DPOTrainer fed from a store: the reference log-probs come with the batch, and no reference model exists.

TRL's own loss, collator and metrics run unchanged. What is replaced, and why:
- `_prepare_dataset`, `_precompute_ref_logps`: the dataset already has token ids and reference sums; TRL would tokenize and score again.
- `hash_module`: with `precompute_ref_log_probs` TRL hashes every weight on every rank, to name a cache file that is never written here.
- `_prepare_inputs`: transformers casts every float of a batch to DeepSpeed's dtype. In bfloat16 a sum of -279.65 nats becomes -280.0.
- `forward`, `_get_train_sampler`: in the packed layout, train/packed.py and train/balance.py. In the padded one both are stock.
- `log`: a loss or gradient that is no number ends the run
- `get_batch_samples`, `compute_loss`, `training_step`, `log`: the same, timed and counted  train/speed.py
- `_run_epoch`: resumed at its last step, a run takes none, transformers one more; resumed in a later epoch, it sees that epoch's order.
- `_evaluate`: an evaluation that was dropped leaves a checkpoint and no half of itself; one that is made up for can be the best
- `_load_best_model`: its weights alone; the optimizer's states load on as many ranks as wrote them, and a resumed run may have others
- `_determine_best_metric`: of the checkpoints; transformers takes the best of all evaluated steps, with a checkpoint or without
- `get_train_dataloader`, `_compute_loss`: by tokens, rows made by the loader, and sums instead of gathered metrics   train/bins.py, rows.py, metrics.py
- `create_scheduler`: some schedules ask for the rate that the optimizer began with, which ZeRO's optimizer does not tell
- `set_initial_training_values`: `train_samples_per_second` is of pairs; by tokens transformers would count micro-batches
- `evaluation_loop`: TRL averages batches; here each pair counts once      train/evaluate.py
- `loss_weights` of `sft`: TRL's is a mean over the tokens of a micro-batch; weighted by its tokens it is the mean over the global batch.
- dropout: TRL turns `nn.Dropout` off, and not what a module keeps as a number     train/dropout.py
- `_save_checkpoint`, `save_model`: a file that cannot be written is one error; which checkpoints are old is told by their steps, not by times
- `_save_rng_state`: waits for all ranks, so that the checkpoint's last file (train/checkpoint.py) comes after the last of any of them
- `evaluate`: TRL refuses to score a new dataset after step 0, as the reference is gone by then; ours comes with its scores.
- telemetry is not sent.
"""

import math
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from store.errors import InputError
from train import dropout
from train.balance import RELATE_PAIRS, BalancedSampler, Shape, pairs_of_steps
from train.bins import Bins, within
from train.checkpoint import best_of, refuse_lost_best, remove_oldest
from train.data import REFERENCE, CollateTurns, Lengths, lengths_in
from train.evaluate import Dropped, evaluate
from train.flops import PairFlops
from train.interrupt import is_evaluation
from train.metrics import NUM_TOKENS, Sums, kept
from train.packed import pack_policy
from train.rows import MicroBatches, Row, only
from train.saving import written
from train.speed import Speed


class StoreDPOTrainer(DPOTrainer):
    """`train_dataset` and `eval_dataset` have the columns of train/data.py; `args.precompute_ref_log_probs` must be set.

    `model` may be peft's, of a frozen base and a LoRA adapter; `args.disable_dropout` False keeps that one's dropout.
    `lengths` of the training pairs: given, the policy runs in the packed layout with balanced batches; None: in TRL's padded one.
    `tokens_per_batch`: micro-batches by tokens (train/bins.py), in steps of `pairs_per_step` (None: as many as `args` say). None: of as many
    pairs as `args` say.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        lengths: Lengths | None = None,
        tokens_per_batch: int | None = None,
        pairs_per_step: int | None = None,
    ):
        if not args.precompute_ref_log_probs or args.remove_unused_columns:
            raise ValueError("a store needs precompute_ref_log_probs=True and remove_unused_columns=False")
        self.bins = None
        if tokens_per_batch is not None:
            self.bins = _bins(args, lengths, tokens_per_batch, pairs_per_step)
            _set_micro_steps(args, self.bins.num_micro_steps)
        base = model.get_base_model() if is_peft_model(model) else model
        use_cache = model.config.use_cache
        self.without_dropout = dropout.turn_off(model, keep_adapters=not args.disable_dropout)
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
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.data_collator = CollateTurns(self.data_collator)
        if base is not model:
            model.delete_adapter("ref")  # TRL keeps a copy of the adapter to compute the reference with
        model.config.use_cache = use_cache  # TRL's loss asks for no cache; what is saved is about the model's next use
        self.lengths = lengths
        self.sft_tokens: torch.Tensor | None = None
        """Chosen tokens per micro-batch, on average over this step's micro-batches of all ranks."""
        self.saved_at: int | None = None
        """The step of the last checkpoint that this process wrote."""
        self.skipped_steps: int | None = None
        """Of the run, that DeepSpeed had left out when something was logged last, or when this process began."""
        self.sums = Sums(args.device)
        self.speed = Speed(PairFlops.of(base), args.device, base.dtype)
        if lengths is not None:
            # TRL's alpha divergence knows no float64.
            pack_policy(base, *outputs, sums=torch.float32 if args.f_divergence_type == "alpha_divergence" else torch.float64)

    def get_train_dataloader(self) -> DataLoader:
        """By tokens: this rank's micro-batches, made into rows in the loader's workers. accelerate would move each to the device by itself."""
        if self.bins is None:
            return super().get_train_dataloader()
        return DataLoader(
            MicroBatches(self.train_dataset, self.model.config),
            batch_sampler=self.bins,
            collate_fn=only,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

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
        if "row" in inputs:

            def move(tensor: torch.Tensor) -> torch.Tensor:
                return tensor.to(self.args.device, non_blocking=True)

            return {name: value.moved(move) if name == "row" else move(value) for name, value in inputs.items()}
        reference = {name: inputs[name].to(self.args.device) for name in REFERENCE}
        return {**super()._prepare_inputs(inputs), **reference}

    def _run_epoch(self, *args, **kwargs):
        # Where batches are skipped, accelerate's loader does not reach the sampler of two ranks and more: they would see epoch 0 again.
        (self.bins or kwargs["train_dataloader"]).set_epoch(kwargs["epoch"])
        if self.skipped_steps is None:
            self.skipped_steps = getattr(self.model_wrapped, "skipped_steps", 0)
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float] | None:
        """All that is evaluated at this step; None: it was dropped, and a checkpoint is asked for where there is none of this step."""
        step = self.state.global_step
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Dropped:  # of several stores, the first may have been logged: all are when the run goes on
            self.state.log_history = [entry for entry in self.state.log_history if not is_evaluation(entry, step)]
            self.control.should_save = self.saved_at != step
            return None
        # On start transformers does not ask which is best.
        if skip_scheduler and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self.args.resume_from_checkpoint
        return metrics

    def _load_best_model(self) -> None:
        if not self.is_deepspeed_enabled:
            return super()._load_best_model()
        engine, best = self.model_wrapped, self.state.best_model_checkpoint
        refuse_lost_best(Path(best), engine.zero_optimization_stage() > 0)
        # That was about the checkpoint that this run went on from (train/reshard.py).
        engine._config.load_universal_checkpoint = False
        engine.load_checkpoint(
            best,
            load_module_strict=not is_peft_model(self.model),
            load_optimizer_states=False,
            load_lr_scheduler_states=False,
            load_module_only=True,
        )

    def _determine_best_metric(self, metrics: dict[str, float] | None, trial) -> bool:
        """Of the checkpoints that the options ask for. transformers also takes a step that has none, names it at the end, and saves another."""
        args, step = self.args, self.state.global_step
        planned = args.save_strategy == "epoch" or step % args.save_steps == 0 or step >= self.state.max_steps
        return metrics is not None and planned and super()._determine_best_metric(metrics, trial)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        return super(DPOTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        loss, metrics = evaluate(self, dataloader.dataset, self.args.process_index, self.args.world_size)
        if metric_key_prefix == "eval":
            self._metrics["eval"].update(metrics)
        # TRL adds its metrics where they are logged, under one name for all stores; `metric_for_best_model` is looked up here.
        means = {f"{metric_key_prefix}_{name}": sum(values) / len(values) for name, values in metrics.items()}
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss} | means, len(dataloader.dataset))

    def eval_batches(self, dataset: Dataset) -> list[list[int]]:
        """Consecutive pairs of `dataset`, as many as training's micro-batches may have. What they are changes no figure."""
        if self.bins is not None:
            return within(lengths_in(dataset).packed, self.bins.budget)
        # The routers' loss is no mean over pairs: there it is one over pairs' own losses.
        size = 1 if self.aux_loss_enabled else self.args.eval_batch_size
        return [list(range(start, min(start + size, len(dataset)))) for start in range(0, len(dataset), size)]

    def smaller_eval_batches(self, dataset: Dataset) -> str:
        """What to do where the memory does not hold one of `eval_batches`."""
        if self.bins is None:
            return "Lower --per-device-train-batch-size, which an evaluation's batches have too, or --max-length."
        longest, smaller = int(lengths_in(dataset).packed.max()), self.bins.budget // 2
        if longest <= smaller:
            return f"Use --tokens-per-batch {smaller}, which holds for evaluations too."
        return f"Lower --max-length, for a pair goes alone at the least, and the longest has {longest:,} tokens."

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        of_engine = getattr(optimizer or self.optimizer, "optimizer", None)  # as accelerate wraps it
        if not hasattr(of_engine, "defaults") and hasattr(of_engine, "optimizer"):
            of_engine.defaults = of_engine.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, *args, **kwargs):
        with self.speed.phase("data"):
            micro_batches, num_items = super().get_batch_samples(*args, **kwargs)  # of one optimizer step
            if self.bins is not None:
                self.sums.begin_step()
            elif "sft" in self.loss_types:
                self.sft_tokens = self._mean_over_micro_batches([_chosen_tokens(each) for each in micro_batches])
            return micro_batches, num_items

    def set_initial_training_values(self, *args, **kwargs):
        values = super().set_initial_training_values(*args, **kwargs)
        if self.bins is None:
            return values
        *before, _, total, in_epoch, max_steps = values
        num_pairs = pairs_of_steps(max_steps, len(self.train_dataset), self.bins.pairs_per_step)
        return *before, num_pairs, total, in_epoch, max_steps

    def _mean_over_micro_batches(self, counts: list[torch.Tensor]) -> torch.Tensor:
        """Of all ranks; every rank calls it at once."""
        total = torch.tensor([float(sum(counts)), len(counts)], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        return total[0] / total[1]

    def training_step(self, *args, **kwargs):
        forward = self.speed.recent.seconds["forward"]
        with self.speed.phase("backward_and_step", wait=self._is_logged_next):
            loss = super().training_step(*args, **kwargs)
        self.speed.recent.seconds["backward_and_step"] -= self.speed.recent.seconds["forward"] - forward
        return loss

    @property
    def _is_logged_next(self) -> bool:
        """Is this the last micro-step of an optimizer step that is logged?"""
        step, last = self.state.global_step + 1, self.accelerator.sync_gradients
        return last and (step % self.args.logging_steps == 0 or step in (1, self.state.max_steps))

    def _compute_loss(self, model, inputs, return_outputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        with self.speed.phase("forward"):
            if self.bins is not None:
                return self._loss_of_row(model, inputs)
            self.speed.count(_lengths(inputs), inputs["attention_mask"].numel())
            share = None if self.sft_tokens is None else _chosen_tokens(inputs) / self.sft_tokens
            with self._weighted_sft(share):
                return super()._compute_loss(model, inputs, return_outputs)

    def _loss_of_row(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of a micro-batch of train/bins.py, weighted so that the step's is the mean over all its pairs."""
        row: Row = inputs["row"]
        micro_batch, counted = row.micro_batch, row.micro_batch.weight > 0
        if counted:
            self.speed.count(row.lengths, row.lengths.padded)
        else:
            self.speed.count_nothing()
        self.sums.add(NUM_TOKENS, float(row.num_tokens), 1.0)
        share = micro_batch.token_weight / micro_batch.weight if counted else None
        with self._weighted_sft(share), kept(self, self.sums, counted):
            loss = super()._compute_loss(model, inputs, False)
        return loss * micro_batch.weight

    @contextmanager
    def _weighted_sft(self, share: torch.Tensor | float | None):
        """Inside the block the weight of `sft` is `share` of what was asked for; None: as asked."""
        weights = self.loss_weights
        if share is not None:
            self.loss_weights = [w * share if name == "sft" else w for name, w in zip(self.loss_types, weights, strict=True)]
        try:
            yield
        finally:
            self.loss_weights = weights

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate: 6 FLOPs per token and weight. Of a row, for the tokens of its sequences."""
        if "row" not in inputs:
            return super().floating_point_ops(inputs)
        return 6 * inputs["row"].num_tokens * self.num_weights

    @cached_property
    def num_weights(self) -> int:
        """Parameters but those of the embeddings, for transformers' count of operations."""
        return self.model.num_parameters(exclude_embeddings=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._refuse_no_number(logs["loss"], logs.get("grad_norm", 0.0))
            logs |= self.speed.recent_report()
            means = self.sums.means()
            if means:
                self._total_train_tokens += int(means.pop(NUM_TOKENS)[1])
                self._metrics["train"] |= {name: [mean] for name, (mean, _) in means.items()}
                self._metrics["train"][NUM_TOKENS] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _refuse_no_number(self, loss: float, grad_norm: float) -> None:
        """InputError for a loss that is no number, and for a gradient: DeepSpeed leaves out its step without a word, or all weights are lost. In
        float16 it looks for a scale of the loss by such steps."""
        before, self.skipped_steps = self.skipped_steps, getattr(self.model_wrapped, "skipped_steps", 0)
        num_skipped = 0 if self.args.fp16 else self.skipped_steps - (before or 0)
        if math.isfinite(loss) and (self.args.fp16 or math.isfinite(grad_norm) and grad_norm >= 0) and not num_skipped:
            return
        of_skipped = f", {num_skipped:,} step(s) without effect since the last that was logged" if num_skipped else ""
        raise self._diverged(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}{of_skipped}")

    def _diverged(self, found: str) -> InputError:
        return InputError(
            "the loss or its gradient is too large or no number: the run has diverged",
            where=f"step {self.state.global_step:,} of {self.state.max_steps:,}",
            found=found,
            next="Start again with a lower --learning-rate or --max-grad-norm.",
        )

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        with written(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        # Steps between two that are logged are not looked at (_refuse_no_number).
        if not all(torch.stack([each.isfinite().all() for each in self.model.parameters() if each.requires_grad]).tolist()):
            raise self._diverged("weights that are no numbers")
        folder = Path(self.args.output_dir)
        with written(folder / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)
        self.saved_at = self.state.global_step
        if self.save_total_limit is not None and self.args.should_save:
            remove_oldest(folder, self.save_total_limit, self.state.best_global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's, written at each checkpoint, knows no model that is a folder; train/card.py writes one at the end."""

    def _send_telemetry(self) -> None:
        pass


def _bins(args: DPOConfig, lengths: Lengths, budget: int, pairs_per_step: int | None) -> Bins:
    pairs_per_step = pairs_per_step or args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = math.ceil(len(lengths.packed) / pairs_per_step)
    epochs = math.ceil(args.max_steps / steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs)
    return Bins(
        lengths.packed,
        lengths.chosen,
        pairs_per_step=pairs_per_step,
        world=args.world_size,
        rank=args.process_index,
        budget=budget,
        seed=args.seed,
        shuffle=args.train_sampling_strategy == "random",
        epochs=epochs,
    )


def _set_micro_steps(args: DPOConfig, num_micro_steps: int) -> None:
    """In `args` and in the DeepSpeed configuration that was made of them. To both a micro-batch is one thing, however many pairs it has."""
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 1, num_micro_steps
    if args.deepspeed:
        args.hf_deepspeed_config.config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_micro_steps,
            "train_batch_size": num_micro_steps * args.world_size,
        }


def _lengths(inputs: dict[str, Any]) -> Lengths:
    """Of the pairs of a padded micro-batch."""
    first = inputs["completion_mask"].argmax(dim=1)  # that is scored
    total, prompt = torch.stack([inputs["attention_mask"].sum(dim=1), first]).cpu().numpy()
    half = len(total) // 2
    completion = total - prompt
    return Lengths(prompt[:half], completion[:half], completion[half:])


def _chosen_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """Tokens of the chosen side of a micro-batch that are scored."""
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


class BestIsHere(TrainerCallback):
    """The best checkpoint of a resumed run lies beside the resumed one. The state names it by the path it had when it was written; where
    that is gone, for the folder was moved, transformers would forget it and end with the last model."""

    def __init__(self, resumed: Path):
        self.resumed = resumed

    def on_train_begin(self, args, state, control, **kwargs):
        best = best_of(self.resumed)
        state.best_model_checkpoint = None if best is None else str(best)


class LogLastStep(TrainerCallback):
    """Log the last step too, whatever `logging_steps` is: the summary and run.json end with its loss."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps
