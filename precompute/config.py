"""What phase 1 and its desk tools are told: each field is an option (options.py). What is not given comes from the preset, or is asked for."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from default_store import default_histogram, default_store, preset_of, refuse_taken
from options import FILE, Day, IntegerOrAuto, Option, Rate
from precompute.rows.options import DATA, ColumnOptions
from precompute.scorer import AttentionKernel, Layout
from presets import PRESETS, Preset
from store import DTYPES, ScoredTurns
from store.command import Command, cli
from store.errors import InputError

MAX_LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""What `analyze` asks of every dataset; `--max-length` adds others."""

Show = Literal["text", "json", "nothing"]

MODEL, STORE, SPEED, OUTPUT = "Model and tokenizer", "Store", "Speed and memory", "Output"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which rows are read, and as which tokens."""

    dataset: Annotated[
        tuple[str, ...],
        Option(
            "think | instruct | think-ai2 | instruct-ai2 | think-32b | instruct-32b | demo, a hub id, a file, a 'pattern*.parquet', or a folder: docs/data.md. Repeatable: all go into one store.",
            DATA,
        ),
    ]
    """As load_rows takes them. Split, configuration, limit and columns are asked of each."""
    model: Annotated[str, Option("Reference model: folder or hub id, of an adapter too.", MODEL, default="the preset's")]
    revision: Annotated[str | None, Option("Revision of the model on the hub (and of its tokenizer).", MODEL)] = None
    tokenizer: Annotated[str, Option("Folder or hub id.", MODEL, default="the model's")]
    chat_template: Annotated[Path | None, Option("File that replaces the tokenizer's chat template.", MODEL, type=FILE)] = None
    dataset_config: Annotated[str | None, Option("Configuration of a dataset that has several.", DATA)] = None
    dataset_revision: Annotated[str | None, Option("Revision of the dataset on the hub.", DATA)] = None
    split: Annotated[str, Option("Split of the dataset, or a part of one such as 'train[:1000]'.", DATA, default="train")]
    limit: Annotated[int | None, Option("Only the first N rows.", DATA, at_least=1)] = None
    columns: ColumnOptions = field(default_factory=ColumnOptions)


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Source):
    """What a store is made of, whoever computes its numbers. What makes them has no default here: a preset has, or the user."""

    template_date: Annotated[str | None, Option("The day, for a chat template that writes today's date.", MODEL, type=Day())] = None
    max_length: Annotated[
        int,
        Option("Tokens of prompt + completion; longer sequences keep their start.", STORE, default="the preset's", at_least=2),
    ]
    dtype: Annotated[str, Option("Dtype the model runs in.", STORE, default="the preset's", choices=DTYPES)]
    shard_size: Annotated[
        int | None,
        Option(
            "Rows per shard: the most a killed worker loses.",
            STORE,
            default="2,400 shards, of 16 to 1,024 rows",
            at_least=1,
        ),
    ] = None
    ref_store: Annotated[Path, Option("Folder of the store.", STORE, default="store/<dataset>")]
    preset: str | None = None
    """Recorded: phase 2 takes its defaults from it."""

    def command(self) -> Command:
        """The command that runs now, as the store records it."""
        return Command.now(
            self.ref_store,
            limit=self.limit,
            chat_template=self.chat_template,
            shard_size=self.shard_size,
            columns=str(self.columns),
        )


ScoreTurns = Annotated[
    Literal["completion", "last", "all"],
    Option(
        "Which tokens are scored: completion, all that follows the common prompt, as in TRL; last, each side's last assistant turn, as for OLMo 3; "
        "all, every assistant turn.",
        STORE,
        default="the preset's, or completion",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(StoreConfig):
    """Phase 1. The fields of this class are about speed, but for the first: recorded, never compared."""

    score_turns: ScoreTurns = "completion"
    layout: Annotated[Layout, Option("padded: plain batches, for models that packed refuses.", SPEED)] = "packed"
    attention_kernel: Annotated[
        AttentionKernel,
        Option("Attention of the packed layout on a GPU: PyTorch's own, or FlashAttention 3 or 4 from its package.", SPEED),
    ] = "default"
    torch_compile: Annotated[
        bool, Option("Compile the layers of the packed layout, once for rows of any length. The first rows take a minute.", SPEED)
    ] = False
    tokens_per_batch: Annotated[
        int | Literal["auto"],
        Option(
            "Most tokens of one forward pass: limits its memory. auto: measure, and take the largest number that fits.",
            SPEED,
            type=IntegerOrAuto(),
        ),
    ] = 16384
    gpus_per_worker: Annotated[
        int,
        Option(
            "GPUs of one worker: more than 1 spreads a model that does not fit on a single GPU.",
            SPEED,
            at_least=1,
        ),
    ] = 1
    attn_implementation: Annotated[
        str | None,
        Option("With --layout padded; packed has its own.", SPEED, default="sdpa, or eager where a model has no sdpa"),
    ] = None
    reuse: Annotated[
        tuple[Path, ...],
        Option(
            "Another store of the same model: pairs that it has are taken from it. Of one with a shorter --max-length, those that it did not cut. Repeatable.",
            STORE,
        ),
    ] = ()
    show: Annotated[
        Show,
        Option(
            group=OUTPUT,
            values=(
                ("--quiet", "nothing", "No progress."),
                ("--json", "json", "Progress and result as JSON lines on stdout."),
                ("--text", "text", None),
            ),
        ),
    ] = "text"

    @property
    def scored_turns(self) -> ScoredTurns | None:
        """As the identity has it."""
        return _scored_turns(self.score_turns)

    @classmethod
    def of(cls, given: dict[str, Any]) -> "PrecomputeConfig":
        """From what was given, completed by the preset, whose demo model is made if it is not there."""
        preset, options = completed(given)
        if preset is not None and preset.name == "demo" and given["model"] is None:
            from demo.model import make_demo_model

            make_demo_model(Path(preset.model))
        return cls(preset=preset.name if preset else None, **options)


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(Source):
    """`analyze`: what is measured, and how it is shown."""

    name: str
    """The dataset as it was asked for: a preset's name, or the next."""
    dataset: Annotated[str, Option("As for precompute: a preset, a hub id, a file or a folder.", DATA)]
    model: Annotated[
        str | None, Option("Folder or hub id, for its tokenizer; it is not loaded.", MODEL, default="the preset's")
    ] = None
    score_turns: ScoreTurns = "completion"
    max_lengths: Annotated[
        tuple[int, ...], Option("Report on this length too; repeatable.", DATA, flags=("--max-length",), at_least=2)
    ] = MAX_LENGTHS
    sample: Annotated[int | None, Option("Only N rows, evenly spaced over the dataset.", DATA, at_least=1)] = None
    tokens_per_second: Annotated[
        float | None, Option("Of one GPU, as precompute prints it: adds the expected times.", SPEED, type=Rate())
    ] = None
    train_tokens_per_second: Annotated[
        float | None, Option("Of one GPU in training.", SPEED, default="a quarter of the other", type=Rate())
    ] = None
    num_gpus: Annotated[int, Option("For the expected times.", SPEED, at_least=1)] = 1
    tokens_per_batch: Annotated[int, Option("As for precompute.", SPEED, at_least=1)] = 16384
    num_workers: Annotated[int | None, Option("Processes.", SPEED, default="one per core where it pays", at_least=1)] = None
    png: Annotated[Path | None, Option("File of the histogram.", OUTPUT, default="runs/analyze/NAME.png, as store/NAME")] = None
    json: Annotated[bool, Option("The numbers as JSON instead of text.", OUTPUT)] = False
    quiet: Annotated[bool, Option("No progress bar.", OUTPUT)] = False

    @property
    def scored_turns(self) -> ScoredTurns | None:
        """As precompute's."""
        return _scored_turns(self.score_turns)

    @classmethod
    def of(cls, given: dict[str, Any]) -> "AnalyzeConfig":
        """From what was given, completed by the preset. InputError for what neither says."""
        dataset, preset = given["dataset"], PRESETS.get(given["dataset"])
        given = dict(given)
        given["tokenizer"] = given["tokenizer"] or given["model"]
        if given["tokenizer"] is None and preset is not None:
            if preset.name == "demo":
                from demo.model import make_demo_model

                make_demo_model(Path(preset.model))
            given["tokenizer"] = preset.model
        if given["tokenizer"] is None:
            raise InputError(
                "--model or --tokenizer must be given: lengths depend on it",
                where=f"--dataset {dataset}",
                next=f"Add it, or use a preset: {', '.join(PRESETS)}.",
            )
        if preset is not None:
            refuse_other_template(preset, given.get("chat_template"))
        given["split"] = given["split"] or (preset.split if preset else "train")
        given["score_turns"] = given["score_turns"] or (preset.score_turns if preset else "completion")
        max_lengths = {*MAX_LENGTHS, *given["max_lengths"], *([preset.max_length] if preset else [])}
        given |= {"max_lengths": tuple(sorted(max_lengths)), "dataset": preset.dataset if preset else dataset}
        given["png"] = given["png"] or default_histogram(dataset)
        return cls(name=dataset, **given)


