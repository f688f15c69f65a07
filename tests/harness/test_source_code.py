"""Check which changes of source code make answers stale, on a copy of both packages."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness
import phatgoose
from harness import source_code
from harness.source_code import PROFILES, SCORING, TRAINING, changes, code_of, digest, router_code
from phatgoose.errors import PhatgooseError
from phatgoose.routers import ROUTERS, Router, make_router

OPTIONS = {"single": {"expert": "e0"}, "genknowsub": {"general": "e0"}}
Edit = Callable[[str, str, str], None]


def forget() -> None:
    source_code._tree.cache_clear()
    source_code._hash.cache_clear()
    source_code._imports.cache_clear()


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Return a function that replaces text in a module of the copy, which is then hashed."""
    copies = {}
    for package in (phatgoose, harness):
        name = package.__name__
        copies[name] = tmp_path / name
        assert package.__file__ is not None
        source = Path(package.__file__).parent
        shutil.copytree(source, copies[name], ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source_code, "_ROOTS", copies)
    forget()

    def replace(file: str, old: str, new: str) -> None:
        path = tmp_path / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        forget()

    yield replace
    forget()


def router(name: str) -> Router:
    return make_router(name, **OPTIONS.get(name, {}))


def routers_code() -> dict[str, str]:
    return {name: digest(router_code(router(name))) for name in ROUTERS}


def scoring() -> str:
    return digest(code_of(SCORING))


def test_a_changed_formula_makes_only_answers_of_its_router_stale(edit: Edit) -> None:
    before, scored = routers_code(), scoring()
    edit("phatgoose/routers/phatgoose.py", "gate_ED,\n", "-gate_ED,\n")
    after = routers_code()
    assert {name for name in ROUTERS if before[name] != after[name]} == {"phatgoose"}
    assert scoring() == scored


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_no_code_path_covers_every_router(name: str) -> None:
    """Check that a router's code contains no other router's module, except for its base."""
    home = "phatgoose.routers."
    own = type(router(name)).__module__
    others = {m for m in router_code(router(name)) if m.startswith(home)} - {own}
    shared = {home + "catalog", home + "interface"}
    builds_upon = ("stacked_profiles", "merged", "arrow", "spectr", "retrieval")
    assert others <= shared | {home + name for name in builds_upon}
    assert {m for m in code_of(SCORING) if m.startswith(home)} == shared


def test_a_shared_formula_makes_the_answers_of_its_users_stale(edit: Edit) -> None:
    before = routers_code()
    edit("phatgoose/routers/merged.py", "* weight", "* weight * 2")
    after = routers_code()
    assert {name for name in ROUTERS if before[name] != after[name]} == {
        "merged",
        "task_arithmetic",
        "random_experts",  # its inner router
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("phatgoose/ops/mixing.py", "experts <= 2 * top_k", "experts <= 3 * top_k"),
        ("phatgoose/ops/compiled.py", "tokens > _FEW_TOKENS", "True"),
        ("phatgoose/ops/triton_mixing.py", "tl.sum(", "tl.max("),
        ("phatgoose/inference/scoring.py", "self.tokens + 1", "self.tokens"),
        ("phatgoose/inference/routed_linear.py", "self.base(x) + added", "self.base(x) - added"),
        ("phatgoose/ops/routing.py", "-torch.inf", "0.0"),
        ("phatgoose/routers/interface.py", "top_k=self.top_k", "top_k=1"),
        ("phatgoose/inference/generation.py", "do_sample=False", "do_sample=True"),
        ("harness/evaluation/encoding.py", "request.choices_shown", "True"),
    ],
)
def test_the_scoring_path_makes_all_answers_stale(
    edit: Edit, file: str, old: str, new: str
) -> None:
    before = scoring()
    edit(file, old, new)
    assert scoring() != before


