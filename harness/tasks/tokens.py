"""Tokenize a task's examples once per tokenizer, and map them from disk.

    <cache>/tokens/<key>.arrow    columns context, target: lists of int32; one row per example

The key is a hash of the examples, the tokenizer, the length limits (of the recipe and the base),
and the code that makes the tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import pyarrow as pa

from harness.source_code import code_of, digest
from harness.tasks.records import Split
from harness.tasks.store import read_batches
from phatgoose.base import Base
from phatgoose.cache import cache_dir
from phatgoose.files import replacing
from phatgoose.question import Question
from phatgoose.tokenization import encode_pairs, max_length
from phatgoose.training.recipe import Recipe

if TYPE_CHECKING:
    from harness.tasks import TaskData

_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("context", "target")])


class TokenizedExamples(Sequence[Question]):
    """A sequence of tokenized examples, read from disk on access.

    Args:
        table: a table with the columns above.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedExamples": ...
    def __getitem__(self, index: int | slice) -> "Question | TokenizedExamples":
        """Return one example, or a slice of them without a copy."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return TokenizedExamples(self._table.slice(start, max(0, stop - start)))
        index = range(len(self))[index]  # negative ones count from the end
        context, target = (self._table[name][index].as_py() for name in ("context", "target"))
        return Question(context, [target])


def tokenize(
    base: Base,
    data: "TaskData",
    split: Split,
    recipe: Recipe,
    beat: Callable[[], None] = lambda: None,
) -> TokenizedExamples:
    """Return the examples of one split as token ids, truncated as the recipe says.

    They are created if they are not in the cache. Only the first target of an example is used. The
    texts are read in batches of a few thousand, and `beat` is called after each batch.

    Raises:
        PhatgooseError: a target has no token except the end token.
    """
    limits = recipe.max_input_tokens, recipe.max_target_tokens
    lengths = [*limits, max_length(base)]
    code = digest(code_of([__name__]))
    made_from = [code, data.fingerprint, split, _tokenizer(base), lengths]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    path = cache_dir() / "tokens" / f"{key}.arrow"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as temporary,
            pa.ipc.new_file(str(temporary), _SCHEMA) as writer,
        ):
            for batch in _encoded(base, data, split, *limits):
                writer.write_batch(batch)
                beat()
    return TokenizedExamples(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def _encoded(
    base: Base, data: "TaskData", split: Split, max_input: int | None, max_target: int | None
) -> Iterator[pa.RecordBatch]:
    folder = data.train if split == "train" else data.evaluation
    for batch in read_batches(folder, ["document", "input", "targets"]):
        rows = batch.to_pylist()
        pairs = [(row["input"], row["targets"][0]) for row in rows]
        names = [f"task {data.name}, document {row['document']}" for row in rows]
        encoded = encode_pairs(base, pairs, max_input, max_target, names)
        columns = [pa.array(ids, pa.list_(pa.int32())) for ids in zip(*encoded, strict=True)]
        yield pa.record_batch(columns, schema=_SCHEMA)


def _tokenizer(base: Base) -> str:
    """Return an id of how a base encodes text. Bases with the same tokenizer share tokens."""
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else base.fingerprint
    ends = [base.tokenizer.bos_token_id, base.tokenizer.eos_token_id, base.is_encoder_decoder]
    return hashlib.sha256(json.dumps([whole, ends]).encode()).hexdigest()
