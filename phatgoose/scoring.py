"""Log-likelihoods of targets, with logits only where a target stands, and a context read once.

Shape suffixes: B rows, L positions, C choices, N target tokens, P distinct places where target
tokens are predicted (the first tokens of a question's choices share one), V vocabulary.

A decoder-only base reads a context and all its choices in one row, if that gives the numbers of
separate rows (`phatgoose.rows`).

An encoder-decoder base encodes a context once, computes the cross-attention's keys and values once,
and copies that cache for each choice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phatgoose.base import Base
from phatgoose.batch import Batch
from phatgoose.devices import off_mps
from phatgoose.errors import PhatgooseError
from phatgoose.query import Query
from phatgoose.rows import pad_rows, separate_rows, shared_rows
from phatgoose.tokenization import cut_context, encode_pairs, max_length

# Rows of logits that fit a cache: what is done to many at once goes through memory several times.
_ROWS = 16


@dataclass(frozen=True)
class Score:
    """What a base says of one target.

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


@dataclass(frozen=True)
class Question:
    """Token ids of one context and of its targets, each ending with end-of-sequence.

    `query` is the same as text. Routers that look at text need it; others do without.
    """

    context: list[int]
    choices: list[list[int]]
    query: Query | None = None

    @staticmethod
    def encode(
        base: Base,
        context: str,
        choices: Sequence[str],
        max_context: int | None = None,
        max_target: int | None = None,
        query: Query | None = None,
    ) -> "Question":
        """Tokenize a context and what may follow it, by the rules of `phatgoose.tokenization`.

        The query is the context, with the choices if there are several to choose from, unless
        another one is given. A single choice is the right answer, which routers must not see.
        Lengths are those of `encode_pair`; without them nothing is cut here, and scoring cuts what
        is too long for the base.
        """
        pairs = [(context, choice) for choice in choices]
        encoded = encode_pairs(base, pairs, max_context, max_target)
        # The longest choice leaves the least room for the context.
        shortest = min((ids for ids, _ in encoded), key=len)
        query = query or Query(context, tuple(choices) if len(choices) > 1 else ())
        return Question(shortest, [target for _, target in encoded], query)

    @property
    def length(self) -> int:
        """Tokens that scoring it reads."""
        return len(self.context) + sum(len(choice) for choice in self.choices)

    def is_cut(self, base: Base) -> bool:
        """Return whether scoring leaves out a part of the context, which is too long."""
        if base.is_encoder_decoder:
            return len(self.context) > max_length(base)
        longest = max(len(choice) for choice in self.choices) - 1
        return len(self.context) + longest > max_length(base) + 1

    def parts(self, base: Base) -> list["Question"]:
        """Return what is scored in its place: itself, or questions that the base has room for.

        A decoder's context is cut for each choice on its own, as lm-evaluation-harness cuts it: the
        last token of a choice is predicted there and not read. The end behind it takes a position
        more, so it is scored after a context that is one token shorter.

        Raises:
            PhatgooseError: a choice alone is too long.
        """
        room = max_length(base)
        longest = max(len(choice) for choice in self.choices) - 1
        if longest > room:
            raise PhatgooseError(
                f"a choice of {longest} tokens: base {base.name} reads {room} at most. Shorten it "
                "or leave the example out."
            )
        if base.is_encoder_decoder:
            return [replace(self, context=cut_context(base, self.context, room))]
        if len(self.context) + longest <= room:
            return [self]
        parts = []
        for choice in self.choices:
            target, end = choice[:-1], choice[-1:]
            context = cut_context(base, self.context, room + 1 - len(target))
            parts.append(replace(self, context=context, choices=[target]))
            row = cut_context(base, [*self.context, *target], room)
            parts.append(replace(self, context=row, choices=[end]))
        return parts


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
            # The last token of the choice stands where the end does otherwise.
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
    """Within it, a forward pass of the base returns logits [1, N, V] for these places only.

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
    base: Base, questions: Sequence[Question], batch: Batch | None = None
) -> list[list[Score]]:
    """Score every choice of every question in one batch.

    Args:
        base: the base, with experts attached or not.
        questions: the batch.
        batch: told what each pass reads.

    Returns:
        For each question, a Score per choice.
    """
    return score_parts(base, questions, lambda parts: score_as_is(base, parts, batch))


def score_as_is(
    base: Base, questions: Sequence[Question], batch: Batch | None = None
) -> list[list[Score]]:
    """`score` in the mode that torch is in, of questions that the base has room for.

    Weights that are gathered in inference mode can never be trained with, so where they are
    gathered as they are needed, `torch.no_grad` has to do.
    """
    logits = _score_encoder_decoder if base.is_encoder_decoder else _score_decoder
    logits_PV, places, targets = logits(base, questions, batch or Batch())
    return to_scores(logits_PV, places, targets, questions)


def to_scores(
    logits_PV: Tensor, places: list[int], targets: list[int], questions: Sequence[Question]
) -> list[list[Score]]:
    """Scores out of logits: the row and the token of each target, in the questions' order."""
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
    base: Base, questions: Sequence[Question], batch: Batch
) -> tuple[Tensor, list[int], list[int]]:
    """Logits [P, V]; the place and the token of each target, by question, choice and token."""
    pad, ids = base.tokenizer.pad_token_id, [(q.context, q.choices) for q in questions]
    if base.shares_context:
        passes = [shared_rows(base.model, pad, ids)]
    else:
        passes = separate_rows(base.model, pad, ids)
    parts: list[Tensor] = []
    places: list[int] = []
    for rows in passes:
        batch.enter("decoder", rows.counted_BL, rows.queries_B)
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
    base: Base, questions: Sequence[Question], batch: Batch
) -> tuple[Tensor, list[int], list[int]]:
    """Logits [P, V]; the place and the token of each target, by question, choice and token."""
    device, model, pad = base.device, base.model, base.tokenizer.pad_token_id
    ids_BL, mask_BL = (t.to(device) for t in pad_rows([q.context for q in questions], pad))
    batch.enter("encoder", mask_BL.bool())
    encoded = model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL)
    start_B1 = torch.full((len(questions), 1), model.config.decoder_start_token_id, device=device)
    batch.enter("decoder", torch.ones_like(start_B1, dtype=torch.bool))
    first = model(
        encoder_outputs=encoded, attention_mask=mask_BL, decoder_input_ids=start_B1, use_cache=True
    )
    choices = [choice for question in questions for choice in question.choices]
    question_C = torch.tensor(
        [i for i, question in enumerate(questions) for _ in question.choices], device=device
    )
    ids_CL, mask_CL = (t.to(device) for t in pad_rows([c[:-1] for c in choices], pad))
    batch.enter("decoder", mask_CL.bool(), question_C)
    cache = first.past_key_values
    cache.batch_select_indices(question_C)
    encoded.last_hidden_state = encoded.last_hidden_state[question_C]
    # The first token of every choice is predicted where its question's start token stands.
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
