"""Check what distinguishes the examples of BIG-bench, their shots, and refused options."""

from pathlib import Path
from typing import Any

import pytest

from harness.tasks import TaskSpec, task_specs
from harness.tasks.records import Record, Split
from harness.tasks.sources import bigbench
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError

# The user's cache, looked up on import because tests have a separate one.
ARCHIVE = cache_dir() / "downloads" / "bigbench-1.0.0.tar.gz"

# Documents of the suites: all examples of BIG-bench 1.0.0 except for duplicates.
DOCUMENTS = {
    "causal_judgment": 190,  # one prompt has two answers, twice
    "logical_deduction": 1500,
    "misconceptions_russian": 49,
    "geometric_shapes": 359,  # of 360
    "operators": 210,  # of 211
    "sports_understanding": 986,  # of 1000
    "bbq_lite_json": 16056,  # of 16076
    "winowhy": 2861,  # of 2865
    "conlang_translation": 164,
    "tracking_shuffled_objects": 3750,
}


def read(*examples: dict[str, Any], keys: Any = None, **fields: Any) -> list[tuple[Split, Record]]:
    """Return the records of a task with these examples."""
    spec = TaskSpec("t", ("m",), **fields)
    return list(bigbench.make_records(spec, {"m": {**(keys or {}), "examples": examples}}))


def documents(*examples: dict[str, Any], **more: Any) -> int:
    return len({record.document for _, record in read(*examples, **more)})


def test_questions_contained_in_hidden_choices_are_different_documents() -> None:
    """Check a task like logical_deduction: one paragraph with several questions in the choices."""
    hidden = {"append_choices_to_input": False}
    row = "An owl, a jay and a hen sit in a row. The owl is left of the jay."
    asked = [
        {"input": row, "target_scores": {f"The {bird} is {place}.": int(bird == right)
                                         for bird in ("owl", "jay", "hen")}}
        for place, right in (("first", "owl"), ("second", "jay"), ("third", "hen"))
    ]  # fmt: skip
    records = read(*asked, *asked, keys=hidden)
    assert {record.input for _, record in records} == {f"\nQ: {row}\nA: "}
    assert len({record.document for _, record in records}) == 3
    assert len({split for split, _ in records}) == 1


def test_questions_without_an_input_are_distinguished_and_split() -> None:
    """Check a task like misconceptions_russian, with empty prompts: only the choices differ."""
    empty = {
        "example_input_prefix": "",
        "example_output_prefix": "",
        "append_choices_to_input": False,
    }
    claims = [{"input": "", "target_scores": {f"{n} is odd.": 1, "So so.": 0}} for n in range(60)]
    records = read(*claims, keys=empty)
    assert len({record.document for _, record in records}) == 60
    assert 3 <= sum(split == "evaluation" for split, _ in records) <= 24


def test_different_answers_to_one_prompt_are_different_documents() -> None:
    """Check a task like gem/e2e_nlg; the documents stay in one split."""
    one, two = {"input": "name: Inn", "target": "An inn."}, {"input": "name: Inn", "target": "Inn!"}
    records = read(one, two, one)
    assert len({record.document for _, record in records}) == 2
    assert len({split for split, _ in records}) == 1


def test_the_order_of_answers_case_and_spacing_do_not_distinguish_documents() -> None:
    scores = {"up": 1, "down": 0}
    assert documents(
        {"input": "Where to?", "target_scores": scores},
        {"input": "where  to?", "target_scores": dict(reversed(scores.items()))},
    ) == 1  # fmt: skip
    two = ["3", "three"]
    assert documents({"input": "n", "target": two}, {"input": "n", "target": two[::-1]}) == 1


def test_cap_and_balance_keep_questions_contained_in_hidden_choices() -> None:
    keys = {"append_choices_to_input": False}
    asked = [{"input": "x", "target_scores": {f"{n}": 1, "no": 0}} for n in range(9)]
    assert documents(*asked, keys=keys, load_opts={"cap": 5}) == 5
    assert len(read(*asked, *asked, keys=keys, load_opts={"cap": 20})) == 9


def test_shots_are_placed_between_the_prefix_and_the_question() -> None:
    """Check a rule that shows only in shots, as in mult_data_wrangling, for both kinds of task."""
    keys = {
        "task_prefix": "Cut it.\n",
        "example_input_prefix": "Input: ",
        "example_output_prefix": " Output: ",
        "few_shot_example_separator": "\n\n",
        "append_choices_to_input": False,
    }
    for answer in (
        lambda n: {"target": f"'{n}'"},
        lambda n: {"target_scores": {"'?'": 0, f"'{n}'": 1}},
    ):
        examples = [{"input": f"'Mx. {n}'", **answer(n)} for n in "ABCDEFGH"]
        records = read(*examples, keys=keys, load_opts={"kshot": 2})
        train = [record.text[5] for split, record in records if split == "train"]
        assert 2 < len(train) < 8
        for _, record in records:
            one, two = [name for name in train if name != record.text[5]][:2]
            assert record.input == (
                f"Cut it.\nInput: 'Mx. {one}' Output: '{one}'\n\n"
                f"Input: 'Mx. {two}' Output: '{two}'\n\nInput: {record.text} Output: "
            )


def test_multiple_choice_labeled_as_exact_match_is_multiple_choice() -> None:
    """Check tasks like arithmetic and penguins_in_a_table."""
    labels = {"metrics": ["exact_str_match"], "preferred_score": "exact_str_match"}
    scores = {"6": 0.0, "5": 1.0}
    ((_, record),) = read({"input": "2+3", "target": "5", "target_scores": scores}, keys=labels)
    assert (record.choices, record.correct, record.grades) == (["6", "5"], [1], [0.0, 1.0])


@pytest.mark.parametrize(
    ("load_opts", "message"),
    [
        ({"cap": -1}, "load_opts.cap=-1: it must be at least 0"),
        ({"kshot": -2}, "load_opts.kshot=-2: it must be at least 0"),
        ({"choices": "Yes."}, "load_opts.choices=.*: give two or more different answers"),
        ({"choices": []}, "load_opts.choices=.*: give two or more"),
        ({"choices": ["Yes."]}, "load_opts.choices=.*: give two or more"),
        ({"choices": ["Yes.", "Yes."]}, "load_opts.choices=.*: give two or more"),
        ({"choices": [True, False]}, "yes and no need quotes"),
    ],
)
def test_contradictory_options_are_refused(load_opts: dict[str, Any], message: str) -> None:
    with pytest.raises(PhatgooseError, match=message):
        bigbench.check(TaskSpec("t", ("m",), load_opts=load_opts))


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} has not been downloaded")
def test_suites_contain_all_documents_of_the_archive() -> None:
    specs = task_specs({"name": "suites", "lists": ["bbh", "bbl", "bbl_rest"], "style": "paper"})
    chosen = [spec for spec in specs if spec.name in DOCUMENTS]
    found = {
        task.spec.name: len({record.document for _, record in task.records})
        for task in bigbench.read_archive(Path(ARCHIVE), chosen)
    }
    assert found == DOCUMENTS
