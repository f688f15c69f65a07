from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import harness.conf
from harness.tasks import TaskSpec, prepare, prepare_all, task_specs
from harness.tasks.sources.flan import DATA_SET, split_rows
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError
from tests.support.hub_copies import write_saved

FOLDER = "FLANV2/NIV2/Poem Writing"


def row(number: int, kind: str) -> dict[str, Any]:
    return {"inputs": f"ask {number}", "targets": f"say {number}", "_template_type": kind}


def spec(folder: Path, **load_opts: Any) -> TaskSpec:
    return TaskSpec("poems", (FOLDER,), "flan", load_opts=load_opts, folder=str(folder))


def test_rows_and_splits_match_the_authors(tmp_path: Path) -> None:
    """Compare with a few lines that follow their code: filter, shuffle, split off a tenth."""
    kinds = ("zs_opt", "fs_opt", "zs_noopt", "fs_noopt")
    rows = [row(i, kinds[i % 4]) for i in range(300)]
    rows[0]["inputs"], rows[2]["targets"] = " \n", ""
    write_saved(tmp_path, DATA_SET, FOLDER, {"train": rows})
    kept = [
        r
        for r in rows
        if ("zs_noopt" in r["_template_type"] or "zs_opt" in r["_template_type"])
        and r["inputs"].strip() != ""
        and r["targets"].strip() != ""
    ]
    order = np.random.RandomState(1234).choice(len(kept), size=len(kept), replace=False)
    shuffled = [kept[i] for i in order]
    count = min(int(len(shuffled) * 0.1), 10_000)
    data = prepare(spec(tmp_path))
    assert (len(kept), count) == (148, 14)
    assert data.counts == {"train": 134, "evaluation": 14}
    for split, expected in (("evaluation", shuffled[:count]), ("train", shuffled[count:])):
        records = read_records(getattr(data, split))
        assert {(r.input, *r.targets) for r in records} == {
            (r["inputs"] + " ", r["targets"]) for r in expected
        }
    assert data.kind == "generation"


def test_training_rows_above_the_cap_are_drawn_as_by_the_authors() -> None:
    order = np.random.RandomState(1234).choice(1000, size=1000, replace=False)
    drawn = np.random.default_rng(42).choice(900, size=50, replace=False)
    split = split_rows(1000, 50)
    assert split["train"].tolist() == sorted(order[100:][drawn].tolist())
    assert split["evaluation"].tolist() == sorted(order[:100].tolist())
    assert len(split_rows(200_000, 10**9)["evaluation"]) == 10_000


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"inputs": "a", "targets": "b"}], "has no columns _template_type; it has"),
        ([row(1, "fs_opt")], "has no zero-shot rows"),
    ],
)
def test_unexpected_data_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], reason: str
) -> None:
    write_saved(tmp_path, DATA_SET, FOLDER, {"train": rows})
    with pytest.raises(PhatgooseError, match=f"Poem Writing {reason}"):
        prepare(spec(tmp_path))


def test_every_task_of_the_flan_pool_has_a_loader_a_prompt_and_a_metric(tmp_path: Path) -> None:
    pool = yaml.safe_load((Path(harness.conf.__path__[0]) / "pool" / "flan.yaml").read_text())
    specs = [s for s in task_specs({**pool, "folder": str(tmp_path)}) if s.source == "flan"]
    assert len(specs) == 36 + 75 + 12
    for one in specs:
        write_saved(
            tmp_path, DATA_SET, one.members[0], {"train": [row(i, "zs_opt") for i in range(20)]}
        )
    for data in prepare_all(specs):
        assert data.counts == {"train": 18, "evaluation": 2}
        assert read_records(data.evaluation)[0].input.startswith("ask ")
        assert (data.kind, data.spec.metric) == ("generation", "rouge_l")
        assert data.spec.max_new_tokens > 1
