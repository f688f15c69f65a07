"""Tables of scores and samples in which routers gave chosen answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness import run_folder
from harness.reporting.summary import summary_rows
from harness.reporting.tables import Tables
from harness.storage import Folder

# task -> router -> metric -> one value per document
Answers = Mapping[str, Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]]


NOT_ZERO_SHOT = ("single:", "oracle")


def tables(answers: Answers) -> tuple[pa.Table, pa.Table]:
    """Return scores and samples in which every router gave these answers."""
    scores: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for task, routers in answers.items():
        for router, metrics in routers.items():
            for metric, values in metrics.items():
                scores.append(score(task, router, metric, float(np.mean(values)), len(values)))
            for i, row in enumerate(zip(*metrics.values(), strict=True)):
                samples.append(sample(task, router, f"d{i}", dict(zip(metrics, row, strict=True))))
    return (
        pa.Table.from_pylist(scores, run_folder.SCORES),
        pa.Table.from_pylist(samples, run_folder.SAMPLES),
    )


def summarize(scores: pa.Table, samples: pa.Table) -> list[dict[str, Any]]:
    """Return the summary of scores and samples, the latter written as a run does."""
    folder = Folder("memory:///run")
    write_samples(folder, samples)
    return summary_rows(scores, stored_samples(folder))


def stored_samples(folder: Folder) -> Tables:
    return Tables(folder, run_folder.SAMPLES_FOLDER, run_folder.SAMPLES)


def write_samples(folder: Folder, samples: pa.Table) -> None:
    """Write the samples of each suite and router to a file, with their rows in the same order."""
    for suite in samples["suite"].unique().to_pylist():
        of_suite = samples.filter(pc.equal(samples["suite"], suite))
        for router in of_suite["router"].unique().to_pylist():
            rows = of_suite.filter(pc.equal(of_suite["router"], router)).to_pylist()
            run_folder.write_table(
                folder,
                run_folder.samples_file(suite, router),
                run_folder.SAMPLES,
                [{**row, "metrics": dict(row["metrics"])} for row in rows],
            )


def score(task: str, router: str, metric: str, value: float, n: int) -> dict[str, Any]:
    return {
        **{"run": "r", "base": "b", "manifest": "1", "router": router, "top_k": None},
        **{
            "zero_shot": not router.startswith(NOT_ZERO_SHOT),
            "side_information": None,
            "options": "{}",
            "suite": "s",
            "task": task,
        },
        **{
            "metric": metric,
            "value": value,
            "stderr": None,
            "documents": "0",
            "n": n,
            "cut": 0,
            "seconds": 1.0,
        },
        **{"tokens": 10, "expert": None},
    }


def sample(task: str, router: str, document: str, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        **{"router": router, "suite": "s", "task": task, "document": document, "target": "a"},
        **{"prediction": "a", "correct": True, "choice_scores": []},
        "metrics": sorted(metrics.items()),
    }


def find(rows: list[dict[str, Any]], router: str, metric: str, task: str | None) -> dict[str, Any]:
    (row,) = (r for r in rows if (r["router"], r["metric"], r["task"]) == (router, metric, task))
    return row


def coin(n: int, share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)
