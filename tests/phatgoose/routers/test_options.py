"""Check that errors for invalid options name the router, the option, the value and valid ones."""

import dataclasses
from typing import Any

import pytest
import torch

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.routers import ROUTERS, all_needs, make_router
from phatgoose.routers import stacked_profiles as profiles
from phatgoose.routers.interface import Router, Scorer, TokenRouter, side_information
from phatgoose.routers.logo import Logo
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.random_experts import RandomExperts
from phatgoose.routers.ties import Ties
from tests.support.pools import FakeEncoder, fake_embedding, pool_of
from tests.support.tiny import make_experts

COUNT = "a whole number of at least 1"
NUMBER = "a number"
INF, NAN = float("inf"), float("nan")
# Option -> what is valid, invalid values, and valid values at the limits.
OPTIONS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "top_k": (COUNT, [0, -1, 1.5, "2", [2]], [1, 10**6]),
    "candidates": (COUNT, [0, -1, 2.0, "2"], [1, 10**6]),
    "centroids": (COUNT, [0, -3, 0.5, "8"], [1, 10**6]),
    "examples": (COUNT, [0, -3, 0.5, "8"], [1, 10**6]),
    "temperature": ("a positive number", [0, -1, INF, NAN, "warm"], [1e-6, 1, 1e6]),
    "gamma": (NUMBER, [INF, -INF, NAN, "much"], [0, -3, 1e6]),
    "weight": (NUMBER, [INF, -INF, NAN, "much"], [0, -0.5, 1e6]),
    "density": ("above 0 and at most 1", [0, -0.1, 1.01, NAN, "0.2"], [1e-6, 1]),
    "drop": ("at least 0 and below 1", [1, -0.1, 1.5, NAN, "0.9"], [0, 0.999]),
    "mix": ("outputs or factors", ["product", "", 1], ["outputs", "factors"]),
    "weights": ("softmax or equal", ["sum", "", 1], ["softmax", "equal"]),
}
BY = {
    "lag": ("projection or spectral", ["norm", "", 1], ["projection", "spectral"]),
    "logo": ("norm or entropy", ["spectral", "", 1], ["norm", "entropy"]),
}
FIELDS = {
    name: {field.name for field in dataclasses.fields(router)}  # type: ignore[arg-type]
    for name, router in ROUTERS.items()
}
HAVING = [(n, o) for n in FIELDS for o in sorted(FIELDS[n]) if o in OPTIONS or o == "by"]


def allowed(name: str, option: str) -> tuple[str, list[Any], list[Any]]:
    return BY[name] if option == "by" else OPTIONS[option]


def make(name: str, option: str, value: Any) -> Any:
    needed = {"genknowsub": {"general": "e0"}, "single": {"expert": "e0"}}.get(name, {})
    return make_router(name, **{**needed, option: value})


def test_every_option_is_covered() -> None:
    known = {*OPTIONS, "by", "seed", "expert", "general", "router", "divide_by_sqrt_d"}
    known |= {"standardise_input", "standardise_gates"}
    for name, fields in FIELDS.items():
        assert fields <= known, name
    assert {option for _, option in HAVING} == {*OPTIONS, "by"}


@pytest.mark.parametrize(("name", "option"), HAVING)
def test_invalid_option_values_are_refused(name: str, option: str) -> None:
    words, wrong, _ = allowed(name, option)
    for value in wrong:
        with pytest.raises(PhatgooseError) as caught:
            make(name, option, value)
        assert str(caught.value) == f"router {name}: {option} is {value!r}: it must be {words}"


@pytest.mark.parametrize(("name", "option"), HAVING)
def test_values_at_the_limits_are_accepted(name: str, option: str) -> None:
    for value in allowed(name, option)[2]:
        assert getattr(make(name, option, value), option) == value


def test_a_weight_is_optional() -> None:
    assert make_router("dare", weight=None) == make_router("dare")


@pytest.mark.parametrize("name", ["genknowsub", "random_experts"])
def test_a_wrapper_checks_its_inner_router(name: str) -> None:
    with pytest.raises(PhatgooseError, match="no router 'arow': did you mean arrow"):
        make(name, "router", "arow")


def test_genknowsub_requires_a_token_router() -> None:
    for inner in ("merged", "retrieval", "base"):
        with pytest.raises(PhatgooseError, match=f"genknowsub: {inner} does not route tokens"):
            make("genknowsub", "router", inner)


def test_defaults_match_the_papers() -> None:
    """Check the values of docs/routers.md and the papers; another default is another method."""
    expected = {
        "ariadne": {"centroids": 8},
        "arrow": {"top_k": 4, "temperature": 1.0, "divide_by_sqrt_d": False, "mix": "factors"},
        "average_activation": {"top_k": 2},
        "base": {},
        "dare": {"drop": 0.9, "weight": None, "seed": 0},
        "genknowsub": {"general": "e0", "router": "arrow"},
        "glider": {"top_k": 2, "gamma": 3.0},
        "lag": {"candidates": 20, "by": "projection"},
        "logo": {"top_k": 20, "by": "norm"},
        "lorauter": {"top_k": 3, "temperature": 0.2, "examples": 200},
        "merged": {},
        "merged_factors": {},
        "phatgoose": {
            **{"top_k": 2, "temperature": 1.0},
            **{"standardise_input": True, "standardise_gates": True},
        },
        "random": {"top_k": 2, "seed": 0},
        "random_experts": {"router": "merged", "seed": 0},
        "retrieval": {},
        "seqr": {},
        "single": {"expert": "e0"},
        "spectr": {"top_k": 4, "weights": "equal", "mix": "factors"},
        "task_arithmetic": {"weight": 0.3},
        "ties": {"density": 0.2, "weight": 1.0},
        "uniform": {},
    }
    assert expected.keys() == ROUTERS.keys()
    for name, options in expected.items():
        given = {"genknowsub": {"general": "e0"}, "single": {"expert": "e0"}}.get(name, {})
        router = make_router(name, **given)
        assert vars(router) == options, name
    for name in ("lag", "seqr"):  # not an option: one expert per token
        assert getattr(make_router(name), "top_k") == 1  # noqa: B009


