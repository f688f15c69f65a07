import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.command_line import table
from harness.registry import Registry
from harness.registry.__main__ import _size, main
from harness.registry.files import object_file
from phatgoose.base import Base
from phatgoose.expert import Expert
from tests.support.tiny import make_experts

DOCS = Path(__file__).parents[3] / "docs" / "registry.md"


def with_jobs(experts: list[Expert], **changes: Any) -> list[Expert]:
    """Return the same experts with job ids and other fields of the card."""
    cards = [
        dataclasses.replace(
            expert.card, job=hashlib.sha256(expert.card.name.encode()).hexdigest()[:32], **changes
        )
        for expert in experts
    ]
    return [
        dataclasses.replace(expert, card=card) for expert, card in zip(experts, cards, strict=True)
    ]


@pytest.fixture
def experts(llama: Base) -> list[Expert]:
    return with_jobs(make_experts(llama), recipe={"lora": {"lr": 0.1}}, metrics={"nll": 2.5})


@pytest.fixture
def registry(tmp_path: Path, llama: Base, experts: list[Expert]) -> Registry:
    """Make a registry of the experts e0, e1 and e2."""
    registry = Registry(tmp_path / "pool", llama.fingerprint)
    for expert in experts:
        registry.publish(expert)
    return registry


class Output:
    """The output of a command and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Return a function that runs the command line in this process."""

    def call(*arguments: object) -> Output:
        status = main([str(argument) for argument in arguments])
        return Output(status, *capsys.readouterr())

    return call


@pytest.fixture
def ask(run: Callable[..., Output]) -> Callable[..., Any]:
    """Return a function that runs a command with --json successfully and returns its document."""

    def call(*arguments: object) -> Any:
        output = run(*arguments, "--json")
        assert (output.status, output.err) == (0, "")
        return json.loads(output.out)

    return call


@pytest.fixture
def refused(run: Callable[..., Output]) -> Callable[..., str]:
    """Return a function that runs a command that must fail and returns its one-line error."""

    def call(*arguments: object) -> str:
        output = run(*arguments)
        assert (output.status, output.out) == (2, "")
        assert re.fullmatch(r"error: .+\n", output.err)
        return output.err

    return call


def where(registry: Registry) -> str:
    return registry.folder.uri


def test_list_prints_the_experts(
    registry: Registry, experts: list[Expert], run: Callable[..., Output], ask: Callable[..., Any]
) -> None:
    document = ask("list", where(registry))
    assert document["manifest"] == 3
    assert document["base_fingerprint"] == registry.base_fingerprint
    sizes = [
        sum(
            4 * 4 * (f.lora_A_RD.shape[1] + f.lora_B_OR.shape[0]) + 4 * f.lora_A_RD.shape[1]
            for f in expert.linears.values()
        )
        for expert in experts
    ]
    assert document["experts"] == [
        {
            "name": expert.card.name,
            "task": expert.card.task,
            "hash": expert.content_hash(),
            "ranks": [4],
            "linears": 14,
            "gates": 14,
            "bytes": size,
            "job": expert.card.job,
            "base": expert.card.base,
        }
        for expert, size in zip(experts, sizes, strict=True)
    ]
    assert document["bytes"] == sum(sizes)

    lines = run("list", where(registry)).out.splitlines()
    assert lines[0].split() == [
        "name", "task", "hash", "rank", "linears", "gates", "size", "job", "base"
    ]  # fmt: skip
    for line, expert, size in zip(lines[2:5], experts, sizes, strict=True):
        card = expert.card
        assert line.split() == [
            card.name, card.task, expert.content_hash()[:12], "4", "14", "yes",
            f"{size / 1024:.1f}", "KiB", card.job[:12], card.base,
        ]  # fmt: skip
    assert lines[6].startswith(f"3 experts, {sum(sizes) / 1024:.1f} KiB, manifest 3, base ")


