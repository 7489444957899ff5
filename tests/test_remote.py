"""push, pull and reading by URL, through fsspec's file:// and memory://; the Hub's calls at its client's boundary."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import store_samples
from click.testing import CliRunner

import cli
from store import remote
from store.errors import InputError, StoreError
from store.reader import open_store
from store.remote import local_copy, pull, push, url_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "think"
    store_samples.make_store(path, num_rows=20, shard_size=4, unscorable=(7,))
    return path


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_there_and_back_is_the_same_bytes(store, tmp_path):
    push(store, f"file://{tmp_path}/there")
    assert files(tmp_path / "there").keys() == files(store).keys() | {"README.md"}
    seen = []
    pull(f"file://{tmp_path}/there", tmp_path / "back", lambda done, total: seen.append((done, total)))
    assert files(tmp_path / "back") == files(store) and seen[-1] == (5, 5)
    pull(f"file://{tmp_path}/there", tmp_path / "back")  # again: checked, nothing changes
    assert files(tmp_path / "back") == files(store)


def test_interrupted_pull_goes_on_and_is_unsealed_until_then(store, tmp_path, monkeypatch):
    push(store, f"file://{tmp_path}/there")
    copied = []
    original = remote._pull_shard

    def failing(files, root, shard, path):
        if shard.name == "part-00003.parquet" and len(copied) < 50:
            raise OSError("the network is gone")
        copied.append(shard.name)
        original(files, root, shard, path)

    monkeypatch.setattr(remote, "_pull_shard", failing)
    with pytest.raises(InputError, match="the network is gone"):
        pull(f"file://{tmp_path}/there", tmp_path / "back")
    with pytest.raises(StoreError, match="not sealed"):
        open_store(tmp_path / "back")
    monkeypatch.setattr(remote, "_pull_shard", original)
    fetched = []
    get = fsspec.filesystem("file").__class__.get_file
    monkeypatch.setattr(
        fsspec.filesystem("file").__class__,
        "get_file",
        lambda self, there, here, **kw: fetched.append(there) or get(self, there, here, **kw),
    )
    pull(f"file://{tmp_path}/there", tmp_path / "back")
    assert 1 <= len(fetched) < 5 and files(tmp_path / "back") == files(store)


def test_altered_shard_is_not_accepted(store, tmp_path):
    push(store, f"file://{tmp_path}/there")
    shard = tmp_path / "there" / "part-00002.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="arrived altered"):
        pull(f"file://{tmp_path}/there", tmp_path / "back")
    assert not (tmp_path / "back" / "_manifest.json").exists() and not (tmp_path / "back" / shard.name).exists()
    push(store, f"file://{tmp_path}/there")  # mends it
    assert files(tmp_path / "there")[shard.name] == files(store)[shard.name]


def test_a_broken_source_is_named_as_it_was_given(store, tmp_path):
    push(store, f"file://{tmp_path}/there")
    (tmp_path / "there" / "part-00002.parquet").unlink()
    with pytest.raises(StoreError, match=r"there/part-00002.parquet: the source lacks a shard"):
        pull(f"file://{tmp_path}/there", tmp_path / "back")
    (tmp_path / "there" / "_manifest.json").write_text("{}")
    with pytest.raises(StoreError, match=rf"^file://{tmp_path}/there: its manifest: not a manifest of refdpo"):
        pull(f"file://{tmp_path}/there", tmp_path / "back")


def test_other_stores_and_folders_are_left_alone(store, tmp_path):
    store_samples.make_store(tmp_path / "other", num_rows=20, shard_size=4, dtype="bfloat16")
    push(tmp_path / "other", f"file://{tmp_path}/there")
    for attempt in (lambda: push(store, f"file://{tmp_path}/there"), lambda: pull(f"file://{tmp_path}/there", store)):
        with pytest.raises(StoreError, match="made with another dtype"):
            attempt()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="nothing was touched"):
        push(store, f"file://{tmp_path}/thesis")
    with pytest.raises(InputError, match="no sealed store"):
        pull(f"file://{tmp_path}/thesis", tmp_path / "new")
    assert not (tmp_path / "new").exists() and files(tmp_path / "thesis").keys() == {"thesis.txt"}


def test_names(monkeypatch):
    assert url_of("acme/think") == "hf://datasets/acme/think" and url_of("acme/think", "v1") == "hf://datasets/acme/think@v1"
    assert url_of("s3://bucket/a/") == "s3://bucket/a"
    for bad in ("think", "./think", "/a/b", "a/b/c", "think/"):
        with pytest.raises(InputError, match="neither a URL nor a repository"):
            url_of(bad)
    with pytest.raises(InputError, match="cannot be reached|needs another package"):
        pull("nosuch://x/y", Path("never"))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("s3fs")))
    with pytest.raises(InputError, match="pip install s3fs"):
        pull("s3://bucket/x", Path("never"))


def test_commands_read_a_url_through_a_checked_copy(store, tmp_path, monkeypatch):
    monkeypatch.setenv("REFDPO_CACHE", str(tmp_path / "cache"))
    push(store, "memory://bucket/think")
    assert files(local_copy("memory://bucket/think")) == files(store)
    argv = ["inspect", "--ref-store", "memory://bucket/think", "--sql", "select count(*) as n from pairs", "--format", "csv"]
    assert CliRunner().invoke(cli.main, argv, catch_exceptions=False).output == "n\n19\n"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for bad, message in (
        (["inspect", "--ref-store", "memory://bucket/none"], "no sealed store"),
        (["push", "--ref-store", str(tmp_path / "none"), "a/b"], "no such folder"),
        (["pull", "think", "--ref-store", str(tmp_path / "x")], "neither a URL nor a repository"),
        (["push", "--ref-store", "memory://bucket/think", "a/b"], "must be a folder of this machine"),
        (["precompute", "--dataset", "think", "--ref-store", "s3://bucket/think"], "written in a local folder"),
    ):
        result = CliRunner().invoke(cli.main, bad)
        assert (
            result.exit_code == 2 and message in result.output and len(re.findall("^Error:", result.output, re.MULTILINE)) == 1
        ), result.output


class FakeHub:
    """Answers as huggingface_hub.HfApi does, from a dictionary, and checks what is asked of it."""

    def __init__(self):
        self.files, self.calls, self.loses = {}, [], None

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        self.calls.append(("create", repo_id, private))

    def repo_info(self, repo_id, *, repo_type, files_metadata):
        assert repo_type == "dataset" and files_metadata
        lfs = {
            name: SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if name.endswith(".parquet") else None
            for name, data in self.files.items()
        }
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, lfs=each) for name, each in lfs.items()])

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        self.calls.append(("folder", tuple(allow_patterns)))
        self.files |= {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns if name != self.loses}

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, commit_message):
        self.calls.append(("file", path_in_repo))
        self.files[path_in_repo] = path_or_fileobj

    def hf_hub_download(self, repo_id, filename, *, repo_type, local_dir):
        (Path(local_dir) / filename).write_bytes(self.files[filename])
        return str(Path(local_dir) / filename)


def test_fake_hub_takes_what_the_real_client_takes():
    from inspect import signature

    from huggingface_hub import HfApi

    for name in ("create_repo", "repo_info", "upload_folder", "upload_file", "hf_hub_download"):
        assert set(signature(getattr(FakeHub, name)).parameters) <= set(signature(getattr(HfApi, name)).parameters), name


def test_a_hub_that_cannot_be_reached_is_one_line(store, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "none")
    with pytest.raises(InputError, match="cannot be reached: ConnectError"):
        push(store, "acme/think-ref")


def test_push_to_the_hub(store, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    hub.loses = "part-00001.parquet"
    with pytest.raises(StoreError, match="1 shards are not there.*part-00001"):
        push(store, "acme/think")
    assert "_manifest.json" not in hub.files  # never sealed while a shard is missing
    hub.loses, hub.calls = None, []
    assert push(store, "acme/think", private=True) == "hf://datasets/acme/think"
    assert hub.calls == [
        ("create", "acme/think", True),
        ("folder", ("part-00001.parquet",)),
        ("file", "README.md"),
        ("file", "_manifest.json"),
    ]
    assert {name: hub.files[name] for name in files(store)} == files(store)
    store_samples.make_store(tmp_path / "other", num_rows=20, shard_size=4, dtype="bfloat16")
    with pytest.raises(StoreError, match="made with another dtype"):
        push(tmp_path / "other", "acme/think")
    hub.files["stray.parquet"] = b"x"
    with pytest.raises(StoreError, match="other Parquet files: stray"):
        push(store, "acme/think")


def test_card_says_what_the_store_is(store):
    import yaml

    text = remote.card(open_store(store).manifest, "acme/think")
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": "part-*.parquet"}]
    assert (
        "19 preference pairs (20 source rows, 1 without a pair" in text
        and "acme/tiny@main" in text
        and "python cli.py pull acme/think" in text
    )
