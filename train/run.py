"""One training run, inside each rank: open the store, load the policy, pass the gate, train, save.

1. plan       options, stores (rank 0 reads every byte, the others the manifest), output folder     train/plan.py
2. policy     the store's own model unless another is named; in the store's dtype
3. gate       policy = reference?                       train/gate.py
4. train      TRL's DPO under DeepSpeed, no reference    train/trainer.py
5. save       output_dir: model, tokenizer, README.md, run.json     run.json is written first as well, for --resume; then the Hub: train/hub.py
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig

import devices
from launch import Process, launched
from precompute.scorer.adapter import Adapter, adapter_of
from precompute.scorer.api import (
    enough_memory,
    keep_freed_memory,
    load_base,
    load_in_4bit,
    load_model,
    load_tokenizer,
    named_compiler,
    named_kernel,
    refuse_dynamic,
    refuse_mixed,
    use_compiler,
    use_kernel,
)
from presets import PRESETS
from stop import STOP_TRAINING, Stopped, StopRequest, listening
from store.errors import InputError
from train import capacity, card, gate, hub, lora, record, schedule
from train.alone import alone
from train.balance import Shape, imbalance, shuffled
from train.beta import beta_notice
from train.bins import refuse_endless
from train.checkpoint import remove_cut_short, state_of
from train.config import TrainConfig
from train.data import Lengths, dataset_of, lengths_of
from train.dpo_config import dpo_config
from train.interrupt import CheckpointAndStop, anyone_told, evaluation_is_due
from train.memory import MemoryPlan, choose, explained, measure
from train.metrics import tokens_before
from train.outlook import describe, outlook
from train.plan import Plan, plan, refuse_folder
from train.progress import ProgressLines
from train.ranks import agree, join, peak_memory, refuse_abandoned_build
from train.record import TrainResult
from train.reshard import ENGINE_OPTION, RemoveWhole, must_reshard, refuse_optimizer, remove_whole, write_whole
from train.saving import written
from train.self_test import self_test_policy
from train.summary import summary
from train.trainer import BestIsHere, LogLastStep, StoreDPOTrainer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def train(config: TrainConfig, stop: StopRequest | None = None) -> TrainResult:
    """Run phase 2 on this rank. Every rank calls it; rank 0 prints. `stop`: set by signals; None: listened for from here on.

    Raises InputError or StoreError before anything is trained, and Stopped, with a checkpoint written, when told to stop.
    """
    process = launched()
    first = process is None or process.rank == 0
    with (
        nullcontext(stop) if stop is not None else listening(STOP_TRAINING) as heard,
        alone(config.output_dir) if first else nullcontext(),
    ):
        return _train(config, heard)


def _train(config: TrainConfig, stop: StopRequest) -> TrainResult:
    rank = _Rank.joined(config, stop)
    planned = _plan(rank)
    pairs, eval_pairs, lengths = _pairs(rank, planned)
    _refuse_what_this_machine_cannot(rank, planned)
    steps_per_epoch = math.ceil(len(pairs) / planned.batch)
    num_steps = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
    refuse_endless(
        num_steps, steps_per_epoch, "--max-steps" if config.max_steps else f"--num-train-epochs {config.num_train_epochs:g}"
    )

    resharded = planned.checkpoint is not None and must_reshard(planned.checkpoint, rank.process.world)
    if resharded:
        refuse_optimizer(planned.checkpoint, config.optim)
    engine_options = ENGINE_OPTION if resharded else {}
    args = dpo_config(
        config, planned.policy.dtype, planned.max_length, planned.accumulation, engine_options
    )  # joins the other ranks
    if notice := schedule.tried(args, num_steps):
        rank.say(notice)
    agree(planned.selection, args.device)
    rank.leave_if_told(args.device)
    capacity.refuse_too_large(config, planned.policy, world=rank.process.world, device=args.device)

    adapter = adapter_of(planned.policy.name, planned.policy.revision)
    kind = lora.kind_of(config, adapter, revision=planned.policy.revision) if config.use_peft else None
    tokenizer, model = _load_policy(rank, planned, adapter, kind, lengths, args.device)
    passed = _pass_gate(rank, planned, model, tokenizer)
    if kind is None:
        trained = model.requires_grad_(True)
    else:
        if adapter is not None or config.load_in_4bit:
            model = None  # all bits, and the adapter merged: the gate has seen it, and its memory is free before the next is loaded
        trained = _with_adapter(rank, planned, model, adapter, kind, args.device)

    memory_plan = None
    if config.tokens_per_batch == "auto" and rank.device.type == "cuda":
        base = trained if kind is None else trained.get_base_model()
        memory_plan = _memory_plan(rank, base, planned, lengths, args)
    interrupt = CheckpointAndStop(stop)
    trainer = StoreDPOTrainer(
        model=trained,
        args=args,
        train_dataset=pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        callbacks=[LogLastStep(), ProgressLines(planned.batch, len(pairs)), interrupt],
        lengths=lengths if config.layout == "packed" else None,
        tokens_per_batch=budget_of(config, memory_plan),
        pairs_per_step=planned.batch,
    )
    if trainer.without_dropout:
        rank.say(
            f"without dropout, as the reference was scored: the checkpoint's {', '.join(trainer.without_dropout)} are not used"
        )
    trainer.remove_callback(PrinterCallback)  # ProgressLines says it shorter; run.json has all of it
    if rank.first:
        _look_ahead(rank, trainer, planned, lengths)
    rank.leave_if_told(args.device)
    if rank.first:
        record.write(config.output_dir, planned.course)
        for removed in remove_cut_short(config.output_dir):
            rank.say(f"{removed} was cut short: removed")
        if planned.checkpoint is not None and not resharded:
            remove_whole(planned.checkpoint)  # of a start on another number of ranks that was killed
    with record.keeping_status(config.output_dir) if rank.first else nullcontext():
        if resharded:
            _reshard(rank, planned.checkpoint, trainer)
        result = _take_steps(rank, planned, trainer, interrupt, memory_plan, lengths)
        _save(rank, planned, trainer, result, passed)
    rank.say(summary(result, config))
    if rank.first and config.push_to_hub:
        rank.say(f"pushed to {hub.send(config.output_dir, config.hub_model_id)}")
    return result


@dataclass(frozen=True)
class _Rank:
    """This process among the ranks of a run."""

    config: TrainConfig
    stop: StopRequest
    process: Process
    device: torch.device

    @classmethod
    def joined(cls, config: TrainConfig, stop: StopRequest) -> "_Rank":
        process = launched() or Process(rank=0, world=1, local_rank=0)
        rank = cls(config, stop, process, devices.device(process.local_rank))
        on_gpu = rank.device.type == "cuda"
        rank.say(devices.describe(rank.device, process.world))
        join(replace(process, local_rank=rank.device.index if on_gpu else process.local_rank))
        if not on_gpu:
            refuse_abandoned_build()
        return rank

    @property
    def first(self) -> bool:
        return self.process.rank == 0

    def say(self, line: object) -> None:
        """Once for all ranks."""
        if self.first:
            print(line)

    def leave_if_told(self, device: torch.device) -> None:
        """End this rank, with all others, if any of them was told to stop; nothing has been trained yet."""
        if anyone_told(self.stop, device):
            self.leave("nothing is lost, as this start had done no step yet")

    def leave(self, what: str, *options: str) -> NoReturn:
        """Raises Stopped on rank 0, which says it for all. `options`: what the command needs besides, to go on."""
        if not self.first:
            raise SystemExit(Stopped.exit_code)
        raise self.stop.error(what, self.config.output_dir, *options)


def _plan(rank: _Rank) -> Plan:
    """The same on every rank; the first reads every byte of the stores, and looks at what must not be overwritten."""
    planned = plan(rank.config, rank.process.world, check="sha256" if rank.first else "none")
    if rank.first:
        refuse_folder(rank.config, planned)
        if rank.config.push_to_hub:
            hub.reach(rank.config.hub_model_id)
    return planned


def _pairs(rank: _Rank, planned: Plan) -> tuple[Dataset, Dataset | dict[str, Dataset] | None, Lengths]:
    """What is trained on, what is evaluated on, and the lengths of the former; says what is unusual about them."""
    config = rank.config
    pairs = dataset_of(planned.store, planned.max_length, config.ld_alpha, planned.train)
    evals = {name: dataset_of(store, planned.max_length, config.ld_alpha, rows) for name, (store, rows) in planned.evals.items()}
    eval_pairs = evals.get("", evals or None)
    if notice := beta_notice(config.loss_type, config.beta):
        rank.say(notice)
    if (preset := PRESETS.get(planned.store.manifest.preset)) is not None and preset.note:
        rank.say(preset.note)
    if not planned.selection.everything:
        rank.say(planned.selection)
    for line in (*_dropped(planned), *_trained_on_too(planned)):
        rank.say(line)
    return pairs, eval_pairs, lengths_of(pairs, planned.store, planned.max_length)


def _dropped(planned: Plan) -> Iterator[str]:
    """A line for the pairs to train on, and for each set to evaluate on, of which max length leaves too little."""
    of_train = "", len(planned.selection.train), len(planned.train)
    of_evals = [
        (
            f" to evaluate on{f' ({name})' if name else ''}",
            store.num_pairs if planned.selection.eval_fraction is None else len(planned.selection.eval),
            len(rows),
        )
        for name, (store, rows) in planned.evals.items()
    ]
    why = "their prompt alone fills" if planned.store.identity.scored_turns is None else "a side has no turn to score within"
    for what, asked, kept in (of_train, *of_evals):
        if kept < asked:
            yield f"{asked - kept:,} of {asked:,} pairs{what} dropped: {why} max length {planned.max_length}"


def _trained_on_too(planned: Plan) -> Iterator[str]:
    """A line for each evaluation store with pairs that are trained on, by the hashes of their content."""
    stores = {name: (store, rows) for name, (store, rows) in planned.evals.items() if store is not planned.store}
    if not stores:
        return
    trained = planned.store.columns(["pair_id"]).column(0).take(planned.train)
    for name, (store, rows) in stores.items():
        both = pc.sum(pc.is_in(store.columns(["pair_id"]).column(0).take(rows), value_set=trained)).as_py()
        if both:
            yield f"{both:,} of {len(rows):,} pairs to evaluate on{f' ({name})' if name else ''} are trained on too"


def _refuse_what_this_machine_cannot(rank: _Rank, planned: Plan) -> None:
    """InputError for what needs a GPU, or a kernel that does not run here. From here on attention and compiler are those asked for."""
    config, dtype, on_cpu = rank.config, planned.policy.dtype, rank.device.type == "cpu"
    if dtype == "float16" and on_cpu:
        raise InputError(
            "float16 trains on GPUs only", where="--dtype float16", next="On the CPU use a store in float32 or bfloat16."
        )
    if config.load_in_4bit and on_cpu:  # there bitsandbytes' product has no gradient once the gate has run it
        raise InputError("4 bits train on GPUs only", where="--load-in-4bit", next="Leave it out on the CPU.")
    use_kernel(config.attention_kernel, layout=config.layout, device=rank.device, dtype=dtype)
    use_compiler(config.torch_compile and config.layout == "packed", layout=config.layout)  # padded: transformers does it


def _load_policy(
    rank: _Rank, planned: Plan, adapter: Adapter | None, kind: "LoraConfig | None", lengths: Lengths, device: torch.device
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and policy, an `adapter` merged. InputError for a model that this layout cannot train, or whose log-probs and gradients
    differ from a plain forward's."""
    config, policy = rank.config, planned.policy
    tokenizer = load_tokenizer(policy.tokenizer, revision=policy.tokenizer_revision, chat_template=config.chat_template)
    refuse_no_padding(tokenizer, policy.tokenizer)
    model = load_model(
        policy.name,
        revision=policy.revision,
        dtype=policy.dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        say=rank.say,
    )
    if adapter is not None:
        rank.say(adapter)
    if config.layout == "padded":
        refuse_mixed(model, np.concatenate([lengths.prompt + lengths.chosen, lengths.prompt + lengths.rejected]))
    refuse_dynamic(model, int(lengths.longer.max(initial=0)))
    with named_kernel(config.attention_kernel), named_compiler():
        rank.say(self_test_policy(model, policy.dtype, config.layout, adapt=None if kind is None else lora.on_twin(kind)))
    if (routers := router_notice(model, config)) is not None:
        rank.say(routers)
    return tokenizer, model


