"""AI2's presets: what their launch scripts say, written out here, and the chat template that one of them asks for."""

import hashlib
from dataclasses import replace

import pytest
from click.testing import CliRunner

import cli
from precompute.config import completed
from presets import PRESETS
from train.start import config_of

TABLE = {
    "think-ai2": ("allenai/Dolci-Think-DPO-7B", "allenai/Olmo-3-7B-Think-SFT", 16384, 8e-8),
    "instruct-ai2": ("allenai/Dolci-Instruct-DPO", "allenai/Olmo-3-7B-Instruct-SFT", 16384, 1e-6),
    "think-32b": ("allenai/Dolci-Think-DPO-32B", "allenai/Olmo-3-32B-Think-SFT", 8192, 7e-8),
    "instruct-32b": ("allenai/Dolci-Instruct-DPO", "allenai/Olmo-3.1-32B-Instruct-SFT", 8192, 1e-6),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_the_launch_scripts_say(name):
    preset = PRESETS[name]
    assert (preset.dataset, preset.model, preset.max_length, preset.learning_rate) == TABLE[name]
    assert (preset.loss_type, preset.beta, preset.lr_scheduler_type, preset.warmup_ratio) == ("sigmoid_norm", 5.0, "linear", 0.1)
    assert (preset.num_train_epochs, preset.effective_batch_size, preset.dtype, preset.max_grad_norm) == (1.0, 128, "bfloat16", 0.0)
    assert "docs/olmo3.md" in preset.note and name in preset.note


def test_the_users_table_says_that_it_is_not_ai2s():
    for name in ("think", "instruct"):
        assert f"{name} is not the run that AI2 made" in PRESETS[name].note and f"{name}-ai2" in PRESETS[name].note
        assert PRESETS[name].max_grad_norm == 1.0


def run(*words: object) -> str:
    result = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    return result.output


@pytest.mark.parametrize("command", ["precompute", "analyze"])
def test_the_chat_template_is_asked_for_and_checked_before_anything_is_loaded(tmp_path, monkeypatch, command):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(
        PRESETS, "think-ai2", replace(PRESETS["think-ai2"], chat_template_sha256=hashlib.sha256(text.encode()).hexdigest())
    )
    file = tmp_path / "template.jinja"
    assert "needs the chat template of AI2's DPO step" in run(command, "--dataset", "think-ai2")
    file.write_text(text + " ")
    output = run(command, "--dataset", "think-ai2", "--chat-template", file)
    assert "not the chat template" in output and hashlib.sha256(file.read_bytes()).hexdigest() in output and "68da0a1" in output
    file.write_text(text + "\n")
    assert "but for the line break at its end" in run(command, "--dataset", "think-ai2", "--chat-template", file)


def test_the_right_template_passes_and_the_preset_completes_both_phases(tmp_path, monkeypatch):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    digest = hashlib.sha256(b"{{ messages }}").hexdigest()
    monkeypatch.setitem(PRESETS, "think-ai2", replace(PRESETS["think-ai2"], chat_template_sha256=digest))
    names = ("model", "split", "max_length", "dtype", "tokenizer", "ref_store", "dataset_config")
    preset, options = completed({"dataset": ("think-ai2",), "chat_template": file, **dict.fromkeys(names)})
    assert (preset.name, options["max_length"], str(options["ref_store"])) == ("think-ai2", 16384, "store/think-ai2")
    context = cli.main.commands["train"].make_context("train", ["--ref-store", str(tmp_path)])
    given = {
        name: value
        for name, value in context.params.items()
        if name not in ("num_processes", "resume_or_start", "overwrite", "config")
    }
    config = config_of(given, preset)
    assert (config.learning_rate, config.max_grad_norm, config.beta) == (8e-8, 0.0, 5.0)
    assert config_of(given | {"max_grad_norm": 0.5}, preset).max_grad_norm == 0.5
    assert config_of(given, PRESETS["think"]).max_grad_norm == 1.0
