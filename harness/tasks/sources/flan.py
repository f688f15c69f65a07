"""FLAN v2: the zero-shot rows of a task or category, split as PHATGOOSE's authors split them.

Members are folders of the authors' data set, such as `FLANV2/NIV2/Poem Generation`. The authors
made them from Open-Orca/FLAN by task name. Only rows with a zero-shot template, a nonempty input
and a nonempty target are used. They are shuffled with a fixed seed. The first tenth (at most
10,000) is for evaluation, and at most 500,000 of the rest are drawn for training
(`src/data/flat.py` of the released code, commit 4fd5790).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.tasks.records import Record, Split, check_record, document_id
from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.jsonl import with_space
from harness.tasks.sources.source import TaskRecords, no_tasks, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    import datasets

DATA_SET = "r-three/Phatgoose_flanv2_offline"
_COLUMNS = ("inputs", "targets", "_template_type")
_TEMPLATES = "zs_opt|zs_noopt"
_SEED_OF_SPLIT = 1234
_SEED_OF_CAP = 42
_MOST_EVALUATION = 10_000
_BATCH = 1000


@dataclass(frozen=True)
class Options:
    """Options for reading rows.

    Attributes:
        revision: revision of the data set.
        max_examples: maximum number of training rows to keep.
    """

    revision: str = ""
    max_examples: int = 500_000


expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Reject unknown options and more than one member."""
    options_of(Options, spec)
    if len(spec.members) != 1:
        raise PhatgooseError(f"task {spec.name}: members must be one folder of {DATA_SET}")


def identity(spec: TaskSpec) -> Any:
    """Return the revision of the data set, or the hashes of its files."""
    return hub.identity(_data(spec), spec.folder)


def missing(spec: TaskSpec) -> str | None:
    """Return why the data set is unavailable, or None."""
    return hub.missing(_data(spec), spec.folder)


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks, a thousand rows at a time."""
    for spec in specs:
        yield TaskRecords(spec, _records(spec), origin=hub.origin(_data(spec), spec.folder))


def split_rows(count: int, max_examples: int) -> dict[Split, np.ndarray]:
    """Return the authors' split of `count` rows; each split is sorted."""
    order = np.random.RandomState(_SEED_OF_SPLIT).choice(count, size=count, replace=False)
    evaluation = min(int(count * 0.1), _MOST_EVALUATION)
    train = order[evaluation:]
    if len(train) > max_examples:
        generator = np.random.default_rng(_SEED_OF_CAP)
        train = train[generator.choice(len(train), size=max_examples, replace=False)]
    return {"train": np.sort(train), "evaluation": np.sort(order[:evaluation])}


def _data(spec: TaskSpec) -> HubData:
    return HubData(DATA_SET, data_dir=spec.members[0], revision=options_of(Options, spec).revision)


def _records(spec: TaskSpec) -> Iterator[tuple[Split, Record]]:
    rows = hub.rows(_data(spec), "train", spec.folder)
    lacking = [name for name in _COLUMNS if name not in rows.column_names]
    if lacking:
        raise PhatgooseError(
            f"data set {_data(spec)} has no columns {', '.join(lacking)}; "
            f"it has {rows.column_names}"
        )
    kept = _kept(rows)
    if not len(kept):
        raise PhatgooseError(f"data set {_data(spec)} has no zero-shot rows")
    chosen = split_rows(len(kept), options_of(Options, spec).max_examples)
    for split in get_args(Split):
        numbers = kept[chosen[split]]
        for start in range(0, len(numbers), _BATCH):
            part = rows[numbers[start : start + _BATCH].tolist()]
            chosen_rows = zip(numbers[start:], part["inputs"], part["targets"], strict=False)
            for number, text, target in chosen_rows:
                prompt = with_space(text)
                # Duplicate rows all count, as for the authors.
                document = document_id(spec.name, f"{number}\n{prompt}")
                record = Record(spec.name, document, prompt, [target.strip()], [], [])
                check_record(record, f"data set {_data(spec)}, row {number + 1}")
                yield split, record


def _kept(rows: "datasets.Dataset") -> np.ndarray:
    """Return the numbers of the rows that are used."""
    found = []
    for start in range(0, len(rows), 100_000):
        part: pa.Table = rows.with_format("arrow")[start : start + 100_000]
        mask = pc.match_substring_regex(part["_template_type"], _TEMPLATES)
        for column in ("inputs", "targets"):
            mask = pc.and_(mask, pc.not_equal(pc.utf8_trim_whitespace(part[column]), ""))
        found.append(start + np.flatnonzero(mask.to_numpy()))
    return np.concatenate(found) if found else np.array([], dtype=int)
