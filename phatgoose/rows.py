"""Rows of token ids in which a decoder-only base reads questions.

Shape suffixes: B rows, L positions, P places of target tokens, V vocabulary, D features.

Where a base can share a context, one row holds it with all its choices. Each choice sees the
context and itself, at the positions it would have alone, so the numbers are those of separate rows:

    row        c0 c1 c2 | a0 a1 | b0 b1 b2          positions  0 1 2 | 3 4 | 3 4 5
    a0 is predicted at c2, a1 at a0, ...            b0 is predicted at c2 too

A sliding window of 3 hides from b1, at position 4, what is before position 2. Any other base reads
a row for each choice, under its own masks.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.architecture import architecture_of
from phatgoose.errors import reason_of

# Relative differences of logits up to this may be rounding in float32.
_ROUNDING = 5e-5
# A context, and its choices, which end with end-of-sequence.
Ids = tuple[list[int], list[list[int]]]


@dataclass
class Rows:
    """What one pass reads.

    Attributes:
        inputs: arguments of the model.
        counted_BL: True for tokens that no other row counts, bool [B, L].
        queries_B: which question each row belongs to, int64 [B].
        places: the row and column where each target token is predicted, by question, choice and
            token.
    """

    inputs: dict[str, Any]
    counted_BL: Tensor
    queries_B: Tensor
    places: list[tuple[int, int]]


def shared_rows(model: PreTrainedModel, pad: int, questions: Sequence[Ids]) -> Rows:
    """Return one row for each question."""
    shape = (len(questions), max(map(_shared_length, questions)))
    ids_BL = torch.full(shape, pad)
    positions_BL = torch.zeros(shape, dtype=torch.long)
    sees_BLL = torch.zeros(*shape, shape[1], dtype=torch.bool)
    tokens_BL = torch.zeros(shape, dtype=torch.bool)
    places: list[tuple[int, int]] = []
    for row, (context_ids, choices) in enumerate(questions):
        context = len(context_ids)
        ids_BL[row, :context] = torch.tensor(context_ids)
        positions_BL[row, :context] = torch.arange(context)
        sees_BLL[row, :context, :context] = torch.ones(context, context).tril().bool()
        start = context
        for choice in choices:
            inputs = len(choice) - 1
            end = start + inputs
            ids_BL[row, start:end] = torch.tensor(choice[:-1], dtype=torch.long)
            positions_BL[row, start:end] = context + torch.arange(inputs)
            sees_BLL[row, start:end, :context] = True
            sees_BLL[row, start:end, start:end] = torch.ones(inputs, inputs).tril().bool()
            places += [(row, context - 1), *((row, column) for column in range(start, end))]
            start = end
        tokens_BL[row, :start] = True
    device = model.device
    record = architecture_of(model.config)
    masks = _masks(model, record.windows(model.config), sees_BLL, positions_BL)
    return Rows(
        inputs={
            "input_ids": ids_BL.to(device),
            "attention_mask": masks if record.window == "layer_types" else masks.popitem()[1],
            "position_ids": positions_BL.to(device),
        },
        counted_BL=tokens_BL.to(device),
        queries_B=torch.arange(len(questions), device=device),
        places=places,
    )


def separate_rows(model: PreTrainedModel, pad: int, questions: Sequence[Ids]) -> list[Rows]:
    """Return passes with one row for each choice, none of more tokens than `shared_rows` has.

    A context is counted in the row of its first choice only.
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
    counted_BL = mask_BL.bool()
    places: list[tuple[int, int]] = []
    for row, (_, index, context, choice) in enumerate(rows):
        if index > 0:
            counted_BL[row, : len(context)] = False
        first = len(context) - 1
        places += [(row, column) for column in range(first, first + len(choice))]
    device = model.device
    return Rows(
        inputs={"input_ids": ids_BL.to(device), "attention_mask": mask_BL.to(device)},
        counted_BL=counted_BL.to(device),
        queries_B=torch.tensor([query for query, *_ in rows], device=device),
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
    model: PreTrainedModel,
    windows: dict[str, int | None],
    sees_BLL: Tensor,
    positions_BL: Tensor,
) -> dict[str, Tensor]:
    """Return the mask of each kind of layer, [B, 1, L, L]; equal ones are one tensor."""
    longest = int(positions_BL.max())
    made: dict[int | None, Tensor] = {}
    masks = {}
    for kind, window in windows.items():
        if window is not None and window > longest:
            window = None  # it reaches everything
        if window not in made:
            near_BLL = sees_BLL
            if window is not None:
                distances_BLL = positions_BL.int().unsqueeze(2) - positions_BL.int().unsqueeze(1)
                near_BLL = sees_BLL & (distances_BLL < window)
            made[window] = _bias(near_BLL, model)
        masks[kind] = made[window]
    return masks


def _bias(sees_BLL: Tensor, model: PreTrainedModel) -> Tensor:
    """Return what is added to the attention's scores, [B, 1, L, L]."""
    bias_BLL = torch.zeros(sees_BLL.shape, dtype=model.dtype, device=model.device)
    bias_BLL.masked_fill_(~sees_BLL.to(model.device), torch.finfo(model.dtype).min)
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
