"""Look at which expert each token went to: as text for a terminal, or as one HTML page.

Shape suffixes: T tokens, E experts.

    routes = token_routes(model, "The goose flies.", "model.layers.3.mlp.up_proj")
    print(to_terminal(routes, model.pool.experts))

A token has the color of its strongest expert. The smaller the weight, the paler the color.
"""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError, near_names
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import TokenLog
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.tokenization import encode_context, max_length

# Red, green and blue of each color: far apart, and light enough for black letters on them.
COLORS = (
    (255, 140, 46),  # orange
    (74, 144, 255),  # blue
    (47, 179, 68),  # green
    (255, 217, 26),  # yellow
    (242, 74, 90),  # red
    (165, 107, 255),  # violet
    (90, 224, 240),  # cyan
    (255, 111, 216),  # pink
    (184, 236, 61),  # lime
    (181, 118, 63),  # brown
    (143, 155, 171),  # gray
    (11, 148, 130),  # teal
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60em; margin: 2em auto; padding: 0 1em; background: #fff; color: #000;
  font-family: sans-serif; }}
pre {{ font-size: 1.1em; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }}
span {{ padding: 0.15em 0; border-radius: 0.2em; }}
li span {{ padding: 0.15em 0.5em; }}
ul {{ list-style: none; padding: 0; line-height: 1.9; }}
</style>
</head>
<body>
<h1>{title}</h1>
<pre>{tokens}</pre>
<p>Each token has the color of its strongest expert, the paler the less it weighs. Point at a token
to see all its weights. Mean weight over these tokens:</p>
<ul>
{legend}
</ul>
</body>
</html>
"""


@dataclass(frozen=True)
class TokenRoute:
    """Where one token went at one linear.

    Attributes:
        token: the token as text, with its space.
        weights: the weight of every expert, in the pool's order; 0 where the token did not go.
    """

    token: str
    weights: tuple[float, ...]

    @property
    def strongest(self) -> int:
        """The expert that weighs most."""
        return self.weights.index(max(self.weights))


def token_routes(
    model: RoutedModel, text: str, linear: str, *, answer: str = "", task: str = ""
) -> list[TokenRoute]:
    """Run a text through the model, and read where each of its tokens went at one linear.

    A decoder-only base reads the text and the answer. An encoder-decoder base reads the text in
    its encoder's linears and in the keys and values of cross-attention, and in all others its
    start token and the answer.

    Args:
        model: a base with a pool and a router that sends tokens or queries to experts.
        text: what is read.
        linear: the name of an adapted linear, one of `model.pool.linears`.
        answer: what follows the text; routers that look at queries do not see it.
        task: what the task is about, for routers that read it.

    Raises:
        PhatgooseError: no expert adapts this linear, or the router treats all tokens alike.
    """
    _check_linear(model, linear)
    question = _question(model.base, text, answer, Query(text, task=task))
    log = TokenLog(linear=linear)
    with model.recording(log):
        model.score([question])
    if not log.routed:
        raise PhatgooseError(
            f"the router {model.router} adds the same to every token, so there is nothing to see: "
            "set one that routes, such as phatgoose"
        )
    tokens = _strings(model.base, _ids_read(model.base, question, linear))
    weights_TE = torch.cat(log.routed).tolist()
    return [TokenRoute(t, tuple(w)) for t, w in zip(tokens, weights_TE, strict=True)]


def _question(base: Base, text: str, answer: str, query: Query) -> Question:
    """Return what is read; without an answer, the text alone and its end."""
    if answer:
        question = Question.encode(base, text, [answer], query=query)
    else:
        question = Question(encode_context(base, text), [[base.tokenizer.eos_token_id]], query)
    if question.parts(base) != [question]:
        raise PhatgooseError(
            f"text of {question.length} tokens: base {base.name} reads {max_length(base)} at most. "
            "Shorten it."
        )
    return question


def to_terminal(routes: Sequence[TokenRoute], experts: Sequence[str]) -> str:
    """Return the tokens in 24-bit colors and a legend; with NO_COLOR set, a line for each token.

    Args:
        routes: what `token_routes` gave.
        experts: the experts' names, `model.pool.experts`.
    """
    legend = _legend(routes, experts)
    if os.environ.get("NO_COLOR"):
        shown = [f"'{_visible(route.token)}'" for route in routes]
        width = max(map(len, shown), default=0)
        lines = [
            f"{token:{width}}  {_weights(route, experts)}"
            for token, route in zip(shown, routes, strict=True)
        ]
        entries = [text for _, text in legend]
    else:
        painted = [
            _paint(_visible(route.token), route.strongest, max(route.weights))
            + "\n" * route.token.count("\n")
            for route in routes
        ]
        lines = ["".join(painted)]
        entries = [text if e is None else _paint(f" {text} ", e, 1.0) for e, text in legend]
    return "\n".join([*lines, "", "mean weight over these tokens:", *entries])


def to_html(routes: Sequence[TokenRoute], experts: Sequence[str], title: str) -> str:
    """Return the tokens as one self-contained HTML page, with each token's weights as a tooltip.

    Args:
        routes: what `token_routes` gave.
        experts: the experts' names, `model.pool.experts`.
        title: the page's title.
    """
    legend = _legend(routes, experts)
    tokens = [
        _span(_visible(route.token), route.strongest, max(route.weights), _weights(route, experts))
        + "\n" * route.token.count("\n")
        for route in routes
    ]
    entries = [
        html.escape(text) if expert is None else _span(text, expert, 1.0) for expert, text in legend
    ]
    return _PAGE.format(
        title=html.escape(title),
        tokens="".join(tokens),
        legend="\n".join(f"<li>{entry}</li>" for entry in entries),
    )


def _check_linear(model: RoutedModel, linear: str) -> None:
    known = list(model.pool.linears)
    if linear in known:
        return
    near = near_names(linear, known, cutoff=0.0)
    why = "no expert of the pool adapts" if linear in model.base.linears else "the base has no"
    raise PhatgooseError(f"{why} linear {linear!r}: near it are {', '.join(near)}")


def _ids_read(base: Base, question: Question, linear: str) -> list[int]:
    """Return the tokens that a linear reads when the question is scored."""
    answer = question.choices[0][:-1]
    if not base.is_encoder_decoder:
        return [*question.context, *answer]
    if base.architecture.side_of(linear) == "encoder":
        return question.context
    return [base.model.config.decoder_start_token_id, *answer]


def _strings(base: Base, ids: Sequence[int]) -> list[str]:
    """Each token's text with its space; a token that is a part of a character is shown as `�`."""

    def decode(ids: list[int]) -> str:
        return str(base.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    # Behind another token: the space before a text's first word is not always decoded.
    before = list(base.tokenizer("a", add_special_tokens=False)["input_ids"])
    start = len(decode(before))
    return [decode([*before, token])[start:] for token in ids]


def _legend(routes: Sequence[TokenRoute], experts: Sequence[str]) -> list[tuple[int | None, str]]:
    """For each expert that got any weight: its place, and its name and mean weight; notes."""
    if any(len(route.weights) != len(experts) for route in routes):
        raise PhatgooseError(
            f"the routes are not among these {len(experts)} experts: give the experts of the pool "
            "they were read with"
        )
    entries: list[tuple[int | None, str]] = []
    for expert, name in enumerate(experts):
        mean = sum(route.weights[expert] for route in routes) / max(1, len(routes))
        if mean > 0:
            entries.append((expert, f"{name} {mean:.1%}"))
    if len(experts) > len(COLORS):
        note = f"(there are {len(experts)} experts: colors repeat after {len(COLORS)})"
        entries.append((None, note))
    return entries


def _weights(route: TokenRoute, experts: Sequence[str]) -> str:
    """Return the experts that a token went to with their weights, the strongest first."""
    chosen = sorted(zip(route.weights, experts, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {weight:.2f}" for weight, name in chosen if weight > 0)


def _visible(text: str) -> str:
    """Spaces as they are, and signs for what cannot be seen or would steer a terminal."""
    shown = text.replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _paint(text: str, expert: int, weight: float) -> str:
    """Set black letters on the expert's color, mixed with white in proportion to its weight."""
    mixed = [round(255 + (part - 255) * weight) for part in COLORS[expert % len(COLORS)]]
    red, green, blue = mixed
    return f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m{text}\x1b[0m"


def _span(text: str, expert: int, weight: float, tooltip: str = "") -> str:
    red, green, blue = COLORS[expert % len(COLORS)]
    hint = f' title="{html.escape(tooltip)}"' if tooltip else ""
    style = f"background: rgba({red}, {green}, {blue}, {weight:.2f})"
    return f'<span style="{style}"{hint}>{html.escape(text)}</span>'
