"""--torch-compile: the same numbers and gradients, compiled once for rows of any length; what goes wrong is an error that names the option.

torch.compile's own front and its handling of gradients run here; Inductor's C++, which takes a minute, in the slow test of whole commands.
"""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_scoring import pairs
from train_setup import make_rows, make_tokenizer
from trl.trainer.utils import add_fused_lm_head

from precompute.scorer import compiled
from precompute.scorer.scoring import score
from precompute.scorer.self_test import self_test
from store.errors import InputError
from store.reader import open_store
from train.packed import pack_policy
from train.self_test import as_trl_pads, self_test_policy

KINDS = ("olmo3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "gpt_oss", "qwen2_moe", "deepseek_v3")))
"""Two kinds of layers, by their windows; one; sinks and experts; experts beside an MLP; a dense layer first."""


def make(kind: str):
    return tiny.make_model(kind) if kind in tiny.CONFIGS else tiny.make_unusual(kind)


@pytest.fixture
def compiling(monkeypatch):
    """As after --torch-compile."""
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    with torch._dynamo.config.patch():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled.use_compiler(True, layout="packed")
        yield compile_
        compiled.use_compiler(False, layout="packed")
        torch._dynamo.reset()


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_are_scored_by_the_same_graphs(kind, compiling):
    model = make(kind)
    many = pairs(seed=5)
    sets = [many, many[:2], many[2:6], many[5:8], many[::2], many[1:4]]
    seen = []
    for sequences in sets:
        found = score(model, sequences, layout="packed", tokens_per_batch=100_000)
        seen.append(compiled.num_graphs())
        assert_close(found, score(model, sequences, layout="padded", tokens_per_batch=1))
    assert seen[0] > 0
    most_later = 0 if kind in tiny.CONFIGS else 1  # an expert may be given one token or none
    assert seen[-1] - seen[0] <= most_later
    assert not any("forward" in vars(module) for module in model.modules())


def gradients(model, sequences: list, packed: bool) -> torch.Tensor:
    """Of a weighted sum of all log-probs, in every parameter, as one vector."""
    outputs = ("log_probs",)
    model = copy.deepcopy(model).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=outputs)
    if packed:
        pack_policy(model, outputs)
    results = []
    for start in range(0, len(sequences), 4):  # rows of several lengths
        input_ids, attention_mask, labels = as_trl_pads(model, sequences[start : start + 4])
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        seen = model(**given, fused_lm_head=True, use_cache=False).log_probs
        (seen * torch.linspace(0.5, 2, seen.numel()).view_as(seen)).sum().backward()
        results.append(compiled.num_graphs())
    assert results[0] == results[-1]
    return torch.cat([each.grad.flatten() for each in model.parameters()])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradients_under_checkpointing_are_those_of_the_padded_layout(kind, compiling):
    model, sequences = make(kind), pairs(seed=7, num=8)
    expected = gradients(model, sequences, packed=False)
    assert compiled.num_graphs() == 0
    found = gradients(model, sequences, packed=True)
    assert compiled.num_graphs() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_both_self_tests_look_at_compiled_layers(compiling, monkeypatch):
    model = make("olmo3")
    assert "packed scoring, compiled, against the model's own forward" in str(self_test(model, "float32"))
    assert "packed training, compiled, against the model's own forward" in str(self_test_policy(model, "float32", "packed"))

    def wrong(function, **options):
        right = compiling(function, **options)
        return lambda *args, **kwargs: right(*args, **kwargs) * 1.01

    monkeypatch.setattr(torch, "compile", wrong)
    for test in (lambda: self_test(model, "float32"), lambda: self_test_policy(model, "float32", "packed")):
        with pytest.raises(InputError, match="compiled, disagrees.*Leave out --torch-compile"):
            test()


def test_a_model_that_is_compiled_for_each_row_is_refused(compiling, monkeypatch):
    """As one whose code depends on the number of tokens; here for want of `dynamic`."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiling(function, dynamic=False))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    model = make("llama")
    with (
        pytest.raises(InputError, match="--torch-compile: this model's code is compiled again.*Leave it out"),
        compiled.named_compiler(),
    ):
        for sequence in pairs(seed=5):
            score(model, [sequence], layout="packed", tokens_per_batch=100_000)


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(InputError, match="--torch-compile: belongs to the packed layout"):
        compiled.use_compiler(True, layout="padded")
    assert not compiled.compiler_wanted()
    without_layers = SimpleNamespace(base_model=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="no layers that torch.compile.*Leave out --torch-compile"):
        compiled.use_compiled_layers(without_layers)


@pytest.mark.slow
def test_whole_commands_compiled_by_inductor(tmp_path):
    tiny.make_model("olmo3").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))

    def run(*words) -> str:
        command = [sys.executable, "cli.py", *map(str, words)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout + done.stderr

    stores, losses = {}, {}
    for name, more in {"plain": (), "compiled": ("--torch-compile",)}.items():
        given = {"dataset": tmp_path / "rows.jsonl", "model": tmp_path / "model", "dtype": "float32", "max-length": 96}
        words = [word for option, value in given.items() for word in (f"--{option}", value)]
        said = run("precompute", *words, "--ref-store", tmp_path / name, *more)
        stores[name] = open_store(tmp_path / name)
        assert stores[name].manifest.provenance["torch_compile"] == bool(more)
        assert ("compiled, against" in said) == bool(more)
        said = run(
            *("train", "--ref-store", tmp_path / "plain", "--output-dir", tmp_path / f"run-{name}", "--max-steps", 3),
            *("--effective-batch-size", 4, "--learning-rate", "1e-3", "--warmup-ratio", 0, "--save-strategy", "no", *more),
        )
        assert ("packed training, compiled, against" in said) == bool(more)
        record = json.loads((tmp_path / f"run-{name}" / "run.json").read_text())
        assert record["config"]["torch_compile"] == bool(more)
        losses[name] = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
    plain, again = (
        np.concatenate([np.concatenate(each.read(range(16))[column].to_pylist()) for column in COLUMNS]) for each in stores.values()
    )
    np.testing.assert_allclose(again, plain, atol=2e-4, rtol=0)
    assert len(losses["plain"]) == 3 and losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)


COLUMNS = ("chosen_token_logps", "rejected_token_logps")
