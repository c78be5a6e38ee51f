"""The rows of the rank lists: some queries of each view, and what the gallery answers."""

from __future__ import annotations

import numpy as np

from gsalign.data import ReIDDataset
from gsalign.evaluation import Features, evaluate_features, feature_distances
from gsalign.visualize import RankList, choose_queries

ANSWERS = 10


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
        order = np.argsort(distances[0].cpu().numpy(), kind="stable")
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
