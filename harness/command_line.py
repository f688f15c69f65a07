"""Helpers of all command lines: answers as JSON or text, and text tables."""

import argparse
import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from harness.logs import log_to_terminal
from phatgoose.errors import PhatgooseError, refusal

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The output of a command as JSON and as text, and its exit status."""

    document: dict[str, Any]
    text: str
    status: int = 0


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run the command's `call`, print its answer, and return the exit status.

    The status is that of the answer. A PhatgooseError is printed in one line, with status 2.
    """
    args = parser.parse_args(arguments)
    log_to_terminal()
    try:
        with one_line_errors():
            made: Output = args.call(args)
    except PhatgooseError as error:
        _LOG.error("%s", error)
        return 2
    print(json.dumps(made.document, indent=1) if args.json else made.text)
    return made.status


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Convert errors of the operating system, such as a full disk, to PhatgooseError."""
    try:
        yield
    except OSError as error:
        line = refusal(error)
        if line is None:
            raise
        raise PhatgooseError(line) from error


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Return a table as text between rules. The columns in `right` are right-aligned."""
    return aligned([header, *rows], right, rules=[1, 1 + len(rows)])


def aligned(lines: Sequence[Sequence[str]], right: Collection[int], rules: Collection[int]) -> str:
    """Return lines of cells as columns of text.

    Args:
        lines: the cells, including those of the header.
        right: indices of the columns to right-align.
        rules: indices of the lines to draw a rule above; `len(lines)` is the end of the table.
    """
    sides = ["right" if column in right else "left" for column in range(len(lines[0]))]
    # Cells are text: numbers are already formatted.
    text = tabulate(
        lines,
        tablefmt="plain",
        colalign=sides,
        disable_numparse=True,
        preserve_whitespace=True,
    ).split("\n")
    width = sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) - 2
    for index in sorted(rules, reverse=True):
        text.insert(index, "-" * width)
    return "\n".join(text)
