"""Turn text into token ids, the same way for training, scoring and generating.

These rules hold at the border between a prompt and what follows it, for every tokenizer:

1. White space at the end of a prompt moves to the target, because tokenizers join a space to the
   word after it. lm-evaluation-harness does the same.
2. A decoder reads prompt and target as one text. If the prompt's own ids begin the ids of that
   text, what comes after them is the target. Otherwise, and if nothing comes after them, the
   target is encoded on its own, as an encoder-decoder's target always is.
3. A target has at least one token besides the end. A target that gives none is refused.
4. A special token that the user wrote stays where it was written. The start token comes before
   once, also where the text begins with it. The end token is added behind targets and behind an
   encoder's input, and nowhere else.
5. What is too long loses the beginning of its prompt, as in lm-evaluation-harness, but the start
   token stays in front. `max_length` says how long a row may be. Lengths that a recipe gives for
   training cut an encoder's input at its end.
6. For generation only spaces leave the prompt. They are spaces that the model writes first, so
   they belong neither to the generated text nor to a stop string (see `spaces_moved`).
"""

from collections.abc import Sequence

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError

# What lm-evaluation-harness takes where neither the model nor its tokenizer says a length.
_DEFAULT_LENGTH = 2048
# Tokenizers that know no length say a number as large as this one.
_NO_LENGTH = 10**29


def max_length(base: Base) -> int:
    """Return how many tokens a row of this base may have, as lm-evaluation-harness finds it.

    That is what the configuration says of positions, else what the tokenizer says, else 2048. It
    is also the limit of an encoder with relative positions, such as T5's.
    """
    config = getattr(base.model.config, "text_config", None) or base.model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config, name, None)) is not None:
            return int(length)
    length = base.tokenizer.model_max_length
    return int(length) if length is not None and length < _NO_LENGTH else _DEFAULT_LENGTH


