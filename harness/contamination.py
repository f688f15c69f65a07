"""How much of a suite stands in the experts' training data: exact inputs, and 8-word sequences.

    suite documents ──► hashes of their 8-word windows, sorted ─┐
    training data, a batch at a time ──► hashes of theirs ──────┴─► which documents are hit

Words are runs of letters and digits, in lower case. A sequence that stands in many documents of one
suite task is the task's wording and no document's: it does not count.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from harness.tasks import TaskData
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.records import normal
from harness.tasks.store import read_batches
from phatgoose.cache import cache_dir

# Raise it whenever the same data gives other overlaps than before.
_VERSION = 1
_LENGTH = 8
# A sequence in more than this share of a task's documents, and in so many, is the task's wording.
_WORDING_SHARE, _WORDING_DOCUMENTS = 0.01, 5
# Of a hash's bits, those that a first, small table is indexed by.
_TABLE_BITS = 22
_NO_WORD = re.compile(r"\W+")
_IS_WORD = np.array([b >= 128 or re.match(r"\w", chr(b)) is not None for b in range(256)])
# An odd number, and its inverse modulo 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


@dataclass(frozen=True)
class Overlap:
    """What a suite task and an expert's training data have in common.

    Attributes:
        suite_task, expert: which.
        documents: how many the suite task has, those with the same text counted once.
        exact: how many of them are, prompt and all, inputs that the expert is trained on.
        shared: how many have an exact input or an 8-word sequence in common with one.
        example: the beginning of one that is shared.
    """

    suite_task: str
    expert: str
    documents: int
    exact: int
    shared: int
    example: str

    @property
    def share(self) -> float:
        """The share of the documents that the expert may have seen."""
        return self.shared / self.documents

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.shared} of {self.documents} documents of suite task {self.suite_task} share "
            f"{_LENGTH} words in a row with what expert {self.expert} is trained on "
            f"({self.exact} are the same input), such as {self.example!r}"
        )


def find_overlaps(pool: Sequence[TaskData], suite: Sequence[TaskData]) -> list[Overlap]:
    """Every overlap between a pool's training data and a suite; kept in the cache."""
    tables = {data.name: evaluation_table(data).select(["text", "input"]) for data in suite}
    tables_id = [[name, *_digest(table)] for name, table in tables.items()]
    found: list[Overlap] = []
    index: SuiteIndex | None = None
    experts = [data for data in pool if data.counts["train"]]
    for data in tqdm(experts, desc="overlap", unit="task", disable=None, delay=2, leave=False):
        key = json.dumps([_VERSION, tables_id, data.fingerprint])
        path = cache_dir() / "overlap" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            index = index or SuiteIndex(tables)
            batches = read_batches(data.train, ["text", "input"])
            _write(path, index.overlaps(data.name, batches))
        found += [Overlap(**{**row, "expert": data.name}) for row in json.loads(path.read_bytes())]
    return found


class SuiteIndex:
    """The documents of a suite, by the hashes of what they hold.

    Args:
        tables: by suite task, its documents' columns `text` and `input`, see
            `harness.tasks.records`.
    """

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self._tasks = [_Task(name, table) for name, table in tables.items()]
        self._hashes = np.unique(np.concatenate([task.hashes for task in self._tasks]))
        self._table = np.zeros(2**_TABLE_BITS, dtype=bool)
        self._table[_place(self._hashes)] = True
        self._inputs = {key for task in self._tasks for key in task.inputs}

    def overlaps(self, expert: str, batches: Iterable[pa.RecordBatch]) -> list[Overlap]:
        """What an expert's training examples, batch by batch, have in common with each task."""
        hit = np.zeros(len(self._hashes), dtype=bool)
        inputs: set[bytes] = set()
        for batch in batches:
            texts, prompts = (batch.column(name).to_pylist() for name in ("text", "input"))
            inputs |= self._inputs.intersection(map(_key, prompts))
            # Prompt and text: wording around a document stands on this side only, and harms not.
            hashes, _ = windows([*prompts, *filter(None, texts)])
            hashes = hashes[self._table[_place(hashes)]]
            if len(self._hashes):
                places = np.searchsorted(self._hashes, hashes)
                places[places == len(self._hashes)] = 0
                hit[places[self._hashes[places] == hashes]] = True
        found = [task.overlap(expert, self._hashes[hit], inputs) for task in self._tasks]
        return [overlap for overlap in found if overlap.shared]


