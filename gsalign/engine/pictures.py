"""The pictures of a run: what is in its folder, put into the hands of ``gsalign.visualize``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsalign.data import ImageRecord, ReIDDataset, Split, load_dataset
from gsalign.engine.distributed import build_accelerator
from gsalign.engine.folder import RunFolder
from gsalign.engine.loading import load_network
from gsalign.engine.metrics import read_metrics
from gsalign.engine.testing import embed_split
from gsalign.errors import DataError
from gsalign.evaluation import Features, evaluate_features, feature_distances
from gsalign.visualize import (
    RankList,
    choose_queries,
    ltps_grids,
    part_masks,
    rank_lists,
    training_curves,
)

if TYPE_CHECKING:
    from gsalign.config import Config

logger = logging.getLogger(__name__)

ANSWERS = 10


def draw_run(folder: RunFolder, config: Config, out: Path) -> Iterator[Path]:
    """Draw a run; yields each picture's path when it is written.

    Args:
        folder: of the run.
        config: where the images are, and what to compute on.
        out: folder to write to.

    Raises:
        CheckpointError: the run has no weights yet, or they are damaged.
        DataError: the data set is missing, or its images cannot be read.
    """
    records = read_metrics(folder.metrics)
    if any(record["kind"] == "train" for record in records):
        path = out / "training_curves.png"
        training_curves(records, path, title=f"{config.name}: training")
        yield path
    weights = folder.best if folder.best.exists() else folder.final
    network = load_network(weights, config.model, compare=False)
    data = config.data.model_copy(update={"image_size": network.config.image_size})
    dataset = load_dataset(data)
    accelerator = build_accelerator(device=config.device, precision=config.training.precision)
    network.to(accelerator.device)

    query = embed_split(network, dataset.query, data, accelerator)
    gallery = embed_split(network, dataset.gallery, data, accelerator)
    lists = make_rank_lists(query, gallery, dataset)
    if lists:
        path = out / "rank_lists.png"
        title = f"{config.name}: first {ANSWERS} answers, queries from best to worst AP"
        rank_lists(lists, path, image_size=network.config.image_size, title=title)
        yield path

    readable = tuple(dataset.query.records[place] for place in query.indices.tolist())
    if network.config.ltps_layers:
        path = out / "ltps_grids.png"
        some = _some_of_each_view(Split(dataset.query.name, readable))
        ltps_grids(network, some, path, title=f"{config.name}: what LTPS does to an image")
        yield path
    else:
        logger.info("no LTPS grids: the network has no LTPS")

    if network.parts is not None:
        path = out / "part_masks.png"
        some = _some_of_each_view(Split(dataset.query.name, readable), per_view=5)
        part_masks(network, some, path, title=f"{config.name}: what the part masks cover")
        yield path

    path = out / "contact_sheet.png"
    if _draw_contact_sheet(data.root, path):
        yield path


def make_rank_lists(
    query: Features, gallery: Features, dataset: ReIDDataset, *, per_view: int = 3
) -> list[RankList]:
    """Rank lists under the protocol ``all`` of queries from best to worst.

    Args:
        query: embeddings of the query split.
        gallery: embeddings of the gallery split.
        dataset: the images they are of.
        per_view: queries of each view.
    """
    result = evaluate_features(query, gallery, protocols=["all"])["all"]
    lists = []
    for place in choose_queries(query.views, result.average_precision, per_view):
        distances = feature_distances(query, gallery, slice(place, place + 1))
        order = np.argsort(np.asarray(distances[0]), kind="stable")
        left_out = (gallery.identities == query.identities[place]) & (
            gallery.cameras == query.cameras[place]
        )
        answers = [number for number in order.tolist() if not left_out[number]][:ANSWERS]
        lists.append(
            RankList(
                query=dataset.query.records[query.indices[place]],
                answers=tuple(dataset.gallery.records[gallery.indices[i]] for i in answers),
                average_precision=float(result.average_precision[place]),
            )
        )
    return lists


def _some_of_each_view(split: Split, per_view: int = 3) -> list[ImageRecord]:
    """Images of different people and, as far as there are some, cameras; aerial ones first."""
    chosen: list[ImageRecord] = []
    for view in (1, 0):
        left = [record for record in split.records if record.view == view]
        for _ in range(min(per_view, len(left))):
            people = {record.identity for record in chosen}
            cameras = {record.camera for record in chosen}
            # The first of the least repetitive, so that the choice is always the same.
            best = min(left, key=lambda r: (r.identity in people) + (r.camera in cameras))
            chosen.append(best)
            left.remove(best)
    return chosen


def _draw_contact_sheet(root: Path, path: Path) -> bool:
    from gsalign.data.synthetic import contact_sheet

    try:
        contact_sheet(root, path)
    except DataError as error:
        logger.info("no contact sheet: %s", error)
        return False
    return True
