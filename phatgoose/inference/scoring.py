"""Score targets by log-likelihood: logits only at the targets, and each context read once.

Shape suffixes: B rows, L positions, C choices, N target tokens, P distinct places where target
tokens are predicted (the first tokens of a question's choices share one), V vocabulary.

A decoder-only base reads a context and all its choices in one row, if that gives the numbers of
separate rows (`phatgoose.rows`).

An encoder-decoder base encodes a context once, computes the cross-attention's keys and values once,
and copies that cache for each choice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.base import Base
from phatgoose.devices import off_mps
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.question import Question
from phatgoose.rows import pad_rows, separate_rows, shared_rows

# Rows of logits that fit a cache: what is done to many at once goes through memory several times.
_ROWS = 16


@dataclass(frozen=True)
class Score:
    """The scores of one target.

    Attributes:
        loglikelihood: summed over the target's tokens, end-of-sequence left out.
        eos_loglikelihood: of the end-of-sequence token after it.
        tokens: number of target tokens, end-of-sequence left out.
        is_greedy: whether greedy decoding would give the target (end-of-sequence left out).
        ends_greedy: whether it would then end the sequence.
    """

    loglikelihood: float
    eos_loglikelihood: float
    tokens: int
    is_greedy: bool
    ends_greedy: bool

    @property
    def mean(self) -> float:
        """The paper's score: mean token log-likelihood, end-of-sequence included."""
        return (self.loglikelihood + self.eos_loglikelihood) / (self.tokens + 1)


def score_parts(
    base: Base,
    questions: Sequence[Question],
    ask: Callable[[list[Question]], list[list[Score]]],
) -> list[list[Score]]:
    """Score questions of any length with `ask`, which scores those that the base has room for."""
    parts = [question.parts(base) for question in questions]
    found = iter(ask([part for several in parts for part in several]))
    return [_join([next(found) for _ in several]) for several in parts]


def _join(parts: list[list[Score]]) -> list[Score]:
    """Return the scores of a question's choices from those of `Question.parts`."""
    if len(parts) == 1:
        return parts[0]
    return [
        Score(
            # The last token of the choice is at the place where the end token normally is.
            loglikelihood=target.loglikelihood + target.eos_loglikelihood,
            eos_loglikelihood=end.eos_loglikelihood,
            tokens=target.tokens + 1,
            is_greedy=target.is_greedy and target.ends_greedy,
            ends_greedy=end.ends_greedy,
        )
        for (target,), (end,) in zip(parts[::2], parts[1::2], strict=True)
    ]


