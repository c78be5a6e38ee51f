"""The data sets by name: who reads which layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gsalign.data.ag_reid import AG_REID, load_ag_reid
from gsalign.data.ag_reid_v2 import AG_REID_V2, load_ag_reid_v2
from gsalign.data.cargo import CARGO, is_camera_folder, load_cargo
from gsalign.data.folder import FOLDER, load_folder
from gsalign.data.layout import SPLITS, Layout, Singletons, folder_names
from gsalign.data.market1501 import MARKET_1501, load_market1501
from gsalign.data.records import ReIDDataset
from gsalign.data.table import TABLE, is_table, load_table
from gsalign.errors import DataError

DatasetName = Literal["cargo", "ag_reid", "ag_reid_v2", "market1501", "folder", "table"]


class Reader(Protocol):
    """Reads the records of a set; see :func:`gsalign.data.load_cargo`."""

    def __call__(self, root: Path, *, singletons: Singletons, max_bad_names: int) -> ReIDDataset:
        """Read them."""


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that can be named: how it lies on disk, and who reads it."""

    layout: Layout
    load: Reader


DATASETS: Mapping[str, DatasetEntry] = {
    entry.layout.name: entry
    for entry in (
        DatasetEntry(CARGO, load_cargo),
        DatasetEntry(AG_REID, load_ag_reid),
        DatasetEntry(AG_REID_V2, load_ag_reid_v2),
        DatasetEntry(MARKET_1501, load_market1501),
        DatasetEntry(FOLDER, load_folder),
        DatasetEntry(TABLE, load_table),
    )
}


def get_dataset_entry(name: str) -> DatasetEntry:
    """The data set of that name.

    Raises:
        DataError: there is none; the message lists those there are.
    """
    if name not in DATASETS:
        raise DataError(f"data set {name!r} is unknown; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def guess_dataset(root: Path) -> str:
    """The name of the data set that lies in a folder, by the folders in it.

    Args:
        root: a folder or a table.

    Returns:
        The set that has most of its folders there, so that reading it can say what is missing;
        for a folder that does not exist CARGO, which can be generated.

    Raises:
        DataError: no folder of any data set is there.
    """
    if is_table(root):
        return TABLE.name
    if not root.exists():
        return CARGO.name
    found = set(folder_names(root)) if root.is_dir() else set()
    shares = {
        name: len(found.intersection(entry.layout.folders)) / len(entry.layout.folders)
        for name, entry in DATASETS.items()
        if entry.layout.folders
    }
    best = max(shares, key=lambda name: shares[name])
    if not shares[best]:
        there = ", ".join(sorted(found)[:8]) or "none"
        raise DataError(
            f"data root {str(root)!r} is laid out like no data set known ({', '.join(DATASETS)}); "
            f"the folders in it: {there}. Expected for images of your own\n{FOLDER.picture}"
        )
    if best == CARGO.name:
        # A folder of one's own has the same splits, but people and not cameras in them.
        inner = {
            name for split in found.intersection(SPLITS) for name in folder_names(root / split)
        }
        if inner and not any(map(is_camera_folder, inner)):
            return FOLDER.name
    return best
