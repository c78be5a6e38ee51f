"""Query features searched in gallery features: the results of several protocols."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from gsalign.evaluation.comparison import Search, compare
from gsalign.evaluation.distances import pairwise_distances
from gsalign.evaluation.evaluate import evaluate_protocols
from gsalign.evaluation.features import Features
from gsalign.evaluation.metrics import MAX_RANK, EvaluationResult
from gsalign.evaluation.protocols import PROTOCOLS, Protocol, get_protocol, membership
from gsalign.evaluation.ranking import Ranker


def evaluate_features(
    query: Features,
    gallery: Features,
    *,
    protocols: Iterable[str | Protocol] = tuple(PROTOCOLS),
    search: Search | None = None,
    ranker: Ranker = "auto",
    max_rank: int = MAX_RANK,
) -> dict[str, EvaluationResult]:
    """Evaluate protocols on two sets of features.

    Args:
        query: features that ask.
        gallery: features that are searched.
        protocols: names, or protocols of your own.
        search: how distances are made; plain cosine distances if None. Expansion and re-ranking
            see the queries and the gallery of one protocol at a time, as if there were no others.
        ranker: see ``evaluate``.
        max_rank: likewise.

    Returns:
        Protocol name to result, in the order asked.

    Raises:
        ConfigError: a protocol is unknown or wants a list the features do not have, or the search
            does not fit the features.
        DataError: a distance is NaN.
    """
    chosen = [get_protocol(protocol) for protocol in protocols]
    how = Search() if search is None else search
    if not how.is_plain:
        return {
            protocol.name: compare(query, gallery, protocol, how).evaluate(
                ranker=ranker, max_rank=max_rank
            )
            for protocol in chosen
        }
    lists = {
        protocol.name: found
        for protocol in chosen
        if (found := membership(protocol, query.lists, gallery.lists)) is not None
    }
    return evaluate_protocols(
        query=query.embeddings,
        gallery=gallery.embeddings,
        query_identities=query.identities,
        gallery_identities=gallery.identities,
        query_cameras=query.cameras,
        gallery_cameras=gallery.cameras,
        query_views=query.views,
        gallery_views=gallery.views,
        query_visibility=query.visibility,
        gallery_visibility=gallery.visibility,
        protocols=chosen,
        lists=lists,
        metric=how.metric,
        ranker=ranker,
        max_rank=max_rank,
    )


def feature_distances(query: Features, gallery: Features, places: slice) -> Tensor:
    """Cosine distances of some queries to the gallery, by parts where the features have them.

    Args:
        query: features that ask.
        gallery: features that are searched.
        places: which rows of ``query``.

    Returns:
        ``[number of places, G]``.
    """
    visibility = None
    if query.visibility is not None and gallery.visibility is not None:
        visibility = (query.visibility[places], gallery.visibility)
    return pairwise_distances(query.embeddings[places], gallery.embeddings, visibility=visibility)
