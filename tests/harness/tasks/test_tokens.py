from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import normalizers

from harness.tasks import TaskData, TaskSpec
from harness.tasks.records import Record, Split, document_id
from harness.tasks.store import read_records, read_task, write_task
from harness.tasks.tokens import tokenize
from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.question import Question
from phatgoose.training.recipe import Recipe
from phatgoose.training.train import Example, train_expert
from tests.support.tiny import make_card
from tests.support.toy import toy_config

INPUTS = [f"the goose {deed} {'very ' * i}" for i, deed in enumerate(["flies", "swims", "is"] * 5)]


def record(prompt: str) -> Record:
    return Record("toy", document_id("toy", prompt), prompt, ["the lake", "unused"], [], [])


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    splits: list[Split] = ["train", "train", "evaluation"]
    folder = tmp_path / "toy"
    write_task(folder, "toy", ((splits[i % 3], record(text)) for i, text in enumerate(INPUTS)))
    file = read_task(folder)
    return TaskData(
        TaskSpec("toy", ("toy",)),
        folder / "train",
        folder / "evaluation",
        file.fingerprint,
        file.counts,
        file.kind,
    )


@pytest.mark.parametrize("which", ["llama", "t5"])
def test_token_examples_match_the_tokenization_of_training(
    request: pytest.FixtureRequest, which: str, data: TaskData
) -> None:
    base: Base = request.getfixturevalue(which)
    recipe = Recipe(max_input_tokens=6, max_target_tokens=2)
    found = tokenize(base, data, "train", recipe)
    expected = [
        Question.encode(base, r.input, r.targets[:1], 6, 2) for r in read_records(data.train)
    ]
    assert len(found) == 10
    assert [(q.context, q.choices) for q in found] == [(q.context, q.choices) for q in expected]
    part = found[2:-1]
    assert [q.context for q in part] == [q.context for q in expected[2:-1]]
    assert part[-1].context == expected[-2].context
    with pytest.raises(IndexError):
        part[len(part)]


def test_token_examples_are_made_once_per_tokenizer(llama: Base, t5: Base, data: TaskData) -> None:
    def files() -> dict[str, int]:
        import os

        folder = Path(os.environ["PHATGOOSE_CACHE"]) / "tokens"
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    tokenize(llama, data, "train", Recipe())
    first = files()
    tokenize(llama, data, "train", Recipe(seed=7))  # which does not change any token
    assert files() == first
    assert len(first) == 1
    tokenize(llama, data, "evaluation", Recipe())
    tokenize(llama, data, "train", Recipe(max_input_tokens=3))
    tokenize(t5, data, "train", Recipe())
    assert len(files()) == 4


def test_an_expert_is_the_same_from_texts_and_from_tokens(
    llama_folder: Path, data: TaskData, tmp_path: Path
) -> None:
    recipe: Recipe = toy_config(llama_folder, tmp_path / "run").train
    texts = [Example(r.input, r.targets[0]) for r in read_records(data.train)]
    evaluation = [Example(r.input, r.targets[0]) for r in read_records(data.evaluation)]
    hashes = []
    for train in (texts, None):
        base = load_base(str(llama_folder))
        examples = train or tokenize(base, data, "train", recipe)
        expert = train_expert(base, make_card("toy", base), examples, evaluation, recipe)
        hashes.append(expert.content_hash())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("which", ["llama", "t5"])
def test_a_target_without_tokens_is_refused_with_its_example(
    request: pytest.FixtureRequest, which: str, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(which)
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    records = [record(text) for text in INPUTS]
    # The only text that this tokenizer drops, without a leading space that would be a token.
    records[7] = replace(record(INPUTS[7].strip()), targets=["~"])
    folder = tmp_path / "faulty"
    write_task(folder, "faulty", (("train", one) for one in records))
    file = read_task(folder)
    faulty = TaskData(
        TaskSpec("faulty", ("faulty",)),
        folder / "train",
        folder / "evaluation",
        file.fingerprint,
        file.counts,
        file.kind,
    )
    line = f"task faulty, document {records[7].document}: target='~': .* makes no token of it"
    with pytest.raises(PhatgooseError, match=line):
        tokenize(base, faulty, "train", Recipe())


def test_examples_fit_the_base(llama: Base, data: TaskData) -> None:
    whole = tokenize(llama, data, "train", Recipe())
    llama.model.config.max_position_embeddings = 9
    found = tokenize(llama, data, "train", Recipe())
    assert len(found) == len(whole)
    for cut, example in zip(found, whole, strict=True):
        assert cut.choices == example.choices
        assert cut.context == example.context[-(9 - len(cut.choices[0]) + 1) :]
