"""From text to token ids, the same way for training, scoring and generating.

A pair of a context and a target is cut the way lm-evaluation-harness does it: white space at the
end of the context belongs to the target, because tokenizers glue a space to the word after it.
"""

from phatgoose.base import Base


def encode_context(base: Base, context: str, max_tokens: int | None = None) -> list[int]:
    """Token ids of a context alone, never empty.

    Spaces at its end are left out, see above. An encoder's input ends with the end-of-sequence
    token, as T5 was trained. What is too long is cut: at the end for an encoder, keeping the
    end-of-sequence token, at the beginning for a decoder, keeping the question.
    """
    ids = _tokenize(base, context.rstrip(" "))
    eos = base.tokenizer.eos_token_id
    if base.is_encoder_decoder:
        return [*ids[: None if max_tokens is None else max_tokens - 1], eos]
    ids = ids if max_tokens is None else ids[-max_tokens:]
    bos = base.tokenizer.bos_token_id
    return ids or [eos if bos is None else bos]


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
    stripped = context.rstrip()
    target = context[len(stripped) :] + target
    context_ids = encode_context(base, stripped, max_context)
    if base.is_encoder_decoder:
        target_ids = _tokenize(base, target)
    else:
        # A tokenizer may join across the border: what the whole has more is the target.
        whole = _tokenize(base, stripped + target)
        target_ids = whole[len(_tokenize(base, stripped)) :]
    target_ids = target_ids[: None if max_target is None else max_target - 1]
    return context_ids, [*target_ids, base.tokenizer.eos_token_id]


def _tokenize(base: Base, text: str) -> list[int]:
    """Ids with whatever the tokenizer puts in front (Llama's start token), nothing behind."""
    ids = list(base.tokenizer(text)["input_ids"])
    if ids and ids[-1] == base.tokenizer.eos_token_id:
        ids.pop()
    return ids
