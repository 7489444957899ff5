"""One subcommand's words: checked where click lets them pass in silence, completed from a file, and told what was meant."""

import json
from pathlib import Path
from typing import Any

import click

from options import FILE, JsonObject, Numbers
from store.command import INSTALLED, cli
from store.errors import InputError

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

CONFIG = "YAML or JSON file with options by name; typed options come first. The run.json of an earlier run works too."

OF_A_START = ("resume",)
"""What a run.json says of how its run was started, and not of what is trained."""


class Command(click.Command):
    """A subcommand with --config, and with its store as a word of its own where it reads one.

    Refuses an option that is given twice where one counts: the last would silently win. Keeps the values as they were given, by option, in
    `ctx.meta["typed"]` and `ctx.meta["from file"]`.
    """

    def __init__(self, name: str, *, params: list[click.Parameter], **more: Any):
        config = click.Option(["--config"], type=FILE, expose_value=False, help=CONFIG)
        super().__init__(name, params=[*params, config], **more)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = self._with_store(ctx, args)
        given = self._given(ctx, args)
        for name in dict.fromkeys(option.name for option in given):
            same = [option for option in given if option.name == name]
            if len(same) > 1 and not all(_may_be_repeated(option, args) for option in same):
                named = ", ".join(dict.fromkeys(option.opts[0] for option in same))
                raise InputError(f"given {len(same)} times, and one counts", where=named, next="Leave the others out.")
        typed, ctx.meta["from file"] = ctx.meta.get("typed", {}), {}
        if path := typed.get("config"):
            config = next(option for option in self.params if option.name == "config")
            ctx.meta["from file"] = ctx.default_map = self._from_file(FILE.convert(path, config, ctx), typed)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if meant := self._meant(error.option_name):
                error.possibilities = meant
            raise
        except click.BadParameter as error:
            if error.param is not None and error.param.name in ctx.meta["from file"] and error.param.name not in typed:
                error.message = f"{error.message.rstrip('.')} (in {path})."
            raise

    def _with_store(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`inspect store/demo` is `inspect --ref-store store/demo`; before or after the command's other word, as its parameters are."""
        store = next((option for option in self.params if getattr(option, "positional", False)), None)
        try:
            typed, rest, _ = self._parsed(ctx, args)
        except click.UsageError:
            return args
        words = [each for each in self.params if isinstance(each, click.Argument)]
        if store is None or store.name in typed or len(rest) <= len(words):
            return args
        place = sum(self.params.index(word) < self.params.index(store) for word in words)
        others = rest[:place] + rest[place + 1 :]
        for index in range(len(args)):  # which of the words it was: an option's value may be the same text
            without = args[:index] + args[index + 1 :]
            try:
                if args[index] == rest[place] and self._parsed(ctx, without)[:2] == (typed, others):
                    return [store.opts[0], rest[place], *without]
            except click.UsageError:
                continue
        return args

    def _given(self, ctx: click.Context, args: list[str]) -> list[click.Option]:
        """The options on the command line, one entry for each time; none where the line is wrong, which click then says."""
        try:
            ctx.meta["typed"], _, order = self._parsed(ctx, args)
        except click.UsageError:
            return []
        return [each for each in order if isinstance(each, click.Option)]

    def _parsed(self, ctx: click.Context, args: list[str]) -> tuple[dict[str, Any], list[str], list[click.Parameter]]:
        """(values as text by option, the other words, the options in their order)."""
        parser = self.make_parser(ctx)
        parser._args = []  # the other words are wanted as they are
        return parser.parse_args(list(args))

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        store = next((index for index, each in enumerate(self.params) if getattr(each, "positional", False)), None)
        if store is not None:
            place = sum(isinstance(each, click.Argument) for each in self.params[:store])
            pieces.insert(len(pieces) - sum(isinstance(each, click.Argument) for each in self.params) + place, "[STORE]")
        return pieces

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Under the headings of their fields, in the order in which these first occur."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (row := option.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(option, "group", "") or "Options", []).append(row)
        groups["Options"] = groups.pop("Options")
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_help(self, ctx: click.Context) -> str:
        return as_called(super().get_help(ctx), ctx)

    def _meant(self, flag: str) -> list[str]:
        own = {word for option in self.params for word in option.opts}
        return [word for word in MEANT.get(flag, ()) if word in own]

    def _from_file(self, path: Path, typed: dict[str, Any]) -> dict[str, Any]:
        """Values by option, of a file for --config. What is typed sets aside what the file says of the same, or of another way to it."""
        by_flag = {flag: option for option in self.params for flag in option.opts if flag.startswith("--") and flag != "--config"}
        aside = {name for option in self.params if option.name in typed for name in getattr(option, "instead_of", ())}
        values: dict[str, Any] = {}
        for key, value in read_config(path):
            flag = "--" + key.lstrip("-").replace("_", "-")
            if (option := by_flag.get(flag)) is None:
                import difflib

                near = self._meant(flag) or difflib.get_close_matches(flag, by_flag, 1, cutoff=0.7)
                raise InputError(
                    "no such option",
                    where=f"--config {path}: {key}",
                    found=f"{', '.join(near)} is an option" if near else None,
                    next=f"All options: {cli(self.name, '--help')}",
                )
            if value is None or option.name in aside:
                continue
            if not option.is_bool_flag and option.is_flag:  # one of several switches for one value
                if str(value).lower() not in ("true", "false"):
                    raise InputError("is on or off", where=f"--config {path}: {key}", expected="true or false", found=value)
                if str(value).lower() == "false":
                    continue
                value = option.flag_value
            if option.name in values:
                raise InputError("given twice, and one counts", where=f"--config {path}: {key}", next="Leave one out.")
            if isinstance(value, list | dict) and not option.multiple and not isinstance(option.type, Numbers | JsonObject):
                raise InputError("takes one value", where=f"--config {path}: {key}", found=json.dumps(value))
            values[option.name] = [value] if option.multiple and not isinstance(value, list) else value
        return values


def as_called(help: str, ctx: click.Context) -> str:
    """Its examples as they are typed where the installed command was."""
    return help.replace("python cli.py", INSTALLED) if ctx.find_root().info_name == INSTALLED else help


def _may_be_repeated(option: click.Option, args: list[str]) -> bool:
    """Options that collect values, and switches: on is on. `--x` with `--no-x` is neither."""
    both = any(word in args for word in option.opts) and any(word in args for word in option.secondary_opts)
    return option.multiple or (option.is_flag and option.is_bool_flag and not both)


def read_config(path: Path) -> list[tuple[str, Any]]:
    """(key, value) of a YAML or JSON file, or of a run.json's `config`. Of YAML, single values are text as it would be typed: neither `no`
    nor 24:00:00 becomes something else; None: null or nothing. InputError for a file that is neither."""
    where = f"--config {path}"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {' '.join(str(error).split())}", where=where) from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = {key: value for key, value in content["config"].items() if key not in OF_A_START}
    if not isinstance(content, dict):
        raise InputError("names no options", where=where, expected="lines such as learning_rate: 1e-6")
    return list(content.items())


def _yaml(text: str) -> Any:
    """ValueError for what is no YAML, and for a key that is given twice."""
    import yaml

    def plain(node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            keys = [str(plain(key)) for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{twice} is given twice")
            return {key: plain(value) for key, (_, value) in zip(keys, node.value, strict=True)}
        if isinstance(node, yaml.SequenceNode):
            return [plain(each) for each in node.value]
        return None if node.style is None and node.value in ("", "~", "null") else node.value

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace('"<unicode string>", ', "")) from error
    return {} if node is None else plain(node)
