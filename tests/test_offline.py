"""A node without internet: model and dataset as `hf download` leaves them in HF_HOME, by their hub ids."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.rows.dataset import load_rows
from store.reader import open_store

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789012345678901234567890123456789"


def downloaded(home: Path, repository: str, kind: str, files: dict[str, bytes]) -> Path:
    """The cache of huggingface_hub: blobs, links to them under the names of one commit, and the branch that points to it."""
    folder = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for index, (name, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{index:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": texts, "chosen": ["a"] * len(texts), "rejected": ["b"] * len(texts)}), sink)
    return sink.getvalue().to_pybytes()


LOAD = """
import sys
from precompute.rows.dataset import load_rows
from store.errors import InputError

for name in sys.argv[1:]:
    try:
        load_rows(name, split="train")
    except InputError as error:
        print(str(error).replace(chr(10), " "))
"""
"""In a process of its own, as huggingface_hub reads its folder where it is imported."""


def test_hub_ids_are_found_in_the_cache(tiny_llama, tmp_path):
    home = tmp_path / "hf"
    model = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    downloaded(home, "acme/tiny", "models", model)
    files = {
        "README.md": b"# prefs",
        "data/train-00000-of-00002.parquet": parquet(["Why? ", "How? "]),
        "data/train-00001-of-00002.parquet": parquet(["When? "]),
        "data/test-00000-of-00001.parquet": parquet(["Who? "]),
    }
    snapshot = downloaded(home, "acme/prefs", "datasets", files)
    assert len(load_rows(str(snapshot), split="train")) == 3 and len(load_rows(str(snapshot), split="test")) == 1

    command = [sys.executable, str(ROOT / "cli.py"), "precompute", "--dataset", "acme/prefs", "--model", "acme/tiny", "--quiet"]
    command += ["--max-length", "64", "--dtype", "float32", "--ref-store", str(tmp_path / "store")]
    environ = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_HUB_CACHE")
    }
    environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0 and "card" not in done.stderr, done.stderr
    store = open_store(tmp_path / "store", check="sha256")
    assert (store.num_pairs, store.identity.dataset, store.identity.model) == (3, "acme/prefs", "acme/tiny")

    shutil.rmtree(snapshot / "data")
    (snapshot / "data").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "acme/prefs", "acme/other"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2, done.stderr
    for refusal, message in zip(refusals, ("holds no dataset", "hf download --repo-type dataset"), strict=True):
        assert message in refusal


def test_the_pages_name_the_commands():
    for page in ("data.md", "slurm.md"):
        text = (ROOT / "docs" / page).read_text()
        assert "hf download --repo-type dataset" in text and "HF_HOME" in text and "HF_HUB_OFFLINE=1" in text, page
