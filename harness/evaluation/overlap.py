"""Find the overlap of a suite with the experts' training data: inputs, and 8-word sequences.

    suite documents ──► hashes of their 8-word windows, sorted ─┐
    training data, a batch at a time ──► hashes of theirs ──────┴─► which documents are hit

Words are runs of letters, digits and `_`, in lower case. What separates them does not matter.
Inputs are the same if they differ only in case and spacing. Other signs count, because they may be
the only difference between short inputs (`3 + 4`, `3 - 4`; brackets; emoji). Inputs without a word
are not compared.

A sequence in more than 1 % of a suite task's documents, and in more than 5 of them, is the task's
wording and does not count. The share excludes the sentences that many BIG-bench tasks repeat in
every input, or in each of a dozen kinds of input. The number is for small tasks, where one document
is more than 1 % and a few documents may have the same subject. As a consequence, a passage that a
small task asks more than 5 questions about does not count. There, only the questions and the same
inputs count.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from harness.source_code import code_of, digest
from harness.tasks import TaskData
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.records import normal
from harness.tasks.store import read_batches
from phatgoose.cache import cache_dir
from phatgoose.files import replacing

_LENGTH = 8
# A sequence in more than this share and this number of a task's documents is its wording.
_WORDING_SHARE, _WORDING_DOCUMENTS = 0.01, 5
# The first table is indexed by a hash's first bits: 16 places per hash, and at most 128 MiB.
_PLACES, _FEWEST_BITS, _MOST_BITS = 16, 16, 27
# The approximate number of characters hashed at once, so that their arrays fit a core's cache.
_PART = 2**17
_WORD, _NO_WORD = re.compile(r"\w"), re.compile(r"\W+")
# An odd number, and its inverse modulo 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_NO_HASHES, _NO_DOCUMENTS = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Overlap:
    """The overlap of a suite task with an expert's training data.

    Attributes:
        suite_task, expert: their names.
        documents: the number of documents of the suite task with distinct texts.
        exact: the number of them whose input, prompt included, is a training input.
        shared: the number of them that share an input or an 8-word sequence with training data.
        example: the beginning of a shared document.
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
        """Return one line for people."""
        return (
            f"{self.shared} of {self.documents} documents of suite task {self.suite_task} share "
            f"{_LENGTH} words in a row with what expert {self.expert} is trained on "
            f"({self.exact} are the same input), such as {self.example!r}"
        )


def find_overlaps(pool: Sequence[TaskData], suite: Sequence[TaskData]) -> list[Overlap]:
    """Find every overlap of a pool's training data with a suite; results are cached."""
    tables = _tables(suite)
    found: list[Overlap] = []
    index: SuiteIndex | None = None
    files = _files(pool, tables)
    bar = tqdm(files, desc="overlap", unit="task", disable=None, delay=2, leave=False)
    for data, path in bar:
        if not path.exists():
            index = index or SuiteIndex(tables)
            batches = read_batches(data.train, ["text", "input"])
            _write(path, index.overlaps(data.name, batches))
        found += [Overlap(**{**row, "expert": data.name}) for row in json.loads(path.read_bytes())]
    return found


def not_compared(pool: Sequence[TaskData], suite: Sequence[TaskData]) -> list[TaskData]:
    """Return the pool's tasks for which `find_overlaps` would read the training data."""
    return [data for data, path in _files(pool, _tables(suite)) if not path.exists()]


def _tables(suite: Sequence[TaskData]) -> dict[str, pa.Table]:
    return {data.name: evaluation_table(data).select(["text", "input"]) for data in suite}


def _files(pool: Sequence[TaskData], tables: Mapping[str, pa.Table]) -> list[tuple[TaskData, Path]]:
    """Return the file in the cache for each task that has training data."""
    tables_id = [[name, *_digest(table)] for name, table in tables.items()]
    code = digest(code_of([__name__]))
    found = []
    for data in pool:
        if data.counts["train"]:
            key = json.dumps([code, tables_id, data.fingerprint]).encode()
            name = f"{hashlib.sha256(key).hexdigest()[:16]}.json"
            found.append((data, cache_dir() / "overlap" / name))
    return found


class SuiteIndex:
    """An index of a suite's documents, by the hashes of their inputs and sequences.

    Args:
        tables: by suite task, the columns `text` and `input` of its documents, see
            `harness.tasks.records`.
    """

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self._tasks = [_TaskIndex(name, table) for name, table in tables.items()]
        hashes = [task.hashes for task in self._tasks]
        self._hashes = np.unique(np.concatenate([_NO_HASHES, *hashes]))
        self._places = [np.searchsorted(self._hashes, of_task) for of_task in hashes]
        bits = (_PLACES * len(self._hashes)).bit_length()
        bits = max(_FEWEST_BITS, min(bits, _MOST_BITS))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, dtype=bool)
        self._table[self._hashes >> self._shift] = True
        self._inputs = {key for task in self._tasks for key in task.inputs}

    def overlaps(self, expert: str, batches: Iterable[pa.RecordBatch]) -> list[Overlap]:
        """Return the overlap of an expert's training examples, in batches, with each task."""
        hit = np.zeros(len(self._hashes), dtype=bool)
        inputs: set[bytes] = set()
        for batch in batches:
            texts, prompts = (batch.column(name).to_pylist() for name in ("text", "input"))
            inputs |= self._inputs.intersection(map(_key, prompts))
            # Prompt and text: wording around a document is on this side only, so it does no harm.
            for hashes, _ in _windows(chain(prompts, filter(None, texts))):
                hashes = hashes[self._table[hashes >> self._shift]]
                if len(hashes):
                    places = np.searchsorted(self._hashes, hashes)
                    places[places == len(self._hashes)] = 0
                    hit[places[self._hashes[places] == hashes]] = True
        found = [
            task.overlap(expert, hit[places], inputs)
            for task, places in zip(self._tasks, self._places, strict=True)
        ]
        return [overlap for overlap in found if overlap.shared]


