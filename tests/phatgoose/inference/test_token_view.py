import itertools
import re
from collections.abc import Sequence
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.token_view import (
    COLORS,
    TokenRoute,
    _strings,
    to_html,
    to_terminal,
    token_routes,
)
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.routers import QueryRouter, Router
from phatgoose.routers.interface import Probe, Scorer, TokenRouter
from phatgoose.routers.logo import Logo
from phatgoose.tokenization import encode_pair
from tests.support.plain import plain_logits
from tests.support.tiny import make_experts

TEXT, ANSWER = "The goose flies over the lake", " and swims"
EXPERTS = ("e0", "e1", "e2")
ROUTES = [
    TokenRoute("The", (0.75, 0.0, 0.25)),
    TokenRoute(" <goose> &\n", (0.0, 1.0, 0.0)),
    TokenRoute("\x1b[2J\u202e", (0.25, 0.0, 0.75)),
]


def attach(base: Base, router: Router | str = "phatgoose") -> RoutedModel:
    return RoutedModel(base, Pool.from_experts(make_experts(base)), router)


def linears_of(base: Base) -> list[str]:
    """Return a linear of each kind; the kinds read different tokens."""
    if not base.is_encoder_decoder:
        return [base.linears[3], base.linears[-1]]
    kinds = ["encoder.block.1.*SelfAttention.v", ".*EncDecAttention.k", "decoder.*wi_0"]
    return [next(n for n in base.linears if re.fullmatch(kind, n)) for kind in kinds]


