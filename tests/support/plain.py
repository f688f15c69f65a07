"""The plain definition of scoring and generating: one sequence at a time, no cache, no padding."""

import torch
from torch import Tensor

from phatgoose.base import Base
from phatgoose.inference.scoring import Score


def plain_logits(base: Base, context: list[int], target: list[int]) -> Tensor:
    """Return logits [len(target) + 1, V]: of each target token and of the token after them."""
    model = base.model
    if base.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        decoder = torch.tensor([start + target])
        logits: Tensor = model(
            input_ids=torch.tensor([context]), decoder_input_ids=decoder, use_cache=False
        ).logits
        return logits[0]
    logits = model(input_ids=torch.tensor([context + target]), use_cache=False).logits
    return logits[0, len(context) - 1 :]


@torch.no_grad()
def plain_score(base: Base, context: list[int], choice: list[int]) -> Score:
    """Return the expected result of `score` for one choice, which ends with end-of-sequence."""
    logprobs = plain_logits(base, context, choice[:-1]).log_softmax(dim=-1)
    chosen = [float(row[token]) for row, token in zip(logprobs, choice, strict=True)]
    greedy = logprobs.argmax(dim=-1).tolist()
    return Score(
        loglikelihood=sum(chosen[:-1]),
        eos_loglikelihood=chosen[-1],
        tokens=len(choice) - 1,
        is_greedy=greedy[:-1] == choice[:-1],
        ends_greedy=greedy[-1] == choice[-1],
    )


@torch.no_grad()
def plain_generate(base: Base, context: list[int], max_new_tokens: int) -> list[int]:
    """Return greedy token ids after a context, up to and including end-of-sequence."""
    written: list[int] = []
    while len(written) < max_new_tokens and written[-1:] != [base.tokenizer.eos_token_id]:
        written.append(int(plain_logits(base, context, written)[-1].argmax()))
    return written
