"""Greedy generation, each row up to its end or its first stop string.

Shape suffixes: B rows, L positions of the prompt, N positions after it, P places where target
tokens are predicted, V vocabulary.

What all prompts begin with is read once, where a token may be read for several queries:

    prompts    p p a b c     row 0   p p | - a b c        `-` is padding
               p p d e f g   row 1   p p | d e f g        one pass reads p p, another one the rest

Rows that have ended leave the batch: where enough of them have, the call of transformers'
`generate` ends, and another one continues with the rows that are left and their part of the cache.

`answer` also scores a target behind each prompt, over the same pass through the prompts:

    prompt ──► cache ──► greedy tokens, one after the other
                 └─ cut back to the prompt ──► the target's tokens, all at once

A cache that has lost or mixed tokens, under a sliding window or in a recurrent layer, cannot be cut
back. Such a base reads the prompt twice.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.inference.scoring import Score, logits_at, score, to_scores
from phatgoose.inference.stopping import Ending, Stopping
from phatgoose.question import Question
from phatgoose.rows import pad_rows
from phatgoose.tokenization import cut_context, prompt_room

# A pass more is worth so many tokens that need not be read.
_WORTH = 64


@torch.inference_mode()
def generate(
    base: Base,
    contexts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    spaces: Sequence[int] = (),
    forward: ForwardContext | None = None,
) -> list[str]:
    """Return greedy continuations of a batch of contexts, as text without special tokens.

    Args:
        base: the base, with experts attached or not.
        contexts: token ids, see `encode_context`. What is too long loses its beginning.
        max_new_tokens: the most tokens to write for each.
        stops: a text ends before the first of them that it holds. An empty one is left out; one
            may hold special tokens.
        spaces: of each context, how many spaces its prompt ends with, see `spaces_moved`. So many
            that the model writes first belong to the prompt, not to the text.
        forward: where each pass announces what it reads.

    Raises:
        PhatgooseError: `max_new_tokens` is less than 1 or leaves no room for a prompt.
    """
    room = prompt_room(base, max_new_tokens)
    contexts = [cut_context(base, ids, room) for ids in contexts]
    ending = Ending(base, stops, spaces or [0] * len(contexts))
    return _write(
        base, contexts, max_new_tokens, ending, forward or ForwardContext(), counted="all"
    ).texts


@torch.inference_mode()
def answer(
    base: Base,
    questions: Sequence[Question],
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    spaces: Sequence[int] = (),
    forward: ForwardContext | None = None,
) -> tuple[list[str], list[Score]]:
    """Return what `generate` writes after each question's context, and its first choice's score.

    The contexts are read once for both, where the base allows it. What is routed is counted for the
    context and the choice, as in scoring, and not for what is written.

    Args:
        base, max_new_tokens, stops, spaces, forward: as for `generate`.
        questions: the batch; a context must be what `encode_context` gives.

    Raises:
        PhatgooseError: as `generate`, or a question is too long, which `fits` finds out.
    """
    if not all(fits(base, question, max_new_tokens) for question in questions):
        raise PhatgooseError("a question is too long for the base. Generate and score it apart.")
    forward = forward or ForwardContext()
    contexts = [question.context for question in questions]
    ending = Ending(base, stops, spaces or [0] * len(contexts))
    targets = [question.choices[0] for question in questions]
    first_choices = [Question(q.context, q.choices[:1]) for q in questions]
    if not _can_cut_back(base, contexts, targets, max_new_tokens):
        scores = score(base, first_choices, forward)
        written = _write(base, contexts, max_new_tokens, ending, forward, counted="nothing")
        return written.texts, [one for (one,) in scores]
    written = _write(base, contexts, max_new_tokens, ending, forward, counted="prompt")
    rest_PV = _after_the_prompt(base, written, [target[:-1] for target in targets], forward)
    # A target's first token is predicted where its prompt ends.
    index, places = len(targets), []
    for row, target in enumerate(targets):
        places += [row, *range(index, index + len(target) - 1)]
        index += len(target) - 1
    logits_PV = torch.cat([written.first_BV, rest_PV])
    scores = to_scores(logits_PV, places, [t for target in targets for t in target], first_choices)
    return written.texts, [one for (one,) in scores]


def fits(base: Base, question: Question, max_new_tokens: int) -> bool:
    """Return whether neither scoring a question nor generating after its context cuts it."""
    room = prompt_room(base, max_new_tokens)
    return len(question.context) <= room and question.parts(base) == [question]


@dataclass
class _Written:
    """What one call of generation leaves behind."""

    texts: list[str]
    first_BV: Tensor  # logits of the first token after the prompt
    cache: Any  # of all rows
    mask_BL: Tensor
    encoded: BaseModelOutput | None


def _write(
    base: Base,
    contexts: Sequence[list[int]],
    max_new_tokens: int,
    ending: Ending,
    forward: ForwardContext,
    *,
    counted: Literal["all", "prompt", "nothing"],
) -> _Written:
    pad, device = base.tokenizer.pad_token_id, base.device
    shared = _shared_beginning(base, contexts, max_new_tokens, forward)
    # A decoder continues where its row ends, so its rows are filled up on the left.
    ids_BL, mask_BL = pad_rows(
        [ids[shared:] for ids in contexts], pad, left=not base.is_encoder_decoder
    )
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    counted_BL = mask_BL.bool() & (counted != "nothing")
    inputs: dict[str, Any] = {"input_ids": ids_BL, "attention_mask": mask_BL}
    encoded = None
    if shared:
        ids_1L = torch.tensor([contexts[0][:shared]], device=device)
        times = 0 if counted == "nothing" else len(contexts)
        forward.announce("decoder", torch.full_like(ids_1L, times))
        read = base.model.base_model(input_ids=ids_1L, use_cache=True).past_key_values
        read.batch_repeat_interleave(len(contexts))
        ids_BL = torch.cat([ids_1L.expand(len(contexts), -1), ids_BL], dim=1)
        mask_BL = torch.cat([torch.ones_like(ids_BL[:, :shared]), mask_BL], dim=1)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "past_key_values": read}
    if base.is_encoder_decoder:
        forward.announce("encoder", counted_BL)
        encoded = base.model.get_encoder()(**inputs)
        inputs["encoder_outputs"] = encoded
        forward.announce("decoder", torch.ones_like(mask_BL[:, :1], dtype=torch.bool))
    else:
        forward.announce("decoder", counted_BL)
    first: list[Tensor] = []

    def keep_first(_: nn.Module, __: Any, output: Any) -> None:
        if not first:
            first.append(output.logits[:, -1])

    stopping = Stopping(
        ending,
        forward,
        rows=len(contexts),
        most=max_new_tokens,
        counts=counted == "all",
        # Other caches hold states whose rows transformers cannot pick.
        compacts=base.shares_context,
    )
    cache = None
    handle = base.model.register_forward_hook(keep_first)
    try:
        while stopping.left:
            with _greedy(base, ending.tokens, stopping.left):
                written = base.model.generate(  # type: ignore[operator]  # a mixin hides its type
                    **inputs, stopping_criteria=StoppingCriteriaList([stopping])
                )
            # What is scored after the prompts reads the cache of all rows.
            cache = written.past_key_values if cache is None else cache
            inputs = _remaining(base, inputs, written, stopping, keep=counted == "prompt")
    finally:
        handle.remove()
    return _Written(
        texts=[ending.text(row, ids) for row, ids in enumerate(stopping.written)],
        first_BV=first[0],
        cache=cache,
        mask_BL=mask_BL,
        encoded=encoded,
    )


def _shared_beginning(
    base: Base, contexts: Sequence[list[int]], max_new_tokens: int, forward: ForwardContext
) -> int:
    """Return how many tokens all prompts begin with alike, if they are to be read once; else 0."""
    first, last = min(contexts), max(contexts)
    # Every row reads at least one token of its own.
    most = min(map(len, contexts)) - 1
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    # A window counts columns, and padding behind what is shared would use them up.
    window = getattr(base.model.config, "sliding_window", None)
    fits_window = window is None or max(map(len, contexts)) + max_new_tokens < window
    allowed = base.shares_context and not base.is_encoder_decoder and forward.shares_tokens
    worth = shared * (len(contexts) - 1) >= _WORTH
    return shared if allowed and fits_window and worth else 0


def _remaining(
    base: Base, inputs: dict[str, Any], written: Any, stopping: Stopping, *, keep: bool
) -> dict[str, Any]:
    """Return what `generate` continues with: the rows that have not ended.

    `keep` leaves the cache as it is, for others.
    """
    places = stopping.compact(base.device)
    if not places:
        return {}
    places_B = torch.tensor(places, device=base.device)
    cache = copy.deepcopy(written.past_key_values) if keep else written.past_key_values
    cache.batch_select_indices(places_B)
    rest = {"past_key_values": cache, "attention_mask": inputs["attention_mask"][places_B]}
    sequences_BN = written.sequences[places_B]
    if base.is_encoder_decoder:
        states_BLD = inputs["encoder_outputs"].last_hidden_state[places_B]
        rest["input_ids"] = inputs["input_ids"][places_B]
        rest["encoder_outputs"] = BaseModelOutput(last_hidden_state=states_BLD)
        # Without this mask, `generate` would take all of them for new tokens.
        rest["decoder_attention_mask"] = torch.ones_like(sequences_BN)
        return {**rest, "decoder_input_ids": sequences_BN}
    before = rest["attention_mask"]
    after = before.new_ones(len(places), sequences_BN.shape[1] - before.shape[1])
    return {**rest, "input_ids": sequences_BN, "attention_mask": torch.cat([before, after], dim=1)}


@contextmanager
def _greedy(base: Base, ends: list[int], max_new_tokens: int) -> Iterator[None]:
    """Within it, the base generates greedily, whatever its own configuration says.

    `generate` fills a configuration that is passed to it with the values of the model's own, so the
    model's own is replaced.
    """
    own = base.model.generation_config
    base.model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=base.tokenizer.pad_token_id,
        eos_token_id=ends,
        decoder_start_token_id=getattr(base.model.config, "decoder_start_token_id", None),
        return_dict_in_generate=True,
        use_cache=True,  # MPT's configuration asks for none, and would read all tokens again
    )
    try:
        yield
    finally:
        base.model.generation_config = own


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
    base: Base, written: _Written, rows: Sequence[list[int]], forward: ForwardContext
) -> Tensor:
    """Return logits [P, V] at every token of these rows, which follow the prompts."""
    places = [(row, column) for row, ids in enumerate(rows) for column in range(len(ids))]
    if not places:
        return written.first_BV[:0]
    device, mask_BL = base.device, written.mask_BL
    prompt = 1 if base.is_encoder_decoder else mask_BL.shape[1]  # a decoder's own start token
    surplus = written.cache.get_seq_length() - prompt
    if surplus:
        written.cache.crop(-surplus)
    ids_BN, mask_BN = (t.to(device) for t in pad_rows(rows, base.tokenizer.pad_token_id))
    forward.announce("decoder", mask_BN.bool())
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
