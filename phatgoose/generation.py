"""Greedy generation, each row up to its end or its first stop string.

Shape suffixes: B rows, L positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from phatgoose.base import Base
from phatgoose.batch import Batch
from phatgoose.scoring import pad_rows


@torch.inference_mode()
def generate(
    base: Base,
    contexts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    batch: Batch | None = None,
) -> list[str]:
    """Greedy continuations of a batch of contexts, as text, end-of-sequence left out.

    Args:
        base: the base, with experts attached or not.
        contexts: token ids, see `encode_context`.
        max_new_tokens: the most tokens to write for each.
        stops: a text ends before the first of them that it holds.
        batch: told what each pass reads.
    """
    pad, batch = base.tokenizer.pad_token_id, batch or Batch()
    # A decoder goes on where its row ends, so its rows are filled up on the left.
    ids_BL, mask_BL = pad_rows(contexts, pad, left=not base.is_encoder_decoder)
    ids_BL, mask_BL = ids_BL.to(base.device), mask_BL.to(base.device)
    side = "encoder" if base.is_encoder_decoder else "decoder"
    batch.enter(side, mask_BL.bool())
    if base.is_encoder_decoder:
        batch.enter("decoder", torch.ones_like(mask_BL[:, :1], dtype=torch.bool))
    start = 1 if base.is_encoder_decoder else ids_BL.shape[1]
    ends = _end_tokens(base)
    written_BL = base.model.generate(  # type: ignore[operator]  # a mixin hides its type
        input_ids=ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=max_new_tokens,
        # Greedy, whatever the base's own generation configuration asks for.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=ends,
        stopping_criteria=StoppingCriteriaList([_Ends(base, start, ends, stops, batch)]),
    )
    texts = base.tokenizer.batch_decode(written_BL[:, start:], skip_special_tokens=True)
    return [_before(stops, text) for text in texts]


class _Ends(StoppingCriteria):
    """Ends a row at an end token or a stop string; tells the batch which rows go on."""

    def __init__(
        self, base: Base, start: int, ends: Sequence[int], stops: Sequence[str], batch: Batch
    ) -> None:
        self._tokenizer, self._start, self._stops = base.tokenizer, start, stops
        self._ends, self._batch = torch.tensor(ends, device=base.device), batch
        self._done_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows have ended, bool [B], after each new token."""
        done_B = torch.isin(input_ids[:, -1], self._ends)
        if self._done_B is not None:
            done_B |= self._done_B
        if self._stops:
            for row in (~done_B).nonzero().flatten().tolist():
                text = self._tokenizer.decode(input_ids[row, self._start :])
                done_B[row] = any(stop in text for stop in self._stops)
        self._done_B = done_B
        self._batch.enter("decoder", ~done_B.unsqueeze(-1))
        return done_B


def _before(stops: Sequence[str], text: str) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _end_tokens(base: Base) -> list[int]:
    """The end-of-sequence token that experts are taught, and those that the base has besides."""
    own = base.model.generation_config.eos_token_id
    others = own if isinstance(own, list) else [own]
    return sorted({base.tokenizer.eos_token_id, *others} - {None})
