"""The command line: parse, build a config, call one function, word the errors. Heavy imports happen inside the commands."""

import contextlib
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

import store.command
from slurm.submit import Resources
from store import DTYPES
from store.command import again, cli
from store.errors import InputError, RefdpoError
from train.leave import leave

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

EXAMPLES = {
    "precompute": """
      python cli.py precompute --dataset demo

      python cli.py precompute --dataset think

      python cli.py precompute --dataset pairs.jsonl --model allenai/Olmo-3-7B-Instruct-SFT --max-length 4096 --dtype bfloat16
    """,
    "analyze": """
      python cli.py analyze --dataset demo

      python cli.py analyze --dataset think --sample 5000 --tokens-per-second 40000 --num-gpus 4
    """,
    "train": """
      python cli.py train --ref-store store/demo

      python cli.py train --ref-store store/think --output-dir runs/think --report-to wandb

      python cli.py train --ref-store store/think --where "num_chosen_tokens < 4096 and ref_chosen_logps - ref_rejected_logps between -200 and 50" --eval-fraction 0.01
    """,
    "inspect": """
      python cli.py inspect --ref-store store/demo

      python cli.py inspect --ref-store store/demo --sql "select row, ref_chosen_logps - ref_rejected_logps as margin from pairs order by margin limit 5"

      python cli.py inspect --ref-store store/demo --sql "from tokens" --format parquet --output runs/tokens.parquet
    """,
    "export": """
      python cli.py export --ref-store store/demo --format jsonl --output runs/export/demo-jsonl

      python cli.py export --ref-store store/demo --format trl --output runs/export/demo-trl

      python cli.py export --ref-store store/think --format open-instruct --loss-type dpo_norm --accept-other-tokens --output runs/export/think
    """,
    "import": """
      python cli.py import --cache ref_logps.arrow --dataset demo --ref-store store/imported
    """,
    "push": """
      python cli.py push --ref-store store/demo file://$PWD/runs/copies/demo

      python cli.py push --ref-store store/think acme/think-ref
    """,
    "pull": """
      python cli.py pull file://$PWD/runs/copies/demo --ref-store store/copy

      python cli.py pull acme/think-ref --ref-store store/think
    """,
    "report": """
      python cli.py report --ref-store store/demo

      python cli.py report --ref-store store/think --compare store/think-bf16 --output-dir runs/report/think
    """,
    "verify": """
      python cli.py verify --ref-store store/demo

      python cli.py verify --ref-store store/demo --model demo/model
    """,
}

EXAMPLES |= {
    "status": """
      python cli.py status --ref-store store/think
    """,
    "submit": """
      python cli.py submit --dataset think

      python cli.py submit --dataset think --array 8 --train-nodes 2 --train-args "--report-to wandb" --dry-run

      python cli.py submit --dataset think --precompute-gpus a100:8 --precompute-time 4:00:00 --train-gpus b200:4 --train-partition big
    """,
}

HOW_MANY_RESCORED = 16


MEANT = {
    "--model": ("--policy",),
    "--model-name-or-path": ("--policy", "--model"),
    "--policy": ("--model",),
    "--ref-model": ("--ref-store", "--model"),
    "--dataset": ("--ref-store",),
    "--dataset-name": ("--dataset", "--ref-store"),
    "--store": ("--ref-store",),
    "--lr": ("--learning-rate",),
    "--epochs": ("--num-train-epochs",),
    "--batch-size": ("--effective-batch-size", "--per-device-train-batch-size", "--tokens-per-batch"),
    "--bf16": ("--dtype",),
    "--deepspeed": ("--zero-config",),
    "--resume-from-checkpoint": ("--resume",),
    "--num-gpus": ("--num-processes", "--num-workers"),
    "--nproc-per-node": ("--num-processes", "--num-workers"),
}
"""Options of another command or of TRL's and torchrun's, and what they are called here: too far apart for click to see it."""


class Commands(click.Group):
    """Turns every error a user can cause into one `Error:` line and an exit code; anything else is a bug and keeps its traceback."""

    def main(self, args=None, *more, **named):
        store.command.called_with = None if args is None else list(args)
        return super().main(args, *more, **named)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except RefdpoError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


class Command(click.Command):
    """Refuses an option that is given twice where one counts: the last would silently win. Keeps the values as they were typed, by
    option, in `ctx.meta["typed"]`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = self._given(ctx, args)
        for name in dict.fromkeys(option.name for option in given):
            same = [option for option in given if option.name == name]
            if len(same) > 1 and not all(_may_be_repeated(option, args) for option in same):
                named = ", ".join(dict.fromkeys(option.opts[0] for option in same))
                raise InputError(f"given {len(same)} times, and one counts", where=named, next="Leave the others out.")
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            own = {word for option in self.params for word in option.opts}
            if meant := [word for word in MEANT.get(error.option_name, ()) if word in own]:
                error.possibilities = meant
            raise

    def _given(self, ctx: click.Context, args: list[str]) -> list[click.Option]:
        """The options on the command line, one entry for each time; none where the line is wrong, which click then says."""
        try:
            ctx.meta["typed"], _, order = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:
            return []
        return [each for each in order if isinstance(each, click.Option)]


def _may_be_repeated(option: click.Option, args: list[str]) -> bool:
    """Options that collect values, and switches: on is on. `--x` with `--no-x` is neither."""
    both = any(word in args for word in option.opts) and any(word in args for word in option.secondary_opts)
    return option.multiple or (option.is_flag and option.is_bool_flag and not both)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """Score a frozen reference model once, keep its log-probs in a Parquet store, train DPO from them without a reference forward.

    \b
    python cli.py precompute --dataset think        # phase 1: writes store/think
    python cli.py train --ref-store store/think     # phase 2: ZeRO-2 DPO, no reference model
    """


def command(name: str):
    """A subcommand whose help ends with runnable examples."""
    example = "\n".join("    " + line.strip() if line.strip() else "" for line in EXAMPLES[name].strip().splitlines())

    def decorate(function):
        function.__doc__ += "\n\n    Examples:\n\n    \b\n" + example.replace("\n\n", "\n")
        return main.command(name, cls=Command)(function)

    return decorate


class StorePath(click.Path):
    """The folder of a store; a URL becomes a checked local copy."""

    def convert(self, value, param, ctx):
        if isinstance(value, str) and "://" in value:
            from store.bar import bar
            from store.remote import local_copy

            with bar("copying", "shards") as progress:
                return local_copy(value, progress)
        return super().convert(value, param, ctx)


ref_store_option = click.option(
    "--ref-store",
    type=StorePath(path_type=Path),
    required=True,
    help="Folder of the store, such as store/think, or a URL (s3://, hf://datasets/, file://).",
)


class Rate(click.FloatRange):
    """A number above zero; nan and inf, which pass every range, are none."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