@contextmanager
def logits_at(base: Base, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Make forward passes of the base return logits [1, N, V] for these places only.

    The hidden states are cut in front of the vocabulary projection, so that whatever the
    architecture does before and after it (scaling, soft caps) stays as it is.
    """

    def cut(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows_N, columns_N].unsqueeze(0), *args[1:])

    handle = base.model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def score(
    base: Base, questions: Sequence[Question], forward: ForwardContext | None = None
) -> list[list[Score]]:
    """Score every choice of every question in one batch.

    Args:
        base: the base, with experts attached or not.
        questions: the batch.
        forward: where each pass announces what it reads.

    Returns:
        For each question, a Score per choice.
    """
    return score_parts(base, questions, lambda parts: score_as_is(base, parts, forward))


def score_as_is(
    base: Base, questions: Sequence[Question], forward: ForwardContext | None = None
) -> list[list[Score]]:
    """Score questions that the base has room for, in the current gradient mode of torch.

    Weights that are gathered in inference mode can never be trained with, so where they are
    gathered as they are needed, `torch.no_grad` has to do.
    """
    logits = _score_encoder_decoder if base.is_encoder_decoder else _score_decoder
    logits_PV, places, targets = logits(base, questions, forward or ForwardContext())
    return to_scores(logits_PV, places, targets, questions)


def to_scores(
    logits_PV: Tensor, places: list[int], targets: list[int], questions: Sequence[Question]
) -> list[list[Score]]:
    """Compute scores from logits, with the row and the token of each target in order."""
    total_P = torch.cat([rows_NV.float().logsumexp(-1) for rows_NV in logits_PV.split(_ROWS)])
    places_N = torch.tensor(places, device=logits_PV.device)
    targets_N = torch.tensor(targets, device=logits_PV.device)
    chosen_N = logits_PV[places_N, targets_N].float() - total_P[places_N]
    chosen = off_mps(chosen_N)[0].double().tolist()
    greedy = (logits_PV.argmax(dim=-1)[places_N] == targets_N).tolist()
    scores: list[list[Score]] = []
    start = 0
    for question in questions:
        scores.append([])
        for choice in question.choices:
            end = start + len(choice) - 1
            scores[-1].append(
                Score(
                    loglikelihood=sum(chosen[start:end]),
                    eos_loglikelihood=chosen[end],
                    tokens=end - start,
                    is_greedy=all(greedy[start:end]),
                    ends_greedy=greedy[end],
                )
            )
            start = end + 1
    return scores


def _score_decoder(
    base: Base, questions: Sequence[Question], forward: ForwardContext
) -> tuple[Tensor, list[int], list[int]]:
    """Return logits [P, V], and each target's place and token by question, choice and token."""
    pad, ids = base.tokenizer.pad_token_id, [(q.context, q.choices) for q in questions]
    if base.shares_context:
        passes = [shared_rows(base.model, pad, ids, across=forward.shares_tokens)]
    else:
        passes = separate_rows(base.model, pad, ids)
    parts: list[Tensor] = []
    places: list[int] = []
    for rows in passes:
        forward.announce("decoder", rows.counted_BL, rows.queries_BL)
        # The choices of a question share the place that predicts their first token: project it
        # once.
        unique = list(dict.fromkeys(rows.places))
        before = sum(map(len, parts))
        index_of = {place: before + index for index, place in enumerate(unique)}
        rows_N, columns_N = torch.tensor(unique, device=base.device).T
        with logits_at(base, rows_N, columns_N):
            logits = base.model(**rows.inputs, use_cache=False).logits
        parts.append(logits[0])
        places += [index_of[place] for place in rows.places]
    targets = [token for _, choices in ids for choice in choices for token in choice]
    return torch.cat(parts) if len(parts) > 1 else parts[0], places, targets


def _score_encoder_decoder(
    base: Base, questions: Sequence[Question], forward: ForwardContext
) -> tuple[Tensor, list[int], list[int]]:
    """Return logits [P, V], and each target's place and token by question, choice and token."""
    device, model, pad = base.device, base.model, base.tokenizer.pad_token_id
    ids_BL, mask_BL = (t.to(device) for t in pad_rows([q.context for q in questions], pad))
    forward.announce("encoder", mask_BL.bool())
    encoded = model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL)
    start_B1 = torch.full((len(questions), 1), model.config.decoder_start_token_id, device=device)
    forward.announce("decoder", torch.ones_like(start_B1, dtype=torch.bool))
    first = model(
        encoder_outputs=encoded, attention_mask=mask_BL, decoder_input_ids=start_B1, use_cache=True
    )
    choices = [choice for question in questions for choice in question.choices]
    question_C = torch.tensor(
        [i for i, question in enumerate(questions) for _ in question.choices], device=device
    )
    ids_CL, mask_CL = (t.to(device) for t in pad_rows([c[:-1] for c in choices], pad))
    forward.announce("decoder", mask_CL.bool(), question_C.unsqueeze(1).expand(mask_CL.shape))
    cache = first.past_key_values
    cache.batch_select_indices(question_C)
    encoded.last_hidden_state = encoded.last_hidden_state[question_C]
    # The first token of every choice is predicted at its question's start token.
    logits_PV = first.logits[:, 0]
    places = [(row, column) for row, c in enumerate(choices) for column in range(len(c) - 1)]
    if places:
        rows_N, columns_N = torch.tensor(places, device=device).T
        with logits_at(base, rows_N, columns_N):
            rest_NV = model(
                encoder_outputs=encoded,
                attention_mask=mask_BL[question_C],
                decoder_input_ids=ids_CL,
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
        logits_PV = torch.cat([logits_PV, rest_NV])
    index_of = {place: len(questions) + index for index, place in enumerate(places)}
    found = [
        question if column < 0 else index_of[row, column]
        for row, (choice, question) in enumerate(zip(choices, question_C.tolist(), strict=True))
        for column in range(-1, len(choice) - 1)
    ]
    return logits_PV, found, [token for choice in choices for token in choice]
