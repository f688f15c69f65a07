import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.generation_options import GenerationOptions, generation_options
from phatgoose.errors import PhatgooseError


@pytest.mark.parametrize(
    ("given_options", "tokens", "until"),
    [
        ({}, 256, ()),
        ({"max_gen_toks": 3}, 3, ()),
        ({"max_new_tokens": 3}, 3, ()),
        ({"max_tokens": 3}, 3, ()),
        ({"max_completion_tokens": 3}, 3, ()),
        ({"max_gen_toks": "3", "max_tokens": 3.0}, 3, ()),
        ({"max_gen_toks": 3, "max_new_tokens": None}, 3, ()),
        ({"until": "\n"}, 256, ("\n",)),
        ({"until": ["\n", "", "Q:"]}, 256, ("\n", "Q:")),
        ({"until": ("b", "a")}, 256, ("b", "a")),
        ({"until": [""]}, 256, ()),
        ({"until": ""}, 256, ()),
        ({"until": []}, 256, ()),
        ({"until": None}, 256, ()),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 50}, 256, ()),
        ({"do_sample": False, "temperature": None}, 256, ()),
        ({"temperature": 0.0}, 256, ()),
        ({"temperature": 0, "do_sample": None, "seed": 3}, 256, ()),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, 256, ()),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}, 256, ()),
    ],
)
def test_options_are_honored_or_change_nothing(
    given_options: dict[str, Any], tokens: int, until: tuple[str, ...]
) -> None:
    before = {**given_options}
    assert generation_options("toy", given_options) == GenerationOptions(tokens, until)
    assert given_options == before


@pytest.mark.parametrize(
    ("given_options", "line"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks=0: it is not a number of tokens. Give at least 1."),
        ({"max_tokens": -2}, "max_tokens=-2: it is not a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: it is not a number"),
        ({"max_new_tokens": True}, "max_new_tokens=True: it is not a number"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many': it is not a number"),
        ({"max_gen_toks": float("nan")}, "max_gen_toks=nan: it is not a number"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf: it is not a number"),
        ({"max_gen_toks": [3]}, r"max_gen_toks=\[3\]: it is not a number"),
        (
            {"max_gen_toks": 3, "max_new_tokens": 4},
            "max_gen_toks/max_new_tokens='3/4': they differ. Keep one.",
        ),
        (
            {"num_beams": 4},
            "num_beams=4: only plain greedy decoding is supported. Remove it, or set",
        ),
        ({"num_beams": True}, "num_beams=True: only plain greedy"),
        ({"temperature": float("nan")}, "temperature=nan: it is not a number"),
        ({"repetition_penalty": 5.0}, "repetition_penalty=5.0: only plain greedy"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2: only plain greedy"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5: only plain greedy"),
        ({"min_new_tokens": 5}, "min_new_tokens=5: only plain greedy"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6: only plain greedy"),
        (
            {"do_sample": True},
            "do_sample=True: only greedy decoding is supported. Set do_sample: f",
        ),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True: only greedy"),
        ({"temperature": 0.7}, "temperature=0.7: only greedy decoding"),
        ({"do_sample": "false"}, "do_sample='false': it is neither true nor false"),
        ({"temperature": "hot"}, "temperature='hot': it is not a number"),
        ({"max_length": 9}, "max_length=9: greedy decoding has no such option. Use max_gen_toks."),
        ({"stop": ["x"]}, r"stop=\['x'\]: greedy decoding has no such option. Use until."),
        ({"stop_strings": "x"}, "stop_strings='x': .* Use until."),
        ({"eos_token_id": 3}, "eos_token_id=3: .* Use until."),
        ({"utnil": "x"}, "utnil='x': .* Use until."),
        ({"max_gen_tokens": 3}, "max_gen_tokens=3: .* Use max_"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids=\[\[3\]\]: .* no such option"),
        ({"until": [1]}, r"until=\[1\]: 1 is not a string. Put it in quotes."),
        ({"until": 5}, "until=5: 5 is not a string"),
        ({"until": {"a": "b"}}, "is not a string"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    given_options: dict[str, Any], line: str
) -> None:
    with pytest.raises(PhatgooseError, match=rf"^task toy: generation_kwargs\..*{line}") as caught:
        generation_options("toy", given_options)
    assert "\n" not in str(caught.value)


KEYS = [
    "until",
    "do_sample",
    "temperature",
    "max_gen_toks",
    "max_tokens",
    "num_beams",
    "top_p",
    "x",
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=3), st.just([""])
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_options_are_honored_or_refused(options: dict[str, Any]) -> None:
    found = None
    with contextlib.suppress(PhatgooseError):
        found = generation_options("toy", options)
    if found is not None:
        assert found.max_new_tokens >= 1
        assert all(found.until)
        lengths = [options.get(key) for key in ("max_gen_toks", "max_tokens")]
        assert all(int(n) == found.max_new_tokens for n in lengths if n is not None)
