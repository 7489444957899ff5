"""Is the store that precompute is asked for there already? Answered without loading the model, which takes a minute and a GPU.

Rows, tokenizer, template and configuration are small and are hashed as ever. Weights are not read again if their files are the very ones that
were: of the same names, sizes and times of change, as `make` and `rsync` decide it. Where anything differs, or nothing is known, the model is
loaded and hashed.
"""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from precompute.scorer.adapter import adapter_of, files_of
from store.folder import missing_shards
from store.manifest import Identity, Manifest, manifest_path

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


def checkpoint_stamp(name: str, revision: str | None) -> str | None:
    """A hash of names, sizes and times of change of the files with a model's weights, an adapter's and its base's; None where there are none to
    be seen. Raises InputError as `adapter_of`."""
    adapter = adapter_of(name, revision)
    if adapter is not None:
        name, revision = adapter.base, adapter.base_revision
    try:
        config = cached_file(name, "config.json", revision=revision)
        if config is None:
            return None
        files = sorted(file for pattern in WEIGHT_FILES for file in Path(config).parent.glob(pattern))
        files += files_of(adapter) if adapter is not None else []
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except (OSError, ValueError):  # a model that cannot be found is reported by whoever loads it
        return None
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest() if stamps else None


def is_complete(store: Path, identity: Identity) -> bool:
    """Sealed, and every shard is there."""
    return manifest_path(store).exists() and not missing_shards(store, identity)


def weights_known(store: Path, stamp: str | None) -> str | None:
    """The hash of the weights that made the sealed `store`, if `stamp` is of the files they were loaded from; else None."""
    if stamp is None or not manifest_path(store).exists():
        return None
    manifest = Manifest.load(manifest_path(store))
    unchanged = manifest.provenance.get("checkpoint_stamp") == stamp and is_complete(store, manifest.identity)
    return manifest.identity.weights_sha256 if unchanged else None