class LocalStorePath(click.Path):
    """The folder of a store on this machine."""

    def convert(self, value, param, ctx):
        if isinstance(value, str) and "://" in value:
            raise InputError("must be a folder of this machine", where=f"{param.opts[0]} {value}", next="pull copies a store here.")
        return super().convert(value, param, ctx)


local_store_option = click.option(
    "--ref-store", type=LocalStorePath(path_type=Path), required=True, help="Folder of the store, such as store/think."
)


attention_kernel_option = click.option(
    "--attention-kernel",
    type=click.Choice(["default", "FA3", "FA4"]),
    default="default",
    show_default=True,
    help="Of the packed layout on a GPU: PyTorch's own, or FlashAttention 3 or 4 from its package.",
)

DATASET_OPTIONS = (
    click.option("--dataset-config", help="Configuration of a dataset that has several."),
    click.option("--dataset-revision", help="Revision of the dataset on the hub."),
    click.option("--split", help="Split of the dataset, or a part of one such as 'train[:1000]'.  [default: train]"),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first so many rows."),
    click.option("--prompt-column", help="Column that holds the prompt.  [default: prompt, if there is one]"),
    click.option("--chosen-column", help="Column of the better answer.  [default: chosen]"),
    click.option("--rejected-column", help="Column of the worse answer.  [default: rejected]"),
    click.option("--system-column", help="Column whose text becomes the first turn; texts then become turns too."),
    click.option("--as-conversation", is_flag=True, help="Plain texts become turns: user (prompt) and assistant (answers)."),
    click.option("--ignore-column", multiple=True, help="A column that looks like part of the prompt and is not; repeatable."),
)
"""How the rows of a dataset are found and read: docs/data.md."""


def _column_options(given: dict):
    """Take the options about columns out of `given`."""
    from precompute.columns import ColumnOptions

    names = {name: given.pop(f"{name}_column") for name in ("prompt", "chosen", "rejected", "system")}
    return ColumnOptions(**names, as_conversation=given.pop("as_conversation"), ignore=given.pop("ignore_column"))


def dataset_options(command):
    """DATASET_OPTIONS as a decorator."""
    for option in reversed(DATASET_OPTIONS):
        command = option(command)
    return command


