"""An expert: the LoRA factors of one task, its gates, and the card that says where they come from.

Shape suffixes: D input features of a linear, O its output features, R LoRA rank.

An expert is one Arrow IPC file. It has a row per adapted linear, with the linear's name and, for
each tensor, its shape, its dtype and its bytes; the card is JSON in the schema's metadata. Nothing
is compressed, so a file is opened by mapping it, without a copy.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from phatgoose.card import (
    DTYPES,
    Card,
    LoraFactors,
    check_factors,
    content_hash,
    dtype_name,
    raw_bytes,
    validate_name,
)
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import replacing

if TYPE_CHECKING:
    from phatgoose.base import Base

SCHEMA_VERSION = 1
_VERSION_KEY, _CARD_KEY = b"phatgoose.version", b"phatgoose.card"
# What reading a damaged file may raise.
_DAMAGE = (pa.ArrowException, OSError, LookupError, TypeError, ValueError, PhatgooseError)
# Arrow has no bfloat16: every tensor is stored as its bytes (little-endian) next to its dtype.
_TENSOR = pa.struct(
    [("shape", pa.list_(pa.int32())), ("dtype", pa.string()), ("data", pa.large_binary())]
)


@dataclass(frozen=True, eq=False, repr=False)
class Expert:
    """An expert of one base: its card, and the factors of each adapted linear by module name.

    The tensors of a loaded expert view its file and are READ-ONLY: writing into one ends the
    process with a segmentation fault. Clone what you want to change.

    Raises PhatgooseError if the name is not valid, if there is no linear, if the shapes of a
    linear do not agree, or if a value is not finite.
    """

    card: Card
    linears: dict[str, LoraFactors]

    def __post_init__(self) -> None:
        """Check the name, the shapes and the values."""
        validate_name(self.card.name)
        if not self.linears:
            raise PhatgooseError(
                f"expert {self.card.name!r} adapts no linear: check which linears were chosen"
            )
        for linear, factors in self.linears.items():
            check_factors(f"expert {self.card.name!r}, linear {linear!r}", factors)

    def __repr__(self) -> str:
        """Its name and sizes, without the tensors."""
        first = next(iter(self.linears.values()))
        gates = "gates" if first.gate_D is not None else "no gates"
        rank, count = len(first.lora_A_RD), len(self.linears)
        return f"Expert({self.card.name}: {count} linears, rank {rank}, {gates})"

    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, over the card and every tensor's name, dtype, shape and bits.

        It depends neither on the order of the linears nor on how a file lays them out.
        """
        return content_hash(self.card, self.linears)

    def to_bytes(self) -> bytes:
        """Return the bytes of the expert's file."""
        names = sorted(self.linears)
        fields = [field.name for field in dataclasses.fields(LoraFactors)]
        columns = [pa.array(names, pa.string())]
        for field in fields:
            tensors = [getattr(self.linears[name], field) for name in names]
            columns.append(pa.array([_to_arrow(tensor) for tensor in tensors], _TENSOR))
        metadata = {_VERSION_KEY: str(SCHEMA_VERSION), _CARD_KEY: self.card.to_json()}
        batch = pa.record_batch(columns, names=["linear", *fields])
        batch = batch.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def save(self, path: str | Path) -> None:
        """Write the expert's file; an existing file is replaced, never changed in place."""
        path = Path(path)
        try:
            # Not a plain write: an expert loaded from `path` would have its tensors cut off.
            with replacing(path) as temporary:
                temporary.write_bytes(self.to_bytes())
        except OSError as error:
            raise PhatgooseError(
                f"cannot save expert {self.card.name!r} as {path} ({reason_of(error)}): "
                "choose an existing, writable folder with space"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Expert":
        """Map an expert's file; its tensors view the mapping and are read-only.

        Raises PhatgooseError if there is no such file, or if it is truncated or damaged.
        """
        try:
            with pa.memory_map(str(path)) as file:
                buffer = file.read_buffer()
        except (OSError, pa.ArrowException) as error:
            raise PhatgooseError(
                f"cannot open the expert {path} ({reason_of(error)}): check the path"
            ) from error
        return cls.from_buffer(buffer, str(path))

    @classmethod
    def from_buffer(cls, buffer: "pa.Buffer | bytes", source: str) -> "Expert":
        """Read the bytes of an expert's file without a copy; errors begin with `source`."""
        try:
            return _read(pa.ipc.open_file(pa.py_buffer(buffer)), source)
        except _NewerFileError:
            raise
        except _DAMAGE as error:
            raise PhatgooseError(
                f"{source} is not a whole expert file ({reason_of(error)}): delete it, and train "
                "it again or copy it again"
            ) from error

    @classmethod
    def from_peft(
        cls, folder: str | Path, *, base: "Base | None" = None, name: str | None = None
    ) -> "Expert":
        """Read a LoRA adapter saved by PEFT, as an expert without gates.

        Arguments and errors are those of `phatgoose.interop.peft.read_adapter`.
        """
        from phatgoose.interop.peft import read_adapter  # slow to import

        return cls(*read_adapter(folder, base=base, name=name))

    def to_peft(self, folder: str | Path, *, base: "Base | None" = None) -> None:
        """Write a LoRA adapter that PEFT loads: `phatgoose.interop.peft.write_adapter`."""
        from phatgoose.interop.peft import write_adapter  # slow to import

        write_adapter(self.card, self.linears, folder, base=base)


def read_checkpoint(
    path: str | Path,
    base: "Base",
    *,
    names: Sequence[str] | None = None,
    scale: float | None = None,
) -> list[Expert]:
    """Read every expert of a checkpoint that PHATGOOSE's authors released.

    Arguments and errors are those of `phatgoose.interop.authors.read_checkpoint`.
    """
    from phatgoose.interop import authors

    return [Expert(*parts) for parts in authors.read_checkpoint(path, base, names, scale)]


class _NewerFileError(PhatgooseError):
    """The file is whole, but from a newer version."""


def _to_arrow(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "data": raw_bytes(tensor),
    }


def _from_arrow(column: "pa.StructArray", row: int) -> Tensor:
    """Return the tensor in one row, as a view; raise ValueError if the file is damaged."""
    shape = column.field("shape")[row].as_py()
    dtype = DTYPES[column.field("dtype")[row].as_py()]
    # Not `values[row].as_buffer()`, which copies.
    values = column.field("data")
    _, offsets, buffer = values.buffers()
    start, end = np.frombuffer(offsets, "<i8")[values.offset + row :][:2]
    data = buffer.slice(start, end - start)
    if min(shape) < 1 or math.prod(shape) * dtype.itemsize != data.size:
        raise ValueError(f"the bytes of a tensor do not fill its shape {shape}")
    if data.address % dtype.itemsize:
        data = bytearray(data)  # the value before it has a narrower dtype and shifts this one
    with warnings.catch_warnings():
        # That the tensor is read-only is said in Expert's docstring.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memoryview(data), dtype=dtype).view(shape)


def _read(reader: "pa.RecordBatchFileReader", source: str) -> Expert:
    metadata = reader.schema.metadata or {}
    version = int(metadata[_VERSION_KEY])
    if version > SCHEMA_VERSION:
        raise _NewerFileError(f"{source} has the newer schema {version}: update phatgoose")
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches instead of one")
    batch = reader.get_batch(0)
    batch.validate(full=True)  # offsets of a damaged file may point anywhere
    card = Card(**json.loads(metadata[_CARD_KEY]))
    names = batch["linear"].cast(pa.string()).to_pylist()
    if len(set(names)) != len(names) or None in names:
        raise ValueError("the linears' names are not one each")
    linears: dict[str, dict[str, Any]] = {name: {} for name in names}
    for field in (f.name for f in dataclasses.fields(LoraFactors)):
        if field not in batch.schema.names:
            continue  # optional, and newer than the file
        column = batch[field]
        if column.type != _TENSOR:
            raise TypeError(f"column {field} has type {column.type}")
        for row in range(len(column)):
            if column[row].is_valid:
                linears[names[row]][field] = _from_arrow(column, row)
    return Expert(card, {name: LoraFactors(**tensors) for name, tensors in linears.items()})
