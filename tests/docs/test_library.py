"""Run the code in docs/library.md unchanged, on a tiny base."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def test_the_page_runs_from_top_to_bottom(
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").replace("smollm2-135m", str(llama_folder))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == text.count("```python") == 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"library.md, block {number}", "exec"), names)

    assert names["pool"].experts == ("capitals", "opposites", "from-peft")
    metrics = names["experts"][0].card.metrics
    assert metrics["nll_lora"] < metrics["nll_base"]
    assert len(names["answers"]) == 2
    assert names["down"].loglikelihood < 0
    routes, log = names["routes"], names["log"]
    assert "".join(route.token for route in routes) == "Write in capitals: swan SWAN"
    for linear, weights_E in log.weights.items():
        assert float(weights_E.sum()) == pytest.approx(log.tokens[linear], rel=1e-4)
    assert (
        torch.tensor([route.weights for route in routes])
        .sum(dim=1)
        .allclose(torch.ones(len(routes)), atol=1e-4)
    )
    assert (tmp_path / "routes.html").read_text().startswith("<!doctype html>")
    assert "mean weight over these tokens" in capsys.readouterr().out
