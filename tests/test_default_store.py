"""No two datasets share a default store in silence."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from store_samples import make_store

import cli
from default_store import default_store, preset_of, refuse_taken
from store.errors import InputError

NAMES = {
    "my.pairs.v1": "my.pairs.v1",
    "my.pairs.v1.jsonl": "my.pairs.v1",
    "my.pairs.v2.jsonl.gz": "my.pairs.v2",
    "/data/prefs/train.parquet": "prefs-train",
    "/data/prefs/data/train-00000-of-00001.parquet": "prefs-train-00000-of-00001",
    "/data/prefs/data": "prefs-data",
    "/data/prefs/data/*.parquet": "prefs-data",
    "/data/prefs/": "prefs",
    "acme/prefs": "prefs",
    "acme/Prefs-1.5B": "Prefs-1.5B",
    "pairs.jsonl": "pairs",
    "test_pairs.jsonl": "test_pairs",
    "demo": "demo",
    "think": "think",
    "allenai/Dolci-Think-DPO-7B": "think",
}


@pytest.mark.parametrize(("dataset", "name"), NAMES.items())
def test_names(dataset, name):
    assert default_store((dataset,), preset_of(dataset)) == Path("store") / name
    assert default_store((dataset, "acme/more"), None) == Path("store") / f"{name}+more"


def test_a_taken_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_store(Path("store/prefs"), num_rows=4, dataset="acme/prefs", split="train")
    refuse_taken(Path("store/prefs"), "acme/prefs", "train", None)
    refuse_taken(Path("store/new"), "acme/prefs", "train", None)
    for asked in (("other/prefs", "train", None), ("acme/prefs", "test", None), ("acme/prefs", "train", "hard")):
        with pytest.raises(InputError, match="taken by the store of another dataset.*found acme/prefs .split train"):
            refuse_taken(Path("store/prefs"), *asked)
    Path("pairs.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b"}) + "\n")
    make_store(Path("store/pairs"), num_rows=4, dataset=str(tmp_path / "pairs.jsonl"), split="train")
    refuse_taken(Path("store/pairs"), "pairs.jsonl", "train", None)  # the same file, otherwise spelled
    argv = ["precompute", "--dataset", "other/prefs", "--model", "nowhere", "--max-length", "8", "--dtype", "float32"]
    result = CliRunner().invoke(cli.main, argv)
    assert result.exit_code == 2 and "taken by" in result.output and "--ref-store store/prefs" in result.output
