"""Read only some rows and columns of many parquet files of a run folder.

Each row group's smallest and largest router, suite and task are in the footer of its file. Only row
groups that may have the wanted rows are read, each in one request.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.run_folder import damage_named, with_schema
from harness.storage import Folder

_KEYS = ("router", "suite", "task")
# Most footers are smaller.
_FOOTER = 64 * 1024


@dataclass(frozen=True)
class _File:
    """A parquet file, and what its footer says."""

    name: str
    size: int
    metadata: pq.FileMetaData
    # Suites that have a file of their own for this router. Version 0.1.0 wrote all suites into one
    # file, which stays when a suite is scored again.
    superseded: tuple[str, ...]


@dataclass(frozen=True)
class _RowGroup:
    """A row group, and the smallest and largest value of each key; None if they are unknown."""

    file: _File
    index: int
    ends: dict[str, tuple[str, str] | None]

    def may_have(self, wanted: dict[str, str]) -> bool:
        """Return whether there may be a row with these values."""
        for key, value in wanted.items():
            ends = self.ends[key]
            if ends is not None and not ends[0] <= value <= ends[1]:
                return False
        return True

    def span(self, columns: set[str]) -> tuple[int, int]:
        """Return the first byte of the columns, and the byte after their last."""
        group = self.file.metadata.row_group(self.index)
        starts, ends = [], []
        for place in range(group.num_columns):
            column = group.column(place)
            if column.path_in_schema.partition(".")[0] in columns:
                start = column.data_page_offset
                if column.dictionary_page_offset is not None:
                    start = min(start, column.dictionary_page_offset)
                starts.append(start)
                ends.append(start + column.total_compressed_size)
        return min(starts), max(ends)


class Tables:
    """The parquet files below a prefix of a run folder: samples or routing.

    Only their footers are read at first. The rows are ordered by file name, then as in the file.
    """

    def __init__(self, folder: Folder, prefix: str, schema: pa.Schema) -> None:
        """Read the footers of all parquet files below `prefix`.

        Raises:
            PhatgooseError: a file is damaged, or has columns other than `schema`.
        """
        self._folder = folder
        self._schema = schema
        entries = [e for e in folder.entries(f"{prefix}/") if e.path.endswith(".parquet")]
        names = {entry.path for entry in entries}
        self._groups: list[_RowGroup] = []
        starts = [max(0, entry.size - _FOOTER) for entry in entries]
        footers = [(e.path, s, e.size - s) for e, s in zip(entries, starts, strict=True)]
        read = folder.read_parts(footers)
        for entry, start, footer in zip(entries, starts, read, strict=True):
            with damage_named(folder, entry.path):
                source = _Source(folder, entry.path, entry.size, start, footer)
                parquet = pq.ParquetFile(source)
                empty = parquet.schema_arrow.empty_table()
            with_schema(folder, entry.path, empty, schema)
            superseded = _superseded(entry.path, prefix, names)
            file = _File(entry.path, entry.size, parquet.metadata, superseded)
            self._groups += _row_groups(file)

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(g.file.metadata.row_group(g.index).num_rows for g in self._groups)

    def distinct(self, column: str, **wanted: str) -> list[str]:
        """Return the values of a key column in rows with the wanted keys, by first occurrence."""
        found: dict[str, None] = {}
        for group in self._groups:
            if not group.may_have(wanted):
                continue
            ends = [group.ends[key] for key in (column, *wanted)]
            known = not group.file.superseded and all(e is not None and e[0] == e[1] for e in ends)
            if known and ends[0] is not None:
                found[ends[0][0]] = None
            else:
                for table in self._read([group], [column], wanted):
                    found |= dict.fromkeys(table[column].unique().to_pylist())
        return list(found)

    def select(self, columns: Sequence[str], **wanted: str) -> Iterator[pa.Table]:
        """Yield some columns of the rows with the wanted keys, one row group at a time.

        Raises:
            PhatgooseError: a file is damaged.
        """
        groups = [group for group in self._groups if group.may_have(wanted)]
        yield from filter(len, self._read(groups, columns, wanted))

    def _read(
        self, groups: Sequence[_RowGroup], columns: Sequence[str], wanted: dict[str, str]
    ) -> Iterator[pa.Table]:
        """Yield the wanted rows of each row group."""
        fields = [f for f in self._schema if f.name in {*columns, *wanted, "suite"}]
        spans = [group.span({field.name for field in fields}) for group in groups]
        parts = [(g.file.name, a, b - a) for g, (a, b) in zip(groups, spans, strict=True)]
        read = self._folder.read_parts(parts)
        for group, (start, _), data in zip(groups, spans, read, strict=True):
            file = group.file
            with damage_named(self._folder, file.name):
                source = _Source(self._folder, file.name, file.size, start, data)
                parquet = pq.ParquetFile(source, metadata=file.metadata)
                # Without Arrow's threads, as in run_folder.read_table.
                table = parquet.read_row_group(
                    group.index, [field.name for field in fields], use_threads=False
                )
            table = with_schema(self._folder, file.name, table, pa.schema(fields))
            for key, value in wanted.items():
                table = table.filter(pc.equal(table[key], value))
            if file.superseded:
                old = pc.is_in(table["suite"], pa.array(file.superseded, pa.string()))
                table = table.filter(pc.invert(old))
            yield table.select(columns)


def _superseded(name: str, prefix: str, names: set[str]) -> tuple[str, ...]:
    """Return the suites whose rows in a file of version 0.1.0 have been written again."""
    router = name.removeprefix(f"{prefix}/")
    if "/" in router:
        return ()
    newer = (n.removeprefix(f"{prefix}/").split("/") for n in names)
    return tuple(parts[0].replace("@", ":") for parts in newer if parts[1:] == [router])


def _row_groups(file: _File) -> Iterator[_RowGroup]:
    metadata = file.metadata
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if not group.num_rows:
            continue
        ends: dict[str, tuple[str, str] | None] = {}
        for place in range(group.num_columns):
            column = group.column(place)
            if column.path_in_schema in _KEYS:
                statistics = column.statistics
                known = statistics is not None and statistics.has_min_max
                ends[column.path_in_schema] = (statistics.min, statistics.max) if known else None
        yield _RowGroup(file, index, ends)


class _Source(io.RawIOBase):
    """A file of a folder as Arrow reads it. A part of it has been read before."""

    def __init__(self, folder: Folder, name: str, size: int, start: int, part: bytes) -> None:
        self._folder = folder
        self._name = name
        self._size = size
        self._start, self._part = start, part
        self._place = 0

    def readable(self) -> bool:
        """Return that the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return that the file can be read from any place."""
        return True

    def tell(self) -> int:
        """Return the current place."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place and return it."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = origin + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most to the end of the file."""
        left = max(0, self._size - self._place)
        size = left if size < 0 else min(size, left)
        start = self._place - self._start
        if start >= 0 and start + size <= len(self._part):
            data = self._part[start : start + size]
        else:
            data = self._folder.read_part(self._name, self._place, size)
        self._place += size
        return data
