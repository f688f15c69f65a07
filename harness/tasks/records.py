"""The record type that all tasks share, and the split into training and evaluation."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import pyarrow as pa

from phatgoose.errors import PhatgooseError

Split = Literal["train", "evaluation"]
Kind = Literal["multiple_choice", "generation"]

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("targets", pa.list_(pa.string()), nullable=False),
        pa.field("choices", pa.list_(pa.string()), nullable=False),
        pa.field("correct", pa.list_(pa.int64()), nullable=False),
        pa.field("grades", pa.list_(pa.float64()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Record:
    """One example of a task.

    Attributes:
        task: the task's name.
        document: id of the example within its task, see `document_id`.
        input: the complete prompt; the target or a choice follows it with nothing in between.
        targets: the accepted answers; the first is the one trained on.
        choices: the answers to choose from; empty where the answer is generated.
        correct: indices of the correct choices; at least one if there are choices.
        grades: BIG-bench's grade of each choice; empty for other sources.
        text: the example's own text without its template; empty if it is all of the input.
        cluster: name of what the example shares with others according to the source, such as the
            row it was made from; empty if nothing. See `harness.tasks.clusters`.
    """

    task: str
    document: str
    input: str
    targets: list[str]
    choices: list[str]
    correct: list[int]
    grades: list[float] = field(default_factory=list)
    text: str = ""
    cluster: str = ""


def split_of(task: str, text: str) -> Split:
    """Return the split of an example. A stable hash assigns one fifth to evaluation.

    Inputs that differ only in case and spacing fall into the same split.
    """
    return "evaluation" if int(_digest(task, text)[-8:], 16) % 5 == 0 else "train"


def document_id(task: str, text: str) -> str:
    """Return a stable id for an example: 16 hexadecimal digits of a hash.

    Inputs that differ only in case and spacing have the same id.
    """
    return _digest(task, text)[:16]


def named(record: Record) -> Record:
    """Return the record with its document id, a hash of prompt, choices and answers.

    The prompt alone does not identify an example: the question may be in choices that the prompt
    does not show, and one prompt may have several answers, each a separate example. The order of
    the choices does not matter.
    """
    return replace(record, document=document_id(record.task, identity_text(record)))


def identity_text(record: Record) -> str:
    """Return the text that identifies an example within its task."""
    return "\n".join([record.input, *sorted(record.choices), *sorted(record.targets)])


def normal(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return " ".join(text.lower().split())


def check_record(record: Record, where: str) -> None:
    """Check that a record is complete and consistent.

    Args:
        record: the record.
        where: its place in the source, such as `x.jsonl, line 3`.

    Raises:
        PhatgooseError: an answer is empty, no choice is correct, or an index is out of range.
    """
    for value in (record.input, record.text, *record.targets, *record.choices):
        if not _is_whole(value):
            raise PhatgooseError(
                f"{where}: a text contains a lone surrogate (half a character), and no tokenizer "
                "accepts it. Fix it, or remove the example."
            )
    if record.choices and not record.correct:
        raise PhatgooseError(
            f"{where}: none of the choices is correct. Fix it, or remove the example."
        )
    if not record.targets or not all(target.strip() for target in record.targets):
        raise PhatgooseError(f"{where}: the target is empty. Fix it, or remove the example.")
    if not all(choice.strip() for choice in record.choices):
        raise PhatgooseError(f"{where}: a choice is empty. Fix it, or remove the example.")
    if not all(0 <= index < len(record.choices) for index in record.correct):
        raise PhatgooseError(
            f"{where}: the correct choice {record.correct} is not an index into the "
            f"{len(record.choices)} choices"
        )
    if record.grades and len(record.grades) != len(record.choices):
        raise PhatgooseError(
            f"{where}: {len(record.grades)} grades for {len(record.choices)} choices"
        )


def _is_whole(text: str) -> bool:
    """Return whether UTF-8 can encode a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(task: str, text: str) -> str:
    # `check_record` rejects text that UTF-8 cannot encode, and names the place.
    content = f"{task}\n{normal(text)}".encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()
