"""Check the lists of the paper's P3 and FLAN tasks and of its T0 suite."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import harness.tasks
from harness.tasks import TaskSpec, task_specs
from harness.tasks.sources import hub
from harness.tasks.sources.flan import DATA_SET
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.p3 import Options
from harness.tasks.sources.promptsource import templates_of
from harness.tasks.sources.source import options_of
from phatgoose.errors import PhatgooseError
from tests.support.hub_copies import write_copy, write_parquet_branch, write_saved

LISTS = Path(harness.tasks.__path__[0]) / "lists"
# The number of tasks, and the first and the last.
EXPECTED = {
    "t0": (36, "P3Agnews", "P3Dbpedia14"),
    "flan2021": (36, "Flanv2zsAi2arceasy", "Flanv2zsWordsegment"),
    "niv2": (75, "Niv2zsTranslation", "Niv2zsMisc"),
    "flan_further": (19, "P3Wscfixed", "Flanv2zsWmt14translatefren"),
    "t0_heldout": (11, "RTE", "WSCFIXED"),
}
# Splits of the data sets without train or validation, according to their cards.
SPLITS = {
    "CogComp/trec": {"train", "test"},
    "Yelp/yelp_review_full": {"train", "test"},
    "facebook/anli": {f"{part}_r{i}" for part in ("train", "dev", "test") for i in (1, 2, 3)},
    "fancyzhx/ag_news": {"train", "test"},
    "fancyzhx/amazon_polarity": {"train", "test"},
    "fancyzhx/dbpedia_14": {"train", "test"},
    "r-three/Phatgoose_storycloze_offline": {"validation", "test"},
    "sealuzh/app_reviews": {"train"},
    "stanfordnlp/imdb": {"train", "test"},
    "stanfordnlp/web_questions": {"train", "test"},
}


def specs_of(*names: str) -> list[TaskSpec]:
    return task_specs({"name": "lists", "lists": list(names)})


def by_hub_id() -> dict[str, dict[str, Any]]:
    """Return the entries of hub_ids.yaml by the data set's current id."""
    entries = yaml.safe_load((LISTS / "hub_ids.yaml").read_text()).values()
    return {entry["now"]: entry for entry in entries}


P3 = [spec for spec in specs_of(*EXPECTED) if spec.source == "p3"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_list_contains_the_tasks_of_the_paper_in_order(name: str) -> None:
    count, first, last = EXPECTED[name]
    names = [spec.name for spec in specs_of(name)]
    assert (len(names), names[0], names[-1]) == (count, first, last)
    assert len(set(names)) == count


def test_no_task_is_in_two_lists() -> None:
    assert len({spec.name for spec in specs_of(*EXPECTED)}) == 36 + 36 + 75 + 19 + 11


@pytest.mark.parametrize("name", EXPECTED)
def test_a_list_names_no_task_twice(name: str) -> None:
    """YAML silently keeps the last of two equal keys."""
    lines = (LISTS / f"{name}.yaml").read_text().splitlines()
    keys = [line.split(":")[0] for line in lines if line[:1].isalpha()]
    assert len(keys) == len(set(keys)) == EXPECTED[name][0]


def test_tasks_have_the_expected_kinds() -> None:
    """Check that 36 + 7 tasks of the pool and 11 of the suite are P3's; generation has options."""
    specs = specs_of(*EXPECTED)
    assert len(P3) == 36 + 7 + 11
    flan = [spec for spec in specs if spec.source == "flan"]
    assert len(flan) == 36 + 75 + 12
    assert all(spec.metric == "rouge_l" for spec in flan)
    assert len({spec.members for spec in flan}) == len(flan)
    generated = [spec for spec in P3 if options_of(Options, spec).interface == "gen"]
    assert len(generated) == 13
    assert sorted(spec.name for spec in generated if spec.metric == "exact_match") == [
        "P3Adversarialqa",
        "P3Duorc",
        "P3Quoref",
        "P3Ropes",
    ]


@pytest.mark.parametrize("spec", P3, ids=lambda spec: spec.name)
def test_a_data_set_is_read_under_the_id_in_hub_ids(spec: TaskSpec) -> None:
    options = options_of(Options, spec)
    known = by_hub_id()[spec.members[0]]
    assert options.revision == known.get("revision", "")
    assert options.data_dir == known.get("data_dir", "")
    assert options.config == known.get("config", options.config)
    splits = SPLITS.get(spec.members[0], {"train", "validation"})
    assert {options.train_split, options.evaluation_split} - {""} <= splits


def test_hub_ids_have_evidence() -> None:
    used = {spec.members[0] for spec in P3} | {DATA_SET, "SaylorTwift/bbh"}
    known = by_hub_id()
    assert set(known) == used
    for entry in known.values():
        assert set(entry) <= {"now", "config", "data_dir", "revision", "certain", "evidence"}
        assert entry["certain"] in (True, False)
        assert len(entry["evidence"]) > 20


def test_every_named_template_exists_in_promptsource() -> None:
    try:
        templates_of("ag_news")
    except PhatgooseError as error:
        pytest.skip(f"promptsource is not available: {error}")
    for spec in P3:
        options = options_of(Options, spec)
        if options.own == "trec":  # has a separate prompt
            continue
        names = {template.name for template in templates_of(options.templates)}
        assert names.issuperset(options.ignore or ()), spec.name


def test_splits_with_other_names_on_the_hub_are_found(tmp_path: Path) -> None:
    """Check the three listed data sets with other names of splits, in their real layout."""
    rows = [{"text": "a goose"}]
    anli = {f"{part}_r{i}": rows for part in ("train", "dev", "test") for i in (1, 2, 3)}
    write_copy(tmp_path, "facebook/anli", anli, "plain_text")
    story, wiki = "r-three/Phatgoose_storycloze_offline", "michaelauli/wiki_bio"
    write_saved(tmp_path, story, "story_cloze/2016", {"validation": rows, "test": rows})
    write_parquet_branch(tmp_path, wiki, "default", {"train": rows, "val": rows, "test": rows})
    found = [spec for spec in P3 if (tmp_path / spec.members[0]).is_dir()]
    assert len(found) == 5
    for spec in found:
        options = options_of(Options, spec)
        data = HubData(spec.members[0], options.config, options.data_dir, options.revision)
        for split in filter(None, (options.train_split, options.evaluation_split)):
            assert hub.rows(data, split, str(tmp_path))[0] == rows[0]
