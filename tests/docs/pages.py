"""Parse the pages of the documentation and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_REDIRECTIONS = (">", ">>", "|")


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Return the command's name in test ids."""
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def module(self) -> str | None:
        """Return the module that it runs with `python -m`, if any."""
        place = self._module_place
        return None if place is None else self.words[place]

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of that module."""
        assert self._module_place is not None
        return list(self.words[self._module_place + 1 :])

    @property
    def _module_place(self) -> int | None:
        for place, word in enumerate(self.words[:-2]):
            if word.endswith("python") and self.words[place + 1] == "-m":
                return place + 2
        return None


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def spans(page: Path) -> list[str]:
    """Return the inline code outside of fenced blocks, with line breaks replaced by spaces."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def commands() -> Iterator[Command]:
    """Yield every command of the shell blocks, and the commands with arguments in the text."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := _words(line):
                    yield Command(name, words)
        for span in spans(page):
            if re.match(r"(\S*python|make|sbatch) ", span):
                yield Command(name, _words(span))


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line.replace("$PWD", "/here"), comments=True)
    end = next((i for i, word in enumerate(words) if word in _REDIRECTIONS), len(words))
    return tuple(words[:end])