def test_each_router_declares_its_needs_and_side_information() -> None:
    def of(name: str) -> Any:
        given = {"genknowsub": {"general": "e0"}, "single": {"expert": "e0"}}.get(name, {})
        return make_router(name, **given)

    needs = {name: all_needs(of(name)) for name in ROUTERS}
    assert {name: need for name, need in needs.items() if need} == {
        "ariadne": ("embeddings",),
        "average_activation": ("activations",),
        "glider": ("gates", "descriptions"),
        "lorauter": ("embeddings",),
        "phatgoose": ("gates",),
        "retrieval": ("embeddings",),
        "seqr": ("activations",),
    }
    told = {name: side_information(of(name)) for name in ROUTERS}
    assert {name: text for name, text in told.items() if text} == {
        "glider": "a description of the evaluation task"
    }
    assert all(router.zero_shot for router in ROUTERS.values())
    for inner in ("glider", "phatgoose"):  # a wrapper needs and knows what its inner router does
        wrapped = make_router("random_experts", router=inner)
        assert all_needs(wrapped) == needs[inner]
        assert side_information(wrapped) == told[inner]


@pytest.mark.parametrize(("name", "options"), [("single", {}), ("single", {"expert": ""}),
                                               ("single:", {})])  # fmt: skip
def test_single_requires_an_expert(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PhatgooseError) as caught:
        make_router(name, **options)
    assert str(caught.value) == "router single needs an expert: call it single:<expert>"
    assert make_router("single:e1") == make_router("single", expert="e1")


def test_an_unknown_router_or_option_is_answered_with_the_available_ones() -> None:
    all_names = ", ".join(sorted(ROUTERS))
    with pytest.raises(PhatgooseError) as caught:
        make_router("phatgose")
    words = f"no router 'phatgose': did you mean phatgoose? there are {all_names}"
    assert str(caught.value) == words
    for name in ("xyzzy", "merged:e1"):
        with pytest.raises(PhatgooseError, match=f"no router {name!r}: "):
            make_router(name)
    with pytest.raises(PhatgooseError) as caught:
        make_router("arrow", topk=2)
    assert str(caught.value) == (
        "router arrow has no option 'topk'; it has "
        "['top_k', 'temperature', 'divide_by_sqrt_d', 'mix']"
    )


def test_gates_are_required_on_every_linear(llama: Base) -> None:
    pool = Pool.from_experts(make_experts(llama, 3))
    router = make_router("phatgoose")
    router.check(pool)
    for linear in (llama.linears[0], llama.linears[-1]):
        bare = dataclasses.replace(pool.linears[linear], gate_ED=None)
        lacking = dataclasses.replace(pool, linears={**pool.linears, linear: bare})
        with pytest.raises(PhatgooseError, match="router phatgoose needs gates, and not every"):
            router.check(lacking)


def test_embedded_texts_do_not_accumulate(
    llama: Base, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._MOST_EMBEDDED", 3)
    pool = pool_of(make_experts(llama, 2))
    for place in range(20):
        rows_QS = profiles.embed(pool, [f"text {place}", "again"])
        assert torch.equal(rows_QS[1], fake_embedding("again"))
        assert len(profiles._embedded[encoder.fingerprint]) <= 5
    assert encoder.asked.count("again") < 20


@pytest.mark.parametrize(
    "router",
    [
        Phatgoose(top_k=0),
        Phatgoose(temperature=float("nan")),
        Phatgoose(top_k=None),  # type: ignore[arg-type]
        Logo(by="loud"),
        Ties(density=2.0),
        RandomExperts(router="genknowsub"),
    ],
)
def test_options_are_checked_however_a_router_is_made(llama: Base, router: Router) -> None:
    """Check routers made from their class too, not only by `make_router`."""
    model = RoutedModel(llama, pool_of(make_experts(llama, 3)), "merged")
    before = model.router
    with pytest.raises(PhatgooseError, match=f"router ({router.name()}|genknowsub)"):
        model.set_router(router)
    assert model.router is before


@dataclasses.dataclass(frozen=True)
class Theirs(TokenRouter):
    """A third-party router that gives options of ours another meaning."""

    weight: str = "heavy"
    examples: tuple[str, ...] = ("a", "b")
    density: float = 7.0
    temperature: float = -1.0
    top_k: int = 1

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        return lambda x_TD: x_TD.new_zeros(len(x_TD), len(pool.experts))


def test_a_plugin_may_reuse_option_names(llama: Base) -> None:
    model = RoutedModel(llama, pool_of(make_experts(llama, 3)), Theirs())
    assert len(model.score([Question([5, 9], [[12, 1]])])[0]) == 1
    with pytest.raises(PhatgooseError, match="router theirs: top_k is 0: it must be a whole num"):
        model.set_router(Theirs(top_k=0))
    with pytest.raises(PhatgooseError, match="router theirs: mix is 'sum': it must be outputs or"):
        model.set_router(_with_mix(Theirs(), "sum"))


def _with_mix(router: Theirs, mix: str) -> Theirs:
    """Return a router whose class has an attribute `mix`, which a plugin may set too."""
    return type("Theirs", (Theirs,), {"mix": mix, "__module__": __name__})()
