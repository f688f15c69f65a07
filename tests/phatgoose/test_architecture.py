"""Every architecture that has a record, as a tiny base on disk, against plain computations.

The plain computation is transformers' own forward pass of one sequence, under its own masks.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from phatgoose.architecture import ARCHITECTURES, Architecture, adapted_linears
from phatgoose.base import Base, bare_model, last_query_projection, load_base
from phatgoose.engine import TargetLoss
from phatgoose.errors import PhatgooseError
from phatgoose.gated_lora import attach_lora, detach_lora
from phatgoose.generation import answer, generate
from phatgoose.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.recipe import Recipe, Stage
from phatgoose.routed_linear import RoutingLog
from phatgoose.scoring import Question, Score, score
from phatgoose.training import Example, Progress, train_expert
from tests.plain import plain_generate, plain_logits, plain_score
from tests.pools import FakeEncoder, make_pool
from tests.textbook import RULES, base_plus, base_with, facts_of
from tests.tiny import (
    build,
    decoder_sizes,
    make_card,
    make_decoder,
    make_experts,
    make_t5,
    state,
)

# Each decoder-only record, and the variants of an architecture that are built in another way.
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

# Prompts and choices of many lengths, in tokens; choices end with end-of-sequence.
QUESTIONS = [
    Question([5, 9, 11, 20, 33, 8, 64, 12], [[12, 30, 7, 0], [7, 0], [0]], Query("a")),
    Question([8, 40], [[6, 0], [14, 15, 16, 17, 50, 51, 52, 0]], Query("b")),
    Question(
        [9, 9, 9, 31, 17], [[61, 62, 63, 64, 65, 66, 67, 0], [14, 0], [77, 78, 0]], Query("c")
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    return Folders(tmp_path_factory.mktemp("architectures"))


class Folders:
    """Tiny bases by architecture and changes, written when they are first asked for."""

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
    """`generate` and `answer`, in a batch, are greedy decoding and scoring of each alone."""
    contexts = [question.context for question in questions]
    expected = [plain_generate(base, context, limit) for context in contexts]
    texts = base.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert generate(base, contexts, limit) == texts
    written, scores = answer(base, questions, limit)
    assert written == texts
    for question, actual in zip(questions, scores, strict=True):
        assert_same(actual, plain_score(base, question.context, question.choices[0]))


@pytest.mark.parametrize("name", DECODERS)
def test_choices_score_together_as_alone(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    assert base.shares_context == (name not in APART)
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 4)


@pytest.mark.parametrize("name", DECODERS)
def test_experts_reach_every_linear(folders: Folders, name: str) -> None:
    """Routed and merged experts are what the textbook says; training reaches each linear."""
    base = folders.load(*DECODERS[name])
    experts = make_experts(base, 3)
    routed = RoutedModel(base, Pool.from_experts(experts), "phatgoose")
    facts = {linear: facts_of(experts, linear) for linear in base.linears}
    dense = base_with(base, lambda linear, x_D: RULES["phatgoose"].added(x_D, facts[linear]))
    assert_plain(dense, routed.score(QUESTIONS))
    routed.set_router("merged")
    means = {
        linear: sum(
            e.card.scale * e.linears[linear].lora_B_OR @ e.linears[linear].lora_A_RD
            for e in experts
        )
        / 3
        for linear in base.linears
    }
    assert_plain(base_plus(base, means), routed.score(QUESTIONS))
    routed.detach()

    layers = attach_lora(base.model, base.linears, rank=2, scale=1.0, init_std=0.1, seed=0)
    TargetLoss(base, "float32")(QUESTIONS).backward()
    for linear, layer in layers.items():
        assert layer.lora_B_OR.grad is not None, linear
        assert float(layer.lora_B_OR.grad.abs().max()) > 0, linear
    trained = {n for n, p in base.model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(base.linears)
    detach_lora(base.model, layers)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "falcon", "mpt", "lfm2", "mixtral"])
def test_an_expert_and_its_gates_are_trained(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    before = state(base)
    words = ["goose", "swan", "lake", "bird", "flock", "two"]
    train = [Example(f"the grey {word} is", f" {word}") for word in words]
    recipe = Recipe(
        rank=2,
        scale=1.0,
        init_std=0.1,
        lora=Stage(steps=12, lr=3e-2),
        gates=Stage(steps=4, lr=1e-1),
        batch_size=6,
        micro_batch_size=3,
        evaluation_examples=2,
        dtype="float32",
    )
    rows: list[Progress] = []
    expert = train_expert(base, make_card("e", base), train, train[:2], recipe, report=rows.append)
    losses = [row.loss for row in rows if (row.stage, row.split) == ("lora", "train")]
    assert losses[-1] < 0.9 * losses[0]
    assert expert.linears.keys() == set(base.linears)
    for linear, factors in expert.linears.items():
        assert factors.gate_D is not None
        assert factors.gate_D.shape == factors.lora_A_RD.shape[1:]
        assert float(factors.gate_D.abs().max()) > 0, linear
    after = base.model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_query_projection_is_probed(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    found = last_query_projection(base, base.linears)
    assert found is not None
    assert found.split(".")[-1] in ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
    assert ".1." in found
    assert last_query_projection(base, [n for n in base.linears if ".0." in n]) != found
    heard: list[torch.Tensor] = []
    linear = base.model.get_submodule(found)
    handle = linear.register_forward_pre_hook(lambda _, args: heard.append(args[0][0, -1]))
    for question in QUESTIONS:
        plain_logits(base, question.context, [])
    handle.remove()
    routed = RoutedModel(base, Pool.from_experts(make_experts(base)))
    with torch.inference_mode():
        x_QD = routed._probe([question.context for question in QUESTIONS])
    torch.testing.assert_close(x_QD, torch.stack(heard), rtol=1e-4, atol=1e-5)


_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "koqv")
_MLP = tuple(f"mlp.{x}_proj" for x in ("down", "gate", "up"))
_FUSED = ("query_key_value", "dense"), ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
LINEARS = {
    **dict.fromkeys(ARCHITECTURES.keys() - {"t5", "mt5"}, (*_MLP, *_ATTENTION)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _ATTENTION),
    **dict.fromkeys(("falcon", "bloom"), (*_FUSED[1], *(f"self_attention.{x}" for x in _FUSED[0]))),
    "gpt_neox": (*_FUSED[1], *(f"attention.{x}" for x in _FUSED[0])),
    "phi3": ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
    "phi": ("mlp.fc1", "mlp.fc2", "self_attn.dense", *(f"self_attn.{x}_proj" for x in "kqv")),
    "opt": ("fc1", "fc2", *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v"))),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "mpt": ("attn.Wqkv", "attn.out_proj", "ffn.down_proj", "ffn.up_proj"),
    "lfm2": (
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
        *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v")),
    ),
}


@pytest.mark.parametrize("kind", sorted(LINEARS))
def test_a_record_names_every_linear_of_a_layer(kind: str) -> None:
    linears = adapted_linears(build(kind, **decoder_sizes(kind)))
    second = [name.split(".1.")[1] for name in linears if ".1." in name]
    assert sorted(second) == sorted(LINEARS[kind])
    first = [name.split(".0.")[1] for name in linears if ".0." in name]
    if kind == "lfm2":
        assert sorted(first)[:2] == ["conv.in_proj", "conv.out_proj"]
    else:
        assert first == second
    assert len(first) + len(second) == len(linears)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize(("form", "feed_forward"), [("gated-gelu", 3), ("relu", 2)])
def test_linears_of_t5_and_their_sides(kind: str, form: str, feed_forward: int) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    linears = adapted_linears(build(kind, **sizes, num_heads=2, feed_forward_proj=form))
    # Two layers each: self-attention (4), in the decoder cross-attention (4), feed-forward.
    assert len(linears) == 2 * (4 + feed_forward) + 2 * (8 + feed_forward)
    assert not any("lm_head" in name or "relative" in name for name in linears)
    read_encoder = [n for n in linears if ARCHITECTURES[kind].side_of(n) == "encoder"]
    of_decoder = [n for n in read_encoder if n.startswith("decoder.")]
    assert len(read_encoder) == 2 * (4 + feed_forward) + 4
    assert {n.split(".")[-2:][0] + n[-2:] for n in of_decoder} == {
        "EncDecAttention.k",
        "EncDecAttention.v",
    }


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("window", [2, 3, 6])
def test_a_sliding_window_is_masked(folders: Folders, name: str, window: int) -> None:
    """Shorter than prompts, choices and what is written, alone and with routed experts."""
    kind, changes = WINDOWED[name]
    base = folders.load(kind, {**changes, "sliding_window": window})
    assert base.model.config.sliding_window == window
    assert base.shares_context
    wide = folders.load(kind, {**changes, "sliding_window": 50})
    narrow_says, wide_says = (
        plain_logits(b, QUESTIONS[0].context, QUESTIONS[0].choices[0]) for b in (base, wide)
    )
    assert not torch.allclose(narrow_says, wide_says, atol=1e-2)  # the window matters
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 7)
    RoutedModel(base, Pool.from_experts(make_experts(base)), "phatgoose")
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 7)


def test_a_window_that_a_model_does_not_read_is_ignored(folders: Folders) -> None:
    base = folders.load("llama", {"sliding_window": 3})
    assert base.shares_context
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 5)


@pytest.mark.parametrize("window", [10, 11, 12, 13])
def test_a_window_at_the_length_of_a_row(folders: Folders, window: int) -> None:
    """The last position that is read is 11."""
    base = folders.load("mistral", {"sliding_window": window})
    assert_plain(base, score(base, QUESTIONS))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("window", [12, 13])
def test_answers_at_the_edge_of_a_window(
    folders: Folders, name: str, window: int, limit: int
) -> None:
    """Prompts of at most 8 tokens, targets of 3, and what is written."""
    kind, changes = WINDOWED[name]
    base = folders.load(kind, {**changes, "sliding_window": window})
    questions = [Question(q.context, [[30, 7, 0]]) for q in QUESTIONS]
    assert_answers_plainly(base, limit, questions)


def test_a_prompt_within_the_window_is_read_once(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(window: int) -> int:
        base = folders.load("mistral", {"sliding_window": window})
        counted = [0]

        def count(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counted[0] += args[0].shape[1]

        base.model.get_input_embeddings().register_forward_pre_hook(count)
        answer(base, QUESTIONS, 3)
        return counted[0]

    longest = max(len(question.context) for question in QUESTIONS)
    assert read(100) < read(6)
    assert read(100) <= longest + 3 + max(len(q.choices[0]) for q in QUESTIONS)


@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize("kind", ["lfm2", "mpt", "llama", "mistral"])
def test_rows_of_their_own_are_counted_as_shared_ones(
    folders: Folders, kind: str, limit: int
) -> None:
    """Each context once, each choice once; what is written is not counted by `answer`."""
    base = folders.load(kind, {"sliding_window": 5} if kind == "mistral" else {})
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), "phatgoose")
    with routed.recording(RoutingLog()) as log:
        scores = routed.score(QUESTIONS)
    tokens = sum(len(q.context) + sum(len(choice) - 1 for choice in q.choices) for q in QUESTIONS)
    assert set(log.tokens) == set(base.linears)
    assert set(log.tokens.values()) == {tokens}
    assert all(w.sum() == pytest.approx(tokens, rel=1e-4) for w in log.weights.values())
    with routed.recording(RoutingLog()) as log:
        _, first = routed.answer(QUESTIONS, limit)
    assert set(log.tokens.values()) == {
        sum(len(q.context) + len(q.choices[0]) - 1 for q in QUESTIONS)
    }
    for one, (other, *_) in zip(first, scores, strict=True):
        assert_same(one, other)


def test_separate_rows_give_what_shared_ones_give(
    llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For routers that decide by token, by query, and by a bias for each query."""
    monkeypatch.setattr("phatgoose.encoder.load_encoder", lambda _: FakeEncoder())
    monkeypatch.setattr("phatgoose.routers.profiles._embedded", {})
    pool = make_pool(llama)
    apart = dataclasses.replace(llama, shares_context=False)
    questions = [
        dataclasses.replace(question, query=Query(f"query {index}", task=f"task {index}"))
        for index, question in enumerate(QUESTIONS)
    ]
    for router in ("base", "phatgoose", "retrieval", "glider", "merged"):
        found = []
        for base in (llama, apart):
            routed = RoutedModel(base, pool, router)
            with routed.recording(RoutingLog()) as log:
                found.append((routed.score(questions), log))
            routed.detach()
        (shared, shared_log), (separate, separate_log) = found
        for one, other in zip(shared, separate, strict=True):
            for a, b in zip(one, other, strict=True):
                assert_same(a, b)
        assert shared_log.tokens == separate_log.tokens
        for name, weights_E in shared_log.weights.items():
            torch.testing.assert_close(separate_log.weights[name], weights_E, rtol=1e-4, atol=1e-4)


