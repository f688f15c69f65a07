"""Prepared BIG-bench tasks as files that lm-eval's packaged definitions read in place of the hub's.

The columns are those of hails/bigbench (`bigbench_*`) and of SaylorTwift/bbh (`bbh_*`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.tasks import TaskData
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError


def write_for_lm_eval(tasks: Sequence[TaskData], folder: Path) -> dict[str, Any]:
    """Write one parquet file per task, all its documents.

    Returns:
        A suite that evaluates lm-eval's packaged definitions of these tasks over the files: what
        its YAML file has to say.

    Raises:
        PhatgooseError: there is no task.
    """
    if not tasks:
        raise PhatgooseError("no task of BIG-bench is among these: name some by pool= or suite=")
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    overlay = {}
    for data in tasks:
        path = folder / f"{data.name}.parquet"
        pq.write_table(pa.Table.from_pylist(list(_rows(data))), path)
        split = "test" if data.spec.source == "bbh" else "default"
        overlay[_definition(data)] = {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}},
        }
    return {
        "name": "lm_eval_local",
        "source": "lm_eval",
        "lm_eval": list(overlay),
        "overlay": overlay,
    }


def _definition(data: TaskData) -> str:
    """What lm-eval calls its task."""
    member = data.spec.members[0].partition("/")[0]
    if data.spec.source == "bbh":
        return f"bbh_zeroshot_{member}"
    kind = "multiple_choice" if data.kind == "multiple_choice" else "generate_until"
    return f"bigbench_{member}_{kind}"


def _rows(data: TaskData) -> Iterator[dict[str, Any]]:
    """The documents, in the order of their hashes."""
    records = [*read_records(data.train), *read_records(data.evaluation)]
    for number, record in enumerate(sorted(records, key=lambda record: record.document)):
        if data.spec.source == "bbh":
            yield {"input": record.text, "target": record.targets[0]}
            continue
        yield {
            "idx": number,
            "inputs": record.input.strip(),
            "targets": record.targets,
            "multiple_choice_targets": record.choices,
            "multiple_choice_scores": record.grades,
        }
