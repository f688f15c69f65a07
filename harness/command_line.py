"""What the command lines share: an answer for programs and for people, and text tables."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import PhatgooseError, refusal


@dataclass(frozen=True)
class Answer:
    """What a command has to say, as JSON and as text, and its exit status."""

    document: dict[str, Any]
    text: str
    status: int = 0


def answer(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse the arguments, make the command's `call` answer, print that; the exit status.

    The status is the answer's, or 2 after a mistake, which is printed in one line.
    """
    args = parser.parse_args(arguments)
    try:
        with one_line_errors():
            made: Answer = args.call(args)
    except PhatgooseError as error:
        print(f"error: {error}", file=sys.stderr)
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


def table(header: list[str], rows: list[list[str]], right: set[int]) -> str:
    """A table as text; the columns in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([lines[0], rule, *lines[1:], rule])
