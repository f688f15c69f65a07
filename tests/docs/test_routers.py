"""Check that docs/routers.md describes every router and agrees with the code."""

import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.config.load import CONF, load_config
from phatgoose.base import Base
from phatgoose.inference.model import RoutedModel
from phatgoose.routers import ROUTERS, QueryRouter, Wrapper, make_router
from phatgoose.routers.lorauter import Lorauter
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import Example
from tests.support.pools import pool_of
from tests.support.tiny import SENTENCES, make_experts
from tests.support.tiny_encoder import make_encoder

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "routers.md").read_text(encoding="utf-8")
# The required options of each router.
GIVEN = {"single": {"expert": "e1"}, "genknowsub": {"general": "e0"}}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["docs_tables"] = module
    spec.loader.exec_module(module)
    return module


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_matches_the_code(tables: ModuleType) -> None:
    assert tables.with_table(PAGE) == PAGE, "run: python docs/tables.py --write"


def test_the_table_has_options_needs_and_side_information(tables: ModuleType) -> None:
    rows = {line.split("`")[1]: line.split(" | ") for line in tables.table().splitlines()[2:]}
    assert all(len(row) == len(tables.COLUMNS) for row in rows.values())
    assert rows["arrow_phatgoose"][1] == "token"
    assert "`temperature=10.0`, `divide_by_sqrt_d=true`" in rows["arrow_phatgoose"][6]
    assert rows["glider"][3:6] == [
        "gates, descriptions",
        "yes",
        "a description of the evaluation task",
    ]
    assert rows["dare"][1:3] == ["merge", "pool"]
    assert "`weight=null`" in rows["dare"][6]
    assert rows["genknowsub"][1:3] == ["wrapper", "token and linear"]
    assert "`general` (must be given)" in rows["genknowsub"][6]
    assert [name for name, row in rows.items() if row[4] == "no"] == ["best_individual", "oracle"]


def test_every_router_has_a_section_in_the_order_of_the_table(tables: ModuleType) -> None:
    sections = re.findall(r"^### `(\w+)`$", PAGE, flags=re.MULTILINE)
    written = {file.stem for file in (CONF / "router").glob("*.yaml")} - {"all", "single"}
    assert set(sections) >= {*ROUTERS, *written}
    assert sections == list(tables.COSTS)


def test_every_section_has_its_parts() -> None:
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        name = section.split("\n")[0]
        for part in ("\n```\n", "**Needs**", "**cost**", "**Use it**", "**Not**", "**Paper**"):
            assert part.lower() in section.lower(), f"{name} lacks {part}"


def test_a_router_without_a_cost_is_an_error(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: cost for name, cost in tables.COSTS.items() if name != "spectr"}
    monkeypatch.setattr(tables, "COSTS", known)
    with pytest.raises(SystemExit, match="add the cost of spectr to COSTS"):
        tables.table()


def test_write_updates_the_page(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(tables, "PAGE", page)
    page.write_text(PAGE.replace(tables.table(), "an old table"), encoding="utf-8")
    tables.main(["--write"])
    assert page.read_text(encoding="utf-8") == PAGE
    page.write_text(PAGE.replace(tables.END, ""), encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks one of the lines"):
        tables.main(["--write"])


@pytest.mark.parametrize("experts", [5, 9])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_the_cost_per_token_matches_the_table(
    tables: ModuleType, base: Base, name: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a large pool: in a small one every expert is evaluated, because that is faster. And with
    # operators that are counted.
    monkeypatch.setenv("PHATGOOSE_MIX", "loop")
    monkeypatch.setattr("phatgoose.ops.frozen_linear.library", lambda: "torch")
    rank, tokens = 3, 7
    pool = pool_of(make_experts(base, experts, rank=rank))
    router = make_router(name, **GIVEN.get(name, {}))
    shape = (48, 32)
    name_of = next(n for n in base.linears if base.model.get_submodule(n).weight.shape == shape)
    model = RoutedModel(base, pool, router)
    linear = base.model.get_submodule(name_of)
    acting = router.inner if isinstance(router, Wrapper) else router
    kept = min(getattr(acting, "top_k", 1), experts)
    for side in ("encoder", "decoder"):
        model.forward_context.announce(side, torch.ones(1, tokens, dtype=torch.bool))
    model.forward_context.bias_QE = torch.zeros(1, experts)
    if isinstance(router, QueryRouter):
        model.forward_context.mixture = (
            torch.full((1, kept), 1 / kept),
            torch.arange(kept).unsqueeze(0),
        )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(1, tokens, 32))
    sizes = {"D": 32, "O": 48, "E": experts, "K": kept, "R": rank}
    per_token = 2 * 32 * 48 + tables.operations(tables.COSTS[name], **sizes)
    assert counter.get_total_flops() == tokens * per_token


def test_variants_have_the_cost_of_their_kind(tables: ModuleType) -> None:
    for variant, kind in (("arrow_phatgoose", "arrow"), ("lag_spectral", "lag")):
        assert tables.COSTS[variant] == tables.COSTS[kind]
    for name in ("oracle", "best_individual", "multitask"):
        assert tables.COSTS[name] == tables.COSTS["single"]


def test_the_commands_compose(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) >= 10
    for command in commands:
        assert command[:3] == ["python", "-m", "harness.run"]
        arguments = [a for a in command[3:] if not a.startswith("run.dir=")]
        assert len(arguments) < len(command) - 3, f"no run.dir in {command}"
        config = load_config([*arguments, f"run.dir={tmp_path}"])
        routers = config.routers([task.name for task in config.pool_tasks()])
        assert len(routers) > 1


def test_the_commands_add_a_variant_of_a_router(tmp_path: Path) -> None:
    config = load_config(
        ["+router.top1.kind=phatgoose", "+router.top1.top_k=1", f"run.dir={tmp_path}"]
    )
    assert config.routers([])["top1"] == make_router("phatgoose", top_k=1)
    assert "merged" in config.router


def test_the_code_runs(base: Base, tmp_path: Path) -> None:
    first, second = blocks("python")
    examples = [Example(text, " yes") for text in SENTENCES]
    stage = Stage(steps=2, lr=1e-3)
    names: dict[str, Any] = {
        "base": base,
        "model": RoutedModel(base, pool_of(make_experts(base))),
        "expert": make_experts(base, 1, gates=False)[0],
        "examples": examples,
        "held_out": examples[:1],
        "recipe": Recipe(
            lora=stage,
            gates=stage,
            batch_size=2,
            micro_batch_size=2,
            validate_every=0,
            dtype="float32",
        ),
    }
    exec(compile(first, "routers.md, first block", "exec"), names)
    assert names["model"].router == make_router("merged")
    names["model"].detach()
    encoder = str(make_encoder(tmp_path / "encoder"))
    exec(compile(second.replace("all-minilm-l6-v2", encoder), "second block", "exec"), names)
    model = RoutedModel(base, names["pool"])
    for name in ("phatgoose", "seqr", "average_activation", "glider", "retrieval"):
        model.set_router(name)
    model.set_router(Lorauter())
    assert model.generate([SENTENCES[0]], 2)
