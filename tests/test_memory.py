"""--tokens-per-batch auto of training: what is chosen from what was measured, and that what is measured is what is taken."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.distributed
from one_rank import one_rank
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from launch import Process
from precompute.scorer.api import MemoryWatch
from store.errors import InputError
from train import memory
from train.capacity import refuse_by_number
from train.config import ZERO2, TrainConfig
from train.memory import GIB, Cost, Measured, choose
from train.plan import Policy
from train.ranks import join

MB = 1e6

B200 = Measured(
    free=0.9 * 165 * GIB, kept=Cost(5.6 * MB, 3 * GIB), checkpointed=Cost(0.55 * MB, 3 * GIB), backward=28 * GIB, step=39 * GIB
)
"""As of OLMo 3's 7B on four B200, beside its weights."""


def test_checkpointing_is_left_out_where_the_budget_holds_enough_without():
    plan = choose(B200, longest=15_800, most_useful=100_000, gradient_checkpointing=None)
    assert (plan.gradient_checkpointing, plan.tokens_per_batch) == (False, 22_528)  # (148.5 - 28 - 3) GiB / 5.6 MB, in whole 1,024
    assert str(plan) == (
        "--tokens-per-batch auto: 22,528 without gradient checkpointing: 5.6 MB per token, 28 GiB for the engine (39 in its step),"
        " together 148 of 148 GiB"
    )
    longer = choose(B200, longest=30_000, most_useful=100_000, gradient_checkpointing=None)
    assert (longer.gradient_checkpointing, longer.tokens_per_batch) == (True, memory.MOST)


def test_few_tokens_are_enough_where_a_step_has_no_more():
    less = Measured(**vars(B200) | {"free": 80 * GIB})  # room for 9,396 tokens without checkpointing
    assert choose(less, longest=4000, most_useful=100_000, gradient_checkpointing=None).gradient_checkpointing
    plan = choose(less, longest=4000, most_useful=9000, gradient_checkpointing=None)
    assert (plan.gradient_checkpointing, plan.tokens_per_batch) == (False, 9216)


def test_what_is_given_stands():
    with_ = choose(B200, longest=4000, most_useful=100_000, gradient_checkpointing=True)
    assert (with_.gradient_checkpointing, with_.tokens_per_batch) == (True, memory.MOST)
    less = Measured(**vars(B200) | {"free": 80 * GIB})
    without = choose(less, longest=9300, most_useful=100_000, gradient_checkpointing=False)
    assert (without.gradient_checkpointing, without.tokens_per_batch) == (False, 9300)  # the longest pair, though no whole 1,024
    with pytest.raises(
        InputError, match="longest pair does not fit the memory without gradient checkpointing.*--gradient-checkpoint"
    ):
        choose(less, longest=9500, most_useful=100_000, gradient_checkpointing=False)


def test_what_does_not_fit_at_all_is_said_with_the_numbers():
    no_row = Measured(**vars(B200) | {"free": 40 * GIB, "kept": Cost(math.inf, 0.0)})  # not even the measured rows fitted
    assert choose(no_row, longest=8000, most_useful=100_000, gradient_checkpointing=None).gradient_checkpointing
    with pytest.raises(
        InputError, match="longest pair.*expected 41.2 GiB for the engine and 20,000 tokens.*found 40 GiB.*--max-length"
    ):
        choose(no_row, longest=20_000, most_useful=100_000, gradient_checkpointing=None)
    with pytest.raises(InputError, match="optimizer's states.*expected 39 GiB.*found 30 GiB.*more GPUs"):
        choose(Measured(**vars(B200) | {"free": 30 * GIB}), longest=100, most_useful=1000, gradient_checkpointing=None)
    larger = Measured(**vars(B200) | {"backward": 151 * GIB})  # a shorter pair would not help
    with pytest.raises(InputError, match="optimizer's states.*expected 151 GiB.*found 148 GiB.*more GPUs"):
        choose(larger, longest=100, most_useful=1000, gradient_checkpointing=None)
    nothing = Measured(**vars(no_row) | {"checkpointed": Cost(math.inf, 0.0)})
    for checkpointing, words in ((None, "with gradient.*Free memory"), (False, "without gradient.*Use --gradient-checkpointing")):
        with pytest.raises(InputError, match=f"measured row itself does not fit the memory {words}.*give.* a number") as error:
            choose(nothing, longest=100, most_useful=1000, gradient_checkpointing=checkpointing)
        assert "expected room for 4,096 tokens" in str(error.value)


OLMO_3_32B = 2 * 100278 * 5120 + 64 * (2 * 5120**2 + 2 * 5120 * 1024 + 3 * 5120 * 27648 + 5120 + 1024 + 2 * 5120) + 5120
"""Embeddings and head, 64 layers, the last norm."""


def asked(tmp_path, zero: dict | None = None, **options) -> TrainConfig:
    if zero is not None:
        (tmp_path / "zero.json").write_text(json.dumps(zero))
        options["zero_config"] = tmp_path / "zero.json"
    given = {"loss_type": ("sigmoid",), "beta": 0.1, "learning_rate": 1e-6, "effective_batch_size": 128, "tokens_per_batch": "auto"}
    return TrainConfig(ref_store=tmp_path / "store", output_dir=tmp_path / "run", **given | options)


