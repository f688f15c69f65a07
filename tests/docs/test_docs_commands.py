"""Check that the code accepts every command in the documentation."""

import argparse
import importlib.util
import re
import runpy
import sys
from typing import Any

import pytest
import yaml

from harness.config.load import CONF, load_config
from phatgoose.errors import PhatgooseError
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, spans

COMMANDS = list(dict.fromkeys(commands()))
# Command lines whose arguments a parser of this repository reads.
PARSED = (
    "harness.status",
    "harness.tasks",
    "harness.registry",
    "benchmarks.linear",
    "benchmarks.registry",
    "benchmarks.scheduler",
    "tests.chaos",
    "tests.mutation",
)


def of(*modules: str) -> list[Command]:
    return [command for command in COMMANDS if command.module in modules and command.arguments]


class Parsed(Exception):
    """Raised when the arguments are accepted, to stop before the work starts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Start the command's module, and stop after its own parser has read the arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        raise Parsed(original(parser, *given, **named))

    assert command.module is not None
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [command.module, *command.arguments])
    with pytest.raises(Parsed) as found:
        runpy.run_module(command.module, run_name="__main__")
    return found.value.arguments


def test_there_are_commands_of_each_kind() -> None:
    assert len(of("harness.run")) >= 25
    for module in ("harness.status", "harness.tasks", "harness.registry"):
        assert len(of(module)) >= 4
    assert any(command.words[0] == "ray" for command in of("harness.run"))


def marked(command: Command) -> Any:
    """Return the command as a parameter; lm-eval needs long to read its catalog."""
    is_slow = any(word.startswith("suite=lm_eval:") for word in command.words)
    return pytest.param(command, marks=[pytest.mark.slow] if is_slow else [], id=str(command))


@pytest.mark.parametrize("command", map(marked, of("harness.run")))
def test_the_overrides_compose(command: Command) -> None:
    if command.arguments == ["--help"]:
        return
    config = load_config(command.arguments)
    assert config.run.dir.startswith(("/", "s3://"))
    assert config.router


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", of(*PARSED), ids=str)
def test_the_parser_accepts_the_arguments(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = parse(command, monkeypatch)
    if overrides := getattr(arguments, "overrides", None):
        load_config(overrides)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "words",
    [
        ("python", "-m", "harness.registry", "erase", "runs/demo/registry"),
        ("python", "-m", "harness.status", "runs/demo", "--follow"),
        ("python", "-m", "harness.tasks", "show"),
    ],
    ids=" ".join,
)
def test_a_removed_command_is_noticed(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(Command("page", words), monkeypatch)
    assert refused.value.code == 2


def test_a_removed_override_is_noticed() -> None:
    for override in ("pool=demos", "train.lora.step=3", "router=[phatgooze]"):
        with pytest.raises(PhatgooseError):
            load_config([override])


def test_the_overrides_for_slurm_compose() -> None:
    found = [command for command in COMMANDS if command.words[0] == "sbatch"]
    found = [command for command in found if len(command.words) > 1]
    assert found
    for command in found:
        assert (ROOT / command.words[1]).exists()
        assert load_config(list(command.words[2:])).run.dir


def test_modules_and_files_exist() -> None:
    for command in COMMANDS:
        if command.module:
            assert importlib.util.find_spec(command.module), str(command)
        for word in command.words[1:]:
            if re.fullmatch(r"(clusters|docs|examples|results|tests)/[\w./-]+\.\w+", word):
                assert (ROOT / word).exists(), str(command)


def test_make_targets_and_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, flags=re.MULTILINE))
    used = [command for command in COMMANDS if command.words[0] == "make"]
    assert len(used) >= 8
    for command in used:
        for word in command.words[1:]:
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), str(command)


def keys_of(group: str) -> set[str]:
    """Return the keys of a group's files and of the configuration section of that name."""
    files = [yaml.safe_load(file.read_text()) for file in (CONF / group).glob("*.yaml")]
    own = yaml.safe_load((CONF / "config.yaml").read_text()).get(group)
    return {key for content in [*files, own] if isinstance(content, dict) for key in content}


def test_keys_in_the_text_exist_in_the_configuration() -> None:
    named = set()
    for page in PAGES:
        for span in spans(page):
            key = re.fullmatch(r"\+?(run|train|cluster|overlap|suite)\.(\w+)[\w.]*(=.*)?", span)
            if key and not span.endswith((".json", ".parquet")):
                named.add((key[1], key[2]))
    assert len(named) >= 20
    # A suite of lm-eval's tasks has its own keys, which no file of the group needs to have.
    known = {group: keys_of(group) for group in {group for group, _ in named}}
    known["suite"] |= {"include_path", "only", "limit", "style", "tasks"}
    assert [f"{group}.{key}" for group, key in sorted(named) if key not in known[group]] == []


def test_pools_and_suites_in_yaml_blocks_load() -> None:
    from harness.tasks import task_specs

    read = 0
    for text in blocks(ROOT / "docs" / "tasks.md", "yaml"):
        group = yaml.safe_load(text)
        if "overlay" in group:
            continue  # its tasks are lm-eval's
        assert [spec.name for spec in task_specs(group)]
        read += 1
    assert read == 3
