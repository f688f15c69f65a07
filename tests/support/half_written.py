"""A disk that is full in the middle of a file."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def half_written() -> Iterator[None]:
    """Write only the first half of every text, and raise OSError."""
    whole = Path.write_text

    def write_half(path: Path, text: str) -> int:
        whole(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        yield
