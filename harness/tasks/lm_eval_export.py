"""Export prepared BIG-bench tasks as local files for lm-eval's packaged definitions.

The columns match hails/bigbench (`bigbench_*`) and SaylorTwift/bbh (`bbh_*`) on the hub.
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
    """Write one parquet file per task with all its documents.

    Returns:
        The content of the YAML file of a suite that evaluates lm-eval's packaged definitions of
        these tasks over the files.

    Raises:
        PhatgooseError: `tasks` is empty.
    """
    if not tasks:
        raise PhatgooseError("no BIG-bench task is selected. Select some with pool= or suite=.")
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
    """Return the name of lm-eval's definition of a task."""
    member = data.spec.members[0].partition("/")[0]
    if data.spec.source == "bbh":
        return f"bbh_zeroshot_{member}"
    kind = "multiple_choice" if data.kind == "multiple_choice" else "generate_until"
    return f"bigbench_{member}_{kind}"


def _rows(data: TaskData) -> Iterator[dict[str, Any]]:
    """Yield the documents in the order of their hashes."""
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
