"""Where results are kept if nobody says: a dataset's store in store/NAME, never in that of another dataset; what is made of a store in
runs/NAME."""

import glob
import re
from pathlib import Path

from presets import PRESETS, Preset
from store.errors import InputError

SHELF, RUNS = Path("store"), Path("runs")

DATA_SUFFIXES = {".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".gz", ".zst", ".bz2"}

SAYS_NOTHING = re.compile(
    r"(train|training|test|validation|valid|val|dev|eval|data|dataset|default|part|snapshots)?[-_]?(\d+(-of-\d+)?)?"
)
"""File and folder names that many datasets share: the folder above names the dataset."""


def default_store(several: tuple[str, ...], preset: Preset | None) -> Path:
    """store/NAME for one dataset, store/NAME+NAME for several."""
    return SHELF / "+".join(_name_of(dataset, preset or preset_of(dataset)) for dataset in several)


def default_run(store: Path) -> Path:
    """Of the model that is trained from it."""
    return RUNS / store.resolve().name


def default_report(store: Path) -> Path:
    """Of its HTML page."""
    return RUNS / "report" / store.resolve().name


def default_histogram(dataset: str) -> Path:
    """Of a dataset's lengths."""
    return RUNS / "analyze" / f"{default_store((dataset,), preset_of(dataset)).name}.png"


def _name_of(dataset: str, preset: Preset | None) -> str:
    """A preset's name, else the file's or folder's without its kind: my.pairs.v1.jsonl.gz -> my.pairs.v1, prefs/train.parquet ->
    prefs-train, acme/prefs -> prefs."""
    if preset is not None:
        return preset.name
    path = Path(dataset.rstrip("/")).expanduser()
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    name = path.name or path.resolve().name
    while Path(name).suffix in DATA_SUFFIXES:
        name = Path(name).stem
    if SAYS_NOTHING.fullmatch(name):
        above = [part for part in path.absolute().parent.parts[1:] if not SAYS_NOTHING.fullmatch(part)]
        name = "-".join([*above[-1:], *([name] if name else [])])
    return name or "dataset"


def refuse_taken(store: Path, dataset: str, split: str, config: str | None) -> None:
    """InputError if the default folder `store` holds the store of another dataset, split or configuration: said before anything is loaded."""
    if not store.is_dir():
        return
    from store.folder import stored_identity

    there = stored_identity(store)
    if there is None or (_same(there.dataset, dataset) and (there.split, there.dataset_config) == (split, config)):
        return
    asked, found = (
        " ".join([name, f"(split {part})", *([f"(configuration {which})"] if which else [])])
        for name, part, which in ((dataset, split, config), (there.dataset, there.split, there.dataset_config))
    )
    raise InputError(
        "this default folder is taken by the store of another dataset",
        where=store,
        expected=asked,
        found=found,
        next=f"Name the folder: --ref-store {store} if they are the same rows, or another.",
    )


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def preset_of(dataset: str) -> Preset | None:
    """The preset of this name, or of this data set: the command that an unsealed store suggests also keeps its training defaults."""
    return PRESETS.get(dataset) or next((each for each in PRESETS.values() if each.dataset == dataset), None)
