"""Rows of token ids in which a decoder-only base reads questions.

Shape suffixes: B rows, L positions, P places of target tokens, V vocabulary, D features.

Where a base can share a context, a row is a tree: tokens that begin several sequences alike are
read once. A token sees those that lead to it, at the positions they would have alone, so the
numbers are those of separate rows. A tree is written in depth-first order, so what a token leads to
ends at one column: column j is seen from j up to there.

    questions  c0 c1 c2 with the choices a and b, and c0 c1 d2 d3 with the choice e
    row        c0 c1 | c2 | a0 a1 | b0 b1 | d2 d3 | e0
    positions   0  1    2    3  4    3  4    2  3    4
    ends       10 10    7    5  5    7  7   10 10   10
    a0 is predicted at c2, a1 at a0, ...; b0 is predicted at c2 too

A sliding window of 3 hides from b1, at position 4, what is before position 2. Any other base reads
a row for each choice, under its own masks.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.architecture import architecture_of
from phatgoose.errors import reason_of

# Relative differences of logits up to this may be rounding in float32.
_ROUNDING = 5e-5
# Attention to so many positions takes as long as the rest of the model (measured on a CPU, for a
# width of 576; the wider a model, the more it is).
_POSITIONS = 3000
# So many capacities of rows are compared.
_CAPACITIES = 64
# A context, and its choices, which end with end-of-sequence.
Ids = tuple[list[int], list[list[int]]]


@dataclass
class Rows:
    """What one pass reads.

    Attributes:
        inputs: arguments of the model.
        counted_BL: for how many questions or choices each token is read, int64 [B, L]: 0 for
            padding, and for tokens that another row counts.
        queries_BL: a question that each token belongs to, int64 [B, L]. Where questions share no
            tokens they ascend, row after row and padding included.
        places: the row and column where each target token is predicted, by question, choice and
            token.
    """

    inputs: dict[str, Any]
    counted_BL: Tensor
    queries_BL: Tensor
    places: list[tuple[int, int]]


def shared_rows(
    model: PreTrainedModel, pad: int, questions: Sequence[Ids], *, across: bool = True
) -> Rows:
    """Return rows in which the choices of a question share its context.

    Args:
        model: the model that reads them.
        pad: the padding token.
        questions: the batch.
        across: whether questions share the beginnings of their contexts as well. If not, each
            token belongs to one question.
    """
    order = list(range(len(questions)))
    if across:
        order.sort(key=lambda place: questions[place][0])
    trees: list[_Tree] = []
    places: list[list[tuple[int, int]]] = [[] for _ in questions]
    for members in _split(questions, order, across=across):
        tree, last = _Tree(), list[int]()
        for place in members:
            context, choices = questions[place]
            kept = _common(context, last) if across else 0
            tree.read(kept, context[kept:], place)
            tree.count(0)
            columns: list[list[int]] = [[] for _ in choices]
            for index, kept in _branches(choices):
                tree.read(len(context) + kept, choices[index][kept:-1], place)
                tree.count(len(context))
                columns[index] = tree.path[len(context) - 1 :]
            places[place] = [(len(trees), column) for found in columns for column in found]
            last = context
        tree.read(0, [], 0)
        trees.append(tree)
    length = max(len(tree.ids) for tree in trees)
    # Padding sees itself: a token that sees nothing is not a number in some implementations.
    ids_BL = _filled([tree.ids for tree in trees], length, pad)
    ends_BL = _filled([tree.ends for tree in trees], length, length)
    positions_BL = _filled([tree.positions for tree in trees], length, 0)
    counted_BL = _filled([tree.counted for tree in trees], length, 0)
    queries_BL = torch.tensor(
        [[*t.queries, *t.queries[-1:] * (length - len(t.ids))] for t in trees]
    )
    device, record = model.device, architecture_of(model.config)
    masks = _masks(model, record.windows(model.config), ends_BL, positions_BL)
    return Rows(
        inputs={
            "input_ids": ids_BL.to(device),
            "attention_mask": masks if record.window == "layer_types" else masks.popitem()[1],
            "position_ids": positions_BL.to(device),
        },
        counted_BL=counted_BL.to(device),
        queries_BL=queries_BL.to(device),
        places=[place for found in places for place in found],
    )


@dataclass
class _Tree:
    """A row that is being written.

    Attributes:
        ids, positions, ends, counted, queries: of each column.
        path: the columns of the tokens that lead to the last one, and its own.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    def read(self, depth: int, ids: Sequence[int], query: int) -> None:
        """Write tokens behind the first `depth` tokens of the path."""
        for column in self.path[depth:]:
            self.ends[column] = len(self.ids)
        first, count = len(self.ids), len(ids)
        self.path[depth:] = range(first, first + count)
        self.ids += ids
        self.positions += range(depth, depth + count)
        self.ends += [0] * count
        self.counted += [0] * count
        self.queries += [query] * count

    def count(self, depth: int) -> None:
        """Count the tokens of the path once more, from this depth on."""
        for column in self.path[depth:]:
            self.counted[column] += 1


