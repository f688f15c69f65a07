import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.records import Record, check_record, document_id, split_of
from phatgoose.errors import PhatgooseError


def record(text: str, **changes: object) -> Record:
    values = {"targets": ["yes"], "choices": [], "correct": [], **changes}
    return Record("some_task", document_id("some_task", text), text, **values)  # type: ignore[arg-type]


def test_split_and_document_ids_never_change() -> None:
    """Check a hash computed by hand.

    `printf 'plural\\nthis is a boy' | sha256sum`; its last 8 digits are 3 modulo 5.
    """
    assert document_id("plural", "This is  a boy\n") == "3e98c260e9542466"
    assert split_of("plural", "This is  a boy\n") == "train"


@given(st.text(), st.lists(st.text(alphabet="abcXYZ09?+-", min_size=1), min_size=1))
def test_split_ignores_case_and_spacing(task: str, words: list[str]) -> None:
    texts = [" ".join(words), "\n " + "\t".join(words).upper() + " ", "  ".join(words).lower()]
    assert len({split_of(task, text) for text in texts}) == 1
    assert len({document_id(task, text) for text in texts}) == 1


def test_split_keeps_about_one_fifth_for_evaluation_and_depends_on_the_task() -> None:
    splits = {task: [split_of(task, f"What is {i}?") for i in range(2000)] for task in ("a", "b")}
    for split in splits.values():
        assert 340 < split.count("evaluation") < 460
    assert splits["a"] != splits["b"]


def test_punctuation_distinguishes_documents() -> None:
    assert document_id("sums", "5 + 3") != document_id("sums", "5 - 3")


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (record("x", targets=[]), "target is empty"),
        (record("x", targets=[" "]), "target is empty"),
        (record("x", choices=["yes", ""], correct=[0]), "a choice is empty"),
        (record("x", choices=["yes", "no"]), "none of the choices is correct"),
        (
            record("x", choices=["yes", "no"], correct=[2]),
            r"\[2\] is not an index into the 2 choices",
        ),
        (record("x", choices=["yes", "no"], correct=[0], grades=[1.0]), "1 grades for 2 choices"),
    ],
)
def test_an_invalid_record_is_reported_with_its_location(faulty: Record, reason: str) -> None:
    with pytest.raises(PhatgooseError, match=f"^x.jsonl, line 3: .*{reason}"):
        check_record(faulty, "x.jsonl, line 3")


def test_a_valid_record_is_accepted() -> None:
    check_record(record("x"), "here")
    check_record(record("x", choices=["a", "b"], correct=[1], grades=[0.0, 0.5]), "here")
