"""What the command lines share: an answer for programs and for people, and text tables."""

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
    """What a command has to say, as JSON and as text, and its exit status."""

    document: dict[str, Any]
    text: str
    status: int = 0


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse the arguments, make the command's `call` answer, print that; the exit status.

    The status is the answer's, or 2 after a mistake, which is printed in one line.
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
    """Raise PhatgooseError in place of what the operating system refused: space, permission."""
    try:
        yield
    except OSError as error:
        line = refusal(error)
        if line is None:
            raise
        raise PhatgooseError(line) from error


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Return a table as text, between rules; the columns in `right` are aligned to the right."""
    return aligned([header, *rows], right, rules=[1, 1 + len(rows)])


def aligned(lines: Sequence[Sequence[str]], right: Collection[int], rules: Collection[int]) -> str:
    """Return lines of cells as columns of text.

    Args:
        lines: the cells, those of the header too.
        right: the columns to align to the right.
        rules: a rule is drawn above the lines of these indices; `len(lines)` is the end.
    """
    sides = ["right" if column in right else "left" for column in range(len(lines[0]))]
    # Text, not numbers: their digits were chosen before.
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
