"""Check lm-eval's generation options: each is applied, has no effect, or is rejected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import PhatgooseError, near_names

_OBEYED = ("until", "do_sample")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Only sampling or beam search reads these.
_WITHOUT_EFFECT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "seed",
    "length_penalty",
    "early_stopping",
    "use_cache",
)
# Options that change greedy decoding, with the value that leaves it unchanged.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}
# Synonyms, with the supported option to use instead.
_INSTEAD = {
    "max_length": "max_gen_toks",
    "stop": "until",
    "stop_strings": "until",
    "stop_sequences": "until",
    "eos_token_id": "until",
}


@dataclass(frozen=True)
class GenerationOptions:
    """The options that generation applies.

    Attributes:
        max_new_tokens: maximum number of tokens to generate.
        until: stop strings; the text ends before the first of them.
    """

    max_new_tokens: int
    until: tuple[str, ...]


def generation_options(task: str, given: Mapping[str, Any]) -> GenerationOptions:
    """Return the options of a task's `generation_kwargs`, as lm-eval normalizes them.

    Null options and empty stop strings are ignored.

    Raises:
        PhatgooseError: an option would change greedy decoding, or a value is invalid.
    """
    from lm_eval.models.utils import normalize_gen_kwargs  # slow to import

    options = {key: value for key, value in given.items() if value is not None}
    for key, value in options.items():
        _check(task, key, value)
    lengths = {key: options[key] for key in _LENGTHS if key in options}
    if len({*map(int, lengths.values())}) > 1:
        raise _refusal(
            task, "/".join(lengths), "/".join(map(str, lengths.values())), "they differ", "Keep one"
        )
    if isinstance(options.get("until"), tuple):
        options["until"] = list(options["until"])
    normal: Mapping[str, Any] = normalize_gen_kwargs(options)
    if normal["do_sample"]:
        key = "do_sample" if "do_sample" in options else "temperature"
        raise _refusal(
            task, key, options[key], "only greedy decoding is supported", "Set do_sample: false"
        )
    for stop in normal["until"]:
        if not isinstance(stop, str):
            raise _refusal(
                task, "until", given["until"], f"{stop!r} is not a string", "Put it in quotes"
            )
    stops = tuple(stop for stop in normal["until"] if stop)
    return GenerationOptions(normal["max_gen_toks"], stops)


def _check(task: str, key: str, value: Any) -> None:
    """Reject an option that is not supported or has an invalid value."""
    if key in _NEUTRAL:
        if isinstance(value, bool) or value != _NEUTRAL[key]:
            fix = f"Remove it, or set it to {_NEUTRAL[key]}"
            raise _refusal(task, key, value, "only plain greedy decoding is supported", fix)
    elif key in _LENGTHS:
        if not _is_count(value):
            raise _refusal(task, key, value, "it is not a number of tokens", "Give at least 1")
    elif key == "do_sample":
        if not isinstance(value, bool):
            raise _refusal(task, key, value, "it is neither true nor false", "Set it to false")
    elif key == "temperature":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise _refusal(task, key, value, "it is not a number", "Remove it")
    elif key not in (*_OBEYED, *_WITHOUT_EFFECT):
        known = [*_OBEYED, *_LENGTHS, *_WITHOUT_EFFECT, *_NEUTRAL]
        near = [_INSTEAD[key]] if key in _INSTEAD else near_names(key, known)
        fix = f"Use {near[0]}" if near else "Remove it"
        raise _refusal(task, key, value, "greedy decoding has no such option", fix)


def _is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1. lm-eval also accepts text."""
    if isinstance(value, str):
        return value.isdecimal() and int(value) >= 1
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 and value == value // 1


def _refusal(task: str, key: str, value: Any, problem: str, fix: str) -> PhatgooseError:
    return PhatgooseError(f"task {task}: generation_kwargs.{key}={value!r}: {problem}. {fix}.")