def identity_options(command):
    """What a store is made of: the options of `precompute` and `import` that decide its identity, and where it is written."""
    options = (
        click.option(
            "--dataset",
            required=True,
            multiple=True,
            help="think | instruct | demo, a hub id, a file, a 'pattern*.parquet', or a folder: docs/data.md. Repeated: all of them.",
        ),
        click.option("--model", help="Reference model: folder or hub id. Default: the preset's."),
        click.option("--revision", help="Revision of the model on the hub (and of its tokenizer)."),
        click.option("--tokenizer", help="Folder or hub id. Default: the model's."),
        click.option(
            "--chat-template",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="File that replaces the tokenizer's chat template.",
        ),
        click.option(
            "--template-date",
            type=click.DateTime(["%Y-%m-%d"]),
            help="The day, for a chat template that writes today's date.",
        ),
        *DATASET_OPTIONS,
        click.option(
            "--max-length",
            type=click.IntRange(min=2),
            help="Tokens of prompt + completion; longer sequences keep their start. Default: the preset's.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Dtype the model runs in. Default: the preset's.",
        ),
        click.option(
            "--shard-size",
            type=click.IntRange(min=1),
            help="Rows per shard: the most a killed worker loses. Default: 2,400 shards, of 16 to 1,024 rows.",
        ),
        click.option("--ref-store", type=click.Path(path_type=Path), help="Folder of the store.  [default: store/<dataset>]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@command("precompute")
@identity_options
@click.option(
    "--layout",
    type=click.Choice(["packed", "padded"]),
    default="packed",
    show_default=True,
    help="padded: plain batches, for models that packed refuses.",
)
@attention_kernel_option
@click.option(
    "--tokens-per-batch",
    callback=lambda context, option, value: value if value == "auto" else click.IntRange(min=1).convert(value, option, context),
    default="16384",
    show_default=True,
    metavar="INTEGER|auto",
    help="Token budget of one forward pass: bounds its memory. auto: measure, and take the largest that fits.",
)
@click.option(
    "--attn-implementation", help="With --layout padded; packed has its own.  [default: sdpa, or eager where a model has no sdpa]"
)
@click.option(
    "--reuse",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Another store, of the dataset before it was mended or extended: pairs that are the same are taken from it.",
)
@click.option("--num-workers", type=click.IntRange(min=1), help="Local processes.  [default: one per GPU; 1 without a GPU]")
@click.option("--quiet", "show", flag_value="nothing", help="No progress.")
@click.option("--json", "show", flag_value="json", help="Progress and result as JSON lines on stdout.")
@click.option("--text", "show", flag_value="text", default="text", hidden=True)
def precompute_cmd(**options) -> None:
    """Phase 1: score a preference dataset with the frozen reference model.

    Writes a sealed store of Parquet shards. Run it again, with any number of workers, to go on where it stopped.
    """
    config = _precompute_config(**{name: value for name, value in options.items() if name != "num_workers"})
    from stop import Stopped

    try:
        _precompute(config, options["num_workers"])
    except KeyboardInterrupt:
        next_ = f"Run the same command again to go on: {again()}"
        raise Stopped("stopped by Ctrl-C: finished shards are kept", where=config.ref_store, next=next_) from None


def _precompute(config, num_workers: int | None) -> None:
    import launch

    process = launch.launched()
    if process is None:
        num_workers = launch.num_local_processes(num_workers, default_without_gpu=1)
        if num_workers > 1:
            code = launch.run_workers(num_workers)
            _report_store(config.ref_store, code, config.show)
        process = launch.Process(rank=0, world=1, local_rank=0)
    with quiet_libraries():
        from precompute.worker import run

        run(config, process)
    if process.world == 1:
        _report_store(config.ref_store, 0, config.show)


def _precompute_config(dataset: tuple[str, ...], **given):
    """The worker's config: what was given, completed by the preset. InputError names what is missing."""
    preset, options = _completed(dataset, **given)
    if preset is not None and preset.name == "demo" and given["model"] is None:
        from demo.model import make_demo_model

        make_demo_model(Path(preset.model))
    from precompute.worker import PrecomputeConfig

    if options["template_date"] is not None:
        options["template_date"] = options["template_date"].date().isoformat()
    options["columns"] = _column_options(options)
    return PrecomputeConfig(preset=preset.name if preset else None, **options)


def _completed(dataset: tuple[str, ...], **given):
    """(the preset or None, the options of precompute completed by it). Imports nothing heavy. InputError names what is missing."""
    from default_store import default_store, preset_of, refuse_taken
    from presets import PRESETS

    several, dataset = dataset, " + ".join(dataset)
    if twice := next((each for each in several if several.count(each) > 1), None):
        raise InputError("given twice: its pairs would count twice", where=f"--dataset {twice}", next="Leave one out.")
    first, *more = names = [each.dataset if (each := preset_of(name)) else name for name in several]
    preset = preset_of(dataset)
    defaults = {"split": "train"}
    if preset is not None:
        defaults |= {name: getattr(preset, name) for name in ("model", "split", "max_length", "dtype")}
    for name, value in defaults.items():
        given[name] = value if given[name] is None else given[name]
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "max_length", "dtype") if given[name] is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be given: without a preset nothing that changes the numbers has a default",
            where=f"--dataset {dataset}",
            next=f"Add them, or use a preset: {', '.join(PRESETS)}.",
        )
    if given["tokenizer"] is None:
        given["tokenizer"] = given["model"]
    if given["layout"] == "packed" and given.get("attn_implementation") is not None:
        raise InputError(
            "the packed layout brings its own attention",
            where=f"--attn-implementation {given['attn_implementation']}",
            next="Leave it out, or use --layout padded.",
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
            refuse_taken(given["ref_store"], " + ".join(names), given["split"], given["dataset_config"])
    return preset, given | {"dataset": first, "more_datasets": tuple(more)}


def _report_store(path: Path, code: int, show: str = "text") -> None:
    """Say what phase 1 made and what to type next; exit with `code` if it is not finished."""
    import json

    from precompute.report import describe
    from store.manifest import Manifest, manifest_path

    if code == 0 and manifest_path(path).exists() and show == "json":
        manifest = Manifest.load(manifest_path(path))
        counts = {
            "num_pairs": manifest.num_pairs,
            "num_rows": manifest.identity.num_rows,
            "num_unscorable": len(manifest.unscorable),
        }
        click.echo(json.dumps({"event": "sealed", "ref_store": str(path), **counts, "counts": manifest.counts}))
    elif code == 0 and manifest_path(path).exists():
        manifest = Manifest.load(manifest_path(path))
        click.echo(describe(manifest, path))
        template = manifest.command and manifest.command.chat_template
        if template is not None:
            template = os.path.relpath(Path(manifest.command.folder, template))
        train = _first_of_train(path, template, manifest.provenance.get("layout"))
        click.echo(f"Next: {cli('train', *train)}\n      {cli('inspect', *train[:2])}")
    elif code == 0:
        raise RefdpoError("not every shard is done", where=path, next=f"Run the same command again to go on: {again()}")
    sys.exit(code)


def _first_of_train(ref_store: Path, chat_template: Path | str | None, layout: str | None, more: tuple[str, ...] = ()) -> list[str]:
    """The options that phase 2 needs for a store, unless `more` has them. It cannot take from there the template's text, nor that packed
    refuses the model."""
    words = ["--ref-store", str(ref_store)]
    if chat_template is not None and "--chat-template" not in more:
        words += ["--chat-template", str(chat_template)]
    if layout == "padded" and "--layout" not in more:
        words += ["--layout", "padded"]
    return words


@command("analyze")
@click.option("--dataset", required=True, help="As for precompute: a preset, a hub id, a file or a folder.")
@click.option("--model", help="Folder or hub id, for its tokenizer; it is not loaded.  [default: the preset's]")
@click.option("--revision", help="Revision of the model on the hub (and of its tokenizer).")
@click.option("--tokenizer", help="Folder or hub id.  [default: the model's]")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File that replaces the tokenizer's chat template.",
)
@dataset_options
@click.option("--max-length", type=click.IntRange(min=2), multiple=True, help="Ask about this one too; may be given several times.")
@click.option("--sample", type=click.IntRange(min=1), help="Only so many rows, evenly spaced over the dataset.")
@click.option(
    "--tokens-per-second",
    type=Rate(min=0, min_open=True),
    help="Measured by precompute, of one GPU: adds the expected times.",
)
@click.option(
    "--train-tokens-per-second",
    type=Rate(min=0, min_open=True),
    help="Of one GPU in training.  [default: a quarter of the other]",
)
@click.option("--num-gpus", type=click.IntRange(min=1), default=1, show_default=True, help="For the expected times.")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), default=16384, show_default=True, help="As for precompute.")
@click.option("--num-workers", type=click.IntRange(min=1), help="Processes.  [default: one per core where it pays]")
@click.option("--png", type=click.Path(path_type=Path), help="The histogram.  [default: runs/analyze/NAME.png, as store/NAME]")
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON instead of text.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def analyze_cmd(
    dataset: str,
    tokens_per_second: float | None,
    train_tokens_per_second: float | None,
    num_gpus: int,
    png: Path | None,
    as_json: bool,
    quiet: bool,
    **given,
) -> None:
    """Measure a dataset before anything is scored: lengths, what each --max-length cuts, formats and traps, expected time.

    Tokenizes with the same code as precompute and recommends a --max-length.
    """
    with quiet_libraries():
        config = _analyze_config(dataset, **given)
        from precompute.analyze import analyze
        from precompute.analyze_view import Rates, describe, plot
        from store.bar import bar

        with bar("tokenizing", "rows", quiet or as_json) as progress:
            analysis = analyze(config, progress)
    if png is None:
        from default_store import default_store, preset_of

        png = Path("runs") / "analyze" / f"{default_store((dataset,), preset_of(dataset)).name}.png"
    plot(analysis, png)
    if as_json:
        import json

        click.echo(json.dumps(analysis.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(describe(analysis, Rates(tokens_per_second, train_tokens_per_second, num_gpus), _also_for_precompute()))
        click.echo(f"histogram: {png}")


def _also_for_precompute() -> list[str]:
    """The words of this `analyze` that make precompute read the same rows in the same way, as they were typed."""
    context = click.get_current_context()
    known = {option.name for option in main.commands["precompute"].params} - {"max_length", "num_workers"}
    words = []
    for option in context.command.params:
        if option.name in known and _typed(context, option.name):
            value = context.meta["typed"][option.name]
            values = value if option.multiple else [value]
            words += [option.opts[0]] if option.is_flag else [word for each in values for word in (option.opts[0], each)]
    return words


def _analyze_config(dataset: str, model: str | None, **given):
    """What was given, completed by the preset."""
    from presets import PRESETS

    preset = PRESETS.get(dataset)
    if given["tokenizer"] is None:
        given["tokenizer"] = model
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
    given["split"] = given["split"] or (preset.split if preset else "train")

    from precompute.analyze import MAX_LENGTHS, AnalyzeConfig

    given["columns"] = _column_options(given)
    max_lengths = {*MAX_LENGTHS, *given.pop("max_length"), *([preset.max_length] if preset else [])}
    return AnalyzeConfig(
        name=dataset, dataset=preset.dataset if preset else dataset, max_lengths=tuple(sorted(max_lengths)), **given
    )


@command("train")
@ref_store_option
@click.option("--eval-ref-store", type=StorePath(path_type=Path), help="A second store, made with the same model, to evaluate on.")
@click.option("--where", help="Train only on pairs for which this SQL condition over the store's columns holds.")
@click.option("--order-by", help="SQL order to train in, such as 'num_chosen_tokens', instead of shuffling.")
@click.option(
    "--eval-fraction",
    type=float,
    help="Hold back this share of the pairs to evaluate on; the same pairs in every order and subset.",
)
@click.option("--policy", help="Model to train: folder or hub id.  [default: the store's reference model]")
@click.option("--revision", help="Revision of --policy on the hub.")
@click.option("--tokenizer", help="Folder or hub id.  [default: the one the store was made with, or the policy's]")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The template file precompute was given, if any.",
)
@click.option("--output-dir", type=click.Path(path_type=Path), help="Checkpoints, model and run.json.  [default: runs/<store>]")
@click.option("--max-length", type=click.IntRange(min=2), help="Any value up to the store's.  [default: the store's]")
@click.option("--loss-type", multiple=True, help="TRL's names; give it several times to add losses up.  [default: sigmoid_norm]")
@click.option("--loss-weights", help="Comma-separated weights, one per --loss-type.")
@click.option("--beta", type=float, help="Its scale belongs to the loss type.  [default: 5 with sigmoid_norm, else 0.1]")
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="For robust and exo_pair.")
@click.option("--ld-alpha", type=float, help="LD-DPO: weight of the tokens beyond the shorter completion.")
@click.option("--use-weighting", is_flag=True, help="WPO: weigh pairs by how likely the policy is to write their completions.")
@click.option("--learning-rate", type=float, help="[default: 1e-6]")
@click.option("--lr-scheduler-type", help="[default: linear]")
@click.option("--warmup-ratio", type=float, help="[default: 0.1]")
@click.option("--num-train-epochs", type=float, help="[default: 1]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many optimizer steps.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True)
@click.option("--per-device-train-batch-size", type=click.IntRange(min=1), help="Pairs per forward on each device.  [default: 1]")
@click.option(
    "--effective-batch-size",
    type=click.IntRange(min=1),
    help="Pairs per step over all devices; accumulation follows.  [default: 128]",
)
@click.option("--gradient-accumulation-steps", type=click.IntRange(min=1), help="Instead of --effective-batch-size.")
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: the store's]")
@click.option("--layout", type=click.Choice(["packed", "padded"]), default="packed", show_default=True, help="padded: stock TRL.")
@click.option(
    "--attn-implementation", help="With --layout padded; packed has its own.  [default: sdpa, or eager where a model has no sdpa]"
)
@click.option(
    "--router-aux-loss-coef",
    type=click.FloatRange(min=0),
    help="Weight of a mixture of experts' load-balancing loss.  [default: none; TRL's is the model's own]",
)
@attention_kernel_option
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="[default: on]")
@click.option("--torch-compile", is_flag=True, help="With --layout padded only.")
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--logging-steps", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--save-strategy", type=click.Choice(["no", "steps", "epoch"]), default="steps", show_default=True)
@click.option("--save-steps", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--save-total-limit", type=click.IntRange(min=1), help="Keep so many of the newest checkpoints.")
@click.option("--eval-steps", type=click.IntRange(min=1), help="Evaluate every so many steps.  [default: once per epoch]")
@click.option("--report-to", multiple=True, type=click.Choice(["wandb", "tensorboard", "none"]), help="[default: none]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output-dir; what is finished stays as it is.")
@click.option("--resume-or-start", is_flag=True, help="--resume if there is a checkpoint, else start: for jobs that are requeued.")
@click.option(
    "--push-to-hub",
    is_flag=True,
    help="Copy the trained model to the Hub, which is reached first; with --resume, a finished one alone.",
)
@click.option("--hub-model-id", help="Repository for --push-to-hub.")
@click.option("--num-processes", type=click.IntRange(min=1), help="Local ranks.  [default: one per GPU; 2 without a GPU]")
@click.option(
    "--zero-config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="DeepSpeed JSON.  [default: train/zero2.json]",
)
@click.option("--allow-different-policy", is_flag=True, help="Train a policy that is not the store's reference.")
def train_cmd(**options) -> None:
    """Phase 2: train DPO from a sealed store under ZeRO-2, without a reference model.

    Defaults are the store's preset: OLMo 3's hyperparameters.
    """
    num_processes = options.pop("num_processes")
    resume_or_start = options.pop("resume_or_start")
    config = _train_config(**options)
    import launch
    from stop import STOP_TRAINING, Stopped, listening
    from train import record
    from train.checkpoint import last_checkpoint

    process = launch.launched()
    if (config.resume or resume_or_start) and record.finished(config.output_dir) is not None:
        from train.plan import refuse_other_course

        refuse_other_course(config)
        if process is None or process.rank == 0:
            _end_finished(config)
        return
    if resume_or_start:
        config = replace(config, resume=last_checkpoint(config.output_dir) is not None)
    if process is None:
        from train.plan import plan, refuse_folder

        # What can be refused here need not cost the start of every rank.
        num_processes = launch.num_local_processes(num_processes, default_without_gpu=2)
        refuse_folder(config, plan(config, num_processes))
        if config.push_to_hub:
            from train import hub

            hub.reach(config.hub_model_id)
        code = launch.run_torchrun(num_processes)
        # Told to stop at the very end, the ranks may have finished all the same.
        sys.exit(0 if code == Stopped.exit_code and record.finished(config.output_dir) is not None else code)
    with listening(STOP_TRAINING) as stop, quiet_libraries():
        from train.run import train

        train(config, stop)


def _end_finished(config) -> None:
    """What is left to do for a run that is finished: at most its copy on the Hub."""
    from train import hub, record

    if not config.push_to_hub or hub.is_sent(record.finished(config.output_dir), config.hub_model_id):
        return click.echo(f"{config.output_dir}: trained already, nothing to do")
    click.echo(f"{config.output_dir}: trained already; pushed to {hub.send(config.output_dir, config.hub_model_id)}")


def _train_config(ref_store: Path, preset=None, **given):
    """The run's config: what was given, completed by the preset of the store; `preset` where the store is yet to be made."""
    if preset is None:
        from presets import PRESETS, Preset
        from store.reader import open_store

        preset = PRESETS.get(open_store(ref_store, check="none").manifest.preset) or Preset
    from train.config import TrainConfig, default_beta

    if given["beta"] is None and given["loss_type"] not in ((), (preset.loss_type,)):
        given["beta"] = default_beta(given["loss_type"])
    names = (
        "loss_type",
        "beta",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "num_train_epochs",
        "per_device_train_batch_size",
    )
    for name in (*names, "gradient_checkpointing"):
        if given[name] is None or given[name] == ():
            given[name] = getattr(preset, name)
    if isinstance(given["loss_type"], str):
        given["loss_type"] = (given["loss_type"],)
    if given["effective_batch_size"] is None and given["gradient_accumulation_steps"] is None:
        given["effective_batch_size"] = preset.effective_batch_size
    if given["loss_weights"] is not None:
        try:
            given["loss_weights"] = tuple(float(weight) for weight in given["loss_weights"].split(","))
        except ValueError as error:
            raise InputError("not comma-separated numbers", where=f"--loss-weights {given['loss_weights']}") from error
    if given["output_dir"] is None:
        given["output_dir"] = Path("runs") / ref_store.resolve().name
    if given["zero_config"] is None:
        del given["zero_config"]
    given["report_to"] = tuple(name for name in given["report_to"] if name != "none")
    return TrainConfig(ref_store=ref_store, **given)


@command("inspect")
@ref_store_option
@click.option(
    "--sql",
    help="A query over the views pairs, completions (one row per side) and tokens (one row per scored token); several separated by ;",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="Of answers. csv and json are streamed, however long.  [default: table]",
)
@click.option("--output", type=click.Path(path_type=Path), help="New file for the answer; --format parquet needs one.")
@click.option("--interactive", "-i", is_flag=True, help="A SQL prompt.")
def inspect_cmd(ref_store: Path, sql: str | None, format_: str | None, output: Path | None, interactive: bool) -> None:
    """Look at a store with SQL. Without --sql: a one-screen summary."""
    _check_inspect(sql, format_, output, interactive)
    from store import sql as store_sql

    if sql is None and not interactive:
        from store.summary import summary

        return click.echo(summary(ref_store))
    connection = store_sql.connect(ref_store)
    if store_sql.sums_only(ref_store):
        from store.schema import SUMS_ONLY_NOTE

        click.echo(f"{ref_store} was {SUMS_ONLY_NOTE}", err=True)
    if interactive:
        store_sql.prompt(connection, format_ or "table")
    elif format_ == "parquet":
        click.echo(f"{output}: {store_sql.write_parquet(connection, sql, output):,} rows", err=True)
    elif output is not None:
        with store_sql.new_file(output) as staged, open(staged, "w", encoding="utf-8", newline="") as file:
            store_sql.write(connection, sql, format_ or "table", file)
    else:
        store_sql.write(connection, sql, format_ or "table", sys.stdout)


def _check_inspect(sql: str | None, format_: str | None, output: Path | None, interactive: bool) -> None:
    """Options that would be passed over in silence are refused."""
    if interactive and sql is not None:
        raise InputError(
            "one of the two", where="--interactive, --sql", next="Type the query at the prompt, or leave --interactive out."
        )
    if interactive and (output is not None or format_ == "parquet"):
        raise InputError("belongs to --sql", where="--output" if output is not None else "--format parquet")
    if sql is None and not interactive and (format_ is not None or output is not None):
        raise InputError(
            "belongs to --sql", where="--format" if format_ is not None else "--output", next="Without it inspect shows a summary."
        )
    if format_ == "parquet" and output is None:
        raise InputError("needs a file", where="--format parquet", next="Add --output answer.parquet.")


@command("export")
@ref_store_option
@click.option("--format", "format_", type=click.Choice(["trl", "open-instruct", "megatron-bridge", "jsonl"]), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder for the files.")
@click.option("--loss-type", help="open-instruct only: dpo_norm writes means per token, dpo and wpo sums.")
@click.option("--metadata", multiple=True, help="megatron-bridge only: KEY=JSON for its scoring_metadata.json, such as split=null.")
@click.option(
    "--accept-other-tokens",
    is_flag=True,
    help="Write for a project that scores other tokens than the store; the refusal says which.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def export_cmd(ref_store: Path, format_: str, output: Path, metadata: tuple[str, ...], quiet: bool, **options) -> None:
    """Write a store in the files that TRL, open-instruct or Megatron-Bridge load, or as JSON lines."""
    from store.bar import bar
    from store.export import export

    with quiet_libraries(), bar("exporting", "pairs", quiet) as progress:
        notes = export(ref_store, format_, output, metadata=_key_values(metadata), progress=progress, **options)
    click.echo("\n".join([f"export: {output}", *(f"  {note}" for note in notes)]))


def _key_values(given: tuple[str, ...]) -> dict:
    import json

    values = {}
    for each in given:
        name, _, text = each.partition("=")
        try:
            values[name] = json.loads(text, parse_constant=int)  # NaN is no JSON
            if not name:
                raise ValueError
        except ValueError as error:
            raise InputError(
                "not KEY=JSON", where=f"--metadata {each}", expected="such as split=null or tensor_model_parallel_size=2"
            ) from error
    return values


@command("import")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="TRL's Arrow file with ref_chosen_logps, ref_rejected_logps.",
)
@identity_options
@click.option(
    "--num-pairs", type=click.IntRange(min=1), default=8, show_default=True, help="Random pairs scored again to check the cache."
)
def import_cmd(cache: Path, num_pairs: int, **options) -> None:
    """Make a store from the cache of TRL's precompute pass, after scoring some pairs again.

    Dataset, model, max length, dtype and limit are those that TRL was given. The store has sums only: train takes it at its own max length
    and without --ld-alpha.
    """
    config = _precompute_config(layout="packed", tokens_per_batch=16384, **options)
    from devices import device

    with quiet_libraries():
        from precompute.import_trl import import_trl

        import_trl(config, cache, device(0), num_pairs)
    _report_store(config.ref_store, 0)


@command("push")
@local_store_option
@click.argument("target")
@click.option("--private", is_flag=True, help="A new repository on the Hub is private.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def push_cmd(ref_store: Path, target: str, private: bool, quiet: bool) -> None:
    """Copy a sealed store to TARGET: owner/name on the Hugging Face Hub, or a URL (s3://, gs://, file://).

    Checked before and after; run it again to go on after an interruption.
    """
    from store.bar import bar
    from store.remote import push

    with bar("pushing", "shards", quiet) as progress:
        where = push(ref_store, target, progress, private=private)
    click.echo(f"{ref_store} is at {where}")


@command("pull")
@click.argument("source")
@local_store_option
@click.option("--revision", help="Branch, tag or commit of a repository on the Hub.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def pull_cmd(source: str, ref_store: Path, revision: str | None, quiet: bool) -> None:
    """Copy the sealed store at SOURCE (owner/name on the Hugging Face Hub, or a URL) to --ref-store, checking every shard.

    Run it again to go on after an interruption.
    """
    from store.bar import bar
    from store.remote import pull

    with bar("pulling", "shards", quiet) as progress:
        manifest = pull(source, ref_store, progress, revision)
    click.echo(
        f"{ref_store} is sealed: {manifest.num_pairs:,} pairs in {len(manifest.shards)} shards, every sha256 as in its manifest"
    )


@command("report")
@ref_store_option
@click.option(
    "--compare", type=StorePath(path_type=Path), help="A second store of the same rows: another model, dtype or template."
)
@click.option("--tokenizer", help="Folder or hub id, to show pairs as text.  [default: the one the store was made with]")
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Gets index.html and the pictures.  [default: runs/report/<store>]"
)
def report_cmd(ref_store: Path, compare: Path | None, tokenizer: str | None, output_dir: Path | None) -> None:
    """One self-contained HTML page about a store: lengths, reference margins, log-probs, truncation, pairs to read, identity."""
    from store.reader import open_store
    from store.report import report

    identity = open_store(ref_store, check="none").identity
    with quiet_libraries():
        decode = _decoder(identity, tokenizer)
        page = report(ref_store, output_dir or Path("runs") / "report" / ref_store.resolve().name, decode, compare)
    click.echo(f"report: {page}")


def _decoder(identity, name: str | None):
    """Ids to text with the store's tokenizer; None (and a line that says so) where it is not at hand and none was named."""
    from precompute.scorer.model import load_tokenizer, tokenizer_sha256

    try:
        tokenizer = load_tokenizer(
            name or identity.tokenizer,
            revision=identity.revision if name is None and identity.tokenizer == identity.model else None,
        )
    except InputError:
        if name is not None:
            raise
        click.echo(f"pairs are shown as token ids: the tokenizer {identity.tokenizer} cannot be loaded; pass --tokenizer", err=True)
        return None
    if tokenizer_sha256(tokenizer) != identity.tokenizer_sha256:
        raise InputError(
            "not the tokenizer the store was made with",
            where=f"--tokenizer {name or identity.tokenizer}",
            next=f"Pass a copy of {identity.tokenizer}.",
        )
    return tokenizer.decode


@command("verify")
@ref_store_option
@click.option("--model", help="Also score a random sample again with this model: folder or hub id.")
@click.option("--revision", help="Revision of --model on the hub.")
@click.option("--num-pairs", type=click.IntRange(min=1), default=HOW_MANY_RESCORED, show_default=True, help="Size of that sample.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random choice.")
@click.option("--layout", type=click.Choice(["packed", "padded"]), help="[default: the one the store was made in]")
def verify_cmd(ref_store: Path, model: str | None, revision: str | None, num_pairs: int, seed: int, layout: str | None) -> None:
    """Check a sealed store: checksums, row coverage, footers, values and counts; with --model also the numbers."""
    from store.bar import bar
    from store.verify import verify

    context = click.get_current_context()
    needless = [name for name in ("revision", "num_pairs", "seed", "layout") if _typed(context, name)]
    if model is None and needless:
        raise InputError("belongs to --model", where=", ".join(f"--{name.replace('_', '-')}" for name in needless))
    if model is not None:
        with quiet_libraries():
            from precompute.scorer.model import config_sha256

            config = config_sha256(model, revision)  # a wrong name is seen before every byte of the store is read
    with bar("verifying", "shards") as progress:
        findings = verify(ref_store, progress)
    for finding in findings:
        click.echo(f"Error: {finding}", err=True)
    if findings:
        sys.exit(1)
    click.echo(f"{ref_store}: intact")
    if model is not None:
        with quiet_libraries():
            _rescore(ref_store, model, revision, config, num_pairs, seed, layout)


def _typed(context: click.Context, name: str) -> bool:
    """Was this option given on the command line, rather than left at its default?"""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _rescore(ref_store: Path, model: str, revision: str | None, config: str, num_pairs: int, seed: int, layout: str | None) -> None:
    from devices import device
    from precompute.scorer.attention import refuse_without_kernels
    from precompute.scorer.model import load_model, weights_sha256
    from precompute.scorer.rescore import TOLERANCE, rescore
    from precompute.scorer.self_test import self_test
    from store.errors import StoreError
    from store.reader import open_store
    from store.schema import SUMS_ONLY

    store = open_store(ref_store, check="none")
    identity = store.identity
    layout = layout or store.manifest.provenance.get("layout", "packed")  # what made it; an imported store does not say
    where = device(0)
    if layout == "packed":
        refuse_without_kernels(where, identity.dtype)
    loaded = load_model(model, revision=revision, dtype=identity.dtype, device=where)
    checked = (("weights", weights_sha256(loaded), identity.weights_sha256), ("configuration", config, identity.config_sha256))
    others = [what for what, now, stored in checked if now != stored]
    click.echo(self_test(loaded, identity.dtype, layout=layout))
    result = rescore(loaded, store, num_pairs=num_pairs, seed=seed, layout=layout)
    of = "completion's mean" if identity.scorer_version == SUMS_ONLY else "token"
    click.echo(
        f"{result.num_pairs} pairs ({result.num_tokens:,} tokens) scored again in other batches, {layout}: |difference| per {of} "
        f"mean {result.mean_token_difference:.2e}, max {result.max_token_difference:.2e} nats; per sum max {result.max_sum_difference:.2e} nats"
    )
    if others:
        raise StoreError(
            f"{model} has NOT the {' and '.join(others)} that made the store",
            where=ref_store,
            next=f"It was made with {identity.model}{f'@{identity.revision}' if identity.revision else ''}.",
        )
    click.echo(f"{model}: the weights that made the store")
    if not result.mean_token_difference <= TOLERANCE[identity.dtype]:  # also true for NaN
        raise StoreError(
            "these weights give other numbers here than the store has",
            where=ref_store,
            expected=f"at most {TOLERANCE[identity.dtype]:g} nats per {of} in {identity.dtype}",
            found=f"{result.mean_token_difference:.2g}, most on row {result.worst_row}",
            next="Either this machine computes wrongly (try the other --layout) or the one that made the store did.",
        )


@command("status")
@ref_store_option
def status_cmd(ref_store: Path) -> None:
    """How far phase 1 is: shards done, running, dead and missing, speed, time left."""
    from store.status import describe, status

    click.echo(describe(status(ref_store), ref_store))


RESOURCES = {
    "gpus": "GPUs per node, with their kind where a cluster has several: 4, h100:4. One worker or rank for each.",
    "cpus": "CPUs per node.",
    "mem": "Memory per node.",
    "time": "Limit per job. Some minutes before it a job is requeued and goes on.",
    "partition": "As for sbatch.",
    "account": "As for sbatch.",
    "qos": "As for sbatch.",
}
"""Options of `submit` that are given for both phases (--time) or for one (--precompute-time, --train-time)."""


def resource_options(command):
    """RESOURCES, each for both phases and for either."""
    for name, text in reversed(RESOURCES.items()):
        default = getattr(Resources, name)
        kind = type(default) if default is not None else str
        for phase in ("train", "precompute"):
            command = click.option(f"--{phase}-{name}", type=kind, hidden=True, help=f"--{name} of {phase} alone.")(command)
        command = click.option(f"--{name}", type=kind, default=default, show_default=default is not None, help=text)(command)
    return command


@command("submit")
@click.option(
    "--dataset", required=True, multiple=True, help="As for precompute: think | instruct | demo, a hub id, a file or a folder."
)
@click.option("--ref-store", type=click.Path(path_type=Path), help="Folder of the store.  [default: store/<dataset>]")
@click.option(
    "--array",
    type=click.IntRange(min=1),
    help="Phase 1 as an array of so many jobs, each with the resources below.  [default: one job]",
)
@click.option(
    "--precompute-nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of (each job of) phase 1."
)
@click.option("--train-nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of phase 2.")
@resource_options
@click.option("--sbatch-args", default="", help="Further options of sbatch, for both jobs, quoted as one word.")
@click.option("--precompute-sbatch-args", default="", hidden=True, help="--sbatch-args of precompute alone.")
@click.option("--train-sbatch-args", default="", hidden=True, help="--sbatch-args of train alone.")
@click.option("--precompute-args", default="", help="Further options of precompute, quoted as one word.")
@click.option("--train-args", default="", help="Further options of train, quoted as one word.")
@click.option("--dry-run", is_flag=True, help="Check, and print the commands and the scripts instead.")
def submit_cmd(dataset: tuple[str, ...], ref_store: Path | None, array: int | None, dry_run: bool, **options) -> None:
    """Queue both phases on a Slurm cluster: precompute, then train once it has succeeded.

    What can be wrong is looked for first. The jobs work in this folder. --gpus, --cpus, --mem, --time, --partition, --account, --qos and
    --sbatch-args hold for both phases; --precompute-time, --train-gpus and so on for one. Secrets (HF_TOKEN, WANDB_API_KEY) come from the
    environment or .env.
    """
    from slurm import submit as jobs
    from slurm.check import check_precompute, check_train

    for name in [name for name in options if name.endswith("_args")]:
        options[name] = _words(f"--{name.replace('_', '-')}", options[name])
    phase_1, phase_2 = (_resources(phase, options) for phase in ("precompute", "train"))
    datasets = [word for each in dataset for word in ("--dataset", each)]
    given = _parsed(
        "precompute",
        [*datasets, *([] if ref_store is None else ["--ref-store", str(ref_store)])],
        options["precompute_args"],
        ours=("--dataset", "--ref-store", "--num-workers"),
    )
    given.pop("num_workers")
    try:
        preset, reference = _completed(**given)
    except InputError as error:
        raise InputError(error.what, where=f"--dataset {' + '.join(dataset)}, --precompute-args", next=error.next) from error
    check_precompute(reference, preset)
    ref_store = reference["ref_store"]
    precompute = [*datasets, "--ref-store", str(ref_store), *options["precompute_args"]]

    from presets import Preset

    first = _first_of_train(ref_store, reference["chat_template"], reference["layout"], options["train_args"])
    given = _parsed("train", first, options["train_args"], ours=("--ref-store", "--num-processes"))
    for name in ("num_processes", "resume", "resume_or_start"):
        given.pop(name)
    config = _train_config(preset=preset or Preset, **given)
    ranks = int(os.environ.get("REFDPO_RANKS_PER_NODE", phase_2.num_gpus))
    check_train(config, reference, world=phase_2.nodes * max(1, ranks))

    submission = jobs.Submission(
        folder=Path.cwd(),
        precompute_options=tuple(precompute),
        train_options=(*first, *options["train_args"]),
        precompute=phase_1,
        train=phase_2,
        array=array,
    )
    if dry_run:
        return click.echo(jobs.dry_run(submission))
    first, second = jobs.submit(submission)
    click.echo(f"phase 1 is job {first}, phase 2 is job {second} and waits for it; logs: {jobs.LOGS}/refdpo-*.out")
    click.echo(f"Next: {cli('status', '--ref-store', ref_store)}\n      squeue --jobs {first},{second}")


def _words(option: str, text: str) -> tuple[str, ...]:
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"cannot be split into words: {error}", where=option) from error


def _resources(phase: str, options: dict) -> "Resources":
    """What one phase asks for: its own option where there is one, else that of both."""
    own = {name: options[f"{phase}_{name}"] for name in RESOURCES}
    chosen = {name: options[name] if value is None else value for name, value in own.items()}
    sbatch_args = (*options["sbatch_args"], *options[f"{phase}_sbatch_args"])
    return Resources(nodes=options[f"{phase}_nodes"], sbatch_args=sbatch_args, **chosen)


def _parsed(phase: str, first: list[str], options: tuple[str, ...], ours: tuple[str, ...]) -> dict:
    """`first` and the further `options` of a phase as its own command parses them. InputError for what it refuses, and for `ours` among
    the further ones."""
    if taken := [word for word in options if word.partition("=")[0] in ours]:
        raise InputError(
            "is not for these", where=f"--{phase}-args {taken[0]}", next="It follows from the options of submit itself."
        )
    try:
        return main.commands[phase].make_context(phase, [*first, *options]).params
    except click.UsageError as error:
        raise InputError(error.format_message().rstrip("."), where=f"--{phase}-args") from error


@contextlib.contextmanager
def quiet_libraries():
    """Loading bars and advice of the libraries are not about this command."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    for name in ("DeepSpeed", "accelerate"):  # accelerate's loggers are below that name, and would pass over a filter there
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    yield


def run() -> None:
    """The command as a process of its own; `main` runs in any process, a test's for one, and leaves its end alone."""
    with leave():
        main()


if __name__ == "__main__":
    run()
