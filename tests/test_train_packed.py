"""The packed layout trains what stock TRL trains: loss, metrics and gradients of a step, whole runs, and runs that are resumed."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import launch
from tiny import CONFIGS, EXPERTS, SMALL, make_model
from train_setup import make_world
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from store.errors import InputError
from train.balance import BalancedSampler, Shape, deal, deal_whole, imbalance, shuffled
from train.choices import LOSS_TYPES
from train.data import Lengths
from train.flops import PairFlops, peak_of_name
from train.packed import pack_policy
from train.speed import Speed

KINDS = ("llama", "qwen3", "olmo3")
LOSSES = (*LOSS_TYPES, "sigmoid + sft, weighted", "WPO", "ld_alpha")
RELATIVE = 1e-5
BETA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For each kind: the reference, its store, and a policy that differs from it, so that no loss stands where it starts."""
    folder = tmp_path_factory.mktemp("packed")
    for kind in KINDS:
        world = make_world(folder / kind, architecture=kind)
        (folder / kind / "rows.json").write_text(json.dumps(world.rows))
        policy = AutoModelForCausalLM.from_pretrained(world.model)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        policy.save_pretrained(folder / kind / "policy")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int | str, dict]:
    """By number of processes; the second launch goes on from a checkpoint of the first, and the third, one case, from one of the second."""
    results = {}
    for world, case in ((2, []), (1, []), (2, ["resume_on_more"])):
        output = launch("packed_cases.py", folder, *case, world=world, timeout=600)
        name = "-".join([str(world), *case])
        results[case[0] if case else world] = json.loads((folder / f"results-{name}.json").read_text()) | {"output": output}
    return results


