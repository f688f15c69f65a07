"""Check the measurements and files of the stage `evaluate` against computations by hand."""

import json
import math
import statistics
from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformers import __version__ as transformers_version

from harness.registry.packs import Members, pool_id
from harness.tasks import TaskData
from harness.tasks.records import Record
from harness.tasks.store import read_records
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import make_router
from phatgoose.tokenization import encode_pair
from tests.support.evaluations import EXPERTS, Run, routers
from tests.support.plain import plain_score
from tests.support.toy import LocalWorkers


def documents(data: TaskData) -> dict[str, Record]:
    return {r.document: r for r in read_records(data.train) + read_records(data.evaluation)}


def plain(base: Base, context: str, choice: str) -> Any:
    return plain_score(base, *encode_pair(base, context, choice))


def test_metrics_of_choices_match_values_computed_by_hand(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    rows = run.evaluation(workers).run("single:e1", make_router("single:e1"))
    samples = [row for row in run.table("samples/held/single@e1.parquet") if row["task"] == "swans"]
    known = documents(tasks[0])
    assert len(samples) == 9
    by_hand: dict[str, list[float]] = {}
    for sample in samples:
        record = known[sample["document"]]
        scores = [plain(llama, record.input, choice) for choice in record.choices]
        sums = [score.loglikelihood for score in scores]
        means = [
            (score.loglikelihood + score.eos_loglikelihood) / (score.tokens + 1) for score in scores
        ]
        normed = [s / len(c) for s, c in zip(sums, record.choices, strict=True)]
        [right] = record.correct
        expected = {
            "acc": float(sums.index(max(sums)) == right),
            "acc_norm": float(normed.index(max(normed)) == right),
            "acc_paper": float(means.index(max(means)) == right),
            "nll": -means[right],
            # BIG-bench: one of three choices is right, so chance is one third.
            "multiple_choice_grade": float(sums.index(max(sums)) == right),
            "bigbench_normalized": 1.0 if sums.index(max(sums)) == right else -0.5,
        }
        assert dict(sample["metrics"]) == pytest.approx(expected, abs=1e-4)
        assert sample["choice_scores"] == pytest.approx(sums, abs=1e-4)
        assert sample["target"] == record.choices[right]
        assert sample["prediction"] == record.choices[sums.index(max(sums))]
        assert sample["correct"] == bool(expected["acc"])
        for metric, value in expected.items():
            by_hand.setdefault(metric, []).append(value)
    scored = {row["metric"]: row for row in rows if row["task"] == "swans"}
    assert scored.keys() == by_hand.keys()
    for metric, values in by_hand.items():
        assert scored[metric]["value"] == pytest.approx(statistics.fmean(values), abs=1e-4)
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert scored[metric]["stderr"] == pytest.approx(error, abs=1e-4)
        assert scored[metric]["n"] == 9
    assert len({round(value, 3) for value in by_hand["nll"]}) > 1


def test_metrics_of_generated_answers_match_values_computed_by_hand(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    rows = run.evaluation(workers).run("base", make_router("base"))
    samples = [row for row in run.table("samples/held/base.parquet") if row["task"] == "sums"]
    assert len(samples) == 5
    for sample in samples:
        record = documents(tasks[1])[sample["document"]]
        score = plain(llama, record.input, "nine")
        mean = (score.loglikelihood + score.eos_loglikelihood) / (score.tokens + 1)
        metrics = dict(sample["metrics"])
        assert metrics["nll"] == pytest.approx(-mean, abs=1e-4)
        assert metrics["exact_match"] == float(sample["prediction"] == "nine")
        assert sample["target"] == "nine"
        assert sample["choice_scores"] == []
        assert sample["prediction"] == sample["prediction"].strip()
    scored = {row["metric"]: row["value"] for row in rows if row["task"] == "sums"}
    assert scored.keys() == {"exact_match", "nll", "bigbench_normalized"}
    assert scored["bigbench_normalized"] == scored["exact_match"]


def test_rows_name_their_suite_task_and_router(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base", "phatgoose"))
    evaluation.finish()
    evaluation.write_scores()
    table = run.table("scores.parquet")
    assert len(table) == 2 * (6 + 3)
    for row in table:
        manifest = pool_id(run.members.experts)
        assert (row["run"], row["base"], row["manifest"]) == ("run", "tiny", manifest)
        assert row["suite"] == "held"
        assert row["zero_shot"]
        assert row["expert"] is None
        assert row["top_k"] == (2 if row["router"] == "phatgoose" else None)
        assert row["tokens"] > 0
        assert row["seconds"] > 0


def test_documents_with_a_truncated_prompt_are_counted(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    """Check that a row may be longer by one, because the last token of a choice is not read."""
    known, needed = documents(tasks[0]), []
    for document in sorted(known)[:9]:  # the lengths that are asked
        pairs = [encode_pair(llama, known[document].input, c) for c in known[document].choices]
        needed.append(max(len(context) + len(choice) - 2 for context, choice in pairs))
    room = max(needed) - 1
    llama.model.config.max_position_embeddings = room
    rows = run.evaluation(workers).run("base", make_router("base"))
    cut = [length > room for length in needed]
    counts = {row["task"]: row["cut"] for row in rows}
    assert counts == {"swans": sum(cut), "sums": 0}
    assert 0 < sum(cut) < len(cut)


def test_routing_is_recorded_for_routers_that_choose(
    run: Run, workers: LocalWorkers, llama: Base
) -> None:
    evaluation = run.evaluation(workers)
    for name, router in routers("base", "phatgoose", "merged").items():
        evaluation.run(name, router)
    assert run.folder.names("routing/") == ["routing/held/phatgoose.parquet"]
    rows = run.table("routing/held/phatgoose.parquet")
    assert len(rows) == 2 * len(llama.linears) * len(EXPERTS)
    order = [row["linear"] for row in rows if (row["task"], row["expert"]) == ("swans", "e0")]
    assert order == list(llama.linears)  # rows in model order
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["linear"]), []).append(row)
    for group in groups.values():
        assert [row["expert"] for row in group] == EXPERTS
        shares = [row["share"] for row in group]
        assert sum(shares) == pytest.approx(1)
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert [row["entropy"] for row in group] == pytest.approx([entropy] * 3)
        assert all(row["tokens"] > 0 for row in group)


def test_the_oracle_is_the_best_single_expert(run: Run, workers: LocalWorkers) -> None:
    names = [f"single:{expert}" for expert in EXPERTS]
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base", *names))
    evaluation.finish()
    evaluation.write_scores(derived={"oracle"})
    table = run.table("scores.parquet")
    oracle = [row for row in table if row["router"] == "oracle"]
    assert {(row["task"], row["metric"]) for row in oracle} == {
        (row["task"], row["metric"]) for row in table
    }
    for row in oracle:
        assert not row["zero_shot"]
        singles = {
            other["router"]: other["value"]
            for other in table
            if other["router"] in names
            and (other["task"], other["metric"]) == (row["task"], row["metric"])
        }
        best = min if row["metric"] == "nll" else max
        assert row["value"] == best(singles.values()) == singles[f"single:{row['expert']}"]


def test_an_actor_follows_the_order_of_the_pool(run: Run, workers: LocalWorkers) -> None:
    turned = Members(dict(reversed([*run.members.experts.items()])))
    shares = []
    for name, members in (("as-is", run.members), ("turned", turned)):
        other = Run(run.path.with_name(name), run.tasks, members, run.base)
        other.evaluation(workers).run("phatgoose", make_router("phatgoose"))
        rows = other.table("routing/held/phatgoose.parquet")
        shares.append({(r["task"], r["linear"], r["expert"]): r["share"] for r in rows})
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_a_failure_names_the_router_and_the_task(run: Run, workers: LocalWorkers) -> None:
    with pytest.raises(PhatgooseError, match="the pool has no expert 'e9': it has e0, e1, e2"):
        run.evaluation(workers).run("single:e9", make_router("single:e9"))
    assert run.folder.names() == []


def test_rows_record_what_computed_them(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base", "merged"))
    evaluation.finish()
    evaluation.write_scores()
    table = run.table("scores.parquet")
    assert {row["dtype"] for row in table} == {"float32"}
    assert {row["device"] for row in table} == {"cpu"}
    versions = {
        "lm_eval": version("lm_eval"),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers_version,
    }
    assert {row["versions"] for row in table} == {json.dumps(versions, sort_keys=True)}
    assert len({row["code"] for row in table}) == 1
    by_router = {row["router"]: row["router_code"] for row in table}
    assert len({*by_router.values()}) == 2