class _TaskIndex:
    """The distinct documents of one suite task.

    `hashes` and `documents` are pairs: a sequence that counts, and a document that contains it.
    """

    def __init__(self, name: str, table: pa.Table) -> None:
        self.name = name
        by_text: dict[str, int] = {}
        self.inputs: dict[bytes, set[int]] = {}  # which documents have a prompt
        for text, prompt in zip(*(table[c].to_pylist() for c in ("text", "input")), strict=True):
            document = by_text.setdefault(text or prompt, len(by_text))
            key = _key(prompt)
            if key is not None:
                self.inputs.setdefault(key, set()).add(document)
        self.texts = list(by_text)
        hashes, documents = windows(self.texts)
        order = np.argsort(hashes, kind="stable")  # documents of the same hash stay in order
        hashes, documents = hashes[order], documents[order]
        first = np.ones(len(hashes), dtype=bool)
        first[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
        hashes, documents = hashes[first], documents[first]
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        kept = counts[which] <= max(_WORDING_SHARE * len(self.texts), _WORDING_DOCUMENTS)
        self.hashes, self.documents = hashes[kept], documents[kept]

    def overlap(self, expert: str, hit: np.ndarray, inputs: set[bytes]) -> Overlap:
        """Return the overlap, given the hashes and the prompts seen in training data."""
        exact = set().union(*(self.inputs[key] for key in self.inputs.keys() & inputs))
        shared = exact | set(np.unique(self.documents[hit]).tolist())
        example = " ".join(self.texts[min(shared)].split())[:80] if shared else ""
        return Overlap(self.name, expert, len(self.texts), len(exact), len(shared), example)


def windows(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a 64-bit hash for each 8-word window of each text, and the number of its text.

    Hashes are the same in every process. A word's hash is a polynomial of its characters, computed
    for all words from the prefix sums of one long text. A window's is a polynomial of its words.
    """
    found = [(_NO_HASHES, _NO_DOCUMENTS), *_windows(texts)]
    return np.concatenate([h for h, _ in found]), np.concatenate([d for _, d in found])


def _windows(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what `windows` returns, a part at a time."""
    words, documents = _NO_HASHES, _NO_DOCUMENTS
    for part in _parts(texts):
        new, of = _words(part)
        # A text may continue from the previous part, whose last words begin windows that end here.
        words = np.concatenate([words[1 - _LENGTH :], new])
        documents = np.concatenate([documents[1 - _LENGTH :], of])
        count = len(words) - _LENGTH + 1
        if count < 1:
            continue
        rolling = np.zeros(count, dtype=np.uint64)
        for place in range(_LENGTH):
            rolling *= _BASE
            rolling += words[place : place + count]
        whole = documents[:count] == documents[_LENGTH - 1 :]
        yield rolling[whole], documents[:count][whole]


def _parts(texts: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield the texts in lower case with their numbers, in parts of about equal size.

    Long texts are cut into pieces.
    """
    part: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in _pieces(text.lower()):
            part.append((number, piece))
            size += len(piece) + 1
            if size > _PART:
                yield part
                part, size = [], 0
    if part:
        yield part


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of limited length, cut between words."""
    start = 0
    while len(text) - start > _PART:
        border = _NO_WORD.search(text, start + _PART)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.end()
    yield text[start:]


def _words(part: list[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash for each word, and the number of its text."""
    together = f" {' '.join(text for _, text in part)} "
    data = np.frombuffer(together.encode("utf-32-le"), dtype=np.uint32)
    borders = np.diff(_is_word()[data].view(np.int8))
    starts, ends = (np.flatnonzero(borders == sign) + 1 for sign in (1, -1))
    powers, inverses = _powers(len(data))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * powers[: len(data)], out=prefix[1:])
    words = (prefix[ends] - prefix[starts]) * inverses[starts]
    words ^= words >> np.uint64(29)  # so that all bits depend on all characters
    words *= _BASE
    words ^= words >> np.uint64(32)
    offsets = np.cumsum([1, *(len(text) + 1 for _, text in part)])
    numbers = np.array([number for number, _ in part], dtype=np.int64)
    return words, numbers[np.searchsorted(offsets, starts, side="right") - 1]


@lru_cache
def _is_word() -> np.ndarray:
    r"""Return, for every character, whether `\w` matches it: a letter, a digit or `_`."""
    characters = map(chr, range(sys.maxunicode + 1))
    return np.array([character.isalnum() or character == "_" for character in characters])


@lru_cache(maxsize=1)
def _powers_up_to(count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        return (
            np.multiply.accumulate(np.full(count, _BASE)),
            np.multiply.accumulate(np.full(count, _INVERSE)),
        )


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the polynomial's base modulo 2**64, and their inverses."""
    return _powers_up_to(max(2 * _PART, 1 << count.bit_length()))


def _key(prompt: str) -> bytes | None:
    """Return a key that is the same for the same inputs; None for an input without a word."""
    if _WORD.search(prompt) is None:
        return None
    return hashlib.blake2b(normal(prompt).encode(), digest_size=8).digest()


def _digest(table: pa.Table) -> Iterator[str]:
    """Yield a digest of each column's texts."""
    for name in table.column_names:
        digest = hashlib.sha256()
        for text in table[name].to_pylist():
            digest.update(f"{len(text)}:{text}".encode())
        yield digest.hexdigest()


def _write(path: Path, overlaps: Sequence[Overlap]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:  # another run may write the same file
        temporary.write_text(json.dumps([asdict(overlap) for overlap in overlaps]))
