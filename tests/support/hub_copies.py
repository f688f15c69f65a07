"""Copies of hub data sets, small and invented, in the layout of the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

Rows = Sequence[Mapping[str, Any]]


def write_copy(folder: Path, path: str, splits: Mapping[str, Rows], config: str = "") -> Path:
    """Write a data set in parquet as `<folder>/<owner>/<name>`, with one configuration or none."""
    place = folder / path
    inside = place / (config or "data")
    inside.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(list(rows)).to_parquet(str(inside / f"{split}-0.parquet"))
    entry = f"- config_name: {config or 'default'}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {inside.name}/{split}-*.parquet\n" for split in splits
    )
    card = place / "README.md"
    before = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    card.write_text(before + entry + "---\n")
    return place


def write_parquet_branch(folder: Path, path: str, config: str, splits: Mapping[str, Rows]) -> None:
    """Write the layout of the hub's branch refs/convert/parquet: `<config>/<split>/<n>.parquet`."""
    for split, rows in splits.items():
        place = folder / path / config / split
        place.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(list(rows)).to_parquet(str(place / "0000.parquet"))


def write_saved(folder: Path, path: str, data_dir: str, splits: Mapping[str, Rows]) -> None:
    """Write the output of `save_to_disk`, in a folder within the data set."""
    made = {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder / path / data_dir))
