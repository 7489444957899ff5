"""The command line: parse, build a config, call one function, word the errors. Heavy imports happen inside the commands.

What a command is told stands in its config dataclass (precompute/config.py, train/config.py, slurm/submit.py), or, where it has none, in the
parameters of its function here. options.py makes click's options of either.
"""

import codecs
import errno
import inspect
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from click.core import ParameterSource

import store.command
from default_store import default_report
from options import FILE, LOCAL_STORE, STORE_TO_READ, Argument, Option, StorePath, collected, options_of
from parsing import Command, as_called
from precompute.config import SPEED, AnalyzeConfig, PrecomputeConfig, StoreConfig
from precompute.scorer import AttentionKernel, Layout
from slurm.submit import Resources, SubmitConfig
from store.command import cli
from store.errors import InputError, RefdpoError
from train.config import MACHINE, RECORDS, TrainConfig
from train.leave import leave
from versions import refuse_old_packages

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

      python cli.py inspect --ref-store store/demo --sql "select row, side, token, logp from tokens order by logp limit 10"

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
    "completion": """
      python cli.py completion bash
    """,
    "status": """
      python cli.py status --ref-store store/think
    """,
    "submit": """
      python cli.py submit --dataset think

      python cli.py submit --dataset think --array 8 --train-nodes 2 --train-args "--report-to wandb" --dry-run

      python cli.py submit --dataset think --precompute-gpus a100:8 --precompute-time 4:00:00 --train-gpus b200:4 --train-partition big
    """,
}


def _version(ctx: click.Context, option: click.Option, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"refdpo {version('refdpo')}")
        ctx.exit()


class Commands(click.Group):
    """Turns every error a user can cause into one `Error:` line and an exit code; anything else is a bug and keeps its traceback."""

    def main(self, args=None, *more, **named):
        store.command.called_with = None if args is None else list(args)
        try:
            try:
                return super().main(args, *more, **named)
            finally:
                sys.stdout.flush()  # or Python finds a full disk out when nobody can say so any more
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"Error: what was to be printed cannot be written: {error.strerror}.", err=True)
            sys.exit(1)

    def get_help(self, ctx: click.Context) -> str:
        return as_called(super().get_help(ctx), ctx)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except RefdpoError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
def main() -> None:
    """Score a frozen reference model once, keep its log-probs in a Parquet store, train DPO from them without a reference forward.

    \b
    python cli.py precompute --dataset think        # phase 1: writes store/think
    python cli.py train --ref-store store/think     # phase 2: ZeRO-2 DPO, no reference model
    """


def command(name: str, *configs: type, more: tuple[click.Option, ...] = ()):
    """A subcommand with the options of `configs`, those of the function's parameters, and `more`. Its help ends with runnable examples.

    The function gets the values by the names of the fields. What it does not name is in its `**given`.
    """
    example = "\n".join(line.strip() for line in EXAMPLES[name].strip().splitlines() if line.strip())

    def decorate(function):
        def call(**values: Any) -> None:
            refuse_old_packages()
            for config in configs:
                values = collected(config, values)
            function(**values)

        options = [option for source in (*configs, function) for option in options_of(source)]
        text = f"{inspect.cleandoc(function.__doc__)}\n\nExamples:\n\n\b\n{example}"
        main.add_command(Command(name, params=[*options, *more], callback=call, help=text))
        return function

    return decorate


QUIET = Option("No progress bar.")


@command("precompute", PrecomputeConfig)
def precompute_cmd(
    num_workers: Annotated[
        int | None, Option("Local processes.", group=SPEED, default="one per GPU; 1 without a GPU", at_least=1)
    ] = None,
    **given,
) -> None:
    """Phase 1: score a dataset with the frozen reference model.

    Writes a sealed store of Parquet shards. Run it again, with any number of workers, to go on where it stopped.
    """
    config = PrecomputeConfig.of(given)
    from precompute.start import start

    start(config, num_workers)


@command("analyze", AnalyzeConfig)
def analyze_cmd(**given) -> None:
    """Measure a dataset before anything is scored.

    Lengths, what each --max-length cuts, formats, unusual rows, expected time. Tokenizes with the same code as precompute and recommends a --max-length.
    """
    config = AnalyzeConfig.of(given)
    from quiet import importing

    with importing():
        from precompute.desk.analyze import analyze
        from precompute.desk.analyze_view import Rates, describe, plot
        from store.bar import bar

    with bar("tokenizing", "rows", config.quiet or config.json) as progress:
        analysis = analyze(config, progress)
    plot(analysis, config.png)
    if config.json:
        import json

        click.echo(json.dumps(analysis.to_json(), indent=1, ensure_ascii=False))
    else:
        rates = Rates(config.tokens_per_second, config.train_tokens_per_second, config.num_gpus)
        click.echo(describe(analysis, rates, _also_for_precompute()))
        click.echo(f"histogram: {config.png}")