@pytest.mark.parametrize(("world", "kind"), [(1, "olmo3"), *((2, kind) for kind in KINDS)])
@pytest.mark.slow
def test_a_step_is_stock_trls(results, kind, world):
    """Same global batch, dealt again to two ranks: mean loss, each metric, each parameter's gradient. Rewards are differences of sums of some
    200 nats, times beta: what is 1e-6 of those is no error in them."""
    steps = dict(results[world]["steps"][kind])
    assert steps.pop("attention") == "refdpo_packed"
    assert tuple(steps) == LOSSES
    for name, step in steps.items():
        ours, theirs = step["loss"]
        assert ours == pytest.approx(theirs, rel=RELATIVE), name
        assert {"rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy", "logps/rejected"} <= step["metrics"].keys()
        for metric, (mine, trls) in step["metrics"].items():
            assert mine == pytest.approx(trls, rel=RELATIVE, abs=BETA * 1e-6 * abs(step["metrics"]["logps/chosen"][1])), (
                name,
                metric,
            )
        assert step["gradient"] < RELATIVE, name
    assert len({step["loss"][1] for step in steps.values()}) >= len(steps) - 1  # on some batch aot sorts nothing and equals sigmoid
    assert world == 1 or steps["sigmoid"]["dealt_anew"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.slow
def test_accelerate_hands_out_what_the_sampler_dealt(results, world):
    """Micro-batch k of the sampler's order goes to rank k mod world, in both epochs, which differ."""
    order = results[world]["order"]
    for epoch in (0, 1):
        expected = order["expected"][epoch]
        micro_batches = [expected[start : start + 2] for start in range(0, len(expected), 2)]
        for rank in range(world):
            assert order["reached"][rank][epoch] == micro_batches[rank::world]
    assert order["expected"][0] != order["expected"][1]


@pytest.mark.slow
def test_fifty_steps_follow_stock_trl_with_an_online_reference(results):
    """Measured: 1e-6 at most; stock with other micro-batches differs from itself by 6e-7. Ten times that is allowed."""
    fifty = results[2]["fifty_steps"]
    ours, theirs = (np.array(fifty[name]) for name in ("ours", "theirs"))
    assert len(ours) == len(theirs) == 50
    assert theirs.min() < 0.7 * theirs.max()  # it learned: the comparison is not one of constants
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.slow
def test_speed_is_logged(results):
    speed = results[2]["fifty_steps"]["speed"]
    assert speed["speed/tokens_per_second"] > speed["speed/pairs_per_second"] > 0
    assert sum(speed[f"speed/{name}_share"] for name in ("data", "forward", "backward_and_step")) == pytest.approx(1)
    assert 0 <= speed["speed/imbalance"] < 0.5
    assert 0.2 < speed["speed/padding"] < 0.8
    assert "speed/mfu" not in speed  # no GPU
    assert results[2]["fifty_steps"]["whole_speed"].keys() <= speed.keys()


def losses_of(run: Path) -> dict[int, float]:
    history = json.loads((run / "run.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(results, folder):
    whole, resumed = losses_of(folder / "run"), losses_of(folder / "resumed")
    assert [resumed[step] for step in (5, 6)] == pytest.approx([whole[step] for step in (5, 6)], abs=1e-7)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(results, folder):
    """Two processes made the checkpoint, one goes on: same pairs in each step, Adam's states reassembled. Sums over ranks round otherwise."""
    whole, one = losses_of(folder / "run"), losses_of(folder / "one")
    assert [one[step] for step in (3, 4, 5, 6)] == pytest.approx([whole[step] for step in (3, 4, 5, 6)], rel=1e-4)
    assert results[1]["run_and_resume"]["left"] == []


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes(results, folder):
    """One process made the checkpoint, two go on: each gets its half of Adam's states."""
    whole, two = losses_of(folder / "run"), losses_of(folder / "two")
    assert [two[step] for step in (5, 6)] == pytest.approx([whole[step] for step in (5, 6)], rel=1e-4)
    assert "its optimizer states are converted" in results["resume_on_more"]["output"]
    assert results["resume_on_more"]["resume_on_more"]["left"] == []


@pytest.mark.slow
def test_both_layouts_of_a_run_learn_the_same(results, folder):
    packed, padded = losses_of(folder / "run"), losses_of(folder / "padded")
    assert packed[1] == pytest.approx(math.log(2), abs=1e-6)
    assert list(packed.values()) == pytest.approx(list(padded.values()), rel=1e-4)
    runs = [json.loads((folder / name / "run.json").read_text()) for name in ("run", "padded")]
    assert [run["config"]["layout"] for run in runs] == ["packed", "padded"]
    evaluated = [[entry["eval_loss"] for entry in run["log_history"] if "eval_loss" in entry] for run in runs]
    assert evaluated[0] and evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    assert runs[0]["outlook"]["packed_tokens"] < runs[0]["outlook"]["padded_tokens"]
    assert runs[0]["result"]["speed"]["speed/pairs_per_second"] > 0
    assert "layout packed:" in results[2]["output"] and "as shuffled" in results[2]["output"]


@pytest.mark.slow
def test_a_saved_policy_knows_nothing_of_the_layout(results, folder):
    assert "refdpo_packed" not in (folder / "run" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder / "run").config._attn_implementation == "sdpa"


def batch_of(rng: np.random.Generator, num_pairs: int) -> dict[str, torch.Tensor]:
    def ids(low: int, high: int) -> list[int]:
        return rng.integers(2, 384, int(rng.integers(low, high))).tolist()

    rows = [
        {
            "prompt_ids": ids(1, 60),
            "chosen_ids": ids(1, 60),
            "rejected_ids": ids(1, 60),
            "ref_chosen_logps": 0.0,
            "ref_rejected_logps": 0.0,
        }
        for _ in range(num_pairs)
    ]
    return DataCollatorForPreference(pad_token_id=1)(rows)


def forward_and_backward(model, batch, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [B, L - 1], and the gradient of their sum as one vector; both float64."""
    outputs = ("log_probs",)
    model.requires_grad_(True).train()
    add_fused_lm_head(model, outputs=outputs)
    if packed:
        pack_policy(model, outputs)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    seen = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True, use_cache=False
    )
    seen.log_probs.sum().backward()
    return seen.log_probs.detach().double(), torch.cat([each.grad.double().flatten() for each in model.parameters()])


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_as_close_to_float32_as_in_the_padded_layout(kind):
    """Root mean square over tokens and weights; the two layouts round at other places, so neither is better: within a tenth."""
    batch = batch_of(np.random.default_rng(0), 8)
    exact = forward_and_backward(make_model(kind), batch, packed=False)
    noise = {}
    for packed in (True, False):
        rounded = forward_and_backward(make_model(kind).to(torch.bfloat16), batch, packed)
        noise[packed] = [(mine - true).square().mean().sqrt().item() for mine, true in zip(rounded, exact, strict=True)]
    assert all(value > 0 for value in noise[False])
    for ours, theirs in zip(noise[True], noise[False], strict=True):
        assert ours < 1.1 * theirs


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_experts_train_as_in_trl(kind, coefficient):
    """With the routers' auxiliary loss too, which counts every token of every sequence: shared prompts twice, last tokens as well."""
    batch = batch_of(np.random.default_rng(0), 6)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | EXPERTS)))
    results = {}
    for packed in (False, True):
        model = copy.deepcopy(plain)
        add_fused_lm_head(model)
        if packed:
            pack_policy(model, ("log_probs",))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels, "use_cache": False}
        output = model(**given, fused_lm_head=True, **({"output_router_logits": True} if coefficient else {}))
        (output.log_probs.sum() + (coefficient * output.aux_loss if coefficient else 0)).backward()
        results[packed] = [output.log_probs.detach(), *([output.aux_loss.detach()] if coefficient else [])]
        results[packed] += [each.grad for each in model.parameters()]
    for ours, theirs in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(theirs.abs().max().item(), 1e-3))