def _scored_turns(asked: str) -> ScoredTurns | None:
    return None if asked == "completion" else asked


def refuse_other_template(preset: Preset, chat_template: Path | None) -> None:
    """InputError unless the file is the chat template that `preset` asks for. Its text is not ours to ship."""
    if preset.chat_template_sha256 is None:
        return
    where = f"--dataset {preset.name}"
    next_ = f"It is the text of {preset.chat_template_source}: write it to a file without a line break at its end, and pass --chat-template FILE."
    if chat_template is None:
        raise InputError("needs the chat template of AI2's DPO step, which is not the checkpoint's own", where=where, next=next_)
    try:
        data = chat_template.read_bytes()
    except OSError as error:
        raise InputError(f"the chat template cannot be read: {error}", where=f"--chat-template {chat_template}") from error
    if (found := hashlib.sha256(data).hexdigest()) != preset.chat_template_sha256:
        stripped = hashlib.sha256(data.rstrip(b"\r\n")).hexdigest() == preset.chat_template_sha256
        raise InputError(
            f"not the chat template of {where}" + (": it is, but for the line break at its end" if stripped else ""),
            where=f"--chat-template {chat_template}",
            expected=f"sha256 {preset.chat_template_sha256}",
            found=found,
            next=next_,
        )


def completed(given: dict[str, Any]) -> tuple[Preset | None, dict[str, Any]]:
    """(the preset or None, the fields of StoreConfig and more that were given, completed by it). InputError names what is missing."""
    given = dict(given)
    several: tuple[str, ...] = given["dataset"]
    asked = " + ".join(several)
    if twice := next((each for each in several if several.count(each) > 1), None):
        raise InputError("given twice: its pairs would count twice", where=f"--dataset {twice}", next="Leave one out.")
    given["dataset"] = tuple(each.dataset if (each := preset_of(name)) else name for name in several)
    preset = preset_of(asked)
    defaults: dict[str, Any] = {"split": "train"}
    if preset is not None:
        defaults |= {name: getattr(preset, name) for name in ("model", "split", "max_length", "dtype")}
    if "score_turns" in given:  # import has none: TRL scores completions
        defaults["score_turns"] = preset.score_turns if preset is not None else "completion"
    if preset is not None:
        refuse_other_template(preset, given.get("chat_template"))
    for name, value in defaults.items():
        given[name] = value if given[name] is None else given[name]
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "max_length", "dtype") if given[name] is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be given: without a preset nothing that changes the numbers has a default",
            where=f"--dataset {asked}",
            next=f"Add them, or use a preset: {', '.join(PRESETS)}.",
        )
    if given["tokenizer"] is None:
        given["tokenizer"] = given["model"]
    if given.get("layout") == "packed" and given.get("attn_implementation") is not None:
        raise InputError(
            "the packed layout brings its own attention",
            where=f"--attn-implementation {given['attn_implementation']}",
            next="Leave it out, or use --layout padded.",
        )
    if given.get("torch_compile") and given.get("gpus_per_worker", 1) > 1:
        raise InputError(
            "compiled layers were never run on several GPUs of one worker",
            where=f"--torch-compile, --gpus-per-worker {given['gpus_per_worker']}",
            next="Leave out --torch-compile.",
        )
    if "://" in str(given["ref_store"]).replace(":/", "://", 1):
        raise InputError(
            "is written in a local folder",
            where=f"--ref-store {given['ref_store']}",
            next=f"Make it in a folder, then copy it there: {cli('push', '--ref-store')} … {given['ref_store']}",
        )
    if given["ref_store"] is None:
        given["ref_store"] = default_store(several, preset)
        if preset is None:
            refuse_taken(given["ref_store"], " + ".join(given["dataset"]), given["split"], given["dataset_config"])
    return preset, given
