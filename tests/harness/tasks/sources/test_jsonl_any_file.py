"""Check that any content of a user's own file gives records or one error of one line."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.tasks import TaskSpec
from harness.tasks.sources import jsonl
from phatgoose.errors import PhatgooseError

GOOD = '{"input": "a", "target": "b"}\n'


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


KEYS = st.sampled_from(["input", "target", "choices", "correct", "cluster", "other", ""])


LINES = st.lists(
    st.dictionaries(KEYS, JSON, max_size=5).map(json.dumps)
    | JSON.map(json.dumps)
    | st.text(max_size=30).map(lambda text: text.replace("\ud800", ""))
    | st.sampled_from([GOOD.strip(), '{"input": "a", "input": "b"}', "[" * 50_000, "\ufeff{}"]),
    max_size=4,
)


def ends_in_records_or_one_error(path: Path) -> None:
    """Check that a reader raises only PhatgooseError, in one line that names the file."""
    spec, line = TaskSpec("mine", (str(path),), "jsonl"), None
    try:
        for _, record in jsonl._records(spec):
            assert record.targets
            assert all(target.encode() for target in record.targets)
            assert record.input.encode()
            assert not record.choices or len({*record.choices}) > 1
    except PhatgooseError as error:
        line = str(error)
    if line is not None:
        assert path.name in line
        assert "\n" not in line


@settings(deadline=None, max_examples=300)
@given(LINES, st.binary(max_size=12))
@example(lines=['{"\\n": null}'], tail=b"")
def test_any_json_lines_give_records_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass") + b"\n" + tail)
    ends_in_records_or_one_error(path)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(KEYS, min_size=1, max_size=4),
    st.lists(st.lists(JSON.map(json.dumps) | st.text(max_size=8), max_size=4), max_size=4),
    st.sampled_from([",", "\t"]),
    st.binary(max_size=8),
)
def test_any_csv_gives_records_or_one_error(
    tmp_path_factory: pytest.TempPathFactory,
    header: list[str],
    rows: list[list[str]],
    delimiter: str,
    tail: bytes,
) -> None:
    path = tmp_path_factory.getbasetemp() / ("fuzz.csv" if delimiter == "," else "fuzz.tsv")
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    path.write_bytes(file.getvalue().encode(errors="surrogatepass") + tail)
    ends_in_records_or_one_error(path)


ARROW = st.sampled_from(
    [
        (pa.string(), st.text(max_size=5)),
        (pa.float64(), st.floats()),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
        (pa.bool_(), st.booleans()),
        (pa.binary(), st.binary(max_size=4)),
        (pa.date32(), st.dates()),
        (pa.timestamp("us"), st.integers(-(2**63), 2**63 - 1)),
        (pa.duration("s"), st.integers(-(2**62), 2**62)),
        (pa.decimal128(9, 2), st.decimals(0, 99, places=2)),
        (pa.list_(pa.string()), st.lists(st.text(max_size=3) | st.none(), max_size=3)),
        (pa.list_(pa.float64()), st.lists(st.floats(), max_size=3)),
        (pa.struct([("a", pa.int64())]), st.fixed_dictionaries({"a": st.integers(0, 9)})),
        (pa.map_(pa.string(), pa.int64()), st.just([("a", 1)])),
    ]
)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_parquet_gives_records_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    names = data.draw(st.lists(KEYS, min_size=1, max_size=4))
    columns = []
    for _ in names:
        kind, values = data.draw(ARROW)
        columns.append(
            pa.array(data.draw(st.lists(values | st.none(), min_size=2, max_size=2)), kind)
        )
    pq.write_table(pa.table(columns, names), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 0xFF
    path.write_bytes(bytes(content))
    ends_in_records_or_one_error(path)