def _also_for_precompute() -> list[str]:
    """The words of this `analyze` that make precompute read the same rows in the same way, as they were given."""
    context = click.get_current_context()
    known = {option.name for option in main.commands["precompute"].params} - {"num_workers", "config"}
    words = []
    for option in context.command.params:
        if option.name in known and _given(context, option.name):
            value = (context.meta["from file"] | context.meta["typed"])[option.name]
            values = value if option.multiple else [value]
            words += [option.opts[0]] if option.is_flag else [str(word) for each in values for word in (option.opts[0], each)]
    return words


def _given(context: click.Context, name: str) -> bool:
    """Was this option typed, or in the --config file, rather than left at its default?"""
    return context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


@command("train", TrainConfig)
def train_cmd(
    resume_or_start: Annotated[
        bool, Option("--resume if there is a checkpoint, else start: for jobs that are requeued.", RECORDS)
    ] = False,
    overwrite: Annotated[
        bool, Option("Remove the run in --output-dir first. Not under torchrun or another launcher.", RECORDS)
    ] = False,
    num_processes: Annotated[
        int | None, Option("Local ranks.", MACHINE, default="one per GPU; 2 without a GPU", at_least=1)
    ] = None,
    **given,
) -> None:
    """Phase 2: train DPO from a store, without a reference model.

    Defaults are the store's preset: OLMo 3's hyperparameters.
    """
    from train.start import config_of, start

    start(config_of(given), num_processes, resume_or_start, overwrite, click.get_current_context().meta["typed"].get("config"))


@command("inspect")
def inspect_cmd(
    ref_store: Annotated[Path, STORE_TO_READ],
    sql: Annotated[
        str | None,
        Option(
            "A query over the views pairs, completions (one row per side), tokens (one per scored token) and texts (decoded); several separated by ;"
        ),
    ] = None,
    form: Annotated[
        Literal["table", "csv", "json", "parquet"] | None,
        Option("Format of answers. csv and json are streamed, so they may be of any length.", default="table", flags=("--format",)),
    ] = None,
    output: Annotated[Path | None, Option("New file for the answer; --format parquet needs one.")] = None,
    overwrite: Annotated[bool, Option("Replace --output if it is there, once the new one is whole.")] = False,
    interactive: Annotated[bool, Option("A SQL prompt.", flags=("--interactive", "-i"))] = False,
    tokenizer: Annotated[
        str | None,
        Option("Folder or hub id, for queries that ask for text.", default="the one the store was made with"),
    ] = None,
) -> None:
    """Look at a store with SQL. Without --sql: a one-screen summary."""
    from precompute.scorer.decoder import lazy_decoder
    from store.inspect import inspect

    if tokenizer is not None and sql is None and not interactive:
        raise InputError("belongs to --sql", where="--tokenizer", next="Without it inspect shows a summary.")
    inspect(ref_store, sql, form, output, interactive, lazy_decoder(ref_store, tokenizer), overwrite)


