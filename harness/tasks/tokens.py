"""A task's examples as token ids: made once per tokenizer, mapped from disk.

    <cache>/tokens/<key>.arrow    columns context, target: lists of int32; a row per example

The key is the hash of the examples, the tokenizer, the lengths they are cut to (the recipe's and
the base's), and the code that makes them.
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


class TokenisedExamples(Sequence[Question]):
    """Examples of one split, or a part of them; only what is looked at is read from disk.

    Args:
        table: a table with the columns above.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenisedExamples": ...
    def __getitem__(self, index: int | slice) -> "Question | TokenisedExamples":
        """One example, or a part of them, which is not copied."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return TokenisedExamples(self._table.slice(start, max(0, stop - start)))
        index = range(len(self))[index]  # negative ones count from the end
        context, target = (self._table[name][index].as_py() for name in ("context", "target"))
        return Question(context, [target])


def tokenise(
    base: Base,
    data: "TaskData",
    split: Split,
    recipe: Recipe,
    beat: Callable[[], None] = lambda: None,
) -> TokenisedExamples:
    """The examples of one split as token ids, cut as the recipe says; made if they are not there.

    Each counts with its first target, which is the one trained on. The texts are read a few
    thousand at a time, and `beat` is called after each time.

    Raises:
        PhatgooseError: a target has no token besides the end.
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
    return TokenisedExamples(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


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
    """What identifies how a base encodes: bases that share a tokenizer share tokens."""
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else base.fingerprint
    ends = [base.tokenizer.bos_token_id, base.tokenizer.eos_token_id, base.is_encoder_decoder]
    return hashlib.sha256(json.dumps([whole, ends]).encode()).hexdigest()
