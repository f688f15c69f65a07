"""Check how a user's own files are read, and one clear error for each kind of fault."""

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.tasks import TaskSpec, prepare, task_specs
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.records import Record
from harness.tasks.sources import jsonl
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError

EXAMPLES: list[dict[str, Any]] = [
    {"input": "2 + 2 =", "target": ["4", "four"]},
    {"input": "Say goose: ", "target": "goose"},
    {"input": "ça va ?", "target": "oui"},
]


CHOICES: list[dict[str, Any]] = [
    {"input": "Is ice warm?", "choices": ["yes", "no"], "correct": 1},
    {"input": "Is ice cold?", "choices": ["yes", "no"], "correct": "yes"},
    {"input": "Which are birds?", "choices": ["goose", "ice", "swan"], "correct": [0, 2]},
]


def write(path: Path, examples: list[dict[str, Any]]) -> Path:
    """Write examples in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples))
    elif path.suffix == ".parquet":
        names = dict.fromkeys(name for example in examples for name in example)
        columns = {name: [e.get(name) for e in examples] for name in names}
        for name, values in columns.items():
            if any(isinstance(value, list) for value in values):
                columns[name] = [v if isinstance(v, list) else [v] for v in values]
        pq.write_table(pa.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            names = dict.fromkeys(name for example in examples for name in example)
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for example in examples:
                writer.writerow(
                    {
                        key: json.dumps(value) if isinstance(value, list) else value
                        for key, value in example.items()
                    }
                )
    return path


def records(*members: Path, **load_opts: Any) -> list[Record]:
    spec = TaskSpec("mine", tuple(map(str, members)), "jsonl", load_opts=load_opts)
    data = prepare(spec)
    return read_records(data.train) + read_records(data.evaluation)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    found = {r.input: r.targets for r in records(write(tmp_path / f"a{suffix}", EXAMPLES))}
    assert found == {
        "2 + 2 = ": ["4", "four"],
        "Say goose: ": ["goose"],
        "ça va ? ": ["oui"],
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_the_right_choice_is_given_as_an_index_or_as_text(tmp_path: Path, suffix: str) -> None:
    found = {r.input: r for r in records(write(tmp_path / f"a{suffix}", CHOICES))}
    assert {text: record.correct for text, record in found.items()} == {
        "Is ice warm? ": [1],
        "Is ice cold? ": [0],
        "Which are birds? ": [0, 2],
    }
    assert found["Which are birds? "].targets == ["goose", "swan"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 2),
        min_size=1,
    )
)
def test_any_texts_survive_every_format(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    examples = [{"input": text + "?", "target": "a" + answer} for text, answer in pairs]
    found = [
        [
            (example["input"], example["target"])
            for _, example in jsonl._examples(str(write(folder / f"a{suffix}", examples)))
        ]
        for suffix in (".jsonl", ".csv", ".tsv", ".parquet")
    ]
    assert all(rows == [(e["input"], e["target"]) for e in examples] for rows in found)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", [{"question": "2 + 2 =", "answer": "4"}])
    (record,) = records(file, input="question", target="answer")
    assert (record.input, record.targets) == ("2 + 2 = ", ["4"])


def test_the_user_may_give_the_evaluation_split(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", EXAMPLES[:2])
    test = write(tmp_path / "test.jsonl", EXAMPLES[2:])
    data = prepare(TaskSpec("mine", (str(train),), "jsonl", load_opts={"evaluation": [str(test)]}))
    assert data.counts == {"train": 2, "evaluation": 1}


def test_different_answers_to_one_prompt_are_different_examples(tmp_path: Path) -> None:
    same = [{"input": "Say it", "target": t} for t in ("a", "b", "a")]
    assert sorted(r.targets[0] for r in records(write(tmp_path / "a.jsonl", same))) == ["a", "b"]


def text(content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content

    def write_it(path: Path) -> None:
        path.write_bytes(data)

    return write_it


GOOD = '{"input": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", GOOD + "{", r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", GOOD + "[1]\n", r"a\.jsonl, line 2: not an object"),
        (
            "a.jsonl",
            GOOD + '{"inptu": "a", "target": "b"}',
            r"line 2: no column input; it has inptu,",
        ),
        (
            "a.jsonl",
            '{"inptu": "a"}',
            r"did you mean inptu\? Set load_opts\.input to the column's name",
        ),
        ("a.jsonl", GOOD + '{"input": "a"}', r"line 2: no column target; it has input"),
        ("a.jsonl", GOOD + '{"input": "a", "target": " "}', "line 2: the target is empty"),
        ("a.jsonl", GOOD + '{"input": "a", "target": []}', "line 2: the target is empty"),
        ("a.jsonl", GOOD + '{"input": "a", "target": {}}', "line 2: an answer is {}, not text"),
        ("a.jsonl", GOOD + '{"input": 1, "target": "b"}', "line 2: input is 1, not text"),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", "y"], "correct": 2}',
            "line 1: the correct choice 2 is neither an index into the 2 choices nor one of them",
        ),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", "y"], "correct": []}',
            "line 1: none of the choices is correct",
        ),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", ""], "correct": 0}',
            "line 1: a choice is empty",
        ),
        ("a.jsonl", '{"input": "a", "choices": ["x"]}', "line 1: no column correct; it has"),
        ("a.jsonl", GOOD.encode() + b'{"input": "\xe9"}', r"line 2: byte 12 is not UTF-8"),
        ("a.jsonl", "\n \n", r"task mine: .*a\.jsonl has no examples"),
        ("a.csv", "input,target\n", r"a\.csv has no examples"),
        ("a.csv", "question,target\nx,y\n", r"a\.csv, line 2: no column input; it has question"),
        (
            "a.csv",
            "input,target\nx,y\nz\n",
            r"a\.csv, line 3: it does not have the header's 2 fields",
        ),
        (
            "a.csv",
            "input,target\nx,y\nx,y,z\n",
            r"a\.csv, line 3: it does not have the header's 2 fields",
        ),
        ("a.csv", "input,target\nx,\n", r"a\.csv, line 2: no column target"),
        ("a.parquet", "no", r"a\.parquet is not a parquet file"),
        ("a.jsonl", GOOD + '{"input": "a", "target": NaN}', "line 2: an answer is nan, not text"),
        ("a.jsonl", GOOD + '{"input": "a", "target": -Infinity}', "line 2: an answer is -inf, not"),
        ("a.jsonl", GOOD + '{"input": "a", "target": 1e999}', "line 2: an answer is inf, not text"),
        ("a.jsonl", GOOD + '{"input": NaN, "target": "b"}', "line 2: input is nan, not text"),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", NaN], "correct": 0}',
            r"line 1: an answer is \['x', nan\], not text",
        ),
        (
            "a.jsonl",
            GOOD + '{"input": "half \\ud83d", "target": "b"}',
            r"line 2: '\\ud83d' is a lone surrogate \(half a character\)",
        ),
        ("a.jsonl", GOOD + '{"input": "a", "target": "\\udc00"}', "line 2: .* is a lone surrogate"),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", "\\ud83d"], "correct": 0}',
            "line 1: .* is a lone surrogate",
        ),
        ("a.jsonl", GOOD + "[" * 100_000, "line 2: not JSON"),
        ("a.jsonl", GOOD + '{"input": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: not JSON"),
        ("a.jsonl", '{"input": "a", "target": 1' + "0" * 5000 + "}", "line 1: not JSON"),
        (
            "a.jsonl",
            GOOD + '{"input": "a", "target": "b", "target": "c"}',
            r"line 2: not JSON \(duplicate key 'target'\)",
        ),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x"], "correct": 0}',
            "line 1: there is only one choice",
        ),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["x", " x "], "correct": 0}',
            "line 1: there is only one choice",
        ),
        (
            "a.jsonl",
            '{"input": "a", "target": "b", "cluster": []}',
            r"line 1: cluster is \[\], not",
        ),
        (
            "a.csv",
            "input,target,input\nx,y,z\n",
            r"a\.csv, line 1: duplicate column 'input'",
        ),
        (
            "a.csv",
            'input,target\nsort 3 1 2,"[1, 2, 3]"\n',
            r"a\.csv, line 2: target=.*could be text or a list of answers\.",
        ),
        (
            "a.csv",
            'input,choices,correct\nhow many,"[1, 2, 3]",1\n',
            r"a\.csv, line 2: correct=1: it could be an index or the choice '1'\.",
        ),
        ("a.csv", 'input,target\nx,y\nz,"open\nu,v\n', r"a\.csv, line 3: unexpected end of data"),
        ("a.csv", 'input,target\nx,"y" z\n', r"a\.csv, line 2: ',' expected after"),
        (
            "a.csv",
            'input,choices,correct\nx,"[""a"", ""b""]",' + "1" * 5000 + "\n",
            r"a\.csv, line 2: the correct choice '1+\.\.\. is neither",
        ),
        ("a.txt", "no", r"a\.txt does not end in \.jsonl, \.csv, \.tsv, \.parquet"),
    ],
)
def test_broken_files_give_one_error_with_the_location(
    tmp_path: Path, cache: Path, name: str, content: str | bytes, error: str
) -> None:
    text(content)(tmp_path / name)
    with pytest.raises(PhatgooseError, match=error) as caught:
        records(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.parquet"))


def test_mixed_kinds_of_examples_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [EXAMPLES[0], *CHOICES] * 1)
    with pytest.raises(PhatgooseError, match="mine mixes multiple choice with generation"):
        records(file, evaluation=[str(file)])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"cannot find .*gone\.jsonl"):
        records(tmp_path / "gone.jsonl")
    with pytest.raises(PhatgooseError, match=r"no file matches .*\*\.jsonl"):
        records(tmp_path / "*.jsonl")
    with pytest.raises(PhatgooseError, match=r"no file matches .* a folder must contain files"):
        records(tmp_path)


def test_an_endless_line_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Check 100 MB in one line: never more than the bound is held."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD.encode())
        file.truncate(100 * 2**20)
    tracemalloc.start()
    with pytest.raises(PhatgooseError, match=r"a\.jsonl, line 2: longer than 16 MiB"):
        records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_files_become_one_task_each(tmp_path: Path) -> None:
    for name in ("my task.jsonl", "b.csv"):
        write(tmp_path / name, EXAMPLES)
    pool = {"name": "mine", "source": "jsonl", "limit": 3}
    by_glob = task_specs({**pool, "files": f"{tmp_path}/*"})
    assert [(s.name, s.members, s.limit) for s in by_glob] == [
        ("b", (f"{tmp_path}/b.csv",), 3),
        ("my_task", (f"{tmp_path}/my task.jsonl",), 3),
    ]
    assert task_specs({**pool, "files": str(tmp_path)}) == by_glob
    assert task_specs({**pool, "files": [f"{tmp_path}/b.csv", f"{tmp_path}/my*"]}) == by_glob
    write(tmp_path / "b.tsv", EXAMPLES)
    with pytest.raises(PhatgooseError, match=r"b\.csv and .*b\.tsv would both become the task b"):
        task_specs({**pool, "files": str(tmp_path)})
    with pytest.raises(PhatgooseError, match="no files are given"):
        task_specs({**pool, "files": None})


def test_adapters_become_one_expert_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pool = {"name": "mine", "source": "peft"}
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    specs = task_specs({**pool, "adapters": folders})
    assert [(s.name, s.adapter, s.has_data) for s in specs] == [
        ("a", folders[0], False),
        ("b", folders[1], False),
    ]
    data = write(tmp_path / "a.jsonl", EXAMPLES)
    tasks = {"a": {"source": "jsonl", "members": [str(data)]}}
    first, second = task_specs({**pool, "adapters": folders, "tasks": tasks})
    assert (first.adapter, first.source, first.has_data) == (folders[0], "jsonl", True)
    assert not second.has_data
    with pytest.raises(PhatgooseError, match="two adapters have the same name"):
        task_specs({**pool, "adapters": [folders[0], str(tmp_path / "b" / ".." / "a")]})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_lists_of_numbers_are_equal_in_every_format(tmp_path: Path, suffix: str) -> None:
    examples: list[dict[str, Any]] = [
        {"input": "how many", "choices": [1, 2, 3], "correct": [1]},
        {"input": "which", "choices": ["a", "b"], "correct": 1},
        {"input": "these", "choices": [7, 8, 9], "correct": [0, 2]},
        {"input": "[1, 2]", "choices": [7, 8], "correct": ["8"]},
        {"input": "same", "choices": [0, 1], "correct": 1},
    ]
    found = {r.input: r.targets for r in records(write(tmp_path / f"a{suffix}", examples))}
    assert found == {
        "how many ": ["2"],
        "which ": ["b"],
        "these ": ["7", "9"],
        "[1, 2] ": ["8"],
        "same ": ["1"],  # index and choice agree
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_in_parquet_is_refused(tmp_path: Path, value: float) -> None:
    pq.write_table(pa.table({"input": ["a", "b"], "target": [1.5, value]}), tmp_path / "a.parquet")
    with pytest.raises(
        PhatgooseError, match=r"a\.parquet, row 2: an answer is (nan|inf), not text"
    ):
        records(tmp_path / "a.parquet")


def test_duplicate_columns_in_parquet_are_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, ["input", "target", "target"]), tmp_path / "a.parquet")
    with pytest.raises(PhatgooseError, match="duplicate column 'target'"):
        records(tmp_path / "a.parquet")


def test_equal_choices_are_equally_correct(tmp_path: Path) -> None:
    examples = [{"input": f"q{i}", "choices": ["x", "y", "x"], "correct": 2} for i in range(3)]
    spec = TaskSpec("mine", (str(write(tmp_path / "a.jsonl", examples)),), "jsonl", split="all")
    assert evaluation_table(prepare(spec))["correct"].to_pylist() == [[0, 2]] * 3


def test_a_column_joins_examples_into_clusters(tmp_path: Path) -> None:
    examples = [
        {**EXAMPLES[1], "input": f"say {w}", "cluster": c}
        for w, c in zip("abc", (1, 1, "z"), strict=True)
    ]
    found = {r.input: r.cluster for r in records(write(tmp_path / "a.jsonl", examples))}
    assert found == {"say a ": "1", "say b ": "1", "say c ": "z"}