@command("export")
def export_cmd(
    ref_store: Annotated[Path, STORE_TO_READ],
    form: Annotated[Literal["trl", "open-instruct", "megatron-bridge", "jsonl"], Option(flags=("--format",))],
    output: Annotated[Path, Option("New folder for the files.")],
    loss_type: Annotated[str | None, Option("open-instruct only: dpo_norm writes means per token, dpo and wpo sums.")] = None,
    metadata: Annotated[
        tuple[str, ...],
        Option("megatron-bridge only: KEY=JSON for its scoring_metadata.json, such as split=null."),
    ] = (),
    accept_other_tokens: Annotated[
        bool, Option("Write for a project that scores other tokens than this store. Without it, the error says which.")
    ] = False,
    overwrite: Annotated[bool, Option("Replace an earlier export in --output, once the new one is whole.")] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Write a store in the format of another trainer.

    The files are those that TRL, open-instruct or Megatron-Bridge load, or JSON lines.
    """
    from quiet import importing

    with importing():
        from store.bar import bar
        from store.export import export, key_values

    more = {
        "metadata": key_values(metadata),
        "loss_type": loss_type,
        "accept_other_tokens": accept_other_tokens,
        "overwrite": overwrite,
    }
    with bar("exporting", "pairs", quiet) as progress:
        notes = export(ref_store, form, output, progress=progress, **more)
    click.echo("\n".join([f"export: {output}", *(f"  {note}" for note in notes)]))


@command("import", StoreConfig)
def import_cmd(
    cache: Annotated[Path, Option("TRL's Arrow file with ref_chosen_logps, ref_rejected_logps.", type=FILE)],
    num_pairs: Annotated[int, Option("Random pairs scored again to check the cache.", at_least=1)] = 8,
    layout: Annotated[Layout, Option("Layout of that check; padded is TRL's own.")] = "padded",
    attention_kernel: Annotated[AttentionKernel, Option("Attention of --layout packed on a GPU, as for precompute.")] = "default",
    gpus_per_worker: Annotated[int, Option("Spread the model over N GPUs.", at_least=1)] = 1,
    **given,
) -> None:
    """Make a store from the cache of TRL's precompute pass.

    Some pairs are scored again first. Dataset, model, max length, dtype and limit are those that TRL was given. The store has sums only: train takes it at its own max length
    and without --ld-alpha.
    """
    more = {"layout": layout, "attention_kernel": attention_kernel, "gpus_per_worker": gpus_per_worker}
    config = PrecomputeConfig.of(given | more)
    from quiet import importing

    with importing():
        from devices import describe, devices
        from precompute.desk.import_trl import import_trl
        from precompute.start import end

    where = devices(0, gpus_per_worker)
    click.echo(describe(where[0], 1, len(where)))
    import_trl(config, cache, where, num_pairs)
    end(config.ref_store, 0)


@command("push")
def push_cmd(
    ref_store: Annotated[Path, LOCAL_STORE],
    target: Annotated[str, Argument()],
    private: Annotated[bool, Option("Make a new repository on the Hub private.")] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Copy a sealed store to the Hub or to a URL.

    TARGET is owner/name on the Hugging Face Hub, or a URL (s3://, gs://, file://). The store is checked before, the copy after. If it is
    interrupted, run it again: it goes on.
    """
    from store.bar import bar
    from store.remote import push

    with bar("pushing", "shards", quiet) as progress:
        where = push(ref_store, target, progress, private=private)
    click.echo(f"{ref_store} is at {where}")


@command("pull")
def pull_cmd(
    source: Annotated[str, Argument()],
    ref_store: Annotated[Path, LOCAL_STORE],
    revision: Annotated[str | None, Option("Branch, tag or commit of a repository on the Hub.")] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Copy a store from the Hub or from a URL.

    SOURCE is owner/name on the Hugging Face Hub, or a URL. Every shard is checked. If it is interrupted, run it again: it goes on.
    """
    from store.bar import bar
    from store.remote import pull

    with bar("pulling", "shards", quiet) as progress:
        manifest = pull(source, ref_store, progress, revision)
    click.echo(
        f"{ref_store} is sealed: {manifest.num_pairs:,} pairs in {len(manifest.shards)} shards, every sha256 as in its manifest"
    )


@command("report")
def report_cmd(
    ref_store: Annotated[Path, STORE_TO_READ],
    compare: Annotated[
        Path | None, Option("A second store of the same rows: another model, dtype or template.", type=StorePath())
    ] = None,
    tokenizer: Annotated[
        str | None, Option("Folder or hub id, to show pairs as text.", default="the one the store was made with")
    ] = None,
    output_dir: Annotated[Path | None, Option("Folder for index.html and the pictures.", default="runs/report/<store>")] = None,
) -> None:
    """Make one HTML page about a store.

    Lengths, reference margins, log-probs, truncation, pairs to read, identity. The page needs no other file.
    """
    from store.reader import open_store
    from store.report import report

    identity = open_store(ref_store, check="none").identity
    from quiet import importing

    with importing():
        from precompute.scorer.decoder import decoder_of

    page = report(ref_store, output_dir or default_report(ref_store), decoder_of(identity, tokenizer), compare)
    click.echo(f"report: {page}")


@command("verify")
def verify_cmd(
    ref_store: Annotated[Path, STORE_TO_READ],
    model: Annotated[str | None, Option("Also score a random sample again with this model: folder or hub id.")] = None,
    revision: Annotated[str | None, Option("Revision of --model on the hub.")] = None,
    num_pairs: Annotated[int, Option("Size of that sample.", at_least=1)] = 16,
    seed: Annotated[int, Option("Seed of the random choice.", at_least=0)] = 0,
    layout: Annotated[Layout | None, Option(default="the one the store was made in")] = None,
    attention_kernel: Annotated[AttentionKernel, Option("Attention of the packed layout on a GPU, as for precompute.")] = "default",
    gpus_per_worker: Annotated[int, Option("Spread the model over N GPUs.", at_least=1)] = 1,
) -> None:
    """Check a sealed store, every byte and every value.

    Checksums, rows, footers, values and counts; with --model also the log-probs of a sample.
    """
    from store.bar import bar
    from store.verify import verify

    context = click.get_current_context()
    of_model = ("revision", "num_pairs", "seed", "layout", "attention_kernel", "gpus_per_worker")
    needless = [name for name in of_model if _given(context, name)]
    if model is None and needless:
        raise InputError("belongs to --model", where=", ".join(f"--{name.replace('_', '-')}" for name in needless))
    if model is not None:
        from quiet import importing

        with importing():
            from precompute.desk.verify_model import devices_for, verify_model
            from precompute.scorer.api import config_sha256

        # What cannot be is seen before every byte of the store is read.
        config = config_sha256(model, revision)
        where, layout = devices_for(ref_store, model, revision, layout, attention_kernel, gpus_per_worker)
    with bar("verifying", "shards") as progress:
        findings = verify(ref_store, progress)
    for finding in findings:
        click.echo(f"Error: {finding}", err=True)
    if findings:
        sys.exit(1)
    click.echo(f"{ref_store}: intact")
    if model is not None:
        of_sample = {"num_pairs": num_pairs, "seed": seed, "layout": layout, "attention_kernel": attention_kernel}
        verify_model(ref_store, model, revision, config, where=where, **of_sample)


@command("status")
def status_cmd(ref_store: Annotated[Path, STORE_TO_READ]) -> None:
    """Say how far phase 1 is.

    Shards done, running, dead and missing, speed, time left.
    """
    from store.status import describe, status

    click.echo(describe(status(ref_store), ref_store))


@command("completion")
def completion_cmd(shell: Annotated[Literal["bash", "zsh", "fish"], Argument()]) -> None:
    """Print the script with which a shell completes `refdpo`.

    It completes commands, options and their values.

    In ~/.bashrc or ~/.zshrc: eval "$(refdpo completion bash)", or zsh. fish: refdpo completion fish > ~/.config/fish/completions/refdpo.fish
    """
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(main, {}, "refdpo", "_REFDPO_COMPLETE").source())


def _resource_options() -> list[click.Option]:
    """Those of Resources, each for both phases (--time) and for one (--precompute-time, --train-time)."""
    options = []
    for option in options_of(Resources):
        options.append(option)
        for phase in ("precompute", "train"):
            text = f"{option.opts[0]} of {phase} alone."
            flag = f"--{phase}-{option.name}"
            options.append(click.Option([flag], type=option.type, help=text, hidden=True))
    return options


@command("submit", SubmitConfig, more=tuple(_resource_options()))
def submit_cmd(
    dry_run: Annotated[bool, Option("Check, print the commands and the scripts, and queue nothing.")] = False, **given
) -> None:
    """Queue both phases on a Slurm cluster.

    Train starts once precompute has succeeded. What can be wrong is looked for first. The jobs work in this folder. --gpus, --cpus, --mem, --time, --partition, --account, --qos and
    --sbatch-args hold for both phases; --precompute-time, --train-gpus and so on for one. Secrets (HF_TOKEN, WANDB_API_KEY) come from the
    environment or .env.
    """
    from slurm import submit as jobs
    from slurm.plan import plan

    submission = plan(_parse, given)
    if dry_run:
        return click.echo(jobs.dry_run(submission))
    first, second = jobs.submit(submission)
    click.echo(f"phase 1 is job {first}, phase 2 is job {second} and waits for it; logs: {jobs.LOGS}/refdpo-*.out")
    click.echo(f"Next: squeue --jobs {first},{second}")
    click.echo(f"      {cli('status', '--ref-store', submission.ref_store)}    # once phase 1 has started")


def _parse(phase: str, words: list[str]) -> dict[str, Any]:
    """A phase's options as its own command reads these words. InputError for what it refuses."""
    try:
        params = main.commands[phase].make_context(phase, words).params
    except click.UsageError as error:
        raise InputError(error.format_message().rstrip("."), where=f"--{phase}-args") from error
    return collected({"precompute": PrecomputeConfig, "train": TrainConfig}[phase], params)


def _as_it_came(error: UnicodeError) -> tuple[str | bytes, int]:
    """For what no text can be: the byte of a file's name that it stood for, or else its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("as_it_came", _as_it_came)


def run() -> None:
    """The command as a process of its own; `main` runs in any process, a test's for one, and leaves its end alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale: tables have lines, names of files any characters
            stream.reconfigure(encoding="utf-8", errors="as_it_came")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115   a shell's `>&-` leaves none
    with leave():
        main()


if __name__ == "__main__":
    run()
