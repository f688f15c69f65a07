import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.generation import generate
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import ROUTERS, Merge, QueryRouter, TokenRouter, all_needs, make_router
from phatgoose.routers.average_activation import AverageActivation
from phatgoose.routers.merged import Merged
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.random import Random
from phatgoose.routers.random_experts import RandomExperts
from phatgoose.routers.single import Single
from tests.support.plain import plain_logits
from tests.support.pools import FakeEncoder, make_pool, queries_of
from tests.support.tiny import make_experts, state

# Every router for a pool, with its required options.
ALL: dict[str, dict[str, Any]] = {
    **{name: {} for name in ROUTERS},
    "single": {"expert": "e1"},
    "genknowsub": {"general": "e0"},
}
TASK = "what the evaluation task is about"


def questions_of(base: Base) -> list[Question]:
    queries = [
        Query("Is the lake deep?", (" yes", " no"), TASK),
        Query("two and three is", (" five",), TASK),
    ]
    return [Question.encode(base, q.text, q.choices, query=q) for q in queries]


@torch.no_grad()
def logits(base: Base) -> Tensor:
    return plain_logits(base, [5, 9, 11, 20, 33, 8], [12, 30, 7])


def test_routers_are_made_by_name() -> None:
    assert make_router("base") == NoExpert()
    assert make_router("merged") == Merged()
    assert make_router("phatgoose", top_k=3) == Phatgoose(top_k=3)
    assert make_router("random", seed=5) == Random(seed=5)
    assert make_router("random_experts", router="single:e1") == RandomExperts("single:e1")
    assert make_router("single:a-b.c") == make_router("single", expert="a-b.c") == Single("a-b.c")


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_router_classes_are_named_after_the_router(name: str) -> None:
    router = make_router(name, **ALL[name])
    assert type(router) is ROUTERS[name]
    assert router.name() == name or name == "base"
    assert all(field.default == getattr(router, field.name) for field in defaults(router))


def defaults(router: Any) -> list[Any]:
    return [f for f in dataclasses.fields(router) if f.name not in ALL.get(router.name(), {})]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phatgose", "no router 'phatgose': did you mean phatgoose"),
        ("marged", "did you mean merged"),
        ("xyz", "no router 'xyz': there are ariadne, arrow, average_activation, base, dare, "),
        ("merged:a", "no router 'merged:a'"),
        ("single", "expert"),
        ("single:", "expert"),
    ],
)
def test_wrong_names_are_answered_with_near_names(name: str, message: str) -> None:
    with pytest.raises(PhatgooseError, match=message):
        make_router(name)


@pytest.mark.parametrize(
    ("name", "option"),
    [("phatgoose", "topk"), ("base", "top_k"), ("random", "needs"), ("uniform", "top_k")],
)
def test_wrong_options_are_answered_with_the_available_ones(name: str, option: str) -> None:
    with pytest.raises(PhatgooseError, match=f"router {name} has no option '{option}'; it has"):
        make_router(name, **{option: 1})


COUNT, POSITIVE = "a whole number of at least 1", "a positive number"


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        *((name, "top_k", 0, COUNT) for name in ("phatgoose", "arrow", "logo", "lorauter")),
        *((name, "top_k", -1, COUNT) for name in ("random", "spectr", "glider")),
        ("average_activation", "top_k", 0, COUNT),
        *((name, "temperature", 0, POSITIVE) for name in ("phatgoose", "arrow", "lorauter")),
        ("phatgoose", "temperature", -1.0, POSITIVE),
        ("phatgoose", "temperature", float("nan"), POSITIVE),
        *((name, "mix", "x", "outputs or factors") for name in ("arrow", "spectr")),
        ("spectr", "weights", "x", "softmax or equal"),
        ("lag", "by", "x", "projection or spectral"),
        ("logo", "by", "x", "norm or entropy"),
        ("lag", "candidates", 0, COUNT),
        ("ariadne", "centroids", 0, COUNT),
        ("lorauter", "examples", 0, COUNT),
        ("ties", "density", 0, "above 0 and at most 1"),
        ("ties", "density", 2, "above 0 and at most 1"),
        ("dare", "drop", 1, "at least 0 and below 1"),
        ("dare", "drop", -0.1, "at least 0 and below 1"),
    ],
)
def test_invalid_values_are_refused(name: str, option: str, value: Any, message: str) -> None:
    expected = rf"router {name}: {option} is {value!r}: it must be {message}"
    with pytest.raises(PhatgooseError, match=expected):
        make_router(name, **{option: value})