def test_list_shows_ranks_and_gates(
    tmp_path: Path, llama: Base, run: Callable[..., Output]
) -> None:
    plain, mixed = with_jobs(make_experts(llama, 2, gates=False))
    gated = with_jobs(make_experts(llama, 1, rank=2))[0]
    linears = {**mixed.linears, llama.linears[0]: gated.linears[llama.linears[0]]}
    registry = Registry(tmp_path / "pool", llama.fingerprint)
    registry.publish(plain)
    registry.publish(dataclasses.replace(mixed, linears=linears))
    lines = run("list", where(registry)).out.splitlines()
    assert lines[2].split()[3:6] == ["4", "14", "no"]
    assert lines[3].split()[3:6] == ["2-4", "14", "some"]


def test_list_of_an_empty_pool_is_empty(registry: Registry, run: Callable[..., Output]) -> None:
    for name in ("e0", "e1", "e2"):
        registry.remove(name)
    output = run("list", where(registry))
    assert output.status == 0
    assert output.out.splitlines()[-1].startswith("0 experts, 0.0 KiB, manifest 6")


def test_show_prints_the_card(
    registry: Registry, experts: list[Expert], run: Callable[..., Output], ask: Callable[..., Any]
) -> None:
    expert = experts[1]
    content_hash = expert.content_hash()
    document = ask("show", where(registry), "e1")
    assert document["card"] == dataclasses.asdict(expert.card)
    assert document["hash"] == content_hash
    assert Path(document["file"]).read_bytes() == expert.to_bytes()
    assert document["linears"].keys() == expert.linears.keys()
    shown = document["linears"]["model.layers.0.mlp.down_proj"]
    assert shown == {
        "lora_A_RD": {"dtype": "float32", "shape": [4, 48], "bytes": 768},
        "lora_B_OR": {"dtype": "float32", "shape": [32, 4], "bytes": 512},
        "gate_D": {"dtype": "float32", "shape": [48], "bytes": 192},
    }

    text = run("show", where(registry), "e1").out
    facts = dict(re.findall(r"(?m)^(\S+)  +(\S.*)$", text))
    assert facts["recipe.lora"] == '{"lr": 0.1}'
    assert facts["metrics.nll"] == "2.5"
    assert facts["job"] == expert.card.job
    assert facts["hash"] == content_hash
    assert re.search(r"(?m)^gate_D +float32 +\[48\] +2 +0\.4 KiB$", text)
    assert re.search(r"(?m)^14 linears, ", text)


def test_verify_accepts_an_intact_registry(
    registry: Registry, experts: list[Expert], run: Callable[..., Output], ask: Callable[..., Any]
) -> None:
    registry.remove("e0")
    registry.folder.write("profiles/0123.safetensors", b"not looked at")
    registry.folder.write("objects/notes.txt", b"nor this")
    assert ask("verify", where(registry)) == {
        "registry": where(registry), "objects": 2, "problems": [], "orphans": [], "unnamed": []
    }  # fmt: skip
    assert run("verify", where(registry), "--all").out == "3 experts read, 0 problems, 0 orphans\n"

    orphan = dataclasses.replace(experts[0], card=dataclasses.replace(experts[0].card, name="x"))
    registry.folder.write(object_file(orphan.content_hash()), orphan.to_bytes())
    output = run("verify", where(registry))
    assert output.status == 0
    assert f"no manifest or record names {object_file(orphan.content_hash())}" in output.out
    assert output.out.endswith("2 experts read, 0 problems, 1 orphan\n")
    assert run("verify", where(registry), "--all").out.endswith(
        "4 experts read, 0 problems, 1 orphan\n"
    )


