"""Write files atomically; write a safetensors file in pieces, and read the header of one.

A file is written under a hidden name that identifies the process, and renamed when it is complete.
So a reader never sees a part of it, and what a killed process left behind can be recognized.
"""

import hashlib
import json
import math
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# What every temporary name is like, on any machine.
TEMPORARY = re.compile(r"\.[A-Za-z0-9]+-\d+-[0-9a-f]{32}\.tmp")

# The width of an element, by the name of its dtype in safetensors files.
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "BOOL": 1}


def _machine() -> str:
    """Return a hash that only processes with a common process table share.

    Two machines may have one name, and so may two containers that number their processes apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        boot, numbers = socket.gethostname(), ""
    return hashlib.sha256(f"{boot}{numbers}".encode()).hexdigest()[:16]


MACHINE = _machine()


def temporary_name() -> str:
    """Return a new hidden name for a file or folder that this process is about to write."""
    return f".{MACHINE}-{os.getpid()}-{uuid.uuid4().hex}.tmp"


@contextmanager
def replacing(path: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """Yield a hidden path to write to, which becomes `path` when the block ends without an error.

    The content reaches the disk before the name does, so the file survives a power cut. Whoever
    has mapped the file that was there before keeps its content.

    Args:
        path: the file to write, in a folder that exists.
        publish: gives the written file its name; by default it replaces one that is there.
    """
    temporary = path.with_name(temporary_name())
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        publish(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TensorLayout:
    """What the header of a safetensors file says of a tensor: a key of `BYTES`, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many bytes the tensor takes."""
        return BYTES[self.dtype] * math.prod(self.shape)


def write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    layouts: Mapping[str, TensorLayout],
    data: Iterable[tuple[str, memoryview]],
) -> None:
    """Write a safetensors file of which only one tensor at a time is in memory.

    The library wants all tensors at once, and copies them. The layout is its published format.

    Args:
        path: the file, which is replaced if it exists.
        metadata: what the header says besides.
        layouts: of every tensor, by name.
        data: the bytes of every tensor, by name, in any order.

    Raises:
        ValueError: a tensor has not the bytes that its layout says, or there are none for it.
    """
    begins, end = {}, 0
    # The widest first, so that each begins at a multiple of its width.
    for name in sorted(layouts, key=lambda name: -BYTES[layouts[name].dtype]):
        begins[name], end = end, end + layouts[name].size
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, begin in begins.items():
        layout = layouts[name]
        offsets = [begin, begin + layout.size]
        header[name] = {"dtype": layout.dtype, "shape": layout.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    missing = set(layouts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, content in data:
            if content.nbytes != layouts[name].size:
                raise ValueError(f"{name} has {content.nbytes} bytes, not {layouts[name].size}")
            file.seek(8 + len(text) + begins[name])
            file.write(content)
            missing.remove(name)
            del content  # before the next is made
        if missing:
            raise ValueError(f"there is no data for {', '.join(sorted(missing))}")
        file.flush()


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file's bytes.

    The library reads metadata from files only. The layout is its published format: the length of
    the header in 8 bytes, then the header as JSON.

    Raises:
        LookupError, ValueError: the header is damaged, or there is no metadata.
    """
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return metadata
