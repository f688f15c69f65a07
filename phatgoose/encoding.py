"""From text to token ids, the same way for training, scoring and generating.

A pair of a context and a target is cut the way lm-evaluation-harness does it: white space at the
end of the context belongs to the target, because tokenizers glue a space to the word after it.
"""

from collections.abc import Sequence

from phatgoose.base import Base


def encode_context(base: Base, context: str, max_tokens: int | None = None) -> list[int]:
    """Token ids of a context alone, never empty.

    Spaces at its end are left out, see above. An encoder's input ends with the end-of-sequence
    token, as T5 was trained. What is too long is cut: at the end for an encoder, keeping the
    end-of-sequence token, at the beginning for a decoder, keeping the question.
    """
    (ids,) = _tokenize_all(base, [context.rstrip(" ")])
    return _cut_context(base, ids, max_tokens)


def encode_pair(
    base: Base,
    context: str,
    target: str,
    max_context: int | None = None,
    max_target: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of a target after it; the target ends with end-of-sequence.

    Args:
        base: whose tokenizer and architecture decide.
        context: the prompt; white space at its end is moved to the target.
        target: the answer.
        max_context: cut the context to so many tokens.
        max_target: cut the target to so many tokens, end-of-sequence included.
    """
    return encode_pairs(base, [(context, target)], max_context, max_target)[0]


def encode_pairs(
    base: Base,
    pairs: Sequence[tuple[str, str]],
    max_context: int | None = None,
    max_target: int | None = None,
) -> list[tuple[list[int], list[int]]]:
    """`encode_pair` of many pairs at once, which tokenizers do in parallel."""
    stripped = [context.rstrip() for context, _ in pairs]
    targets = [
        context[len(bare) :] + target
        for (context, target), bare in zip(pairs, stripped, strict=True)
    ]
    contexts = _tokenize_all(base, stripped)
    if base.is_encoder_decoder:
        target_ids = _tokenize_all(base, targets)
    else:
        # A tokenizer may join across the border: what the whole has more is the target.
        texts = [bare + target for bare, target in zip(stripped, targets, strict=True)]
        wholes = _tokenize_all(base, texts)
        target_ids = [w[len(c) :] for w, c in zip(wholes, contexts, strict=True)]
    eos = base.tokenizer.eos_token_id
    last = None if max_target is None else max_target - 1
    return [
        (_cut_context(base, context, max_context), [*target[:last], eos])
        for context, target in zip(contexts, target_ids, strict=True)
    ]


def _cut_context(base: Base, ids: list[int], max_tokens: int | None) -> list[int]:
    eos = base.tokenizer.eos_token_id
    if base.is_encoder_decoder:
        return [*ids[: None if max_tokens is None else max_tokens - 1], eos]
    ids = ids if max_tokens is None else ids[-max_tokens:]
    bos = base.tokenizer.bos_token_id
    return ids or [eos if bos is None else bos]


def _tokenize_all(base: Base, texts: list[str]) -> list[list[int]]:
    """Ids with whatever the tokenizer puts in front (Llama's start token), nothing behind."""
    found = [list(ids) for ids in base.tokenizer(texts)["input_ids"]]
    eos = base.tokenizer.eos_token_id
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in found]
