"""Run the walk-through in examples/ unchanged, on a tiny base."""

import json
import re
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from phatgoose import Expert, PhatgooseError, Pool, load_base

SCRIPT = Path(__file__).parents[2] / "examples" / "own_tasks.py"
NAMES = ["capitals", "count", "opposites"]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("own_tasks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["own_tasks"] = module  # dataclasses look up the module there
    spec.loader.exec_module(module)
    return module


def write(file: Path, *rows: Any) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"input": f"Double {i}:", "target": str(2 * i)} for i in range(count)]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_example_trains_routes_and_shows_the_weights(
    example: Any,
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    example.main(["--base", str(folder), "--steps", "8", "--out", str(tmp_path / "out")])
    base, printed = load_base(str(folder)), capsys.readouterr().out
    experts = [Expert.load(tmp_path / "out" / f"{name}.arrow") for name in NAMES]
    for expert in experts:
        assert set(expert.linears) == set(base.linears)
        assert all(factors.gate_D is not None for factors in expert.linears.values())
        assert expert.card.metrics["nll_lora"] < expert.card.metrics["nll_base"]
        assert f"{expert.card.name}: lora step 8, loss " in printed
        assert f"{expert.card.name}, 12 held-out examples" in printed
    assert Pool.from_experts(experts).base_fingerprint == base.fingerprint
    # Routing weights sum up, per task and in the view.
    for line in re.findall("experts, over all linears: (.*)", printed):
        shares = [int(share) for share in re.findall(r"(\d+)%", line)]
        assert 98 <= sum(shares) <= 102
    assert len(re.findall(r"correct: base \d+ of 12 .*, routed \d+ of 12", printed)) == 3
    linear = base.linears[len(base.linears) // 3]
    assert f"Experts of each token at {linear}:\n\n'" in printed
    page = (tmp_path / "out" / "routes.html").read_text()
    assert f"<title>Experts at {linear}</title>" in page
    assert page.count('title="') > 50


def test_the_example_tasks_are_correct_and_held_out(example: Any) -> None:
    tasks = {name: example.read_task(example.DATA / f"{name}.jsonl") for name in NAMES}
    for task in tasks.values():
        assert (len(task.train), len(task.held_out)) == (48, 12)
        inputs = [row.input for row in [*task.train, *task.held_out]]
        assert len(set(inputs)) == 60
        assert all(text.endswith(" ") and not text.endswith("  ") for text in inputs)
    for row in [*tasks["capitals"].train, *tasks["capitals"].held_out]:
        assert row.target == row.input.split(": ")[1].strip().upper()
    for row in [*tasks["count"].train, *tasks["count"].held_out]:
        assert int(row.target) == len(row.input.split(": ")[1].split())


def test_equal_examples_are_not_both_trained_on_and_held_out(example: Any, tmp_path: Path) -> None:
    task = example.read_task(Path(write(tmp_path / "double.jsonl", *pairs(12), *pairs(12))))
    assert task.held_out
    assert not set(task.train) & set(task.held_out)


@pytest.mark.parametrize(
    "row",
    [
        "no object",
        {"input": "2 + 2 ="},
        {"input": 4, "target": "4"},
        {"input": "2 + 2 =", "target": ["4", "four"]},
    ],
)
def test_a_line_that_is_not_an_example_is_named(example: Any, tmp_path: Path, row: Any) -> None:
    file = write(tmp_path / "mine.jsonl", *pairs(10), row)
    with pytest.raises(PhatgooseError, match=r"mine\.jsonl, line 11: invalid\. Write"):
        example.main([file])


def test_unusable_files_are_refused_before_training(
    example: Any, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "train_expert", None)
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.jsonl", *pairs(10))
    (tmp_path / "other").mkdir()
    cases = {
        "cannot read .*none.jsonl": [str(tmp_path / "none.jsonl")],
        "only 9 examples": [write(tmp_path / "few.jsonl", *pairs(9))],
        "same name": [good, write(tmp_path / "other" / "good.jsonl", *pairs(10))],
        "cannot name an expert": [write(tmp_path / "my task.jsonl", *pairs(10))],
        "--linear=mlp: no such linear": [good, "--base", str(llama_folder), "--linear", "mlp"],
        "steps of at least 1": [good, "--base", str(llama_folder), "--steps", "0"],
    }
    for says, arguments in cases.items():
        with pytest.raises(PhatgooseError, match=says):
            example.main(arguments)


def test_the_script_reports_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert str(exit_info.value).startswith("error: cannot read")
    assert "\n" not in str(exit_info.value)
