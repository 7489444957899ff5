"""Identity, reports and the manifest: strict on the way in, compared field by field, intact to the byte."""

import dataclasses
import json

import pytest
from store_samples import make_identity, make_shard, make_store, memory_folder

from store import record
from store.errors import StoreError
from store.manifest import MANIFEST, NAMES, DatasetPart, Identity, Manifest, check_same, totals_of
from store.reader import open_store
from store.verify import verify


@pytest.fixture
def tmp_path():
    yield from memory_folder()


OTHER = {int: 7, str: "f" * 64}


def changed(name: str) -> Identity:
    special = {"dtype": "bfloat16", "num_rows": 11, "scored_turns": "all", "datasets": (DatasetPart("a", 4), DatasetPart("b", 6))}
    value = special.get(name) or OTHER[type(getattr(make_identity(), name) or "")]
    return dataclasses.replace(make_identity(), **{name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Identity) if field.name not in {*NAMES, "truncation"}])
def test_every_field_that_makes_numbers_is_compared(name):
    with pytest.raises(StoreError) as error:
        check_same(make_identity(), changed(name), "store/x")
    assert f"{name} " in str(error.value)
    assert [difference[0] for difference in make_identity().differences(changed(name))] == [name]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_are_not_compared(name):
    check_same(make_identity(), changed(name), "store/x")


def test_a_mismatch_names_fields_values_models_and_options():
    stored = make_identity(max_length=8192, model="acme/sft", revision="step-900")
    now = make_identity(max_length=2048, model="acme/dpo", revision=None, weights_sha256="9" * 64)
    with pytest.raises(StoreError) as error:
        check_same(stored, now, "store/think")
    assert str(error.value) == (
        "store/think: made with another model (its weights differ), max length; "
        "expected weights_sha256 999999999999 (acme/dpo); max_length 2048 (this run); "
        "found weights_sha256 a1a1a1a1a1a1 (acme/sft@step-900); max_length 8192 (there). "
        "To go on with this store repeat its --model and --revision, --max-length; for other numbers choose another --ref-store."
    )


def test_same_name_with_other_weights_is_explained():
    with pytest.raises(StoreError, match="weights behind acme/tiny have changed since: pin a --revision"):
        check_same(make_identity(), make_identity(weights_sha256="9" * 64), "store/x")


def test_identity_survives_json_and_nothing_else_does():
    identity = make_identity(revision=None)
    assert Identity.from_json(json.loads(json.dumps(identity.to_json())), "x") == identity
    for name, value in identity.to_json().items():
        for bad in ({**identity.to_json(), name: [value]}, {k: v for k, v in identity.to_json().items() if k != name}):
            with pytest.raises(StoreError, match=name):
                Identity.from_json(bad, "x")
    with pytest.raises(StoreError, match="unknown flavour"):
        Identity.from_json({**identity.to_json(), "flavour": 1}, "x")
    with pytest.raises(StoreError, match="max_length should be int, is true"):
        Identity.from_json({**identity.to_json(), "max_length": True}, "x")
    with pytest.raises(StoreError, match="shard_size must be at least 1, is 0"):
        Identity.from_json({**identity.to_json(), "shard_size": 0}, "x")


def test_blocks_cover_every_row_once():
    for num_rows in (1, 4, 5, 11, 12):
        identity = make_identity(num_rows=num_rows)
        rows = [row for index in range(identity.num_shards) for row in identity.rows_of(index)]
        assert rows == list(range(num_rows))


def test_manifest_survives_a_round_trip(tmp_path):
    manifest = make_store(tmp_path / "s", unscorable=(1, 6))
    assert Manifest.load(tmp_path / "s" / MANIFEST) == manifest
    assert manifest.num_pairs == 8
    assert [each.row for each in manifest.unscorable] == [1, 6]
    assert manifest.provenance["shards_by_worker"] == {"n1:0": 3} and manifest.provenance["layout"] == "packed"
    assert manifest.provenance["tokens_per_second"] == pytest.approx(manifest.model_tokens / 6.0)
    assert manifest.provenance["waited"] == pytest.approx(0.75)


def test_totals_add_up_and_keep_the_first_example():
    shards = [make_shard(make_identity(), index, unscorable=(1,))[0] for index in range(3)]
    shards = [
        dataclasses.replace(
            report, counts={"identical": 2, f"kind_{report.index}": 1}, examples={"identical": f"row {report.first_row}"}
        )
        for report in shards
    ]
    totals = totals_of(shards)
    assert totals.counts == {"identical": 6, "kind_0": 1, "kind_1": 1, "kind_2": 1}
    assert totals.examples == {"identical": "row 0"}
    assert (totals.num_pairs, [each.row for each in totals.unscorable]) == (9, [1])
    assert totals.num_completion_tokens == sum(report.num_completion_tokens for report in shards)


def test_any_changed_byte_of_the_manifest_is_found(tmp_path):
    make_store(tmp_path, num_rows=2, shard_size=2)
    path = tmp_path / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(StoreError):
            Manifest.load(path)
    for other in (b"", data[:-1], data + b" ", data.replace(b"\n", b"\r\n"), b"\xff" + data, b"[1]", b"{}"):
        path.write_bytes(other)
        with pytest.raises(StoreError):
            open_store(tmp_path, check="none")
        with pytest.raises(StoreError):
            verify(tmp_path)


def test_manifest_of_another_version_is_refused(tmp_path):
    make_store(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(StoreError, match="another format; expected format_version 1; found 2"):
        Manifest.load(path)


def test_canonical_json_has_one_spelling():
    assert record.canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    with pytest.raises(ValueError):
        record.canonical({"a": float("nan")})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "0"),
        ("waited", None),
        ("seconds", -1),
        ("tokens_per_second", 10**400),
        ("shards_by_worker", ["a"]),
        ("layout", 3),
    ],
)
def test_provenance_that_is_read_has_the_right_types_even_under_a_right_checksum(tmp_path, name, value):
    make_store(tmp_path / "store")
    manifest = Manifest.load(tmp_path / "store" / MANIFEST)
    changed = dataclasses.replace(manifest, provenance={**manifest.provenance, name: value, "free": [value]})
    (tmp_path / "store" / MANIFEST).write_bytes(changed.to_bytes())
    with pytest.raises(StoreError, match=f"provenance.{name} should be"):
        open_store(tmp_path / "store")
