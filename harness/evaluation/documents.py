"""The documents of an evaluation task, and the metrics of each. Scores are means of these."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.tasks import TaskData
from harness.tasks.clusters import clusters
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.metrics import (
    NORMALIZED,
    bigbench_grade,
    bigbench_low,
    bigbench_normalized,
    rouge_l,
)
from phatgoose.inference.scoring import Score


@dataclass(frozen=True)
class Documents:
    """The documents that a task is evaluated on, in lm-eval's order.

    Attributes:
        data: the task.
        rows: the documents' records.
        low: the score that BIG-bench takes for chance.
        clusters: the cluster of each document, see `harness.tasks.clusters`.
    """

    data: TaskData
    rows: list[dict[str, Any]]
    low: float
    clusters: list[str]

    @staticmethod
    def of(data: TaskData) -> "Documents":
        """Return the documents that a task's specification selects."""
        rows = evaluation_table(data).to_pylist()
        return Documents(data, rows, bigbench_low(rows), clusters(rows))

    def answered(
        self,
        samples: Sequence[Mapping[str, Any]],
        scores: Mapping[int, Sequence[Score]],
    ) -> list[dict[str, Any]]:
        """Return one row of samples per document.

        Args:
            samples: the samples that lm-eval logged, one per document and filter.
            scores: by document, the full scores of its choices, or of its correct answer.
        """
        filters = {sample["filter"] for sample in samples}
        logged: dict[int, dict[str, float]] = {}
        shown: dict[int, Mapping[str, Any]] = {}
        for sample in samples:
            metrics = logged.setdefault(sample["doc_id"], {})
            shown.setdefault(sample["doc_id"], sample)
            for metric in sample["metrics"]:
                if isinstance(sample[metric], bool | int | float):
                    key = metric_name(metric, sample["filter"], len(filters))
                    metrics[key] = float(sample[metric])
        return [
            {
                **self._document(self.rows[doc], shown[doc], logged[doc], scores.get(doc, ())),
                "cluster": self.clusters[doc],
            }
            for doc in sorted(logged)
        ]

    def _document(
        self,
        row: Mapping[str, Any],
        sample: Mapping[str, Any],
        metrics: dict[str, float],
        scores: Sequence[Score],
    ) -> dict[str, Any]:
        """Return a document's row, with the paper's and BIG-bench's metrics added to lm-eval's."""
        sums: list[float] = []
        # For mutual information, lm-eval scores each choice a second time, without the prompt.
        scores = scores[: len(row["choices"]) or 1]
        if row["choices"] and len(scores) == len(row["choices"]):
            sums = [score.loglikelihood for score in scores]
            means = [score.mean for score in scores]
            metrics["acc_paper"] = float(means.index(max(means)) in row["correct"])
            metrics["nll"] = -max(means[i] for i in row["correct"])
            prediction = row["choices"][sums.index(max(sums))]
        else:
            if scores and not row["choices"]:
                metrics["nll"] = -scores[0].mean
            prediction = str(sample["filtered_resps"][0])
        metrics |= self._added(row, sums, prediction, metrics)
        return {
            "document": row["document"],
            "target": row["targets"][0],
            "prediction": prediction,
            "correct": bool(metrics.get("acc", metrics.get("exact_match", 0.0))),
            "choice_scores": sums,
            "metrics": metrics,
        }

    def _added(
        self, row: Mapping[str, Any], sums: list[float], prediction: str, known: dict[str, float]
    ) -> dict[str, float]:
        """Return BIG-bench's own metrics, and ROUGE-L if it is the task's metric."""
        added = {}
        if sums and row["grades"]:
            added["multiple_choice_grade"] = bigbench_grade(row, sums)
        if self.data.spec.source in ("bigbench", "bbh"):
            score = added.get("multiple_choice_grade", known.get("exact_match", 0.0))
            added[NORMALIZED] = bigbench_normalized(score, self.low)
        if self.data.spec.metric == "rouge_l" and not row["choices"]:
            added["rouge_l"] = rouge_l(prediction, row["targets"])
        return added


def metric_name(metric: str, filtered: str, filters: int) -> str:
    """Return a metric's name in results, with the filter's name if a task has several filters."""
    return metric if filters == 1 else f"{metric}_{filtered.replace('-', '_')}"


def score_rows(
    lm_eval: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a task's metrics with their standard errors: lm-eval's own, then the added ones.

    A metric that is not a mean over documents, such as F1 over all of them, keeps lm-eval's value.
    Its values per document are removed from `documents`.
    """
    filters = {key.partition(",")[2] for key in lm_eval if "," in key}
    own = {}
    for key, value in lm_eval.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = lm_eval.get(f"{metric}_stderr,{filtered}")
            own[metric_name(metric, filtered, len(filters))] = (value, stderr)
    for metric, (value, stderr) in own.items():
        values = [d["metrics"].get(metric) for d in documents]
        if None in values or not math.isclose(statistics.fmean(values), value, abs_tol=1e-9):
            for document in documents:
                document["metrics"].pop(metric, None)
        # lm-eval writes "N/A" if it has no standard error.
        yield {
            "metric": metric,
            "value": float(value),
            "stderr": stderr if isinstance(stderr, float) else None,
        }
    for metric in documents[0]["metrics"]:
        if metric not in own:
            values = [document["metrics"][metric] for document in documents]
            stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            yield {"metric": metric, "value": statistics.fmean(values), "stderr": stderr}
