"""Compare prompts with ones written by hand from BIG-bench's rules.

Its order of choices, `numpy.random.RandomState(42).permutation(sorted(choices))`, is [1, 0] for two
choices, [0, 1, 2] for three, [1, 3, 0, 2] for four.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks import TaskSpec
from harness.tasks.records import Record, Split
from harness.tasks.sources.bigbench import (
    Options,
    make_records,
    parse_member,
    prompt_of,
    read_archive,
)
from phatgoose.errors import PhatgooseError

Archive = Callable[[dict[str, Any]], Path]

COLORS = {"red": 0, "blue": 1, "pink": 0, "grey": 0}


@pytest.mark.parametrize(
    ("definition", "example", "prompt"),
    [
        pytest.param({}, {"input": "Why?", "target": "so"}, "\nQ: Why?\nA: ", id="defaults"),
        pytest.param(
            {
                "task_prefix": "Compute.",
                "example_input_prefix": "\n",
                "example_output_prefix": " = ",
            },
            {"input": "op 2", "target": "4"},
            "Compute.\nop 2 = ",
            id="own prefixes",
        ),
        pytest.param(
            {"example_input_prefix": "", "example_output_prefix": ""},
            {"input": "2 m is ", "target_scores": {"b": 1, "a": 0, "c": 0}},
            "2 m is \n  choice: a\n  choice: b\n  choice: c",
            id="three choices",
        ),
        pytest.param(
            {},
            {"input": "Color?", "target_scores": COLORS},
            "\nQ: Color?\n  choice: grey\n  choice: red\n  choice: blue\n  choice: pink\nA: ",
            id="four choices",
        ),
        pytest.param(
            {"append_choices_to_input": False},
            {"input": "Color?", "target_scores": COLORS},
            "\nQ: Color?\nA: ",
            id="choices not appended",
        ),
        pytest.param(
            {"append_choices_to_input": "false"},
            {"input": "Well?", "target_scores": {"Yes": 1, "No": 0}},
            "\nQ: Well?\n  choice: Yes\n  choice: No\nA: ",
            id="the string false appends",
        ),
        pytest.param(
            {"choice_prefix": ""},
            {"input": "Well? ", "target_scores": {"Yes.": 1, "No.": 0}},
            "\nQ: Well? Yes.No.\nA: ",
            id="empty choice prefix",
        ),
        pytest.param(
            {},
            {"input": "", "target_scores": {"Yes": 1, "No": 0}},
            "\nQ: \n  choice: Yes\n  choice: No\nA: ",
            id="empty input",
        ),
        pytest.param(
            {},
            {"input": "2+2", "target": "4", "target_scores": {"4": 1, "5": 0}},
            "\nQ: 2+2\n  choice: 5\n  choice: 4\nA: ",
            id="target beside target_scores",
        ),
    ],
)
def test_the_prompt_follows_bigbench(
    definition: dict[str, Any], example: dict[str, Any], prompt: str
) -> None:
    assert prompt_of(definition, example) == prompt


@given(st.lists(st.text(alphabet="abcdef", min_size=1), min_size=1, max_size=30, unique=True))
def test_choices_are_ordered_as_bigbench_orders_them(choices: list[str]) -> None:
    """Check that the order is drawn for each example: calling twice gives the same."""
    expected = np.random.RandomState(42).permutation(sorted(choices))
    example = {"input": "", "target_scores": dict.fromkeys(choices, 1)}
    definition = {"choice_prefix": "|", "example_input_prefix": "", "example_output_prefix": ""}
    for _ in range(2):
        assert prompt_of(definition, example) == "".join("|" + choice for choice in expected)


def records_of(example: dict[str, Any], style: str = "bigbench") -> Record:
    ((_, record),) = made({"examples": [example]}, style=style)
    return record


def made(
    *definitions: dict[str, Any], name: str = "t", **fields: Any
) -> list[tuple[Split, Record]]:
    """Return the records of one task made of these files."""
    members = {f"m{i}": definition for i, definition in enumerate(definitions)}
    return list(make_records(TaskSpec(name, tuple(members), **fields), members))


def test_generation_targets_are_read() -> None:
    assert records_of({"input": "n", "target": ["three ", "3"]}).targets == ["three", "3"]
    assert records_of({"input": "n", "target": "3"}).targets == ["3"]


def test_right_choices_are_those_with_the_highest_score_in_the_order_of_the_file() -> None:
    record = records_of({"input": "n", "target_scores": {"z": 0.4, "b": 0.9, "a": 0.9}})
    assert record.choices == ["z", "b", "a"]
    assert record.correct == [1, 2]
    assert record.targets == ["b", "a"]


@pytest.mark.parametrize("scores", [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0}])
def test_no_choice_is_right_if_all_scores_are_equal(scores: dict[str, float]) -> None:
    with pytest.raises(PhatgooseError, match=r"task t: BIG-bench task m0, example 1: (none|the t)"):
        records_of({"input": "n", "target_scores": scores})


def test_the_choices_of_the_file_outrank_its_free_text() -> None:
    """Check a task like strategyqa, whose target explains the answer."""
    record = records_of({"input": "n", "target": "Yes. For", "target_scores": {"Yes": 1, "No": 0}})
    assert record.targets == ["Yes"]


def test_prompts_in_the_style_of_the_paper() -> None:
    record = records_of({"input": "How many?", "target": ["3", "three"]}, style="paper")
    assert record.input == "Q: How many?\nA:\nAnswer: "
    assert record.targets == ["three", "3"]


def test_duplicates_are_dropped_and_repeated_inputs_stay_in_one_split() -> None:
    once = {"input": "Mass of 1 l of water?", "target_scores": {"1 kg": 1, "2 kg": 0}}
    other_choices = {"input": "mass of 1 l of water?", "target_scores": {"1 kg": 1, "9 kg": 0}}
    records = made({"examples": [once, once]}, {"examples": [other_choices]}, name="physics")
    assert len({record.document for _, record in records}) == 2
    assert len({split for split, _ in records}) == 1


@given(st.lists(st.text(alphabet="ab \n", max_size=6), min_size=1, max_size=60))
def test_splits_do_not_share_documents(inputs: list[str]) -> None:
    examples = [{"input": text, "target": "x"} for text in inputs]
    records = made({"examples": examples})
    train, evaluation = (
        {r.document for split, r in records if split == s} for s in ("train", "evaluation")
    )
    assert not train & evaluation
    assert len(train | evaluation) == len({" ".join(text.split()) for text in inputs})


def test_short_prefix_keeps_the_last_sentence() -> None:
    source = {
        "task_prefix": "Definition: long. Prompt: no. Prompt: Ask a question.",
        "examples": [{"input": "x", "target": "y"}],
    }
    definition = parse_member("ni", json.dumps(source).encode(), Options(short_prefix=True))
    assert prompt_of(definition, definition["examples"][0]) == "Ask a question.\nQ: x\nA: "
    with pytest.raises(PhatgooseError, match=r'ni has no "Prompt:"'):
        parse_member(
            "ni", json.dumps({**source, "task_prefix": "Go."}).encode(), Options(short_prefix=True)
        )


def test_choices_need_not_be_appended() -> None:
    source = {"examples": [{"input": "x", "target_scores": {"a": 1, "b": 0}}]}
    definition = parse_member("sum", json.dumps(source).encode(), Options(no_append=True))
    assert prompt_of(definition, definition["examples"][0]) == "\nQ: x\nA: "


def test_a_task_with_only_subtasks_is_refused() -> None:
    with pytest.raises(PhatgooseError, match=r"arithmetic has no examples of its own.*subtasks"):
        parse_member("arithmetic", b'{"name": "arithmetic"}', Options())
    with pytest.raises(PhatgooseError, match="arithmetic is not JSON"):
        parse_member("arithmetic", b'{"name": ', Options())


def read(path: Path, *members: str) -> list[Record]:
    """Return the records of one task made of these members of an archive."""
    (task,) = read_archive(path, [TaskSpec("t", members)])
    return [record for _, record in task.records]


def ask(text: str) -> dict[str, Any]:
    return {"examples": [{"input": text, "target": "y"}], "description": text, "canary": "c"}


def test_members_are_read_from_the_archive(archive: Archive) -> None:
    path = archive({"sums": ask("sums"), "sums/small": ask("small"), "other": ask("other")})
    assert {r.text for r in read(path, "sums/small", "sums")} == {"small", "sums"}
    assert {r.text for r in read(path, "sums/*")} == {"small"}
    (task,) = read_archive(path, [TaskSpec("t", ("sums", "sums/small"))])
    assert (task.description, task.origin["canary"]) == ("sums; small", "c")


def test_several_tasks_are_read_in_one_pass_and_returned_when_complete(archive: Archive) -> None:
    """Check that the archive determines the order; a pattern is complete only at its end."""
    path = archive({name: ask(name) for name in ("a/1", "b", "a/2", "c")})
    specs = [TaskSpec("all", ("*",)), TaskSpec("a", ("a/1", "a/2")), TaskSpec("b", ("b",))]
    found = {t.spec.name: [r.text for _, r in t.records] for t in read_archive(path, specs)}
    assert found == {"b": ["b"], "a": ["a/1", "a/2"], "all": ["a/1", "a/2", "b", "c"]}
    assert list(found) == ["b", "a", "all"]


def test_an_unknown_member_is_answered_with_near_names(archive: Archive) -> None:
    path = archive({"linguistic_mappings/plural_json": ask("x"), "operators": ask("y")})
    with pytest.raises(PhatgooseError, match=r"no task operatos: did you mean operators\?"):
        read(path, "operatos")
    with pytest.raises(PhatgooseError, match="did you mean linguistic_mappings/plural_json"):
        read(path, "plural_json")


@pytest.mark.parametrize("damage", ["truncated", "not an archive"])
def test_a_damaged_archive_gives_one_clear_error(archive: Archive, damage: str) -> None:
    path = archive({"first": ask("x"), "operators": ask("y")})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"<html>404</html>")
    with pytest.raises(PhatgooseError, match=r"is damaged .* Delete it") as caught:
        read(path, "operators")
    assert "\n" not in str(caught.value)


def options(examples: list[dict[str, Any]], **load_opts: Any) -> list[Record]:
    spec = TaskSpec("t", ("m",), load_opts=load_opts)
    definition = parse_member("m", json.dumps({"examples": examples}).encode(), Options())
    return [record for _, record in make_records(spec, {"m": definition})]


def test_yes_and_no_become_choices() -> None:
    (record,) = options([{"input": "x", "target": "No."}], choices=["Yes.", "No."])
    assert (record.choices, record.correct, record.grades) == (["Yes.", "No."], [1], [0.0, 1.0])
    with pytest.raises(PhatgooseError, match="example 1: none of the choices is correct"):
        options([{"input": "x", "target": "Maybe."}], choices=["Yes.", "No."])


def test_balance_and_cap_keep_the_first_examples_by_hash() -> None:
    """Check that this does not depend on the order in the file."""
    examples = [{"input": f"q{i}", "target": "yes" if i % 5 else "no"} for i in range(50)]
    balanced = options(examples, balance=True)
    assert sorted(r.targets[0] for r in balanced) == ["no"] * 10 + ["yes"] * 10
    assert balanced == options(examples[::-1], balance=True)
    capped = options(examples, cap=7)
    assert [r.document for r in capped] == sorted(r.document for r in options(examples))[:7]


def test_shots_are_other_training_examples_after_the_prefix() -> None:
    """Check BIG-bench's order: prefix, shots with answers and the separator, then the example."""
    examples = [{"input": f"q{i}", "target": [f"a{i}", "other"]} for i in range(20)]
    definition = {"task_prefix": "Go.", "few_shot_example_separator": "; ", "examples": examples}
    spec = TaskSpec("t", ("m",), load_opts={"kshot": 2})
    records = list(make_records(spec, {"m": definition}))
    train = [r.text for split, r in records if split == "train"]
    for _, record in records:
        number = record.text[1:]
        one, two = [text[1:] for text in train if text != record.text][:2]
        assert record.input == (
            f"Go.\nQ: q{one}\nA: a{one}; \nQ: q{two}\nA: a{two}; \nQ: q{number}\nA: "
        )


def test_examples_without_a_target_are_an_error_unless_dropped() -> None:
    examples = [{"input": "x", "target": " "}, {"input": "y", "target": "z"}]
    with pytest.raises(PhatgooseError, match="BIG-bench task m, example 1: the target is empty"):
        options(examples)
    assert [r.text for r in options(examples, skip_empty=True)] == ["y"]


def test_first_line_keeps_the_beginning_of_the_prefix() -> None:
    source = json.dumps({"task_prefix": "Say how.\n\nLong.", "examples": [{"input": "x"}]})
    definition = parse_member("m", source.encode(), Options(first_line=True))
    assert definition["task_prefix"] == "Say how."
