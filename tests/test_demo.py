"""The demo's preference set is what it claims to be, and its model is made the same everywhere, by any number of processes."""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import model as demo_model
from demo.model import PAIRS, make_demo_model, read_pairs
from store.errors import InputError

ROOT = Path(__file__).parent.parent
GERMAN = re.compile(r"\b(und|nicht|der|die|das|ich|ist|wie)\b", re.IGNORECASE)
ENGLISH = re.compile(r"\b(and|not|the|is|to|of|a|I)\b")


def text(row: dict) -> str:
    return " ".join(turn["content"] for name in ("prompt", "chosen", "rejected") for turn in row[name])


def is_german(row: dict) -> bool:
    return len(GERMAN.findall(text(row))) > len(ENGLISH.findall(text(row)))


class TestPairs:
    def test_datasets_reads_one_schema(self, tmp_path):
        rows = datasets.load_dataset("json", data_files=str(PAIRS), split="train", cache_dir=str(tmp_path))
        assert rows.column_names == ["prompt", "chosen", "rejected"]
        assert rows[:] == {name: [row[name] for row in read_pairs()] for name in rows.column_names}

    def test_every_row_is_a_conversation_with_two_answers(self):
        for row in read_pairs():
            roles = [turn["role"] for turn in row["prompt"]]
            asked = roles[1:] if roles[0] == "system" else roles
            assert asked == ["user", "assistant"] * (len(asked) // 2) + ["user"]
            for side in ("chosen", "rejected"):
                assert [turn["role"] for turn in row[side]] == ["assistant"]
            assert row["chosen"] != row["rejected"]
            assert all(turn["content"].strip() == turn["content"] != "" for turn in row["prompt"] + row["chosen"] + row["rejected"])

    def test_is_varied(self):
        rows = read_pairs()
        num_german = sum(map(is_german, rows))
        assert len(rows) >= 60
        assert num_german >= 20 and len(rows) - num_german >= 40
        assert sum(len(row["prompt"]) >= 3 for row in rows) >= 20
        assert sum(row["prompt"][0]["role"] == "system" for row in rows) >= 5
        assert len({text(row) for row in rows}) == len(rows)
        prompts = [str(row["prompt"]) for row in rows]
        assert len(set(prompts)) < len(prompts)  # some prompts come with more than one pair of answers


@pytest.fixture(scope="module")
def two_models(demo_model, tmp_path_factory) -> list[Path]:
    """The model of all tests, and one from a process that differs in everything that should not matter."""
    folder = tmp_path_factory.mktemp("demo") / "mit Leerzeichen ä"
    code = "import sys; from pathlib import Path; from demo.model import make_demo_model; make_demo_model(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"Making the demo model in {folder} ") == 1
    return [demo_model, folder]


class TestModel:
    def test_is_the_same_in_every_process(self, two_models):
        first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in two_models)
        assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= first.keys()
        assert first.keys() == second.keys()
        assert [name for name in first if first[name] != second[name]] == []

    def test_leaves_nothing_else_behind(self, two_models):
        for folder in two_models:
            assert [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}-")] == []
        assert list(two_models[1].parent.iterdir()) == [two_models[1]]

    def test_is_an_olmo3_whose_window_is_shorter_than_the_pairs(self, two_models):
        model = AutoModelForCausalLM.from_pretrained(two_models[0])
        config = model.config
        assert type(model).__name__ == "Olmo3ForCausalLM"
        assert config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
        assert config.num_key_value_heads < config.num_attention_heads
        assert not config.tie_word_embeddings

        tokenizer = AutoTokenizer.from_pretrained(two_models[0])
        lengths = [len(ids) for ids in map(tokenizer.encode, rendered(tokenizer))]
        assert sum(length > config.sliding_window for length in lengths) > len(lengths) / 2
        assert config.sliding_window < max(lengths) <= 512  # nothing is truncated at the preset's max_length

    def test_has_learned_something(self, two_models):
        """Mean loss over the set, nats per token: ln 2048 = 7.62 for an untrained model; knowing each token's frequency alone gives 6.43."""
        tokenizer = AutoTokenizer.from_pretrained(two_models[0])
        model = AutoModelForCausalLM.from_pretrained(two_models[0])
        losses, counts = [], []
        for conversation in rendered(tokenizer)[::4]:
            ids = torch.tensor([tokenizer.encode(conversation)])
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
            counts.append(ids.shape[1] - 1)
        mean = sum(losses) / sum(counts)
        assert 2.0 < mean < 6.0 < math.log(model.config.vocab_size)

    def test_tokenizer_and_template(self, two_models):
        tokenizer = AutoTokenizer.from_pretrained(two_models[0])
        assert tokenizer.bos_token is None
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
        for row in read_pairs():
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            full = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
            assert full == prompt + row["chosen"][0]["content"] + "<|endoftext|>"
            assert tokenizer.decode(tokenizer.encode(full)) == full
        assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|><|pad|>")) == 4
        turns = [{"role": "user", "content": "Grüß dich"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nGrüß dich<|im_end|>\n"


def rendered(tokenizer) -> list[str]:
    return [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in read_pairs()
        for side in ("chosen", "rejected")
    ]


class TestFolder:
    """What stands in the folder decides what happens; the model itself is not made here."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        self.num_made = 0

        def make(folder: Path) -> None:
            self.num_made += 1
            (folder / "model.safetensors").write_text("weights")
            (folder / demo_model.RECIPE).write_text(demo_model._recipe())

        monkeypatch.setattr(demo_model, "_make", make)

    def test_is_made_once(self, tmp_path, capsys):
        folder = tmp_path / "new" / "model"
        assert make_demo_model(folder) == make_demo_model(folder) == folder
        assert self.num_made == 1
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_many_at_once_leave_one_complete_model(self, tmp_path):
        folder = tmp_path / "model"
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(make_demo_model, [folder] * 32)) == {folder}
        assert list(tmp_path.iterdir()) == [folder]
        assert (folder / "model.safetensors").read_text() == "weights"

    def test_a_model_of_other_demo_files_is_refused(self, tmp_path):
        folder = make_demo_model(tmp_path / "model")
        (folder / demo_model.RECIPE).write_text("something older")
        with pytest.raises(InputError, match=r"made from other demo files.*rm -r"):
            make_demo_model(folder)

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        for folder in (tmp_path, tmp_path / "notes.txt"):
            with pytest.raises(InputError, match="something else is in the way"):
                make_demo_model(folder)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_failed_build_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(folder: Path) -> None:
            (folder / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(demo_model, "_make", fail)
        with pytest.raises(KeyboardInterrupt):
            make_demo_model(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


def test_the_callers_torch_settings_survive():
    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with demo_model._repeatable():
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
        torch.rand(3)
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
