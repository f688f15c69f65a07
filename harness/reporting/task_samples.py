"""The samples of all routers on one task, as NumPy arrays over the same documents.

Legend: N = documents.
"""

from collections.abc import Set

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.reporting.tables import Tables

_COLUMNS = ("router", "document", "metrics", "cluster")


class TaskSamples:
    """The samples of all routers on one task. They stay in Arrow until a router is asked for.

    Attributes:
        documents: the ids of the documents, sorted.
        clusters_N: the index of each document's cluster, from 0, in order of first occurrence.
    """

    def __init__(
        self, samples: Tables, suite: str, task: str, first: str, scored: Set[str]
    ) -> None:
        """Read the samples of a task.

        Args:
            samples: the samples of the run.
            suite: the suite of the task.
            task: the name of the task.
            first: the router whose documents the others must have answered.
            scored: the routers whose clusters count.
        """
        parts = list(samples.select(_COLUMNS, suite=suite, task=task))
        self._parts: dict[str, list[pa.Table]] = {}
        for part in parts:
            routers = part["router"]
            for router in routers.unique().to_pylist():
                rows = part.filter(pc.equal(routers, router))
                self._parts.setdefault(router, []).append(rows)
        documents = [part["document"] for part in self._parts.get(first, [])]
        ids = pa.chunked_array(documents, pa.string()).unique()
        self.documents: pa.Array = ids.take(pc.array_sort_indices(ids))
        self.clusters_N = self._clusters(parts, scored)

    def values(self, router: str) -> dict[str, np.ndarray] | None:
        """Return a value per document for each metric of a router, NaN where one is missing.

        Return None if the router answered other documents. If it has several rows for a document,
        the last one counts.
        """
        if router not in self._parts:
            return None if len(self.documents) else {}
        table = pa.concat_tables(self._parts[router])
        rows_N = self._last_rows(table["document"])
        if rows_N is None:
            return None
        if len(table) > len(rows_N) or (np.diff(rows_N) < 0).any():
            table = table.take(pa.array(rows_N))
        return _values_by_metric(table["metrics"])

    def _last_rows(self, documents: pa.ChunkedArray) -> np.ndarray | None:
        """Return the last row of each document; None if the documents are not those of the task."""
        places = pc.index_in(documents, value_set=self.documents)
        if places.null_count:
            return None
        rows_N = np.full(len(self.documents), -1)
        np.maximum.at(rows_N, places.to_numpy(), np.arange(len(documents)))
        return None if (rows_N < 0).any() else rows_N

    def _clusters(self, parts: list[pa.Table], scored: Set[str]) -> np.ndarray:
        """Return the index of each document's cluster.

        A document that no scored router has a cluster for is its own cluster.
        """
        if not parts:
            return np.zeros(0, dtype=np.int64)
        together = pa.concat_tables(parts).select(["router", "document", "cluster"])
        counts = pc.is_in(together["router"], pa.array(sorted(scored), pa.string()))
        rows = together.filter(pc.and_(counts, pc.not_equal(together["cluster"], "")))
        places = pc.index_in(rows["document"], value_set=self.documents)
        here = pc.is_valid(places)
        last_N = np.full(len(self.documents), -1)
        np.maximum.at(last_N, places.filter(here).to_numpy(), np.flatnonzero(here.to_numpy()))
        chosen = rows["cluster"].take(pa.array(last_N, mask=last_N < 0))
        encoded = pc.coalesce(chosen, self.documents).combine_chunks().dictionary_encode()
        clusters_N: np.ndarray = encoded.indices.to_numpy().astype(np.int64)
        return clusters_N


def _values_by_metric(metrics: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Return a column of maps as an array per key, NaN where a row has no such key."""
    maps = metrics.combine_chunks()
    offsets = maps.offsets.to_numpy()
    start, length = int(offsets[0]), int(offsets[-1] - offsets[0])
    names = maps.keys.slice(start, length).dictionary_encode()
    values = maps.items.slice(start, length).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(maps)), np.diff(offsets))
    by_metric = {}
    indices = names.indices.to_numpy()
    for index, name in enumerate(names.dictionary.to_pylist()):
        found = indices == index
        by_metric[name] = np.full(len(maps), np.nan)
        by_metric[name][rows[found]] = values[found]
    return by_metric
