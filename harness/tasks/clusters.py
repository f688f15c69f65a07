"""Group the documents of a task that are not independent of each other.

Documents belong to one cluster if they share

    a source row   given by the source: all prompts of one row of P3, or a user's column `cluster`
    a prompt       with different choices or answers
    a passage      a line of at least 100 characters of the document's own text
    a template     the same text except for numbers, at least 20 characters

Text that more than half of a task's documents share is the task's wording and does not form a
cluster. A kind of sharing that would chain more than half of the documents into one cluster is
ignored too.

Intervals resample clusters: questions about one passage vary less than questions about several, and
an interval over single documents would be too narrow (Miller, arXiv 2411.00640).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.tasks.records import normal

_KINDS = ("row", "prompt", "template", "passage")
_PASSAGE_CHARACTERS = 100
_TEMPLATE_CHARACTERS = 20
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def clusters(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cluster of each document, named by the id of the cluster's first document.

    Args:
        rows: records of one task, as dictionaries.
    """
    sharing: dict[str, dict[str, list[int]]] = {kind: {} for kind in _KINDS}
    for place, row in enumerate(rows):
        for kind, shared in {*_shared(row)}:
            sharing[kind].setdefault(shared, []).append(place)
    most = max(2, len(rows) // 2)
    first = list(range(len(rows)))
    for kind in _KINDS:
        joined = list(first)
        for places in sharing[kind].values():
            if kind == "row" or len(places) <= most:
                for place in places[1:]:
                    a, b = sorted((_root(joined, places[0]), _root(joined, place)))
                    joined[b] = a
        joined = [_root(joined, place) for place in range(len(rows))]
        if kind == "row" or max(Counter(joined).values(), default=0) <= most:
            first = joined
    return [str(rows[place]["document"]) for place in first]


def _root(first: list[int], place: int) -> int:
    """Return the first document of a document's cluster."""
    while first[place] != place:
        first[place] = first[first[place]]
        place = first[place]
    return place


def _shared(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a document may share with others, as pairs of kind and text."""
    if row["cluster"]:
        yield "row", row["cluster"]
    prompt = normal(row["input"])
    if prompt:
        yield "prompt", prompt
    for line in (row["text"] or row["input"]).splitlines():
        passage = normal(line)
        if len(passage) >= _PASSAGE_CHARACTERS:
            yield "passage", passage
    template = _NUMBER.sub("#", normal(row["text"] or row["input"]))
    if "#" in template and len(template) >= _TEMPLATE_CHARACTERS:
        yield "template", template