def test_a_problem_is_reported(registry: Registry, run: Callable[..., Output]) -> None:
    path = registry.folder.local(object_file(registry.find("e1")))
    assert path is not None
    path.write_bytes(b"half")
    output = run("verify", where(registry))
    assert output.status == 1
    problem, last = output.out.splitlines()
    assert problem.startswith(f"expert e1: {path} ")
    assert last == "3 experts read, 1 problem, 0 orphans"
    output = run("verify", where(registry), "--json")
    assert output.status == 1
    assert json.loads(output.out)["problems"] == [problem]

    listed = run("list", where(registry)).out
    assert re.search(r"(?m)^e1 +damaged ", listed)
    assert re.search(rf"(?m)^e1: {path} ", listed)


def test_rename_and_remove_change_the_registry(
    registry: Registry,
    experts: list[Expert],
    run: Callable[..., Output],
    ask: Callable[..., Any],
    refused: Callable[..., str],
) -> None:
    pool = where(registry)
    renamed = ask("rename", pool, "e0", "new")
    assert renamed == {"old": "e0", "new": "new", "hash": registry.find("new")}
    assert "no experts e0" in refused("rename", pool, "e0", "new")
    assert "has an expert e2" in refused("rename", pool, "e1", "e2")
    assert "cannot name an expert" in refused("rename", pool, "e1", "../x")

    removed = ask("remove", pool, "e1")
    assert removed == {"name": "e1", "hash": experts[1].content_hash()}
    assert "no experts e22: did you mean e2?" in refused("remove", pool, "e22")
    assert "no experts e1: `python -m harness.registry list` shows its experts" in refused(
        "remove", pool, "e1"
    )
    assert set(registry.manifest().experts) == {"new", "e2"}
    assert run("verify", pool, "--all").status == 0

    for expert in experts[:2]:  # the next run
        assert registry.finished(expert.card.job) is None
        registry.publish(expert)
    assert set(registry.manifest().experts) == {"new", "e0", "e1", "e2"}
    assert "renamed e1 to e3" in run("rename", pool, "e1", "e3").out
    assert "removed e3" in run("remove", pool, "e3").out


def test_a_folder_without_a_registry_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    for command in (
        ["list"], ["show", "e0"], ["verify"], ["gc"], ["export-peft", "e0", tmp_path / "x"],
        ["rename", "e0", "e1"], ["remove", "e0"], ["import-peft", tmp_path / "adapter"],
    ):  # fmt: skip
        line = refused(command[0], tmp_path / "pool", *command[1:])
        assert f"no registry here: {tmp_path}/pool" in line
    assert list(tmp_path.iterdir()) == []


def test_an_exported_adapter_can_be_imported(
    tmp_path: Path, base: Base, run: Callable[..., Output], ask: Callable[..., Any]
) -> None:
    expert = with_jobs(make_experts(base, 1))[0]
    first = Registry(tmp_path / "first", base.fingerprint)
    first.publish(expert)
    adapter = tmp_path / "adapter"
    exported = ask("export-peft", where(first), "e0", adapter)
    assert exported == {"name": "e0", "hash": expert.content_hash(), "folder": str(adapter)}
    assert "without its gates" in run("export-peft", where(first), "e0", adapter).out

    # Into a new registry, twice.
    command = ("import-peft", tmp_path / "second", adapter, "--base", base.name)
    imported = ask(*command)
    assert imported == ask(*command)
    second = Registry.open(tmp_path / "second")
    assert second.base_fingerprint == base.fingerprint
    assert second.manifest().number == 1
    assert second.manifest().experts == {"adapter": imported["hash"]}
    loaded = second.load(imported["hash"])
    for linear, factors in expert.linears.items():
        delta = expert.card.scale * factors.lora_B_OR @ factors.lora_A_RD
        other = loaded.linears[linear]
        torch.testing.assert_close(loaded.card.scale * other.lora_B_OR @ other.lora_A_RD, delta)
        assert other.gate_D is None

    # Into an existing registry, which does not need a base.
    ask("import-peft", where(first), adapter, "--name", "other")
    assert set(first.manifest().experts) == {"e0", "other"}
    assert run("verify", where(first)).status == 0


