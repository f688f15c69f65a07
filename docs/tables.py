"""Make the table of all routers in docs/routers.md from the code.

    python docs/tables.py           print it
    python docs/tables.py --write   write it into docs/routers.md

In formulas: D input and O output features of a linear, E experts in the pool, K experts kept per
token, R LoRA rank.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.config.load import CONF
from harness.config.schema import Multitask
from harness.extra_routers import DERIVED, MULTITASK
from phatgoose.routers import (
    ROUTERS,
    Merge,
    QueryRouter,
    Router,
    TokenRouter,
    Wrapper,
    all_needs,
    make_router,
)
from phatgoose.routers.interface import side_information

PAGE = Path(__file__).parent / "routers.md"
START, END = "<!-- table: python docs/tables.py --write -->", "<!-- end of table -->"

# The cost of a token on one linear, in the order of the page; wrappers with their default router.
COSTS = {
    "phatgoose": "2 E D + 2 K R (D + O)",
    "arrow": "2 E D + 2 K R (D + O)",
    "arrow_phatgoose": "2 E D + 2 K R (D + O)",
    "average_activation": "2 E D + 2 K R (D + O)",
    "spectr": "2 E R D + 2 K R (D + O)",
    "lag": "2 E R D + 2 R (D + O)",
    "lag_spectral": "2 E R D + 2 R (D + O)",
    "seqr": "2 E R D + 2 R (D + O)",
    "glider": "2 E D + 2 K R (D + O)",
    "retrieval": "2 R (D + O)",
    "lorauter": "2 K R (D + O)",
    "ariadne": "2 R (D + O)",
    "logo": "2 K R (D + O)",
    "merged": "2 min(E R (D + O), D O)",
    "merged_factors": "2 R (D + O)",
    "task_arithmetic": "2 min(E R (D + O), D O)",
    "ties": "2 D O",
    "dare": "2 D O",
    "single": "2 R (D + O)",
    "genknowsub": "2 E D + 4 K R (D + O)",
    "base": "0",
    "uniform": "2 E R (D + O)",
    "random": "2 E D + 2 K R (D + O)",
    "random_experts": "2 min(E R (D + O), D O)",
    "best_individual": "2 R (D + O)",
    "oracle": "2 R (D + O)",
    "multitask": "2 R (D + O)",
}
# The additional cost of a query.
PER_QUERY = {
    "glider": "embedding the task's description",
    "retrieval": "embedding it",
    "lorauter": "embedding it",
    "ariadne": "embedding it",
    "logo": "a pass of the base over the prompt",
}
# The linears of T5-XL as (how many, D, O), the rank of its experts, and two sizes of pools.
T5_XL = [(288, 2048, 2048), (96, 2048, 5120), (48, 5120, 2048)]
RANK, EXPERTS = 16, (36, 166)

COLUMNS = (
    "router",
    "kind",
    "decides per",
    "needs",
    "zero-shot",
    "also knows",
    "options",
    "cost per token and linear",
    "in % of T5-XL's linears, E = 36 / 166",
)
_KINDS: dict[type[Router], tuple[str, str]] = {
    TokenRouter: ("token", "token and linear"),
    QueryRouter: ("query", "query"),
    Merge: ("merge", "pool"),
}
# Routers derived from the scores of single experts have no class.
_DERIVED_PER = {"oracle": "evaluation task and metric", "best_individual": "suite"}


def table() -> str:
    """Return the table in Markdown.

    Raises:
        SystemExit: a router has no cost in COSTS.
    """
    written = {file.stem for file in (CONF / "router").glob("*.yaml")} - {"all"}
    missing = {*ROUTERS, *written} - COSTS.keys()
    if missing:
        raise SystemExit(f"docs/tables.py: add the cost of {', '.join(sorted(missing))} to COSTS")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_row, COSTS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(page: str) -> str:
    """Return the page with the table between its two markers."""
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE.name} lacks one of the lines {START} and {END}")
    return f"{before}{START}\n{table()}\n{END}{after}"


def operations(cost: str, **sizes: int) -> int:
    """Return the value of a formula of COSTS; `sizes` are its letters."""
    return int(eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", cost), {"min": min}, sizes))


def _row(name: str) -> list[str]:
    own, cost = _yaml(name), f"`{COSTS[name]}`"
    if name in PER_QUERY:
        cost += f"; per query: {PER_QUERY[name]}"
    link = f"[`{name}`](#{name})"
    if name in DERIVED:
        known = "the answers of the evaluation tasks"
        about = ["derived", _DERIVED_PER[name], "–", "no", known, "–"]
        return [link, *about, cost, _share(COSTS[name], 1)]
    kind = own.pop("kind", name)
    router = _example(kind)
    acting = router
    while isinstance(acting, Wrapper):
        acting = acting.inner
    word, per = next((k for t, k in _KINDS.items() if isinstance(acting, t)), ("none", "–"))
    return [
        link,
        "wrapper" if isinstance(router, Wrapper) else word,
        per,
        ", ".join(all_needs(router)) or "–",
        "yes" if router.zero_shot else "no",
        side_information(router) or "–",
        _options(own if name not in ROUTERS or name == "single" else _defaults(ROUTERS[name])),
        cost,
        _share(COSTS[name], own.get("top_k", getattr(acting, "top_k", 1))),
    ]


def _yaml(name: str) -> dict[str, Any]:
    """Return a router's options from the configuration, and its kind if it is a variant."""
    container = OmegaConf.to_container(OmegaConf.load(CONF / "router" / f"{name}.yaml"))
    assert isinstance(container, dict)
    return dict(container[name])


def _example(kind: str) -> Router:
    if kind == MULTITASK:
        return Multitask(MULTITASK)
    return make_router(kind, **({"expert": "any"} if kind == "single" else {}))


def _defaults(router: type[Router]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(router)}  # type: ignore[arg-type]


def _options(options: dict[str, Any]) -> str:
    """Return options as a command line writes them."""

    def written(name: str, value: Any) -> str:
        if value is dataclasses.MISSING or value == "":
            return f"`{name}` (must be given)"
        return f"`{name}={value if isinstance(value, str) else json.dumps(value)}`"

    return ", ".join(written(*option) for option in options.items()) or "–"


def _share(cost: str, top_k: int) -> str:
    base = sum(2 * count * inputs * outputs for count, inputs, outputs in T5_XL)
    shares = []
    for experts in EXPERTS:
        sizes = {"E": experts, "K": min(top_k, experts), "R": RANK}
        added = sum(
            n * operations(cost, D=inputs, O=outputs, **sizes) for n, inputs, outputs in T5_XL
        )
        shares.append(f"{100 * added / base:.1f}")
    return " / ".join(shares)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description="Make the table of all routers.")
    parser.add_argument("--write", action="store_true", help=f"write it into {PAGE.name}")
    if parser.parse_args(arguments).write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
