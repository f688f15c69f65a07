"""Every supported architecture as a tiny base on disk, compared with plain computations.

The plain computation is transformers' own forward pass of one sequence, with its own masks.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phatgoose.architecture import ARCHITECTURES
from phatgoose.base import Base, load_base
from phatgoose.inference.generation import answer, generate
from phatgoose.inference.scoring import Score
from phatgoose.query import Query
from phatgoose.question import Question
from tests.support.plain import plain_generate, plain_score
from tests.support.tiny import (
    make_decoder,
)

# Each decoder-only record, and the architectural variants that are built differently.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ARCHITECTURES if kind not in ("t5", "mt5")},
    "falcon with a bias by column": ("falcon", {"alibi": True}),
    "falcon with groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon with many heads": ("falcon", {"multi_query": False, "parallel_attn": False}),
    "opt with projections": ("opt", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
}
APART = {"bloom", "mpt", "lfm2", "falcon with a bias by column"}

LAYERS = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "phi3": ("phi3", {}),
    "qwen3_moe": ("qwen3_moe", {"use_sliding_window": True}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": LAYERS}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2 in every layer": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "smollm3": ("smollm3", {"use_sliding_window": True, "layer_types": LAYERS}),
}

# Prompts and choices of many lengths in tokens; choices end with end-of-sequence.
QUESTIONS = [
    Question([5, 9, 11, 20, 33, 8, 64, 12], [[12, 30, 7, 0], [7, 0], [0]], Query("a")),
    Question([8, 40], [[6, 0], [14, 15, 16, 17, 50, 51, 52, 0]], Query("b")),
    Question(
        [9, 9, 9, 31, 17], [[61, 62, 63, 64, 65, 66, 67, 0], [14, 0], [77, 78, 0]], Query("c")
    ),
    # Its context begins like the first one's, and its choices like each other.
    Question([5, 9, 11, 20, 8], [[12, 30, 9, 0], [12, 0], [12, 30, 7, 0]], Query("d")),
]


class Folders:
    """Tiny bases by architecture and changes, written on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, kind: str, changes: dict[str, Any], dtype: str = "float32") -> Base:
        folder = self.root / re.sub(r"\W+", "-", f"{kind}{json.dumps(changes)}")
        if not folder.exists():
            make_decoder(folder, kind, **changes)
        return load_base(str(folder), dtype=dtype)


def assert_same(actual: Score, expected: Score) -> None:
    assert actual.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-4)
    assert actual.eos_loglikelihood == pytest.approx(expected.eos_loglikelihood, abs=1e-4)
    assert (actual.tokens, actual.is_greedy) == (expected.tokens, expected.is_greedy)
    assert actual.ends_greedy == expected.ends_greedy


def assert_plain(base: Base, scores: list[list[Score]]) -> None:
    for question, found in zip(QUESTIONS, scores, strict=True):
        assert len(found) == len(question.choices)
        for choice, actual in zip(question.choices, found, strict=True):
            assert_same(actual, plain_score(base, question.context, choice))


def assert_answers_plainly(
    base: Base, limit: int, questions: Sequence[Question] = QUESTIONS
) -> None:
    """Check that batched `generate` and `answer` match greedy decoding and scoring one by one."""
    contexts = [question.context for question in questions]
    expected = [plain_generate(base, context, limit) for context in contexts]
    texts = base.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert generate(base, contexts, limit) == texts
    written, scores = answer(base, questions, limit)
    assert written == texts
    for question, actual in zip(questions, scores, strict=True):
        assert_same(actual, plain_score(base, question.context, question.choices[0]))