def test_invalid_imports_are_refused(
    registry: Registry,
    tmp_path: Path,
    llama: Base,
    t5: Base,
    ask: Callable[..., Any],
    refused: Callable[..., str],
) -> None:
    pool, adapter = where(registry), tmp_path / "adapter"
    ask("export-peft", pool, "e1", adapter)
    command = ("import-peft", pool, adapter, "--name", "e0")
    before = registry.folder.names()

    assert "has another expert e0: choose another name with --name" in refused(*command)
    assert "no adapter in" in refused("import-peft", pool, tmp_path / "nothing")
    assert "cannot name an expert" in refused("import-peft", pool, adapter, "--name", "../x")
    assert "no such directory" in refused(*command, "--base", tmp_path / "nothing")
    assert "another base" in refused(*command, "--base", t5.name)
    assert registry.folder.names() == before

    other = Registry(tmp_path / "other", t5.fingerprint)
    other.publish(with_jobs(make_experts(t5, 1))[0])
    for options in ([], ["--base", llama.name]):
        line = refused("import-peft", where(other), adapter, *options)
        assert f"base {llama.fingerprint[:12]}" in line
        assert f"base {t5.fingerprint[:12]}" in line
    assert list(other.manifest().experts) == ["e0"]

    replaced = ask(*command, "--replace")
    assert registry.find("e0") == replaced["hash"]


def test_the_command_starts_without_ray(registry: Registry) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('harness.registry', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "assert not {'ray', 'peft', 'deepspeed', 'lm_eval'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    for name, status in (("e0", 0), ("e9", 2)):
        command = [sys.executable, "-c", code, "show", where(registry), name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_commands_of_the_page_work(
    tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Output]
) -> None:
    monkeypatch.chdir(tmp_path)
    expert = with_jobs(make_experts(llama, 1))[0]
    card = dataclasses.replace(expert.card, name="plural")
    registry = Registry("runs/demo/registry", llama.fingerprint)
    registry.publish(dataclasses.replace(expert, card=card))
    lines = re.findall(r"(?m)^python -m harness\.registry (.*?)(?: +#.*)?$", DOCS.read_text())
    assert {line.split()[0] for line in lines} == {
        "list", "show", "verify", "gc", "import-peft", "export-peft", "rename", "remove"
    }  # fmt: skip
    for line in lines:
        output = run(*line.replace("smollm2-135m", llama.name).split())
        assert (output.status, output.err) == (0, ""), line
    assert list(registry.manifest().experts) == ["plural"]
    assert list(Registry.open("pools/mine").manifest().experts) == ["plural"]


@given(rows=st.lists(st.lists(st.text("ab ", max_size=9), min_size=3, max_size=3), max_size=4))
def test_table_columns_are_aligned(rows: list[list[str]]) -> None:
    lines = table(["x", "yy", "zzz"], rows, right={1}).split("\n")
    widths = [max(len(row[i]) for row in [["x", "yy", "zzz"], *rows]) for i in range(3)]
    assert len(lines) == len(rows) + 3
    assert set(lines[1]) == set(lines[-1]) == {"-"}
    for line, row in zip(lines[2:-1], rows, strict=True):
        padded = line.ljust(sum(widths) + 4)
        start = widths[0] + 2
        assert padded[: widths[0]] == row[0].ljust(widths[0])
        assert padded[start : start + widths[1]] == row[1].rjust(widths[1])
        assert padded[start + widths[1] + 2 :] == row[2].ljust(widths[2])


def test_sizes_are_printed_with_units() -> None:
    assert [_size(n) for n in (0, 100, 2**20 - 1, 2**20, 3 * 2**29)] == [
        "0.0 KiB", "0.1 KiB", "1024.0 KiB", "1.0 MiB", "1536.0 MiB"
    ]  # fmt: skip
