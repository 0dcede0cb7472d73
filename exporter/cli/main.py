"""The `medexport` group: verbs, errors to one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from exporter import __version__
from exporter.cli import build, bundles, check, engines, formats, listings, stages
from exporter.cli import run as running
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError

INTERNAL, INTERRUPTED = 70, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="medexport")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
def cli(debug: bool) -> None:
    """Merge, quantize, export, compare and package medical vision-language models.

    Exit codes: 0 done or gate passed, 1 gate or parity failed, 2 wrong usage, 3 input refused,
    4 gate inconclusive, 5 the environment lacks something, 70 a defect in medexport.
    """


for room in (build, stages, check, formats, running, bundles, engines, listings):
    for command in room.COMMANDS:
        cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: run, print an error as one line, exit."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(given))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; every error becomes one line on stderr."""
    try:
        result = cli(arguments, prog_name="medexport", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # the reader of a pipe had enough
        sys.stderr.close()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = explain(error)
        if message:
            click.echo(f"medexport: {' '.join(message.split())}", err=True)
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """One line and an exit code for anything that can end a command."""
    for kind, describe in EXPLANATIONS:
        if isinstance(error, kind):
            return describe(error)
    kind_name = type(error).__name__
    line = f"defect in medexport: {kind_name}: {error}; run with --debug and report it"
    return line, INTERNAL


# In this order: a FileNotFoundError is an OSError too.
EXPLANATIONS: tuple[tuple[type[BaseException], Callable[[Any], tuple[str, int]]], ...] = (
    (MedexportError, lambda e: (str(e), e.exit_code)),
    (click.exceptions.Exit, lambda e: ("", e.exit_code)),
    (click.Abort, lambda _: ("interrupted", INTERRUPTED)),
    (click.ClickException, lambda e: (e.format_message(), 2)),
    (
        KeyboardInterrupt,
        lambda _: ("interrupted; finished stages are kept, run the same again", INTERRUPTED),
    ),
    (FileNotFoundError, lambda e: (f"{e.filename}: no such file", InputRefused.exit_code)),
    (OSError, lambda e: (f"the system refused: {e}", EnvironmentLacks.exit_code)),
    (
        MemoryError,
        lambda _: ("not enough memory for this model here", EnvironmentLacks.exit_code),
    ),
)
