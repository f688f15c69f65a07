"""How much of a suite stands in the experts' training data: exact inputs, and 8-word sequences.

    suite documents ──► hashes of their 8-word windows, sorted ─┐
    training data, a batch at a time ──► hashes of theirs ──────┴─► which documents are hit

Words are runs of letters, digits and `_`, in lower case; what stands between them does not matter.
Inputs are the same if they differ in case and spacing only: where they are short, signs may be all
that tells them apart (`3 + 4`, `3 - 4`; brackets; emoji). Those without a word are not compared.

A sequence in more than 1 % of a suite task's documents, and in more than 5 of them, is the task's
wording and no document's: it does not count. Many BIG-bench tasks repeat a sentence in every input,
or in each of a dozen kinds of input, which the share catches. The number is for small tasks, where
one document is more than 1 %: a few may well be about one thing. What is lost is a passage that a
small task asks more than 5 questions about: there, only the questions and the same inputs count.
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
# A sequence in more than this share of a task's documents, and more than so many, is its wording.
_WORDING_SHARE, _WORDING_DOCUMENTS = 0.01, 5
# A first table is indexed by a hash's first bits: so many places a hash, and at most 128 MiB.
_PLACES, _FEWEST_BITS, _MOST_BITS = 16, 16, 27
# About so many characters are hashed at once: what is made of them fits a core's cache.
_PART = 2**17
_WORD, _NO_WORD = re.compile(r"\w"), re.compile(r"\W+")
# An odd number, and its inverse modulo 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_NO_HASHES, _NO_DOCUMENTS = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)


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
        key = json.dumps([digest(code_of([__name__])), tables_id, data.fingerprint])
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
        """What an expert's training examples, batch by batch, have in common with each task."""
        hit = np.zeros(len(self._hashes), dtype=bool)
        inputs: set[bytes] = set()
        for batch in batches:
            texts, prompts = (batch.column(name).to_pylist() for name in ("text", "input"))
            inputs |= self._inputs.intersection(map(_key, prompts))
            # Prompt and text: wording around a document stands on this side only, and harms not.
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

    `hashes` and `documents` are pairs: a sequence that counts, and a document that holds it.
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
        order = np.argsort(hashes, kind="stable")  # of one hash, documents stay in order
        hashes, documents = hashes[order], documents[order]
        first = np.ones(len(hashes), dtype=bool)
        first[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
        hashes, documents = hashes[first], documents[first]
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        kept = counts[which] <= max(_WORDING_SHARE * len(self.texts), _WORDING_DOCUMENTS)
        self.hashes, self.documents = hashes[kept], documents[kept]

    def overlap(self, expert: str, hit: np.ndarray, inputs: set[bytes]) -> Overlap:
        """What is common, given which hashes and which prompts were seen in training data."""
        exact = set().union(*(self.inputs[key] for key in self.inputs.keys() & inputs))
        shared = exact | set(np.unique(self.documents[hit]).tolist())
        example = " ".join(self.texts[min(shared)].split())[:80] if shared else ""
        return Overlap(self.name, expert, len(self.texts), len(exact), len(shared), example)


def windows(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of 64 bits for each 8-word window of each text, and which text it is of.

    The same in every process. A word's hash is that of its characters as a polynomial, all
    of them read off the prefix sums of one long text; a window's is that of its words.
    """
    found = [(_NO_HASHES, _NO_DOCUMENTS), *_windows(texts)]
    return np.concatenate([h for h, _ in found]), np.concatenate([d for _, d in found])


def _windows(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `windows`, a part at a time."""
    words, documents = _NO_HASHES, _NO_DOCUMENTS
    for part in _parts(texts):
        new, of = _words(part)
        # A text may go on from the part before: its last words begin windows that end here.
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
    """The texts in lower case with their numbers, about as much at a time; long ones in pieces."""
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
    """A text, cut between words wherever it gets too long."""
    start = 0
    while len(text) - start > _PART:
        border = _NO_WORD.search(text, start + _PART)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.end()
    yield text[start:]


def _words(part: list[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """A hash for each word, and the number of the text it is of."""
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
    r"""Of every character, whether it is a letter, a digit or `_`, as `\w` has it."""
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
    """The powers of the polynomial's base modulo 2**64, and their inverses."""
    return _powers_up_to(max(2 * _PART, 1 << count.bit_length()))


def _key(prompt: str) -> bytes | None:
    """What two same inputs have in common; None for one without a word."""
    if _WORD.search(prompt) is None:
        return None
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
    with replacing(path) as temporary:  # another run may write it too
        temporary.write_text(json.dumps([asdict(overlap) for overlap in overlaps]))
