"""One subcommand's words, checked: what click lets pass in silence, or refuses without saying what was meant."""

import click

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