def prompt_room(base: Base, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have if so many are to be generated after it.

    A decoder's prompt shares its positions with what is generated; an encoder's has its own.

    Raises:
        PhatgooseError: there is no room for a prompt, or nothing is to be generated.
    """
    room = max_length(base) - (0 if base.is_encoder_decoder else max_new_tokens)
    if max_new_tokens < 1 or room < 1:
        raise PhatgooseError(
            f"max_new_tokens={max_new_tokens}: base {base.name} reads {max_length(base)} tokens at "
            "most, prompt included. Choose at least 1 and fewer than these."
        )
    return room


def spaces_moved(text: str) -> int:
    """Return how many spaces at the end of a prompt `encode_context` leaves to the generation."""
    return len(text) - len(text.rstrip(" "))


def encode_context(base: Base, context: str, max_tokens: int | None = None) -> list[int]:
    """Return the token ids of a context alone, never empty.

    Spaces at its end are left out, see rule 6. An encoder's input ends with the end-of-sequence
    token, as T5 was trained. `max_tokens` cuts it as in training, see rule 5.
    """
    (ids,) = encode_contexts(base, [context])
    return _training_cut(base, ids, max_tokens)


def encode_contexts(base: Base, contexts: Sequence[str]) -> list[list[int]]:
    """Return `encode_context` of many contexts at once, which tokenizers do in parallel."""
    found = _encode_all(base, [context.rstrip(" ") for context in contexts])
    return [_complete(base, ids) for ids in found]


def encode_pair(
    base: Base,
    context: str,
    target: str,
    max_context: int | None = None,
    max_target: int | None = None,
) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of a target after it, which ends with the end token.

    Args:
        base: whose tokenizer and architecture decide.
        context: the prompt.
        target: the answer.
        max_context: cut the context to so many tokens.
        max_target: cut the target to so many tokens, the end token included. With one of these
            lengths the pair is an example for training, and cut to the base's `max_length` too.

    Raises:
        PhatgooseError: the target has no token besides the end.
    """
    return encode_pairs(base, [(context, target)], max_context, max_target)[0]


def encode_pairs(
    base: Base,
    pairs: Sequence[tuple[str, str]],
    max_context: int | None = None,
    max_target: int | None = None,
    names: Sequence[str] = (),
) -> list[tuple[list[int], list[int]]]:
    """Return `encode_pair` of many pairs at once, which tokenizers do in parallel.

    `names` are what errors call the pairs.
    """
    # 1. Move white space to the target.
    stripped = [context.rstrip() for context, _ in pairs]
    targets = [
        context[len(bare) :] + target
        for (context, target), bare in zip(pairs, stripped, strict=True)
    ]
    # 2. Read the target behind its prompt, or on its own.
    distinct = list(dict.fromkeys(stripped))  # the choices of a question follow one context
    ids_of = dict(zip(distinct, _encode_all(base, distinct), strict=True))
    contexts = [ids_of[text] for text in stripped]
    found: list[list[int]] = [[] for _ in pairs]
    if not base.is_encoder_decoder:
        texts = [bare + target for bare, target in zip(stripped, targets, strict=True)]
        for place, whole in enumerate(_encode_all(base, texts)):
            border = len(contexts[place])
            if whole[:border] == contexts[place]:
                found[place] = whole[border:]
    alone = [place for place, ids in enumerate(found) if not ids]
    own = _encode_bare(base, [targets[place] for place in alone])
    for place, ids in zip(alone, own, strict=True):
        if not ids:
            name = f"{names[place]}: " if names else ""
            raise PhatgooseError(
                f"{name}target={targets[place]!r}: the tokenizer of base {base.name} makes no "
                f"token of it (after a prompt that ends with {stripped[place][-40:]!r}). Give the "
                "target a text or leave the example out."
            )
        found[place] = ids
    # 3. A target after no prompt may bring the start token itself.
    start = _start_id(base)
    for place, ids in enumerate(found):
        behind_nothing = not contexts[place] and not base.is_encoder_decoder
        if behind_nothing and ids[0] == start and len(ids) > 1:
            found[place] = ids[1:]
    whole_pairs = [
        (_complete(base, context), [*target, base.tokenizer.eos_token_id])
        for context, target in zip(contexts, found, strict=True)
    ]
    if max_context is None and max_target is None:
        return whole_pairs
    return [_training_pair(base, pair, max_context, max_target) for pair in whole_pairs]


def cut_context(base: Base, ids: list[int], max_tokens: int) -> list[int]:
    """Return the end of a prompt that is too long, behind its start token if it has one."""
    if len(ids) <= max_tokens:
        return ids
    start = [] if base.is_encoder_decoder else _start_of(base, ids)
    return [*start, *ids[len(ids) - max_tokens + len(start) :]]


def _training_pair(
    base: Base,
    pair: tuple[list[int], list[int]],
    max_context: int | None,
    max_target: int | None,
) -> tuple[list[int], list[int]]:
    """Cut an example to its recipe's lengths, and so that the base has a position for each token.

    The last token of a target is predicted and never read. A decoder's prompt keeps at least one
    token.
    """
    context, target = pair
    length = max_length(base)
    most = length if max_target is None else min(length, max_target)
    if most < 2:
        raise PhatgooseError(
            f"max_target_tokens={max_target}: a target needs a token besides the end. Give at "
            "least 2."
        )
    target = [*target[:-1][: most - 1], target[-1]]
    room = length if base.is_encoder_decoder else length - len(target) + 1
    room = room if max_context is None else min(room, max_context)
    return _training_cut(base, context, room), target


def _training_cut(base: Base, ids: list[int], max_tokens: int | None) -> list[int]:
    """Cut a context as training does: an encoder's input loses its last tokens, except the end."""
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    if base.is_encoder_decoder:
        return [*ids[: max_tokens - 1], ids[-1]]
    return cut_context(base, ids, max_tokens)


def _complete(base: Base, ids: list[int]) -> list[int]:
    """Return a context with the end token of an encoder's input; a decoder reads at least one."""
    if base.is_encoder_decoder:
        return [*ids, base.tokenizer.eos_token_id]
    return ids or [_start_id(base)]


def _start_id(base: Base) -> int:
    """Return what a decoder reads in place of an empty prompt."""
    bos, eos = base.tokenizer.bos_token_id, base.tokenizer.eos_token_id
    return int(eos if bos is None else bos)


def _start_of(base: Base, ids: list[int]) -> list[int]:
    """Return the start token of a prompt, by whatever it was added; empty without one."""
    front = _front(base)
    if front and ids[: len(front)] == front:
        return front
    return ids[:1] if ids[:1] == [base.tokenizer.bos_token_id] else []


def _encode_all(base: Base, texts: list[str]) -> list[list[int]]:
    """Return ids behind what the tokenizer puts in front of a text, once; nothing behind them."""
    front = _front(base)
    return [
        ids if ids[: len(front)] == front else [*front, *ids] for ids in _encode_bare(base, texts)
    ]


def _encode_bare(base: Base, texts: list[str]) -> list[list[int]]:
    """Return ids of the texts alone."""
    if not texts:
        return []
    return [list(ids) for ids in base.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _front(base: Base) -> list[int]:
    """Return what the tokenizer puts in front of every text, such as Llama's start token."""
    ids, bare = list(base.tokenizer("a")["input_ids"]), _encode_bare(base, ["a"])[0]
    places = range(len(ids) - len(bare) + 1)
    return next((ids[:at] for at in places if ids[at : at + len(bare)] == bare), [])
