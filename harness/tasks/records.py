"""The one record type of every task, and its split."""

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
        document: what identifies the example within its task, see `document_id`.
        input: the whole prompt; the target or a choice follows it with nothing in between.
        targets: the accepted answers; the first is the one trained on.
        choices: the answers to choose from; empty where the answer is generated.
        correct: indices of the right choices, at least one where there are choices.
        grades: how much BIG-bench gives for each choice; empty elsewhere.
        text: the example's own words, without what a template puts around them; empty where that
            is all of the input.
        cluster: what the source says that it shares with other examples, such as the row that it
            is made of; empty if nothing. See `harness.tasks.clusters`.
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
    """Which split an example belongs to: one fifth is for evaluation, chosen by a stable hash.

    Inputs that differ only in case and spacing fall into the same split.
    """
    return "evaluation" if int(_digest(task, text)[-8:], 16) % 5 == 0 else "train"


def document_id(task: str, text: str) -> str:
    """A stable name for an example: 16 hexadecimal digits of a hash.

    Inputs that differ only in case and spacing have the same one.
    """
    return _digest(task, text)[:16]


def named(record: Record) -> Record:
    """The record with its document, a hash of prompt, choices and answers.

    Prompts alone do not tell examples apart: the question may stand in choices that the prompt does
    not show, and one prompt may have several answers, an example each. The order of choices tells
    nothing.
    """
    return replace(record, document=document_id(record.task, identity_text(record)))


def identity_text(record: Record) -> str:
    """What tells examples of a task apart."""
    return "\n".join([record.input, *sorted(record.choices), *sorted(record.targets)])


def normal(text: str) -> str:
    """A text without its case and spacing."""
    return " ".join(text.lower().split())


def check_record(record: Record, where: str) -> None:
    """Check what every record must have.

    Args:
        record: the record.
        where: its place in the source, such as `x.jsonl, line 3`.

    Raises:
        PhatgooseError: an empty answer, no right choice, or one that is no index.
    """
    for value in (record.input, record.text, *record.targets, *record.choices):
        if not _is_whole(value):
            raise PhatgooseError(
                f"{where}: a text holds half a character (a lone surrogate), which no tokenizer "
                "reads: fix it or leave the example out"
            )
    if record.choices and not record.correct:
        raise PhatgooseError(
            f"{where}: none of the choices is right: mend it or leave the example out"
        )
    if not record.targets or not all(target.strip() for target in record.targets):
        raise PhatgooseError(f"{where}: the target is empty: mend it or leave the example out")
    if not all(choice.strip() for choice in record.choices):
        raise PhatgooseError(f"{where}: a choice is empty: mend it or leave the example out")
    if not all(0 <= index < len(record.choices) for index in record.correct):
        raise PhatgooseError(
            f"{where}: the right choice {record.correct} is no index into the "
            f"{len(record.choices)} choices"
        )
    if record.grades and len(record.grades) != len(record.choices):
        raise PhatgooseError(
            f"{where}: {len(record.grades)} grades for {len(record.choices)} choices"
        )


def _is_whole(text: str) -> bool:
    """Whether UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(task: str, text: str) -> str:
    # What UTF-8 cannot hold is refused by `check_record`, which names the place.
    content = f"{task}\n{normal(text)}".encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()