class _Task:
    """The distinct documents of one suite task."""

    def __init__(self, name: str, table: pa.Table) -> None:
        self.name = name
        by_text: dict[str, int] = {}
        self.inputs: dict[bytes, int] = {}  # which document a prompt is of
        for text, prompt in zip(*(table[c].to_pylist() for c in ("text", "input")), strict=True):
            document = by_text.setdefault(text or prompt, len(by_text))
            self.inputs.setdefault(_key(prompt), document)
        self.texts = list(by_text)
        hashes, documents = windows(self.texts)
        pairs = np.unique(np.stack([hashes, documents.astype(np.uint64)], axis=1), axis=0)
        distinct, counts = np.unique(pairs[:, 0], return_counts=True)
        most = max(_WORDING_SHARE * len(self.texts), _WORDING_DOCUMENTS)
        kept = np.isin(pairs[:, 0], distinct[counts <= most])
        self.hashes, self._documents = pairs[kept, 0], pairs[kept, 1].astype(int)

    def overlap(self, expert: str, hit: np.ndarray, inputs: set[bytes]) -> Overlap:
        """What is common, given the hashes and the prompts that were seen in training data."""
        exact = {document for key, document in self.inputs.items() if key in inputs}
        shared = exact | set(self._documents[np.isin(self.hashes, hit)].tolist())
        example = " ".join(self.texts[min(shared)].split())[:80] if shared else ""
        return Overlap(self.name, expert, len(self.texts), len(exact), len(shared), example)


def windows(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of 64 bits for each 8-word window of each text, and which text it is of.

    The same in every process. A word's hash is that of its bytes as a polynomial, all of them read
    off the prefix sums of one long text; a window's is that of its words.
    """
    hashes, documents = [], []
    for first, part in _parts(texts):
        words, document = _words(part)
        count = len(words) - _LENGTH + 1
        if count < 1:
            continue
        rolling = np.zeros(count, dtype=np.uint64)
        for place in range(_LENGTH):
            rolling *= _BASE
            rolling += words[place : place + count]
        whole = document[:count] == document[_LENGTH - 1 :]
        hashes.append(rolling[whole])
        documents.append(first + document[:count][whole])
    if not hashes:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    return np.concatenate(hashes), np.concatenate(documents)


def _parts(texts: Sequence[str]) -> Iterator[tuple[int, list[bytes]]]:
    """The texts in groups of about a megabyte, each with the number of its first; words apart."""
    part: list[bytes] = []
    size = first = 0
    for number, text in enumerate(texts):
        lower = text.lower()
        # In ASCII the bytes tell words apart; elsewhere, what is no word is taken out here.
        encoded = (lower if lower.isascii() else _NO_WORD.sub(" ", lower)).encode()
        part.append(encoded)
        size += len(encoded) + 1
        if size > 2**20:
            yield first, part
            part, size, first = [], 0, number + 1
    if part:
        yield first, part


def _words(part: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A hash for each word, and which of the texts it is of."""
    data = np.frombuffer(b" " + b" ".join(part) + b" ", dtype=np.uint8)
    borders = np.diff(_IS_WORD[data].view(np.int8))
    starts, ends = (np.flatnonzero(borders == sign) + 1 for sign in (1, -1))
    powers, inverses = _powers(len(data))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * powers[: len(data)], out=prefix[1:])
    words = (prefix[ends] - prefix[starts]) * inverses[starts]
    words ^= words >> np.uint64(29)  # so that all bits depend on all bytes
    words *= _BASE
    words ^= words >> np.uint64(32)
    offsets = np.cumsum([1, *(len(text) + 1 for text in part)])
    return words, np.searchsorted(offsets, starts, side="right") - 1


@lru_cache(maxsize=1)
def _powers_up_to(count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        return (
            np.multiply.accumulate(np.full(count, _BASE)),
            np.multiply.accumulate(np.full(count, _INVERSE)),
        )


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the polynomial's base modulo 2**64, and their inverses."""
    return _powers_up_to(max(2**21, 1 << count.bit_length()))


def _place(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _key(prompt: str) -> bytes:
    return hashlib.blake2b(normal(prompt).encode(), digest_size=8).digest()


def _digest(table: pa.Table) -> Iterator[str]:
    """What identifies a column's texts."""
    for name in table.column_names:
        digest = hashlib.sha256()
        for text in table[name].to_pylist():
            digest.update(f"{len(text)}:{text}".encode())
        yield digest.hexdigest()


def _write(path: Path, overlaps: Sequence[Overlap]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(overlap) for overlap in overlaps]))
    temporary.replace(path)