@torch.no_grad()
def textbook_weights(model: RoutedModel, expert_gates: list[Tensor], linear: str) -> Tensor:
    """Return each token's weights by the formula, from the linear's inputs in one plain pass."""
    heard: list[Tensor] = []
    hook = model.base.model.get_submodule(linear).register_forward_pre_hook(
        lambda _, args: heard.append(args[0])
    )
    context, choice = encode_pair(model.base, TEXT, ANSWER)
    plain_logits(model.base, context, choice[:-1])
    hook.remove()
    rows = []
    for x_D in heard[0][0].double():
        scores = []
        for gate_D in expert_gates:
            x, gate = (
                (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() for v in (x_D, gate_D.double())
            )
            scores.append(float(x @ gate) / len(x) ** 0.5)
        share = torch.tensor(scores).softmax(dim=0)
        share[share.argmin()] = 0  # two of three are kept
        rows.append(share / share.sum())
    return torch.stack(rows)


def test_the_weights_match_the_formulas(base: Base) -> None:
    experts, model = make_experts(base), attach(base)
    for linear in linears_of(base):
        gates = [gate for e in experts if (gate := e.linears[linear].gate_D) is not None]
        expected = textbook_weights(model, gates, linear)
        routes = token_routes(model, TEXT, linear, answer=ANSWER)
        actual = torch.tensor([route.weights for route in routes])
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert [r.strongest for r in routes] == expected.argmax(dim=1).tolist()


def test_a_decoder_shows_the_text_and_the_answer(llama: Base) -> None:
    model = attach(llama)
    for linear in linears_of(llama):
        routes = token_routes(model, TEXT + " ", linear, answer=ANSWER.strip())
        assert "".join(route.token for route in routes) == TEXT + ANSWER
        assert " goose" in [route.token for route in routes]
        alone = token_routes(model, TEXT, linear)
        assert "".join(route.token for route in alone) == TEXT
        for one, other in zip(alone, routes, strict=False):
            assert one.weights == pytest.approx(other.weights, abs=1e-4)


def test_each_side_of_t5_shows_its_own_tokens(t5: Base) -> None:
    model = attach(t5)
    self_attention, cross_attention, feed_forward = linears_of(t5)
    for linear in (self_attention, cross_attention):
        tokens = [r.token for r in token_routes(model, TEXT, linear, answer=ANSWER)]
        assert tokens == [" The", " goose", " flies", " over", " the", " lake", "</s>"]
    tokens = [r.token for r in token_routes(model, TEXT, feed_forward, answer="the goose")]
    assert tokens == ["<pad>", " the", " goose"]
    assert [r.token for r in token_routes(model, TEXT, feed_forward)] == ["<pad>"]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8", max_codepoint=0x7F), max_size=40))
def test_byte_level_tokens_join_to_the_text(llama_tokens: Base, text: str) -> None:
    ids = llama_tokens.tokenizer(text)["input_ids"]
    assert "".join(_strings(llama_tokens, ids)) == text


@pytest.fixture(scope="module")
def llama_tokens(llama_folder: object) -> Base:
    from phatgoose.base import load_base

    return load_base(str(llama_folder))


def test_partial_characters_are_shown_as_such(llama: Base) -> None:
    routes = token_routes(attach(llama), "a 🪿 b", llama.linears[0])
    assert [route.token for route in routes] == ["a", " ", "�", "�", "�", "�", " ", "b"]


def test_a_query_router_gives_every_token_the_same_mixture(base: Base) -> None:
    model = attach(base, Logo())
    for linear in linears_of(base):
        routes = token_routes(model, TEXT, linear, answer=ANSWER)
        assert {route.weights for route in routes} == {routes[0].weights}
        assert sum(routes[0].weights) == pytest.approx(1, abs=1e-5)


class Overhearing(QueryRouter):
    """A router that sends every query to the last expert and records what it was shown."""

    def __init__(self) -> None:
        self.queries: list[Query] = []

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        self.queries += queries
        last_Q1 = torch.full((len(queries), 1), len(pool.experts) - 1)
        return torch.ones(len(queries), 1), last_Q1


def test_a_query_router_does_not_see_the_answer(base: Base) -> None:
    router = Overhearing()
    routes = token_routes(attach(base, router), TEXT, base.linears[0], answer=ANSWER)
    assert {route.weights for route in routes} == {(0.0, 0.0, 1.0)}
    assert router.queries == [Query(TEXT)]


class Leaning(TokenRouter):
    """A router whose only say is a bias: it sends every query to the second expert."""

    def scorer(self, pool: Pool, linear: str) -> Scorer:
        return lambda x_TD: x_TD.new_zeros(len(x_TD), len(pool.experts))

    def bias(self, pool: Pool, queries: Sequence[Query]) -> Tensor:
        return torch.tensor([[0.0, 50.0, 0.0]]).expand(len(queries), 3)


def test_a_router_that_defines_a_bias_is_biased(base: Base) -> None:
    routes = token_routes(attach(base, Leaning()), TEXT, base.linears[0])
    assert {route.weights[0] for route in routes} == {0.0}
    assert {round(route.weights[1], 4) for route in routes} == {1.0}


def test_an_expert_that_does_not_adapt_the_linear_gets_no_weight(llama: Base) -> None:
    first, second, third = make_experts(llama)
    linear = llama.linears[4]
    less = {name: factors for name, factors in second.linears.items() if name != linear}
    pool = Pool.from_experts([first, Expert(second.card, less), third])
    routes = token_routes(RoutedModel(llama, pool, "phatgoose"), TEXT, linear)
    assert {route.weights[1] for route in routes} == {0.0}


@pytest.mark.parametrize("router", ["base", "merged", "single:e1"])
def test_a_router_that_does_not_choose_is_refused(base: Base, router: str) -> None:
    with pytest.raises(PhatgooseError, match="adds the same to every token"):
        token_routes(attach(base, router), TEXT, base.linears[0])


def test_an_unknown_linear_is_refused_with_near_names(llama: Base) -> None:
    missing, typed = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up"
    experts = make_experts(llama)
    for expert in experts:
        del expert.linears[missing]
    model = RoutedModel(llama, Pool.from_experts(experts), "phatgoose")
    with pytest.raises(PhatgooseError, match=rf"no expert.*{missing}.*layers\.0\.mlp\.up_proj"):
        token_routes(model, TEXT, missing)
    with pytest.raises(PhatgooseError, match=rf"the base has no.*{typed}'.*mlp\.up_proj"):
        token_routes(model, TEXT, typed)
    with pytest.raises(PhatgooseError, match="near it are"):
        token_routes(model, TEXT, "zzz")


def test_the_terminal_shows_each_token_in_the_color_of_its_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = to_terminal(ROUTES, EXPERTS)
    painted = re.findall(r"\x1b\[38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m", shown)
    assert [text for *_, text in painted[:3]] == ["The", " <goose> &⏎", r"\x1b[2J\u202e"]
    colors = [tuple(map(int, parts)) for *parts, _ in painted]
    assert colors[1] == COLORS[1]
    assert colors[0] == tuple(round(0.75 * c + 0.25 * 255) for c in COLORS[0])
    # The legend: the mean of 0.75, 0 and 0.25 and so on, each in its full color.
    assert [text for *_, text in painted[3:]] == [" e0 33.3% ", " e1 33.3% ", " e2 33.3% "]
    assert colors[3:] == list(COLORS[:3])
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "\x1b" not in plain
    assert plain.startswith("The <goose> &⏎\n\\x1b")


def test_no_color_prints_a_line_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = to_terminal(ROUTES, EXPERTS).splitlines()
    assert [re.split(r" {2,}", line) for line in lines[:3]] == [
        ["'The'", "e0 0.75, e2 0.25"],
        ["' <goose> &⏎'", "e1 1.00"],
        [r"'\x1b[2J\u202e'", "e2 0.75, e0 0.25"],
    ]
    assert lines[-3:] == ["e0 33.3%", "e1 33.3%", "e2 33.3%"]
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: an empty value does not count
    assert "\x1b" in to_terminal(ROUTES, EXPERTS)


class Page(HTMLParser):
    """A parser of the page as a browser sees it: tags, and the text and attributes of spans."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags = [""]
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "span":
            self.spans.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "span" and data.strip() and not self.spans[-1][1]:
            self.spans[-1] = (self.spans[-1][0], data)


def test_the_page_shows_the_tokens_and_is_self_contained() -> None:
    page = to_html(ROUTES, ("<b>0", 'e"1', "e2"), "Experts <at> {linear}")
    parsed = Page(page)
    assert [text for _, text in parsed.spans[:3]] == ["The", " <goose> &⏎", r"\x1b[2J\u202e"]
    assert [attrs.get("title") for attrs, _ in parsed.spans[:3]] == [
        "<b>0 0.75, e2 0.25",
        'e"1 1.00',
        "e2 0.75, <b>0 0.25",
    ]
    red, green, blue = COLORS[0]
    assert parsed.spans[0][0]["style"] == f"background: rgba({red}, {green}, {blue}, 0.75)"
    assert [text for _, text in parsed.spans[3:]] == ["<b>0 33.3%", 'e"1 33.3%', "e2 33.3%"]
    assert "Experts &lt;at&gt; {linear}" in page
    assert not {"b", "script", "link", "img", "goose"} & set(parsed.tags)
    assert "//" not in page


def test_repeated_colors_are_reported() -> None:
    names = [f"e{index}" for index in range(13)]
    route = TokenRoute("x", (0.25, *[0.0] * 11, 0.75))
    parsed = Page(to_html([route], names, "title"))
    token, *legend = [attrs["style"] for attrs, _ in parsed.spans]
    assert token != legend[0]  # paler
    assert legend[0] == legend[1]
    for text in (to_html([route], names, ""), to_terminal([route], names)):
        assert "colors repeat after 12" in text
        assert "e5" not in text  # no token was routed there
    assert "repeat" not in to_terminal(ROUTES, EXPERTS)


def test_experts_that_are_not_in_the_pool_are_refused() -> None:
    for show in (lambda: to_terminal(ROUTES, ["e0"]), lambda: to_html(ROUTES, ["e0"], "")):
        with pytest.raises(PhatgooseError, match="not among these 1 experts"):
            show()


def test_zero_tokens_are_accepted() -> None:
    assert "mean weight" in to_terminal([], EXPERTS)
    assert Page(to_html([], EXPERTS, "none")).spans == []


def _linear_rgb(color: tuple[int, int, int]) -> list[float]:
    parts = [part / 255 for part in color]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def _lab(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """Convert to CIELAB under D65."""
    r, g, b = _linear_rgb(color)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_colors_are_distinct_and_text_on_them_is_readable() -> None:
    for one, other in itertools.combinations(COLORS, 2):
        distance = sum((a - b) ** 2 for a, b in zip(_lab(one), _lab(other), strict=True)) ** 0.5
        assert distance > 30, (one, other)
    for color in COLORS:
        r, g, b = _linear_rgb(color)
        luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
        assert (luminance + 0.05) / 0.05 > 4.5  # WCAG's contrast with black