def _split(questions: Sequence[Ids], order: Sequence[int], *, across: bool) -> list[list[int]]:
    """Distribute questions over rows, so that reading them takes the least time.

    Short rows leave more padding and share less, long rows need more attention.
    """
    sizes = {
        place: len(context) + sum(len(choices[i]) - 1 - kept for i, kept in _branches(choices))
        for place, (context, choices) in enumerate(questions)
    }
    shared = dict.fromkeys(order, 0)
    if across:
        for before, place in pairwise(order):
            shared[place] = _common(questions[before][0], questions[place][0])

    def fill(capacity: int) -> tuple[float, list[list[int]]]:
        rows, lengths = list[list[int]](), list[int]()
        for place in order:
            if rows and lengths[-1] + sizes[place] - shared[place] <= capacity:
                rows[-1].append(place)
                lengths[-1] += sizes[place] - shared[place]
            else:
                rows.append([place])
                lengths.append(sizes[place])
        return len(rows) * max(lengths) * (1 + max(lengths) / _POSITIONS), rows

    shortest, longest = max(sizes.values()), sum(sizes.values()) - sum(shared.values())
    capacities = range(shortest, longest, max(1, (longest - shortest) // _CAPACITIES))
    return min(map(fill, [*capacities, longest]))[1]


def _branches(choices: Sequence[list[int]]) -> list[tuple[int, int]]:
    """Return the index of each choice in the order of a tree, and how many tokens it shares."""
    order = sorted(range(len(choices)), key=lambda index: choices[index][:-1])
    shared = [_common(choices[a][:-1], choices[b][:-1]) for a, b in pairwise(order)]
    return list(zip(order, [0, *shared], strict=True))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _filled(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def separate_rows(model: PreTrainedModel, pad: int, questions: Sequence[Ids]) -> list[Rows]:
    """Return passes with one row for each choice.

    None has more tokens than one row for each question, with all its choices, would have. A context
    is counted in the row of its first choice only.
    """
    rows = [
        (query, index, context, choice)
        for query, (context, choices) in enumerate(questions)
        for index, choice in enumerate(choices)
    ]
    longest = max(len(context) + len(choice) - 1 for _, _, context, choice in rows)
    most = max(1, len(questions) * max(map(_shared_length, questions)) // longest)
    return [
        _separate_pass(model, pad, rows[start : start + most])
        for start in range(0, len(rows), most)
    ]


def _separate_pass(
    model: PreTrainedModel, pad: int, rows: Sequence[tuple[int, int, list[int], list[int]]]
) -> Rows:
    ids_BL, mask_BL = pad_rows([context + choice[:-1] for _, _, context, choice in rows], pad)
    counted_BL = mask_BL.clone()
    places: list[tuple[int, int]] = []
    for row, (_, index, context, choice) in enumerate(rows):
        if index > 0:
            counted_BL[row, : len(context)] = 0
        first = len(context) - 1
        places += [(row, column) for column in range(first, first + len(choice))]
    device = model.device
    return Rows(
        inputs={"input_ids": ids_BL.to(device), "attention_mask": mask_BL.to(device)},
        counted_BL=counted_BL.to(device),
        queries_BL=torch.tensor([query for query, *_ in rows], device=device)
        .unsqueeze(1)
        .expand(ids_BL.shape),
        places=places,
    )


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Return why choices cannot share a context in this model; None if they can.

    A model whose record does not say so is tested: the logits of choices that share a context are
    compared with those of separate rows, in float32, where rounding does not look like a leak.
    """
    record, config = architecture_of(model.config), model.config
    if record.shares_context:
        kinds = ", ".join(record.windows(config))
        return None if record.masks(config) else f"its layers are of the kinds {kinds}"
    # Short texts do not show what a window, or attention in chunks, hides.
    limits = [k for k, v in config.to_dict().items() if re.search("window|chunk", k) and v]
    if limits:
        return f"its configuration has {', '.join(limits)}, which its record does not say is tested"
    generator = torch.Generator().manual_seed(0)
    weight_VD: Tensor = model.get_input_embeddings().get_parameter("weight")

    def random(length: int) -> list[int]:
        return torch.randint(len(weight_VD), (length,), generator=generator).tolist()

    questions = [(random(9), [random(5), random(7)]), (random(6), [random(4), random(3)])]
    with _in_float32(model):
        separate = _logits(model, separate_rows(model, 0, questions))
        try:
            together = _logits(model, [shared_rows(model, 0, questions)])
        # A model that takes no positions or masks from outside may raise anything.
        except Exception as error:
            return f"{type(error).__name__}: {reason_of(error, first_line=True)}"
    relative_P = (together - separate).norm(dim=-1) / separate.norm(dim=-1)
    difference = float(relative_P.max())
    if difference <= _ROUNDING:
        return None
    return f"their logits differ by {difference:.2%} from those of separate rows"


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Make the model compute in float32, and restore its own weights afterwards."""
    own = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter, data in own.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


@torch.no_grad()
def _logits(model: PreTrainedModel, passes: Sequence[Rows]) -> Tensor:
    """Return the logits at all places, minus their means, float32 [places, vocabulary]."""
    found = []
    for rows in passes:
        rows_P, columns_P = torch.tensor(rows.places, device=model.device).T
        found.append(model(**rows.inputs, use_cache=False).logits[rows_P, columns_P].float())
    logits = torch.cat(found)
    return logits - logits.mean(dim=-1, keepdim=True)


def _shared_length(question: Ids) -> int:
    context, choices = question
    return len(context) + sum(len(choice) - 1 for choice in choices)


def _masks(
    model: PreTrainedModel, windows: dict[str, int | None], ends_BL: Tensor, positions_BL: Tensor
) -> dict[str, Tensor]:
    """Return the mask of each kind of layer, [B, 1, L, L]; equal ones are one tensor."""
    longest, device = int(positions_BL.max()), model.device
    ends_BL, positions_BL = ends_BL.to(device), positions_BL.to(device)
    columns_L = torch.arange(ends_BL.shape[1], device=device)
    rows_L1 = columns_L.unsqueeze(1)
    sees_BLL = (columns_L <= rows_L1) & (rows_L1 < ends_BL.unsqueeze(1))
    made: dict[int | None, Tensor] = {}
    masks = {}
    for kind, window in windows.items():
        if window is not None and window > longest:
            window = None  # it reaches everything
        if window not in made:
            near_BLL = sees_BLL
            if window is not None:
                distances_BLL = positions_BL.unsqueeze(2) - positions_BL.unsqueeze(1)
                near_BLL = sees_BLL & (distances_BLL < window)
            made[window] = _bias(near_BLL, model)
        masks[kind] = made[window]
    return masks


def _bias(sees_BLL: Tensor, model: PreTrainedModel) -> Tensor:
    """Return what is added to the attention's scores, [B, 1, L, L]."""
    bias_BLL = torch.zeros(sees_BLL.shape, dtype=model.dtype, device=model.device)
    bias_BLL.masked_fill_(~sees_BLL, torch.finfo(model.dtype).min)
    return bias_BLL.unsqueeze(1)


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] padded with `pad`, and their attention mask [B, L]."""
    length = max(1, max(len(row) for row in rows))
    ids_BL = torch.full((len(rows), length), pad)
    mask_BL = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids_BL[index, place] = torch.tensor(row, dtype=torch.long)
        mask_BL[index, place] = 1
    return ids_BL, mask_BL
