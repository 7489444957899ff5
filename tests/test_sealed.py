"""precompute on a sealed store: the model is loaded only where its files are not those that made the store; everything else is compared as ever."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

import cli
from precompute import inputs
from precompute.sealed import checkpoint_stamp
from store.manifest import MANIFEST, Manifest
from store.shard import part_name


@pytest.fixture
def world(tmp_path, tiny_llama, monkeypatch):
    """A sealed store, its rows and its model, and a list that grows with each loading of a model."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    sides = {side: [{"role": "user", "content": "why"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(sides) + "\n" for _ in range(3)))
    loaded, load_model = [], inputs.load_model
    monkeypatch.setattr(inputs, "load_model", lambda *args, **options: loaded.append(1) or load_model(*args, **options))
    call(tmp_path, code=0)
    assert loaded == [1]
    loaded.clear()
    return tmp_path, loaded


def call(folder: Path, *more: str, code: int, **changes) -> str:
    options = {
        "dataset": "rows.jsonl",
        "model": "model",
        "max-length": 64,
        "dtype": "float32",
        "shard-size": 2,
        "ref-store": "store",
    }
    given = {
        name: folder / value if isinstance(value, str) and name != "dtype" else value for name, value in (options | changes).items()
    }
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(cli.main, ["precompute", *words, *more])
    assert result.exit_code == code, result.output
    return result.output


def test_the_same_again_loads_no_model_and_says_so(world):
    folder, loaded = world
    output = call(folder, code=0)
    assert not loaded and "sealed already, nothing to score" in output and "3 pairs of 3 rows" in output
    assert "left" not in output and "tokens/s ·" not in output


def test_what_differs_is_still_refused(world):
    folder, loaded = world
    assert "made with another max length" in call(folder, code=1, **{"max-length": 32})
    assert "made with another dtype" in call(folder, code=1, dtype="bfloat16")
    (folder / "t.jinja").write_text(tiny.THINKING)
    assert "made with another chat template" in call(folder, "--chat-template", str(folder / "t.jinja"), code=1)
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("why", "how"))
    assert "made with another dataset" in call(folder, code=1)
    assert not loaded
    (folder / "rows.jsonl").write_text(rows)
    tiny.make_model("llama", seed=1).save_pretrained(folder / "model")  # other weights in files of the same names and sizes
    assert "made with another model (its weights differ)" in call(folder, code=1) and loaded == [1]


def test_files_that_may_have_changed_are_hashed(world):
    folder, loaded = world
    file = next((folder / "model").glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert "sealed already" in call(folder, code=0) and loaded == [1]
    shutil.copytree(
        folder / "model", folder / "copy"
    )  # the same weights elsewhere: times of change are kept, nothing need be loaded
    assert "sealed already" in call(folder, code=0, model="copy")


def test_a_store_that_lacks_a_shard_or_was_made_before_loads_the_model(world):
    folder, loaded = world
    (folder / "store" / part_name(1)).unlink()
    output = call(folder, code=0)
    assert "2 of 3 rows are done, going on" in output and "scored 3/3" in output and loaded == [1]
    path = folder / "store" / MANIFEST
    manifest = Manifest.load(path)
    manifest.provenance.pop("checkpoint_stamp")
    path.write_bytes(manifest.to_bytes())
    assert "sealed already" in call(folder, code=0) and loaded == [1, 1]


def test_a_worker_that_comes_late_says_what_was_there_before_the_others(world, monkeypatch):
    """They score and seal all that was missing while its model loads."""
    folder, _ = world
    missing = [folder / "store" / name for name in (MANIFEST, part_name(1))]
    for file in missing:
        file.rename(folder / file.name)
    load_model = inputs.load_model

    def load_after_the_others(*args, **options):
        for file in reversed(missing):
            (folder / file.name).rename(file)
        return load_model(*args, **options)

    monkeypatch.setattr(inputs, "load_model", load_after_the_others)
    output = call(folder, code=0)
    assert "store: 2 of 3 rows are done, going on\n" in output
    assert "store: sealed by other workers, nothing to score\n" in output
    missing.pop(0).unlink()  # and where they have not sealed it yet
    (folder / "store" / part_name(1)).rename(folder / part_name(1))
    output = call(folder, code=0)
    assert "store: 2 of 3 rows are done, going on\n" in output
    assert "store: scored by other workers meanwhile, sealing\n" in output and "scored 3/3" not in output


def test_stamp_is_of_the_files_with_weights_alone(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "model")
    stamp = checkpoint_stamp(str(tmp_path / "model"), None)
    assert stamp == checkpoint_stamp(str(tmp_path / "model"), None) is not None
    (tmp_path / "model" / "README.md").write_text("x")
    assert stamp == checkpoint_stamp(str(tmp_path / "model"), None)
    (tmp_path / "model" / "model-00002-of-00002.safetensors").write_text("x")
    assert stamp != checkpoint_stamp(str(tmp_path / "model"), None)
    assert checkpoint_stamp(str(tmp_path), None) is None and checkpoint_stamp(str(tmp_path / "none"), None) is None
