"""The one error a user sees: what is wrong, where, what was expected against what was found, what to do next."""


class RefdpoError(Exception):
    """Something the user can cause and correct. The command line prints it as one `Error:` line and exits with `exit_code`.

    `what` is a sentence without a final stop; the other three parts are optional where they would say nothing.
    `exit_code` is 2 when the command was asked for something impossible (bad option, bad input) and 1 when the world failed it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, expected: object = None, found: object = None, next: str | None = None):
        self.what, self.where, self.expected, self.found, self.next = what, where, expected, found, next
        text = what if where is None else f"{where}: {what}"
        if expected is not None:
            text += f"; expected {expected}"
        if found is not None:
            text += f"; found {found}"
        text += "."
        if next is not None:
            text += f" {next}"
        super().__init__(text)


class InputError(RefdpoError):
    """What was asked for cannot be done: a bad option, dataset, model or path. Exit code 2."""

    exit_code = 2


class StoreError(RefdpoError):
    """A store is missing, unsealed, altered, of another identity, or cannot be written. Exit code 1."""
