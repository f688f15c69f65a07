"""Greedy generation, each row up to its end or its first stop string.

Shape suffixes: B rows, L positions of the prompt, N positions after it, P places where target
tokens are predicted, V vocabulary.

`answer` also scores a target behind each prompt, over the same pass through the prompts:

    prompt ──► cache ──► greedy tokens, one after the other
                 └─ cut back to the prompt ──► the target's tokens, all at once

A cache that has lost or mixed tokens, under a sliding window or in a recurrent layer, cannot be cut
back. Such a base reads the prompt twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.base import Base
from phatgoose.batch import Batch
from phatgoose.rows import pad_rows
from phatgoose.scoring import Question, Score, logits_at, score, to_scores


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
    return _write(base, contexts, max_new_tokens, stops, batch or Batch(), counted="all").texts


@torch.inference_mode()
def answer(
    base: Base,
    questions: Sequence[Question],
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    batch: Batch | None = None,
) -> tuple[list[str], list[Score]]:
    """What `generate` writes after each question's context, and the score of its first choice.

    The contexts are read once for both, where the base allows it. What is routed is counted for the
    context and the choice, as in scoring, and not for what is written.

    Args:
        base, max_new_tokens, stops, batch: as for `generate`.
        questions: the batch; a context must be what `encode_context` gives.
    """
    batch = batch or Batch()
    contexts = [question.context for question in questions]
    targets = [question.choices[0] for question in questions]
    first_choices = [Question(q.context, q.choices[:1]) for q in questions]
    if not _can_cut_back(base, contexts, targets, max_new_tokens):
        scores = score(base, first_choices, batch)
        written = _write(base, contexts, max_new_tokens, stops, batch, counted="nothing")
        return written.texts, [one for (one,) in scores]
    written = _write(base, contexts, max_new_tokens, stops, batch, counted="prompt")
    rest_PV = _after_the_prompt(base, written, [target[:-1] for target in targets], batch)
    # A target's first token is predicted where its prompt ends.
    index, places = len(targets), []
    for row, target in enumerate(targets):
        places += [row, *range(index, index + len(target) - 1)]
        index += len(target) - 1
    logits_PV = torch.cat([written.first_BV, rest_PV])
    scores = to_scores(logits_PV, places, [t for target in targets for t in target], first_choices)
    return written.texts, [one for (one,) in scores]


@dataclass
class _Written:
    """What one call of generation leaves behind."""

    texts: list[str]
    first_BV: Tensor  # logits of the first token after the prompt
    cache: Any
    mask_BL: Tensor
    encoded: BaseModelOutput | None


def _write(
    base: Base,
    contexts: Sequence[list[int]],
    max_new_tokens: int,
    stops: Sequence[str],
    batch: Batch,
    *,
    counted: Literal["all", "prompt", "nothing"],
) -> _Written:
    pad, device = base.tokenizer.pad_token_id, base.device
    # A decoder goes on where its row ends, so its rows are filled up on the left.
    ids_BL, mask_BL = pad_rows(contexts, pad, left=not base.is_encoder_decoder)
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    counted_BL = mask_BL.bool() & (counted != "nothing")
    prompt: dict[str, Any] = {"input_ids": ids_BL, "attention_mask": mask_BL}
    encoded, start = None, ids_BL.shape[1]
    if base.is_encoder_decoder:
        batch.enter("encoder", counted_BL)
        encoded = base.model.get_encoder()(**prompt)
        prompt["encoder_outputs"], start = encoded, 1
        batch.enter("decoder", torch.ones_like(mask_BL[:, :1], dtype=torch.bool))
    else:
        batch.enter("decoder", counted_BL)
    ends = _end_tokens(base)
    first: list[Tensor] = []

    def keep_first(_: nn.Module, __: Any, output: Any) -> None:
        if not first:
            first.append(output.logits[:, -1])

    handle = base.model.register_forward_hook(keep_first)
    try:
        written = base.model.generate(  # type: ignore[operator]  # a mixin hides its type
            **prompt,
            max_new_tokens=max_new_tokens,
            use_cache=True,  # MPT's configuration asks for none, and would read all tokens again
            # Greedy, whatever the base's own generation configuration asks for.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=ends,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList(
                [_Ends(base, start, ends, stops, batch, counted=counted == "all")]
            ),
        )
    finally:
        handle.remove()
    texts = base.tokenizer.batch_decode(written.sequences[:, start:], skip_special_tokens=True)
    return _Written(
        texts=[_before(stops, text) for text in texts],
        first_BV=first[0],
        cache=written.past_key_values,
        mask_BL=mask_BL,
        encoded=encoded,
    )


def _can_cut_back(
    base: Base,
    contexts: Sequence[list[int]],
    targets: Sequence[list[int]],
    max_new_tokens: int,
) -> bool:
    """Return whether a cache still holds all of a prompt after tokens were written."""
    if base.is_encoder_decoder:
        return True  # the decoder's own cache holds a start token, and T5 has no windows
    # transformers limits the cache of any base whose configuration has a window.
    window = getattr(base.model.config, "sliding_window", None)
    after = max(max_new_tokens, *map(len, targets))
    within = window is None or max(map(len, contexts)) + after < window
    return base.shares_context and within


def _after_the_prompt(
    base: Base, written: _Written, rows: Sequence[list[int]], batch: Batch
) -> Tensor:
    """Logits [P, V] at every token of these rows, which stand behind the prompts."""
    places = [(row, column) for row, ids in enumerate(rows) for column in range(len(ids))]
    if not places:
        return written.first_BV[:0]
    device, mask_BL = base.device, written.mask_BL
    prompt = 1 if base.is_encoder_decoder else mask_BL.shape[1]  # a decoder's own start token
    surplus = written.cache.get_seq_length() - prompt
    if surplus:
        written.cache.crop(-surplus)
    ids_BN, mask_BN = (t.to(device) for t in pad_rows(rows, base.tokenizer.pad_token_id))
    batch.enter("decoder", mask_BN.bool())
    inputs: dict[str, Any]
    if base.is_encoder_decoder:
        inputs = {
            "encoder_outputs": written.encoded,
            "attention_mask": mask_BL,
            "decoder_input_ids": ids_BN,
        }
    else:
        inputs = {
            "input_ids": ids_BN,
            "attention_mask": torch.cat([mask_BL, mask_BN], dim=1),
            "position_ids": mask_BL.sum(dim=1, keepdim=True)
            + torch.arange(ids_BN.shape[1], device=device),
        }
    rows_P, columns_P = torch.tensor(places, device=device).T
    with logits_at(base, rows_P, columns_P):
        logits = base.model(**inputs, past_key_values=written.cache, use_cache=True).logits
    rest_PV: Tensor = logits[0]
    return rest_PV


class _Ends(StoppingCriteria):
    """Ends a row at an end token or a stop string; tells the batch which rows go on.

    Where what is written is not to be counted, the batch is told that it is padding.
    """

    def __init__(
        self,
        base: Base,
        start: int,
        ends: Sequence[int],
        stops: Sequence[str],
        batch: Batch,
        *,
        counted: bool,
    ) -> None:
        self._tokenizer, self._start, self._stops = base.tokenizer, start, stops
        self._ends, self._batch = torch.tensor(ends, device=base.device), batch
        self._counted = counted
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
        counts_B = ~done_B if self._counted else torch.zeros_like(done_B)
        self._batch.enter("decoder", counts_B.unsqueeze(-1))
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
