"""LoRA from a store trains what stock TRL's LoRA trains: losses and gradients of each adapter weight, and runs that are saved and resumed."""

import importlib.util
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from ranks import launch
from test_adapter import make_adapter
from tiny import make_model
from train_setup import make_store, make_tokenizer, make_world
from transformers import AutoModelForCausalLM

from precompute.scorer.adapter import adapter_of
from store.errors import InputError
from train import dropout, lora, run
from train.config import TrainConfig
from train.self_test import self_test_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two worlds, and an adapter whose merge made another store of the same rows."""
    folder = tmp_path_factory.mktemp("lora")
    worlds = {kind: make_world(folder / kind, num_rows=32, architecture=kind) for kind in ("llama", "olmo3")}
    (folder / "rows.json").write_text(json.dumps(worlds["llama"].rows))
    world = worlds["llama"]
    adapter = make_adapter(world.model, folder / "llama" / "adapter", tokenizer=False, target_modules=["q_proj", "up_proj"])
    make_tokenizer().save_pretrained(adapter)
    peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder / "llama" / "merged")
    make_tokenizer().save_pretrained(folder / "llama" / "merged")
    named = {"model": str(adapter), "tokenizer": str(adapter)}
    make_store(folder / "llama" / "store-adapter", folder / "llama" / "merged", world.rows, **named)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, dict]:
    """By number of processes."""
    results = {}
    for world in (2, 1):
        output = launch("lora_cases.py", folder, world=world, timeout=1200)
        results[world] = json.loads((folder / f"results-{world}.json").read_text()) | {"output": output}
    return results


def close(case: dict) -> None:
    assert len(case["ours"]) == len(case["gradient"]) == 4
    assert case["ours"] == pytest.approx(case["theirs"], abs=2e-6)
    # Measured: 2e-6, then up to 1e-4, for Adam's first steps move a weight whose gradient is hardly more than rounding as far as any other.
    assert case["gradient"][0] < 2e-5 and max(case["gradient"]) < 1e-3
    assert case["of_reference"] == 0 and case["trained"] > 0
    assert abs(case["theirs"][-1] - math.log(2)) > 0.005  # it moved: the comparison is not one of constants


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("kind", "layout"), [("llama", "packed"), ("llama", "padded"), ("olmo3", "tokens")])
@pytest.mark.slow
def test_a_fresh_adapter_trains_as_stock_trls(results, kind, layout, world):
    """Reference there: the base with the adapter off. Gradient checkpointing is on."""
    case = results[world]["fresh"][kind][layout]
    close(case)
    assert case["ours"][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.slow
def test_an_adapter_that_is_trained_on_trains_as_stock_trls(results, layout, world):
    """Reference there: a frozen copy of the adapter; here: its merge, scored before."""
    case = results[world]["going_on"][layout]
    close(case)
    assert case["ours"][0] == pytest.approx(math.log(2), abs=1e-5)


def run_of(folder: Path, name: str) -> tuple[dict, list[float]]:
    record = json.loads((folder / name / "run.json").read_text())
    return record, [entry["loss"] for entry in record["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_a_run_saves_an_adapter_and_says_what_it_is(results, folder):
    record, losses = run_of(folder, "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert record["lora"] | {"base": None} == {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.2,
        "use_rslora": True,
        "base": None,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "trained_weights": 6656,
        "all_weights": 179264,
    }
    for place in (folder / "run", folder / "run" / "checkpoint-4"):
        assert (place / "adapter_model.safetensors").exists() and not list(place.glob("model*.safetensors"))
        config = json.loads((place / "adapter_config.json").read_text())
        assert (config["r"], config["use_rslora"], config["base_model_name_or_path"]) == (4, True, str(folder / "llama" / "model"))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "run")
    assert not lora.adds_nothing(loaded) and set(loaded.peft_config) == {"default"}
    output = results[2]["output"]
    assert "gate: the fresh adapter adds nothing to it yet" in output
    assert "LoRA: 6,656 of 179,264 weights are trained (3.71 %): r 4, alpha 32, on down_proj, q_proj, v_proj" in output
    card = (folder / "run" / "README.md").read_text()
    assert "library_name: peft" in card and "lora_alpha" in card


@pytest.mark.slow
def test_what_is_saved_is_what_was_evaluated(results, folder):
    """The adapter read again, on the held-out pairs, one by one."""
    from train_setup import token_logps

    from store.reader import open_store
    from store.select import select

    record, _ = run_of(folder, "run")
    last = [entry for entry in record["log_history"] if "eval_loss" in entry][-1]
    store = open_store(folder / "llama" / "store")
    pairs = store.read(select(folder / "llama" / "store", "row < 24", None, 0.2).eval).to_pylist()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "run").eval()
    margins = [
        0.1
        * sum(
            sign * (sum(token_logps(model, each["prompt_ids"], each[f"{side}_ids"])) - each[f"ref_{side}_logps"])
            for side, sign in (("chosen", 1), ("rejected", -1))
        )
        for each in pairs
    ]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert last["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(results, folder):
    """Dropout included. With another number of processes sums are rounded elsewhere, and other numbers are dropped."""
    whole, resumed = ((folder / name / "adapter_model.safetensors").read_bytes() for name in ("run", "resumed"))
    assert whole == resumed and not (folder / "resumed" / "checkpoint-2").exists()
    assert len(run_of(folder, "one")[1]) == 6  # of which four are the first launch's
    assert not list((folder / "run" / "checkpoint-4").glob("*universal*"))


@pytest.mark.slow
def test_dropout_counts_where_it_was_asked_for(results, folder):
    """The first loss has B = 0 either way."""
    dropped, plain = run_of(folder, "run")[1], run_of(folder, "undropped")[1]
    assert dropped[0] == pytest.approx(plain[0], abs=1e-6) and abs(dropped[-1] - plain[-1]) > 1e-4


@pytest.mark.slow
def test_a_run_from_an_adapter_goes_on_with_it(results, folder):
    record, losses = run_of(folder, "on")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert record["lora"]["r"] == 4 and record["lora"]["target_modules"] == ["q_proj", "up_proj"]
    assert "gate: the adapter beside its base, as it is trained: 8 random pairs" in results[2]["output"]
    assert adapter_of(str(folder / "on")).base == str(folder / "llama" / "model")


@pytest.mark.slow
def test_what_cannot_be_trained_is_one_error(results):
    other, decided, no_layer, head = results[2]["run"]["errors"]
    assert "is not the reference of this store" in other
    assert "--lora-r: " in decided and "is an adapter, which is trained on and has decided this" in decided
    assert "--lora-target-modules: no adapter can be made" in no_layer and "all-linear" in no_layer
    assert "the head cannot have an adapter" in head


PLAIN = {
    "ref_store": "s",
    "output_dir": "o",
    "loss_type": ("sigmoid",),
    "beta": 0.1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 1,
    "effective_batch_size": 2,
}


def config(**options) -> TrainConfig:
    return TrainConfig(**PLAIN | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "--lora-r: belongs to --use-peft"),
        ({"lora_target_modules": ("q_proj",), "use_rslora": True}, "--lora-target-modules, --use-rslora: belongs to --use-peft"),
        ({"load_in_4bit": True}, "--load-in-4bit: belongs to --use-peft"),
        ({"use_peft": True, "lora_dropout": 1.0}, "--lora-dropout: .*expected at least 0 and below 1"),
        ({"use_peft": True, "lora_target_modules": ("all-linear", "q_proj")}, "all-linear alone"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        config(**options)


def test_missing_packages_are_named_before_anything_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    missing = {"peft"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    with pytest.raises(InputError, match="--use-peft: needs peft, which is not installed. pip install peft"):
        config(use_peft=True)
    config()  # who trains all weights does not need it
    missing.clear()
    missing.add("bitsandbytes")
    with pytest.raises(InputError, match="--load-in-4bit: needs bitsandbytes, which is not installed"):
        config(use_peft=True, load_in_4bit=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), None),
        (("q_proj,v_proj", "o_proj"), {"q_proj", "v_proj", "o_proj"}),
        (("all-linear",), "all-linear"),
        ((r".*\.(0|1)\.self_attn\.[qv]_proj",), r".*\.(0|1)\.self_attn\.[qv]_proj"),
    ],
)
def test_target_modules_are_names_or_all_or_a_pattern(given, expected):
    assert lora.kind_of(config(use_peft=True, lora_target_modules=given), None).target_modules == expected


def test_defaults_are_trls_but_for_dropout_which_would_count():
    kind = lora.kind_of(config(use_peft=True), None, revision="v1")
    assert (kind.r, kind.lora_alpha, kind.lora_dropout, kind.use_rslora, kind.revision) == (16, 32, 0.0, False, "v1")


def test_a_fresh_adapter_adds_nothing_and_is_known_when_it_does():
    ids = torch.arange(2, 40)[None]
    model = make_model("llama")
    before = model(input_ids=ids).logits
    policy = lora.fresh(model, lora.kind_of(config(use_peft=True, lora_target_modules=("all-linear",)), None), seed=0)
    assert torch.equal(policy(input_ids=ids).logits, before)
    assert lora.adds_nothing(policy)
    next(weight for name, weight in policy.named_parameters() if "lora_B" in name).data[0, 0] = 1e-6
    assert not lora.adds_nothing(policy)
    gaussian = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    with pytest.raises(InputError, match="changes the policy at once"):
        lora.fresh(make_model("llama"), gaussian, seed=0)


def test_an_adapter_of_embeddings_is_fresh_too_but_for_those_that_the_head_shares():
    """peft starts it with A = 0 and a random B."""
    kind = lora.kind_of(config(use_peft=True, lora_target_modules=("embed_tokens", "q_proj")), None)
    ids, model = torch.arange(2, 40)[None], make_model("qwen2")
    before = model(input_ids=ids).logits
    policy = lora.fresh(model, kind, seed=0)
    assert torch.equal(policy(input_ids=ids).logits, before)
    self_test_policy(make_model("qwen2"), "float32", "packed", adapt=lora.on_twin(kind))
    next(weight for name, weight in policy.named_parameters() if "lora_embedding_A" in name).data[0, 0] = 1e-6
    assert not lora.adds_nothing(policy)
    with pytest.raises(InputError, match="the head shares the embeddings"):
        lora.fresh(make_model("llama"), kind, seed=0)


def test_the_adapters_dropout_stays_only_where_it_was_asked_for():
    policy = lora.fresh(make_model("llama"), lora.kind_of(config(use_peft=True, lora_dropout=0.3), None), seed=0)
    shares = lambda: {each.p for each in policy.modules() if isinstance(each, torch.nn.Dropout)}
    assert dropout.turn_off(policy, keep_adapters=True) == () and shares() == {0.3}
    assert dropout.turn_off(policy) == ("Dropout 0.3",) and shares() == {0.0}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_self_test_looks_at_the_adapters_gradients(layout, monkeypatch):
    """An adapter whose layers are computed without it has no gradient; one that is scaled wrongly another."""
    kind = lora.kind_of(config(use_peft=True, lora_target_modules=(r".*\.3\.self_attn\.q_proj",)), None)  # the twin has two layers
    self_test_policy(make_model("olmo3"), "float32", layout, adapt=lora.on_twin(kind))
    from train import self_test

    name = "_packed" if layout == "packed" else "_padded"
    right = getattr(self_test, name)

    def wrong(model, sequences):
        layers = [each for each in model.modules() if hasattr(each, "lora_A")]
        for layer in layers:
            layer.scaling["default"] *= 2
        try:
            return right(model, sequences)
        finally:
            for layer in layers:
                layer.scaling["default"] /= 2

    monkeypatch.setattr(self_test, name, wrong)
    with pytest.raises(InputError, match="gradients of .* training differ"):
        self_test_policy(make_model("olmo3"), "float32", layout, adapt=lora.on_twin(kind))


def test_only_a_plain_adapter_is_trained_on(tmp_path, tiny_llama):
    for name, options in (
        ("use_dora", {"use_dora": True}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("bias all", {"bias": "all"}),
    ):
        adapter = adapter_of(str(make_adapter(tiny_llama, tmp_path / name, tokenizer=False, **options)))
        with pytest.raises(InputError, match=f"only a plain LoRA adapter is trained on; found {name}"):
            lora.kind_of(config(use_peft=True), adapter)


def test_the_trained_weights_flops_alone_are_counted_twice_backward():
    """Of a frozen weight there is no gradient: forward and the gradient of what goes in, not three products."""
    import numpy as np

    from train.flops import PairFlops

    model = AutoModelForCausalLM.from_config(make_model("llama").config).requires_grad_(True)
    count = lambda: float(PairFlops.of(model).of_pairs(np.array([10]), np.array([5]), np.array([7]))[0])
    whole = count()
    model.requires_grad_(False)
    linear = [each for each in model.model.modules() if isinstance(each, torch.nn.Linear)]
    body, head = sum(each.weight.numel() for each in linear), model.get_output_embeddings().weight.numel()
    assert whole - count() == 2 * body * 22 + 2 * head * 12


def test_4_bits_are_refused_on_a_cpu_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    """bitsandbytes packs weights for a CPU when the gate runs, and its product of those has no gradient."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name == "bitsandbytes" else find(name, *rest))
    monkeypatch.setattr(run, "join", lambda process: None)
    monkeypatch.setattr(run, "load_model", None)
    asked = {"ref_store": folder / "llama" / "store", "output_dir": tmp_path / "run", "use_peft": True, "load_in_4bit": True}
    with pytest.raises(InputError, match="--load-in-4bit: 4 bits train on GPUs only"):
        run.train(config(**asked))
