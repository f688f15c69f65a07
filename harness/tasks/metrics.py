"""Metrics of single documents that lm-eval does not provide."""

import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# BIG-bench's normalized preferred score as a share; BIG-bench scales it to 100.
NORMALIZED = "bigbench_normalized"


def bigbench_grade(row: Mapping[str, Any], scores: Sequence[float]) -> float:
    """Return BIG-bench's `multiple_choice_grade` of a document.

    Args:
        row: the document's record, with one of `grades` per choice.
        scores: the summed log-probability of each choice.
    """
    return float(row["grades"][list(scores).index(max(scores))])


def bigbench_low(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return BIG-bench's chance score of a task.

    For multiple choice it is the mean over documents of the mean grade of the choices, otherwise 0.
    The best score is 1
    (`get_task_details` of BIG-bench's `json_task.py`).
    """
    means = [statistics.fmean(row["grades"]) for row in rows if row["grades"]]
    return statistics.fmean(means) if means else 0.0


def bigbench_normalized(score: float, low: float) -> float:
    """Scale a score so that chance is 0 and the best score 1; BIG-bench multiplies by 100."""
    return (score - low) / (1 - low) if low < 1 else 0.0


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure (Lin, 2004), 0 to 1, against the closest reference."""
    return max(_scorer().score(text, prediction)["rougeL"].fmeasure for text in references)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports scikit-learn, by way of NLTK

    return RougeScorer(["rougeL"])
