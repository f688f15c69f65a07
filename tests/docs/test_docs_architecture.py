"""Check that docs/architecture.md names only modules, functions and folders that exist."""

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = dict.fromkeys(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
NAMES = [code for code in CODE if re.fullmatch(r"(harness|phatgoose)(\.\w+)+", code)]
PATHS = [code for code in CODE if re.fullmatch(r"[\w.]+/[\w./]*", code)]


def find(name: str) -> Any:
    """Return the module or attribute that a dotted name refers to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module and not module.startswith(f"{error.name}."):
                raise
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name: str) -> None:
    assert find(name) is not None


def test_a_removed_name_is_noticed() -> None:
    for gone in ("harness.training.stage.Trainings", "phatgoose.no_such_module"):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            find(gone)


def test_every_path_exists() -> None:
    assert len(PATHS) >= 5
    assert [path for path in PATHS if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", ["harness", "phatgoose"])
def test_every_package_is_on_the_page(package: str) -> None:
    rooms = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
    named = {name.split(".")[1] for name in NAMES if name.startswith(f"{package}.")}
    assert rooms - named == set()


@pytest.mark.parametrize("package", ["harness", "phatgoose"])
def test_the_arrows_match_the_import_contract(package: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}
    arrows = PAGE.partition("## Arrows")[2]
    block = arrows.partition(f"In `{package}`:")[2].split("```")[1]
    assert block.split("\n")[1:-1] == layers[package]
