"""The metrics of results: which one stands for a task, and which of two values is better."""

from phatgoose.errors import PhatgooseError

PRIMARY = "primary"
LOWER_IS_BETTER = frozenset({"nll"})


def better(metric: str, a: float, b: float) -> bool:
    """Whether the value `a` of a metric is strictly better than `b`."""
    return a < b if metric in LOWER_IS_BETTER else a > b


def primary_metric(metrics: set[str]) -> str:
    """The primary metric of a task with these metrics.

    ROUGE-L where the task asks for it, else acc, else exact_match (after the strictest filter),
    else the first by name of what lm-eval gave.

    Raises:
        PhatgooseError: there is none.
    """
    for metric in ("rouge_l", "acc", "exact_match", "exact_match_strict_match"):
        if metric in metrics:
            return metric
    others = sorted(metrics - {"nll", "acc_norm", "acc_paper", "bigbench_normalized"})
    if not others and "acc_paper" in metrics:
        return "acc_paper"  # lm-eval's own are not means over documents, such as MCC
    if not others:
        raise PhatgooseError(f"a task has no metric of lm-eval, only {sorted(metrics)}")
    return others[0]
