"""A question: token ids of one context and of the targets that may follow it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.query import Query
from phatgoose.tokenization import cut_context, encode_pairs, max_length


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
        query = query or Query(context, tuple(choices) if len(choices) > 1 else ())
        return Question.encode_all(base, [(context, choices, query)], max_context, max_target)[0]

    @staticmethod
    def encode_all(
        base: Base,
        asked: Sequence[tuple[str, Sequence[str], Query]],
        max_context: int | None = None,
        max_target: int | None = None,
    ) -> list["Question"]:
        """Return `encode` of many contexts, choices and queries at once."""
        pairs = [(context, choice) for context, choices, _ in asked for choice in choices]
        encoded = iter(encode_pairs(base, pairs, max_context, max_target))
        questions = []
        for _, choices, query in asked:
            own = [next(encoded) for _ in choices]
            # The longest choice leaves the least room for the context.
            shortest = min((ids for ids, _ in own), key=len)
            questions.append(Question(shortest, [target for _, target in own], query))
        return questions

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