def _pass_gate(rank: _Rank, planned: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> gate.GateReport:
    """What the gate found. InputError where the policy is not the store's reference and that was not allowed."""
    policy = planned.policy
    if planned.checkpoint is not None:
        rank.say(f"resuming from {planned.checkpoint}; the gate looks at {policy.name}, from which that run started")
    for_room = "Free memory (other processes?), or train on GPUs that have more: gradients and the optimizer come on top."
    with enough_memory("in the gate, which scores a few pairs again, each alone", for_room):
        report = gate.check(
            model,
            tokenizer,
            planned.store,
            policy=policy.name,
            revision=policy.revision,
            seed=rank.config.seed,
            allow_different_policy=rank.config.allow_different_policy,
        )
    rank.say(gate.notice(report, planned.store, policy.name) if report.different else f"gate: {report}")
    return report


def _with_adapter(
    rank: _Rank,
    planned: Plan,
    model: PreTrainedModel | None,
    adapter: Adapter | None,
    kind: "LoraConfig",
    device: torch.device,
) -> "PeftModel":
    """The policy that LoRA trains: `model` with a fresh adapter of this kind. None: loaded for it, in 4 bits or as the base of `adapter`, which
    the gate then looks at too."""
    config, policy, loaded = rank.config, planned.policy, model is None
    if loaded:
        given = {"dtype": policy.dtype, "attn_implementation": config.attn_implementation}
        if config.load_in_4bit:
            model = load_in_4bit(policy.name, revision=policy.revision, device=device, **given)
        else:
            model = load_base(adapter, **given).to(device)
    trained = lora.fresh(model, kind, seed=config.seed) if adapter is None else lora.going_on(model, adapter)
    if adapter is None:
        rank.say("gate: the fresh adapter adds nothing to it yet")
    if loaded:
        start = gate.check_start(
            trained.get_base_model().eval(),
            planned.store,
            "in 4 bits" if config.load_in_4bit else "the adapter beside its base",
            seed=config.seed,
            may_differ=config.load_in_4bit or config.allow_different_policy,
        )
        rank.say(f"gate: {start}")
    planned.course["lora"] = lora.described(trained)
    rank.say(lora.notice(planned.course["lora"]))
    return trained


def _memory_plan(rank: _Rank, model: PreTrainedModel, planned: Plan, lengths: Lengths, args: DPOConfig) -> MemoryPlan:
    """What `--tokens-per-batch auto` chooses on this device, set in `args` too."""
    config, world = rank.config, rank.process.world
    chosen = choose(
        measure(model, args, config.zero_config, world=world),
        longest=int(lengths.packed.max(initial=0)),
        most_useful=math.ceil(lengths.packed.mean() * planned.batch / world),
        gradient_checkpointing=config.gradient_checkpointing,
    )
    args.activation_checkpointing = args.gradient_checkpointing = chosen.gradient_checkpointing
    planned.course["memory"] = chosen.to_json()
    rank.say(chosen)
    return chosen


def _look_ahead(rank: _Rank, trainer: StoreDPOTrainer, planned: Plan, lengths: Lengths) -> None:
    """What the layout and the dealing of pairs save, told and put into the record."""
    config, world = rank.config, rank.process.world
    num_pairs = len(lengths.packed)
    shape = Shape(config.per_device_train_batch_size or 1, world, planned.accumulation or 1)
    before = shuffled(num_pairs, config.seed, epoch=0) if config.order_by is None else np.arange(num_pairs)
    if trainer.bins is not None:
        after = trainer.bins.imbalance()
        planned.course["micro_steps"] = {
            "tokens_per_batch": trainer.bins.budget,
            "per_step": trainer.bins.num_micro_steps,
        }
    else:
        after = imbalance(np.array(list(trainer.get_train_sampler())), lengths.packed, shape)
    seen = outlook(lengths, before, after, shape)
    planned.course["outlook"] = asdict(seen)
    rank.say(describe(seen, config.layout, world))
    if trainer.bins is not None:
        rank.say(trainer.bins.describe())


def _reshard(rank: _Rank, checkpoint: Path, trainer: StoreDPOTrainer) -> None:
    """Optimizer states of another number of ranks, as this number of them loads them."""
    rank.say(f"{checkpoint} was written by another number of processes: its optimizer states are converted")
    if rank.first:
        write_whole(checkpoint)
    torch.distributed.barrier()
    trainer.add_callback(RemoveWhole(checkpoint))


def _take_steps(
    rank: _Rank,
    planned: Plan,
    trainer: StoreDPOTrainer,
    interrupt: CheckpointAndStop,
    memory_plan: MemoryPlan | None,
    lengths: Lengths,
) -> TrainResult:
    """All steps, or those that are left, of pairs of these lengths. Raises Stopped with a checkpoint written."""
    config, args, checkpoint, num_steps_before = rank.config, trainer.args, planned.checkpoint, 0
    if checkpoint is not None:
        state = state_of(checkpoint)
        num_steps_before = state["global_step"]
        args.eval_on_start, args.resume_from_checkpoint = evaluation_is_due(state, args), str(checkpoint)
        trainer.add_callback(BestIsHere(checkpoint))
        seed = config.seed if config.order_by is None else None
        trainer._total_train_tokens = tokens_before(state, lengths, planned.batch, seed)
    if args.device.type == "cpu":
        keep_freed_memory()  # from here on, as when scoring
    budget, longest = None if trainer.bins is None else trainer.bins.budget, int(lengths.packed.max())
    with explained(memory_plan, args.activation_checkpointing, budget, longest, lambda: trainer.state.global_step):
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if interrupt.stopped_at is not None:
        what = f"a checkpoint is written at step {interrupt.stopped_at} of {trainer.state.max_steps}"
        if config.save_only_model:
            what += ", of the model alone (--save-only-model): nothing can go on from it"
        rank.leave(what, *record.resuming())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainResult(
        output_dir=str(config.output_dir),
        num_steps=trainer.state.global_step,
        num_pairs=len(planned.train),
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds=outcome.metrics["train_runtime"],
        peak_memory=peak_memory(args.device),
        speed=trainer.speed.whole_report(),
        num_steps_before=num_steps_before,
    )


def _save(rank: _Rank, planned: Plan, trainer: StoreDPOTrainer, result: TrainResult, passed: gate.GateReport) -> None:
    """The model, its README.md and run.json."""
    config, best = rank.config, None
    if config.load_best_model_at_end:
        best = {"step": trainer.state.best_global_step, "metric": config.deciding_metric}
        best["value"] = trainer.state.best_metric
        rank.say("of all checkpoints that of step {step} evaluated best, {metric} {value:.4f}: it is saved".format(**best))
    trainer.save_model(str(config.output_dir))
    if rank.first:
        done = {
            "status": "finished",
            "finished": record.now(),
            "result": asdict(result),
            "gate": str(passed),
            **({} if best is None else {"best": best}),
            "log_history": trainer.state.log_history,
        }
        with written(config.output_dir):
            card.write(config.output_dir, planned.course | done, config.hub_model_id)
        record.write(config.output_dir, planned.course | done)


DEFAULT_TOKENS = 16384
"""Of a micro-batch on a CPU, where memory is not measured."""


def budget_of(config: TrainConfig, memory_plan: MemoryPlan | None = None) -> int | None:
    """Tokens per micro-batch; None where it is pairs that are counted."""
    if config.tokens_per_batch != "auto":
        return config.tokens_per_batch
    return DEFAULT_TOKENS if memory_plan is None else memory_plan.tokens_per_batch


def refuse_no_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """InputError for a tokenizer with nothing to fill up a batch with, which TRL's trainer refuses once the model is loaded."""
    if (tokenizer.pad_token or tokenizer.eos_token) not in tokenizer.get_vocab():
        raise InputError(
            "the tokenizer names no token that fills up a batch",
            where=name,
            expected="pad_token, or eos_token to take its place",
            found=f"pad_token {tokenizer.pad_token}, eos_token {tokenizer.eos_token}",
            next='Add "pad_token": "…" with any of its special tokens to its tokenizer_config.json: the store is still the same.',
        )


def router_notice(model: PreTrainedModel, config: TrainConfig) -> str | None:
    """A line where TRL would add a mixture of experts' load-balancing loss by itself. InputError for a coefficient that a model has no use for."""
    text = model.config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        if config.router_aux_loss_coef:
            raise InputError(
                "this model returns no router's logits, so there is no auxiliary loss",
                where=f"--router-aux-loss-coef {config.router_aux_loss_coef:g}",
                found=type(model).__name__,
                next="Leave it out.",
            )
        return None
    own = getattr(text, "router_aux_loss_coef", 0.0)
    if config.router_aux_loss_coef is not None or not own:
        return None
    return f"the loss is DPO's alone; TRL would add {own:g} times the routers' load-balancing loss (--router-aux-loss-coef {own:g})"