@pytest.mark.parametrize("name", ["random_experts", "genknowsub"])
def test_an_unknown_wrapped_router_is_refused_immediately(name: str) -> None:
    with pytest.raises(PhatgooseError, match="no router 'phatgose': did you mean phatgoose"):
        make_router(name, router="phatgose")


def test_all_routers_are_zero_shot_and_only_glider_knows_the_task() -> None:
    assert all(router.zero_shot for router in ROUTERS.values())
    assert [name for name, r in ROUTERS.items() if r.side_information] == ["glider"]


def test_routers_declare_their_needs() -> None:
    expected = {
        "ariadne": ("embeddings",),
        "average_activation": ("activations",),
        "glider": ("gates", "descriptions"),
        "lorauter": ("embeddings",),
        "phatgoose": ("gates",),
        "retrieval": ("embeddings",),
        "seqr": ("activations",),
    }
    for name, options in ALL.items():
        assert all_needs(make_router(name, **options)) == expected.get(name, ()), name
    wrapper = make_router("random_experts", router="glider")
    assert all_needs(wrapper) == ("gates", "descriptions")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("phatgoose", {}, "router phatgoose needs gates, .*train gates .*or use a router without"),
        ("glider", {}, r"router glider needs gates, .*train gates"),
        ("average_activation", {}, r"router average_activation needs activations, .*measure_prof"),
        ("seqr", {}, r"router seqr needs activations, .*\(`measure_profile`\)"),
        *(
            (name, {}, rf"router {name} needs embeddings, .*\(`measure_profile`\)")
            for name in ("retrieval", "lorauter", "ariadne")
        ),
        ("random_experts", {"router": "phatgoose"}, "router phatgoose needs gates"),
        ("random_experts", {"router": "retrieval"}, "router retrieval needs embeddings"),
        ("genknowsub", {"general": "e0", "router": "seqr"}, "router seqr needs activations"),
    ],
)
def test_a_missing_need_is_named_with_its_fix(
    llama: Base, name: str, options: dict[str, Any], message: str
) -> None:
    routed = RoutedModel(llama, Pool.from_experts(make_experts(llama, gates=False)))
    before = logits(llama)
    with pytest.raises(PhatgooseError, match=message):
        routed.set_router(make_router(name, **options))
    assert routed.router == NoExpert()
    assert torch.equal(logits(llama), before)


def test_a_missing_description_is_an_error(llama: Base) -> None:
    pool = make_pool(llama, 3)
    assert pool.profiles is not None
    silent = dataclasses.replace(pool.profiles[1], description="")
    pool = pool.with_profiles([pool.profiles[0], silent, pool.profiles[2]])
    with pytest.raises(PhatgooseError, match=r"router glider needs descriptions, .*`description`"):
        make_router("glider").check(pool)
    AverageActivation().check(pool)


def test_every_router_has_exactly_one_kind() -> None:
    kinds = (TokenRouter, QueryRouter, Merge)
    others = [name for name, router in ROUTERS.items() if not issubclass(router, kinds)]
    assert others == ["base", "genknowsub", "random_experts"]