def test_comments_docstrings_and_layout_change_nothing(edit: Edit) -> None:
    before, scored = routers_code(), scoring()
    edit("phatgoose/routers/phatgoose.py", '"""Match the input with the gates."""', '"""Other."""')
    edit("phatgoose/routers/phatgoose.py", "    top_k: int = 2", "    # Two.\n\n    top_k: int = 2")
    edit("phatgoose/inference/scoring.py", '"""Score targets', '"""Rate targets')
    # Also adding a docstring where there was none.
    edit(
        "phatgoose/inference/model.py",
        "            assert isin",
        '            """Hear."""\n            assert isin',
    )
    assert routers_code() == before
    assert scoring() == scored


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("phatgoose/training/trainer.py", "4 * self", "8 * self", {"training", "profiles"}),
        ("harness/training/engine.py", "zero_stage", "stage_of_zero", {"training"}),
        ("harness/training/examples.py", "// len(data)", "", {"training", "profiles"}),
        ("phatgoose/profile_measurement.py", "measure_profile", "measure", {"profiles"}),
        ("harness/scheduling/cluster.py", "wait_seconds", "patience", set()),
        ("phatgoose/routers/arrow.py", "temperature", "heat", set()),
    ],
)
def test_training_and_profiles_know_their_own_code(
    edit: Edit, file: str, old: str, new: str, stale: set[str]
) -> None:
    roots = {"training": TRAINING, "profiles": PROFILES}
    before = {name: digest(code_of(modules)) for name, modules in roots.items()}
    edit(file, old, new)
    after = {name: digest(code_of(modules)) for name, modules in roots.items()}
    assert {name for name in roots if before[name] != after[name]} == stale


def test_changed_modules_are_named() -> None:
    before = {"a": "1", "b": "1", "c": "1"}
    assert changes(before, {"a": "1", "b": "2", "d": "1"}) == ["b", "c (gone)", "d (new)"]
    assert changes(before, before) == []


def test_the_code_of_a_plugin_is_its_module_and_its_imports_from_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugin_of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("FACTOR = 2\n")
    (package / "routers.py").write_text(
        "from phatgoose.routers.uniform import Uniform\n"
        "from . import helper\n"
        "class Mine(Uniform):\n    factor = helper.FACTOR\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from plugin_of_a_user.routers import Mine  # type: ignore[import-not-found]

    forget()
    before = router_code(Mine())
    assert {"plugin_of_a_user.helper", "phatgoose.routers.uniform"} <= before.keys()
    monkeypatch.setattr(sys.modules["plugin_of_a_user.helper"], "FACTOR", 3)
    assert router_code(Mine()) == before  # the source counts, not the module in memory
    (package / "helper.py").write_text("FACTOR = 3\n")
    forget()
    assert changes(before, router_code(Mine())) == ["plugin_of_a_user.helper"]


def test_the_code_of_a_plugin_includes_the_classes_that_it_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "router_by_attribute.py").write_text(
        "import json\nimport phatgoose.routers\nfrom helper_beside import FACTOR\n"
        "class Mine(phatgoose.routers.Uniform):\n    pass\n"
    )
    (tmp_path / "helper_beside.py").write_text("FACTOR = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    from router_by_attribute import Mine  # type: ignore[import-not-found]

    code = router_code(Mine())
    assert {"phatgoose.routers.uniform", "helper_beside"} <= code.keys()
    assert "json" not in code


def test_a_router_without_a_source_file_is_refused() -> None:
    class Typed(type(make_router("uniform"))):  # type: ignore[misc]
        pass

    Typed.__module__ = "typed_at_a_prompt"
    with pytest.raises(PhatgooseError, match="typed_at_a_prompt has no source file"):
        router_code(Typed())


@pytest.mark.parametrize(
    "text",
    [
        "import phatgoose.routers as r\nx = r.Arrow\n",
        "import phatgoose.routers\nx = phatgoose.routers.Arrow()\n",
        "from phatgoose import routers\nx = routers.Arrow.k\n",
        "from phatgoose.routers import Arrow\n",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from phatgoose.routers import Arrow\n",
    ],
)
def test_a_router_reached_through_its_package_counts(edit: Edit, text: str) -> None:
    edit("harness/extra_routers.py", "from phatgoose", f"{text}from phatgoose")
    assert "phatgoose.routers.arrow" in code_of(["harness.extra_routers"])


def test_the_code_of_a_training_includes_what_the_actor_computes(edit: Edit) -> None:
    """Check that it includes everything except the routers, which training does not use."""
    found = code_of(TRAINING)
    assert {
        "harness.training.job",
        "harness.scheduling.load_base",
        "harness.tasks.tokens",
    } <= found.keys()
    assert not [m for m in found if m.startswith("phatgoose.routers")]
    before = digest(found)
    edit("harness/scheduling/load_base.py", "max(1, int(cores))", "max(2, int(cores))")
    assert digest(code_of(TRAINING)) != before