def test_a_policy_too_large_for_zero_is_refused_by_numbers(tmp_path):
    """By hand, of 32 G parameters: 2 bytes each on every GPU, and 16 over all of them."""
    policy = Policy("olmo", None, "olmo", None, "bfloat16")
    assert OLMO_3_32B == 32_233_522_176

    def ask(world: int, gib: float, zero: dict | None = None, **options) -> None:
        refuse_by_number(asked(tmp_path, zero, **options), policy, OLMO_3_32B, world=world, free=int(gib * GIB))

    found = (
        r"olmo: the policy does not fit under ZeRO stage 2; expected 180 GiB on each GPU, before any row: 32,233,522,176 parameters x "
        r"\(2 of weights \+ \(4 of float32 weights \+ 8 of Adam's states \+ 4 of gradients\) / 4\) bytes; found 178 GiB free. "
        "Train on 5 GPUs or more, which share all but the weights; or train an adapter .* take 60 GiB: --use-peft.$"
    )
    with pytest.raises(InputError, match=found):
        ask(4, 178)
    ask(4, 181)
    ask(5, 178)
    ask(1, 61, use_peft=True)
    with pytest.raises(InputError, match=r"parameters x \(2 of weights\) bytes; found 59 GiB free. Take larger GPUs: ZeRO-3"):
        ask(8, 59, use_peft=True)
    with pytest.raises(InputError, match=r"Take larger GPUs: ZeRO-3"):
        ask(64, 59)
    ask(4, 149, optim="sgd")  # 2 + 4 + 4 / 4
    stage_1 = {"zero_optimization": {"stage": 1}}
    with pytest.raises(
        InputError, match=r"\(2 of weights \+ 2 of gradients \+ \(4 .* 8 of Adam's states\) / 8\).* or take stage 2 in"
    ):
        ask(8, 150, stage_1)
    with pytest.raises(InputError, match=r"\(2 of weights \+ 4 of float32 weights \+ 8 of .* 2 of gradients\) bytes.*Take stage 2"):
        ask(8, 178, {"zero_optimization": {"stage": 0}})
    ask(1, 61, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(InputError):
        ask(1, 61, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})


@pytest.fixture(scope="module")
def model():
    """Its micro-steps take enough to be seen among pages that come and go."""
    torch.manual_seed(0)
    sizes = tiny.SMALL | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)


def of_tensors(model, checkpointing: bool, num_tokens: int) -> int:
    """Bytes of a micro-step's tensors at most, by PyTorch's profiler: what the process takes, without what its allocator loses between them."""
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    with (
        memory.ready_to_train(model.train()),
        memory._gradients_let_go(model),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        memory._micro_step(model, num_tokens)
    model.activation_checkpointing_disable()
    assert all(each.grad is None for each in model.parameters())
    taken = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns())]).max())


@pytest.fixture(scope="module")
def tensors(model) -> dict[bool, dict[int, int]]:
    """Without and with checkpointing, by tokens."""
    lengths = (*memory.PROBES["cpu"], 2000)
    return {
        checkpointing: {tokens: of_tensors(model, checkpointing, tokens) for tokens in lengths} for checkpointing in (False, True)
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_rows_predict_a_longer_one(tensors, checkpointing):
    """Of 2,000 tokens, from 128 and 512."""
    *probes, (_, longer) = tensors[checkpointing].items()
    cost = Cost.through(*probes)
    layers = 8 * 256 * 4  # bytes of the hidden states between layers, per token
    assert 1 * layers < cost.per_unit < (8 if checkpointing else 40) * layers
    assert 0.93 * longer < cost.of(2000) < 1.07 * longer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_the_process_is_that_of_the_tensors_and_what_lies_between(model, tensors, checkpointing):
    """glibc loses as much again in blocks of less than a megabyte, here between those of checkpointed layers, more or less of it by what the
    process did before."""
    cost = memory._of_micro_steps(model, checkpointing)
    for tokens in (512, 2000):
        assert 0.8 < cost.of(tokens) / tensors[checkpointing][tokens] < 4
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.slow
def test_the_engine_is_measured_by_real_steps_and_let_go():
    """float32, one rank: Adam's two states, sums of gradients, gradients; DeepSpeed keeps the weights once more."""
    with one_rank():
        join(Process(rank=0, world=1, local_rank=0))
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        args = TrainingArguments("unused", use_cpu=True)
        watch = MemoryWatch(torch.device("cpu"))
        backward, step = memory._of_engines(ZERO2, args, torch.float32, torch.device("cpu"), world=1)
        left = watch.most(lambda: None)
    assert 12 < backward.per_unit < 40 and 12 < step.per_unit < 40
    assert left < 200e6  # of 24 M parameters, which took some 700 MB


def test_memory_that_runs_out_is_explained():
    plan = choose(B200, longest=4000, most_useful=100_000, gradient_checkpointing=None)
    planned = "22,528 tokens.*148 GiB were planned.*found CUDA out of memory. Tried 5 GiB"
    for given, checkpointing, budget, longest, words in (
        (plan, False, 22_528, 4000, planned + ".*Use --gradient-checkpointing"),
        (plan, True, 22_528, 4000, planned + ".*Use --tokens-per-batch 11264"),
        (plan, True, 22_528, 12_000, planned + ".*Lower --max-length.*the longest has 12,000 tokens"),
        (None, True, 9000, 4000, "expected 9,000 tokens to a micro-step; found.*Use --tokens-per-batch 4500"),
        (None, True, 1024, 100, "Use --tokens-per-batch 512"),
        (None, True, 1024, 1000, "Lower --max-length"),
        (None, True, None, 4000, "Lower --per-device-train-batch-size"),
    ):
        with (
            pytest.raises(InputError, match=f"out of memory in step 3.*{words}"),
            memory.explained(given, checkpointing, budget, longest, lambda: 2),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 5 GiB.")
