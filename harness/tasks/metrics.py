"""Scores of single documents that lm-eval has no metric for."""

import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# The share of BIG-bench's normalised preferred score, of which 100 is the best.
NORMALIZED = "bigbench_normalized"


def bigbench_grade(row: Mapping[str, Any], scores: Sequence[float]) -> float:
    """BIG-bench's `multiple_choice_grade` of a document.

    Args:
        row: the document's record, with `grades` per choice.
        scores: the choices' summed log-probabilities.
    """
    return float(row["grades"][list(scores).index(max(scores))])


def bigbench_low(rows: Sequence[Mapping[str, Any]]) -> float:
    """The score that BIG-bench takes for chance on a task.

    It is the mean of the choices' mean grades for multiple choice, else 0; the best score is 1
    (`get_task_details` of BIG-bench's `json_task.py`).
    """
    means = [statistics.fmean(row["grades"]) for row in rows if row["grades"]]
    return statistics.fmean(means) if means else 0.0


def bigbench_normalized(score: float, low: float) -> float:
    """A score on the scale from chance (0) to the best one (1); BIG-bench multiplies by 100."""
    return (score - low) / (1 - low) if low < 1 else 0.0


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004), F-measure, against the reference that is nearest; 0 to 1."""
    return max(_scorer().score(text, prediction)["rougeL"].fmeasure for text in references)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports scikit-learn, by way of NLTK

    return RougeScorer(["rougeL"])