def test_changing_routers_leaves_no_state_behind(base: Base, encoder: FakeEncoder) -> None:
    bare, before = logits(base), state(base)
    modules = {name: base.model.get_submodule(name) for name in base.linears}
    questions = questions_of(base)
    routed = RoutedModel(base, make_pool(base))
    of_the_base = routed.score(questions)
    first: dict[str, list[Any]] = {}
    for name in [*ALL, *reversed(ALL)]:
        routed.set_router(make_router(name, **ALL[name]))
        scores = routed.score(questions)
        if name != "base":
            assert scores != of_the_base, name
        assert first.setdefault(name, scores) == scores, name
        routed.set_router("base")
        assert torch.equal(logits(base), bare), name
    assert first["base"] == of_the_base
    routed.set_router("arrow")
    routed.detach()
    assert torch.equal(logits(base), bare)
    assert all(base.model.get_submodule(name) is module for name, module in modules.items())
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_decisions_for_a_batch_do_not_outlive_it(base: Base, encoder: FakeEncoder) -> None:
    """Check that an unannounced forward pass does not use it."""
    routed = RoutedModel(base, make_pool(base), "phatgoose")
    expected = logits(base)
    for name in ("glider", "logo", "retrieval"):
        routed.set_router(name)
        routed.score(questions_of(base)[:1])
        with pytest.raises(PhatgooseError, match="routers of whole queries"):
            logits(base)
    routed.set_router("phatgoose")
    assert torch.equal(logits(base), expected)


# After rounding, routers that compare scores may choose another expert.
SMOOTH = [n for n, r in ROUTERS.items() if issubclass(r, Merge)] + ["retrieval", "lorauter", "base"]


def test_every_router_works_in_bfloat16(base: Base, encoder: FakeEncoder) -> None:
    pool = make_pool(base)
    half = load_base(base.name, dtype="bfloat16")
    full, rounded = RoutedModel(base, pool), RoutedModel(half, pool)
    questions = questions_of(base)
    heard: set[torch.dtype] = set()
    for name, options in ALL.items():
        full.set_router(make_router(name, **options))
        rounded.set_router(make_router(name, **options))
        expected = [s.mean for scores in full.score(questions) for s in scores]
        with rounded.listening(lambda _, x: heard.add(x.dtype)):
            means = [s.mean for scores in rounded.score(questions) for s in scores]
            texts = rounded.generate(queries_of(questions), 2)
        assert len(texts) == len(questions)
        difference = max(abs(a - b) for a, b in zip(means, expected, strict=True))
        assert difference < (0.3 if name in SMOOTH else 3.0), name
    assert heard == {torch.bfloat16}


@pytest.mark.parametrize("name", [n for n, r in ROUTERS.items() if issubclass(r, TokenRouter)])
def test_rules_give_float32_weights_and_the_choice_of_float32_inputs(
    llama: Base, name: str
) -> None:
    router, pool = make_router(name), make_pool(llama, 8)
    assert isinstance(router, TokenRouter)
    x_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = llama.linears[1]
    bias_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    weights_TK, indices_TK = router.rule(pool, linear)(x_TD, bias_TE)
    assert weights_TK.dtype == torch.float32
    expected_TK, kept_TK = router.rule(pool, linear)(x_TD.float(), bias_TE)
    assert torch.equal(indices_TK, kept_TK)
    assert torch.equal(weights_TK, expected_TK)


def test_a_bare_base_generates_like_the_base_router(base: Base) -> None:
    prompts = ["the grey goose", "Is the lake"]
    contexts = [q.context for q in (Question.encode(base, p, ["a"]) for p in prompts)]
    expected = generate(base, contexts, 5)
    routed = RoutedModel(base, make_pool(base, 3), "base")
    assert routed.generate(prompts, 5) == expected


def test_messages_have_one_line(llama: Base) -> None:
    pool = Pool.from_experts(make_experts(llama, gates=False))
    for router in ROUTERS.values():
        for need in router.needs:
            with pytest.raises(PhatgooseError) as caught:
                make_router(router.name()).check(pool)
            assert re.fullmatch(r"[^\n]+", str(caught.value)), need