def test_separate_rows_need_no_more_memory(llama: Base) -> None:
    """No pass has more tokens, padding included, than the shared rows of the batch."""
    many = [
        Question([5] * 30, [[7] * n + [0] for n in range(12)]),
        Question([6] * 3, [[8, 0], [9, 0]]),
    ]
    sizes: list[int] = []
    embeddings = llama.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    expected = score(llama, many)
    found = score(dataclasses.replace(llama, shares_context=False), many)
    handle.remove()
    shared, *separate = sizes
    assert len(separate) > 1
    assert max(separate) <= shared
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(APART))
def test_a_base_that_leaks_is_found_and_says_so(
    folders: Folders, name: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = folders.load(*DECODERS[name], dtype=dtype)
    lines = [r.getMessage() for r in caplog.records if "share a context" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"base={base.name}: choices cannot share a context")
    assert "a row of its own" in lines[0]
    assert "\n" not in lines[0]
    stored = load_file(Path(base.name) / "model.safetensors")  # and its weights are as they were
    weights = dict(base.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    for key, weight in stored.items():
        assert torch.equal(weights[key], weight.to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon with groups", "mixtral"])
def test_a_record_that_says_nothing_is_tested(
    folders: Folders,
    name: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind, changes = DECODERS[name]
    silent = dataclasses.replace(ARCHITECTURES[kind], shares_context=False)
    monkeypatch.setitem(ARCHITECTURES, kind, silent)
    with caplog.at_level(logging.WARNING):
        assert folders.load(kind, changes, dtype=dtype).shares_context
    assert "share a context" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "changes", "record"),
    [
        # A record that forgets the window, one that was not tested, and a window of another name.
        ("mistral", {"sliding_window": 3}, Architecture(r"self_attn\..*|mlp\..*", "q_proj")),
        (
            "mixtral",
            {"sliding_window": 3},
            dataclasses.replace(ARCHITECTURES["mixtral"], shares_context=False),
        ),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "window_size": 3},
            Architecture(
                linears=r"attention\.([qkv]|out)_proj|mlp\.c_(fc|proj)", query=r"attention\.q_proj"
            ),
        ),
    ],
)
def test_windows_that_no_test_covers_are_read_apart(
    folders: Folders,
    kind: str,
    changes: dict[str, Any],
    record: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, kind, record)
    with caplog.at_level(logging.WARNING):
        base = folders.load(kind, changes)
    assert not base.shares_context
    assert re.search(r"its configuration has .*window.*, which", caplog.text)
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 5)