def test_what_cannot_be_packed_is_refused_with_the_advice():
    model = make_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match="linear_attention layers.*--layout padded"):
        pack_policy(model, ("log_probs",))
    model = make_model("llama")
    add_fused_lm_head(model)
    pack_policy(model, ("log_probs",))
    with pytest.raises(InputError, match="only computes DPO's loss.*--layout padded"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


shapes = st.builds(Shape, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(st.data(), shapes, st.integers(0, 5), st.booleans())
@settings(max_examples=60)
def test_every_global_batch_is_that_of_the_shuffle(data, shape, epoch, whole):
    """The same set of pairs in each, whatever the shape with that many pairs; and the same again for the same seed."""
    num_pairs = data.draw(st.integers(1, 5 * shape.pairs))
    tokens = np.array(data.draw(st.lists(st.integers(2, 9000), min_size=num_pairs, max_size=num_pairs)))
    sampler = BalancedSampler(tokens, shape, seed=7, keep_micro_batches=whole)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert order == list(sampler)
    plain = shuffled(num_pairs, 7, epoch)
    assert len(order) == num_pairs == len(sampler)
    for start in range(0, num_pairs, shape.pairs):
        assert sorted(order[start : start + shape.pairs]) == sorted(plain[start : start + shape.pairs])
    if whole:
        size = shape.micro_batch
        full = num_pairs // shape.pairs * shape.pairs
        cut = [{tuple(each[start : start + size]) for start in range(0, full, size)} for each in (order, plain.tolist())]
        assert cut[0] == cut[1]


@given(shapes, st.integers(0, 100))
@settings(max_examples=100)
def test_dealing_wastes_no_more_than_a_hand_in_the_worst_step(shape, seed):
    """In a micro-step the fullest rank holds at most its mean and the largest pair; on the whole it is better than the shuffle."""
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(7, 1, shape.pairs * 40).astype(np.int64) + 2
    order = np.arange(len(tokens))
    dealt = np.concatenate([deal(part, tokens[part], shape) for part in order.reshape(-1, shape.pairs)])
    assert sorted(dealt) == order.tolist()
    hands = tokens[dealt].reshape(-1, shape.world, shape.micro_batch)
    assert (hands.sum(axis=2).max(axis=1) <= hands.sum(axis=2).mean(axis=1) + hands.max(axis=(1, 2))).all()
    assert imbalance(dealt, tokens, shape) <= imbalance(order, tokens, shape) + 1e-12


def test_the_dealing_in_the_docstring():
    tokens = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    assert tokens[deal(np.arange(8), tokens, Shape(2, 2, 2))].tolist() == [9, 6, 8, 7, 4, 1, 3, 2]
    assert tokens[deal_whole(np.arange(8), tokens, Shape(2, 2, 2))].tolist() == [9, 1, 8, 2, 7, 3, 6, 4]
    assert imbalance(np.arange(8), tokens, Shape(1, 2, 4)) == pytest.approx(1 - 20 / 30)


def test_flops_by_hand():
    """Body 10 weights, head 5, width 2; prompt 3, chosen 2, rejected 1. Tokens 6, scored 3. Visible keys without a window: 1+2+3 of the prompt,
    4+5 and 4 of the completions = 19; with a window of 2: 1+2+2, 2+2, 2 = 11. Forward 2*10*6 + 2*5*3 + 4*2*(19+11) = 390, three times that."""
    flops = PairFlops(body=10, head=5, widths=(2, 2), windows=(None, 2))
    assert flops.of_pairs(np.array([3]), np.array([2]), np.array([1])).tolist() == [1170]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks_by_the_names_that_drivers_give(name, teraflops):
    assert peak_of_name(name) == (None if teraflops is None else teraflops * 1e12)


def test_flops_of_a_model_are_its_products():
    """Against PyTorch's own count of a forward's matrix products, without attention: prompt of one token, completions of 30."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model("olmo3")
    flops = PairFlops.of(model)
    assert flops.windows == (24, 24, 24, None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 31, dtype=torch.long), use_cache=False)
    products = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "mm" in str(operation))
    assert 2 * 31 * (flops.body + flops.head) == products


def test_speed_counts_pairs_and_knows_a_gpus_peak(monkeypatch):
    """A chosen of 3 + 2 and a rejected of 3 + 1 tokens in rows of 5: 9 tokens, 6 packed, 10 padded."""
    monkeypatch.setattr("train.speed.peak_flops", lambda device, dtype: 1e6)
    speed = Speed(PairFlops(10, 5, (2, 2), (None, 2)), torch.device("cpu"), torch.bfloat16)
    speed.count(Lengths(np.array([3]), np.array([2]), np.array([1])), 10)
    speed.recent.seconds.update(data=0.5, forward=0.5, backward_and_step=1.0)
    report = speed.recent_report()
    assert report == {
        "speed/tokens_per_second": 4.5,
        "speed/pairs_per_second": 0.5,
        "speed/padding": pytest.approx(0.4),
        "speed/data_share": 0.25,
        "speed/forward_share": 0.25,
        "speed/backward_and_step_share": 0.5,
        "speed/mfu": pytest.approx(1170 / 2 / 1e6),
    }
    assert speed.recent_report() == {}
    assert speed.whole_report() == report
