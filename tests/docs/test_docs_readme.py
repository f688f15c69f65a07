"""Run the code in README.md unchanged, on a tiny base and the experts of a run."""

from pathlib import Path
from typing import Any

import pytest

from phatgoose.base import Base
from tests.docs.pages import ROOT, blocks
from tests.support.tiny import make_experts


def test_the_library_example_runs(
    llama: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    objects = tmp_path / "runs" / "demo" / "registry" / "objects"
    objects.mkdir(parents=True)
    for expert in make_experts(llama, 2):
        expert.save(objects / f"{expert.content_hash()}.arrow")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(example.replace("smollm2-135m", llama.name), "README.md", "exec"), names)
    assert sorted(names["pool"].experts) == ["e0", "e1"]
    assert "".join(route.token for route in names["routes"]) == "Yesterday I"
    output = capsys.readouterr().out
    assert "e0" in output
    assert "e1" in output