def test_layers_whose_masks_are_unknown_are_read_apart(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also under a record that says that sharing is exact."""
    record = dataclasses.replace(ARCHITECTURES["lfm2"], window="layer_types", shares_context=True)
    monkeypatch.setitem(ARCHITECTURES, "lfm2", record)
    with caplog.at_level(logging.WARNING):
        base = folders.load("lfm2", {})
    assert "its layers are of the kinds conv, full_attention" in caplog.text
    assert_plain(base, score(base, QUESTIONS))


@pytest.mark.parametrize("router", ["logo", "phatgoose"])
@pytest.mark.parametrize(
    ("kind", "changes"), [("lfm2", {}), ("mpt", {}), ("mistral", {"sliding_window": 5})]
)
def test_routers_decide_the_same_where_a_prompt_is_read_twice(
    folders: Folders, kind: str, changes: dict[str, Any], router: str
) -> None:
    base = folders.load(kind, changes)
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), router)
    texts = ["Is the lake deep?", "the goose", "The grey goose flies over the lake, and"]
    questions = [
        Question.encode(base, text, [" yes, the swan"], query=Query(text)) for text in texts
    ]
    written, scores = routed.answer(questions, 6)
    assert written == routed.generate(texts, 6)
    for one, (other,) in zip(scores, routed.score(questions), strict=True):
        assert_same(one, other)


def test_a_base_built_by_hand_is_read_apart(folders: Folders) -> None:
    loaded = folders.load("lfm2", {})
    base = Base("a", "b", loaded.model, loaded.tokenizer, loaded.linears)
    assert not base.shares_context
    assert_plain(base, score(base, QUESTIONS))


@pytest.mark.parametrize(
    ("name", "count", "places"),
    [
        (
            "mixtral",
            2 * (3 * 16 + 3 * 48 * 16 + 3 * 16 * 24),
            ["gate", "gate_up_proj", "down_proj"],
        ),
        ("qwen3_moe", 2 * (3 * 16 + 3 * 16 * 16 + 3 * 16 * 8), ["experts.down_proj"]),
        ("opt with projections", 2 * 8 * 16, ["project_in", "project_out"]),
        ("lfm2", 16 * 3, [r"layers\.\*\.conv\.conv\.weight"]),
        ("llama", 0, []),
        ("gpt2", 0, []),
        ("t5", 0, []),
    ],
)
def test_weights_that_no_expert_adapts_are_said(
    folders: Folders,
    t5_folder: Path,
    name: str,
    count: int,
    places: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        base = load_base(str(t5_folder)) if name == "t5" else folders.load(*DECODERS[name])
        loaded, total = caplog.text, sum(p.numel() for p in base.model.parameters())
        caplog.clear()
        bare, linears = bare_model(base.name, Path(base.name))  # as the plan has it
    assert bare.device.type == "meta"
    assert linears == base.linears
    for text in (loaded, caplog.text):
        lines = [line for line in text.splitlines() if "no expert adapts" in line]
        assert len(lines) == (count > 0)
        for line in lines:
            assert f"base={base.name}: no expert adapts {count:,} of its {total:,} " in line
            assert all(re.search(place, line) for place in places)


def refused(folder: Path) -> list[str]:
    """What loading, and planning with the bare base, say."""
    said = []
    for attempt in (lambda: load_base(str(folder)), lambda: bare_model(str(folder), folder)):
        with pytest.raises(PhatgooseError) as raised:
            attempt()
        said.append(str(raised.value))
        assert said[-1].startswith(f"base={folder}: ")
        assert "\n" not in said[-1]
    return said


def test_an_unknown_architecture_says_what_to_add(tmp_path: Path) -> None:
    build("stablelm", **decoder_sizes("stablelm")).save_pretrained(tmp_path)
    for line in refused(tmp_path):
        assert "model_type=stablelm: there is no record of this architecture" in line
        assert "(known: bloom, falcon, gemma, " in line
        assert "Add one to ARCHITECTURES in phatgoose/architecture.py: 'stablelm'" in line


def test_adding_an_architecture_is_adding_a_record(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Architecture(linears=ARCHITECTURES["llama"].linears, query=r"self_attn\.q_proj")
    monkeypatch.setitem(ARCHITECTURES, "stablelm", record)
    base = folders.load("stablelm", {})
    assert len(base.linears) == 14
    assert base.shares_context
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 4)


def test_a_record_that_misses_linears_is_an_error() -> None:
    model = build("llama", **decoder_sizes("llama"))
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(PhatgooseError, match=r"14 linears and leaves out 1 .*1\.mlp\.extra"):
        adapted_linears(model)
    del model.model.layers
    with pytest.raises(PhatgooseError, match="it has none"):
        adapted_linears(model)


def test_bart_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{side}_{x}": 2 for side in ("encoder", "decoder") for x in ("attention_heads",)}
    build("bart", **sizes, encoder_ffn_dim=16, decoder_ffn_dim=16).save_pretrained(tmp_path)
    for line in refused(tmp_path):
        assert "model_type=bart: of encoders with a decoder only T5's are supported" in line
        assert line.endswith("Give a T5-like base, or a decoder-only one.")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantized_base_is_refused(tmp_path: Path, method: str) -> None:
    make_decoder(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for line in refused(tmp_path):
        assert "the weights are quantized" in line
        assert "float32, bfloat16 or float16" in line


def test_a_model_with_integer_weights_is_refused(llama: Base) -> None:
    linear = llama.model.get_submodule(llama.linears[3])
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PhatgooseError, match=rf"{llama.linears[3]} is quantized \(torch\.int8\)"):
        adapted_linears(llama.model)


def test_a_configuration_that_transformers_does_not_know_is_one_line(tmp_path: Path) -> None:
    make_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    for line in refused(tmp_path):
        assert "transformers cannot read its config.json" in line
