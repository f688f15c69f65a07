"""Check the lists of P3 over invented rows, and prompts against ones written by hand.

Templates come from promptsource's archive. Tests are skipped if it is neither in the cache nor
available from an index.
"""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import harness.conf
from harness.tasks import TaskSpec, prepare, task_specs, unreachable
from harness.tasks.records import Record
from harness.tasks.sources.p3 import Options, _numbers, _pairs, _templates
from harness.tasks.sources.promptsource import _sources, templates_of
from harness.tasks.sources.source import options_of
from harness.tasks.store import read_records
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from tests.support.hub_copies import write_copy, write_parquet_branch
from tests.support.p3_rows import ROWS

CONF = Path(harness.conf.__path__[0])


@pytest.fixture(scope="session")
def promptsource(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the archive, downloaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHATGOOSE_CACHE", str(tmp_path_factory.mktemp("promptsource")))
        _sources.cache_clear()  # another test may have downloaded it into a separate cache
        try:
            _sources()
        except PhatgooseError as error:
            pytest.skip(f"promptsource is not available: {error}")
        return cache_dir() / "downloads" / "promptsource-0.2.3.tar.gz"


@pytest.fixture(autouse=True)
def have_promptsource(promptsource: Path, cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(promptsource, cache / "downloads")


def listed(*names: str) -> list[TaskSpec]:
    """Return the tasks of P3 in these pools and suites."""
    groups = [yaml.safe_load((CONF / f"{name}.yaml").read_text()) for name in names]
    return [spec for group in groups for spec in task_specs(group) if spec.source == "p3"]


def write_rows(folder: Path, spec: TaskSpec, rows: list[dict[str, Any]]) -> TaskSpec:
    """Write a copy of a task's data set with these rows in each of its splits."""
    options = options_of(Options, spec)
    names = filter(None, (options.train_split, options.evaluation_split))
    splits = dict.fromkeys(names, rows)
    if options.data_dir:
        write_parquet_branch(folder, spec.members[0], options.data_dir, splits)
    else:
        write_copy(folder, spec.members[0], splits, options.config)
    return replace(spec, folder=str(folder))


def both(spec: TaskSpec) -> tuple[list[Record], list[Record]]:
    data = prepare(spec)
    return read_records(data.train), read_records(data.evaluation)


SPECS = listed("pool/t0", "pool/flan", "suite/t0_heldout")


@pytest.mark.parametrize("spec", SPECS[36:], ids=lambda spec: spec.name)
def test_every_entry_has_a_loader_a_prompt_and_a_metric(tmp_path: Path, spec: TaskSpec) -> None:
    """Check that each matching template gives an example from data with the same columns."""
    options = options_of(Options, spec)
    row = ROWS[options.templates or "trec"]
    train, evaluation = both(write_rows(tmp_path, spec, [row]))
    assert train or options.own == "app_reviews" or not options.train_split
    assert evaluation
    every = _templates(spec, options)
    fitting = [template for template in every if template.apply(row, 0) is not None]
    # Some templates apply only to some rows, such as the cause questions of COPA.
    assert len(train) in (len(fitting), 0)
    assert len(fitting) >= 0.6 * len(every)
    for record in evaluation:
        assert record.input.strip()
        assert record.text
        if options.interface == "mc":
            assert record.choices[record.correct[0]] == record.targets[0]
        else:
            assert not record.choices
            assert spec.metric in ("exact_match", "rouge_l")


def test_the_pools_and_suites_match_the_paper() -> None:
    def names(group: str) -> list[str]:
        return [spec.name for spec in task_specs(yaml.safe_load((CONF / group).read_text()))]

    t0, flan = names("pool/t0.yaml"), names("pool/flan.yaml")
    assert (len(t0), len(flan), len(set(flan))) == (36, 166, 166)
    assert flan[:36] == t0
    assert [flan[i] for i in (0, 35, 36, 71, 72, 146, 147, 153, 165)] == [
        "P3Agnews",
        "P3Dbpedia14",
        "Flanv2zsAi2arceasy",
        "Flanv2zsWordsegment",
        "Niv2zsTranslation",
        "Niv2zsMisc",
        "P3Wscfixed",
        "P3Webquestions",
        "Flanv2zsWmt14translatefren",
    ]
    assert len(names("suite/t0_heldout.yaml")) == 11
    assert len(names("suite/bbh.yaml")) == 22
    assert len(names("suite/bbh23.yaml")) == 23
    assert len(names("suite/bbl.yaml")) == 17
    assert len(names("suite/bbl24.yaml")) == 24
    assert len(names("pool/bigbench.yaml")) == 115
    assert len(names("pool/bigbench_extended.yaml")) == 145


def test_every_listed_data_set_has_evidence() -> None:
    known = yaml.safe_load((CONF.parent / "tasks" / "lists" / "hub_ids.yaml").read_text())
    now = {entry["now"] for entry in known.values()}
    assert {spec.members[0] for spec in SPECS} <= now
    for entry in known.values():
        assert isinstance(entry["certain"], bool)
        assert len(entry["evidence"]) > 20


def test_unreachable_data_are_named_before_any_work() -> None:
    problems = unreachable(SPECS[:36])
    assert len(problems) == 36
    assert "fancyzhx/ag_news" in problems["P3Agnews"]
    assert "the hub's cache" in problems["P3Agnews"]


def spec_of(name: str) -> TaskSpec:
    return next(spec for spec in SPECS[::-1] if spec.name == name)


def test_prompts_match_those_written_by_hand(tmp_path: Path) -> None:
    _, copa = both(write_rows(tmp_path, spec_of("COPA"), [ROWS["super_glue/copa"]]))
    prompts = {record.input: record for record in copa}
    assert len(copa) == 8
    record = prompts['"It was warm." or "It was night."? The ice melted.  because ']
    assert (record.choices, record.correct) == (["It was warm.", "It was night."], [0])
    _, rte = both(write_rows(tmp_path, spec_of("RTE"), [ROWS["super_glue/rte"]]))
    said = {r.input: r.targets for r in rte}
    assert len(said) == 10
    premise = "The goose sleeps by the lake."
    prompt = f'Given {premise} Should we assume that "The goose is awake." is true? Yes or no? '
    assert said[prompt] == ["No"]


def test_evaluation_uses_the_original_templates_and_training_uses_all(tmp_path: Path) -> None:
    """Check HellaSwag, which has eleven templates, four of which pose the original task."""
    rows = [{**ROWS["hellaswag"], "ctx": f"A goose swims {i}. it"} for i in range(3)]
    train, evaluation = both(write_rows(tmp_path, spec_of("P3Hswag"), rows))
    assert len(evaluation) == 3 * 4
    assert len({r.document for r in evaluation}) == 12
    # All prompts of one row form one cluster, and different rows have different clusters.
    assert sorted(Counter(r.cluster for r in evaluation).values()) == [4, 4, 4]
    assert {r.cluster for r in evaluation if "swims 1." in r.input} == {"evaluation row 1"}
    assert len(train) > 3 * 4
    assert all(not record.choices for record in train)


def test_random_choices_in_templates_are_determined_by_the_row(tmp_path: Path) -> None:
    template = next(t for t in templates_of("social_i_qa") if "random" in t.jinja)
    row = ROWS["social_i_qa"]
    said = [template.apply(row, number) for number in range(20)]
    assert len({str(s) for s in said}) > 1
    assert said == [template.apply(row, number) for number in range(20)]


def test_a_separator_in_the_data_is_treated_as_text(tmp_path: Path) -> None:
    row = {**ROWS["ag_news"], "text": "geese ||| swans"}
    _, evaluation = both(write_rows(tmp_path, spec_of("P3Agnews"), [row]))
    assert len(evaluation) == 7
    assert all("geese ||| swans" in record.input for record in evaluation)


def test_pairs_above_the_cap_are_drawn_as_by_the_authors() -> None:
    drawn = np.random.default_rng(42).choice(70, 20, replace=False)
    expected = sorted((i // 7, i % 7) for i in drawn.tolist())
    assert list(_pairs(10, 7, "train", Options(max_examples=20))) == expected
    assert len(list(_pairs(10, 7, "evaluation", Options(max_examples=20)))) == 70


def test_app_reviews_are_split_as_by_the_authors(tmp_path: Path) -> None:
    rows = [{**ROWS["app_reviews"], "review": f"review {i}"} for i in range(10_003)]
    order = list(range(10_003))
    np.random.RandomState(1234).shuffle(order)
    options = options_of(Options, spec_of("P3Appreviews"))
    assert list(_numbers(len(rows), "train", options)) == order[10_000:]
    assert list(_numbers(len(rows), "evaluation", options)) == order[:10_000]


def test_duorc_rows_without_an_answer_get_a_target_that_says_so(tmp_path: Path) -> None:
    row = {**ROWS["duorc/ParaphraseRC"], "no_answer": True, "answers": []}
    train, _ = both(write_rows(tmp_path, spec_of("P3Duorc"), [row] * 9))
    assert train
    assert not any("the lake" in target for record in train for target in record.targets)


def test_trec_has_one_prompt_for_all_fine_labels(tmp_path: Path) -> None:
    train, (record,) = both(write_rows(tmp_path, spec_of("P3Trec"), [ROWS["trec"]]))
    assert len(train) == 1
    assert record.input.startswith("Question: How deep is the lake?\nAnswer choices: ['Abbreviat")
    assert record.input.endswith("'Weight.']\nAnswer: ")
    assert (len(record.choices), record.targets) == (50, ["Distance, linear measure."])


def test_unknown_names_are_answered_with_near_names() -> None:
    with pytest.raises(PhatgooseError, match=r"no 'ag_nws'; did you mean ag_news"):
        templates_of("ag_nws")
    task = {"members": ["a/b"], "source": "p3", "load_opts": {"templats": "ag_news"}}
    with pytest.raises(PhatgooseError, match="did you mean templates"):
        task_specs({"name": "x", "tasks": {"t": task}})
