"""A command as it is typed, run in the test's own process."""

import re

from click.testing import CliRunner

import cli


def call(*argv, code: int = 0) -> str:
    """Its output, both streams. It must end with `code`, and with one `Error:` line unless that is 0."""
    result = CliRunner().invoke(cli.main, [str(word) for word in argv])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert len(re.findall("^Error:", result.output, re.MULTILINE)) == (code != 0), result.output
    return result.output
