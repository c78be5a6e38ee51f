"""One protocol's queries against its gallery: who is compared with whom, and how far apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsalign.errors import ConfigError
from gsalign.evaluation.distances import BLOCK_BYTES, Metric, distance_blocks
from gsalign.evaluation.evaluate import join_rankings
from gsalign.evaluation.expansion import Expansion, expand_embeddings
from gsalign.evaluation.features import Features
from gsalign.evaluation.metrics import MAX_RANK, EvaluationResult
from gsalign.evaluation.protocols import Protocol, get_protocol, membership
from gsalign.evaluation.ranking import Ranker, rank
from gsalign.evaluation.reranking import Reranking, rerank_blocks

# Re-ranked distances up to this size are kept, as several figures are made of them.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Search:
    """How distances are made of embeddings.

    Attributes:
        metric: ``"cosine"`` or ``"euclidean"``.
        expansion: settings of the query expansion; None: none.
        reranking: settings of the re-ranking; None: none. After the expansion, if both are there.
    """

    metric: Metric = "cosine"
    expansion: Expansion | None = None
    reranking: Reranking | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a distance depends on the two embeddings alone."""
        return self.expansion is None and self.reranking is None


@dataclass(frozen=True)
class Comparison:
    """The queries and the gallery of a protocol; made by :func:`compare`.

    Attributes:
        protocol: who asks whom.
        query: features of the queries that ask.
        gallery: features of the gallery that is searched.
        rows: their places in the whole query, int64 ``[Q]``.
        columns: likewise in the whole gallery, ``[G]``.
        search: how distances are made.
    """

    protocol: Protocol
    query: Features
    gallery: Features
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    search: Search

    @property
    def cameras(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What counts as the cameras of queries and gallery; in some protocols their views."""
        if self.protocol.camera_is_view:
            return self.query.views, self.gallery.views
        return self.query.cameras, self.gallery.cameras

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first query, distances ``[rows, G]``); may be asked for again."""
        if self.search.reranking is None:
            yield from self._plain_blocks
        elif len(self.query) * len(self.gallery) * 4 <= _KEPT_BYTES:
            yield from self._kept_blocks
        else:
            yield from self._reranked_blocks()

    def masks(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Which gallery images are of the person of a query, and which of them are left out.

        Args:
            start: number of the first query.
            stop: of the one after the last.

        Returns:
            bool ``[stop - start, G]`` twice, where the embeddings are.
        """
        device = self.query.embeddings.device

        def equal(query: NDArray[np.int64], gallery: NDArray[np.int64]) -> Tensor:
            some = torch.from_numpy(np.array(query[start:stop])).to(device)
            return some[:, None] == torch.from_numpy(np.array(gallery)).to(device)

        same = equal(self.query.identities, self.gallery.identities)
        return same, same & equal(*self.cameras)

    def evaluate(self, *, ranker: Ranker = "auto", max_rank: int = MAX_RANK) -> EvaluationResult:
        """Rank the gallery for every query; see :func:`gsalign.evaluation.evaluate`."""
        cameras = self.cameras
        parts = []
        for start, block in self.blocks():
            stop = start + len(block)
            parts.append(
                rank(
                    block,
                    self.query.identities[start:stop],
                    self.gallery.identities,
                    cameras[0][start:stop],
                    cameras[1],
                    ranker=ranker,
                )
            )
        return join_rankings(self.protocol.name, parts, self.rows, self.columns, max_rank)

    @cached_property
    def _embeddings(self) -> tuple[Tensor, Tensor]:
        query, gallery = self.query.embeddings, self.gallery.embeddings
        if self.search.expansion is None or not len(query) or not len(gallery):
            return query, gallery
        return expand_embeddings(query, gallery, self.search.expansion)

    @property
    def _visibility(self) -> tuple[Tensor, Tensor] | None:
        if self.query.visibility is None or self.gallery.visibility is None:
            return None
        return self.query.visibility, self.gallery.visibility

    @property
    def _plain_blocks(self) -> Iterator[tuple[int, Tensor]]:
        return distance_blocks(
            *self._embeddings,
            self.search.metric,
            visibility=self._visibility,
            block_bytes=BLOCK_BYTES,
        )

    def _reranked_blocks(self) -> Iterator[tuple[int, Tensor]]:
        if len(self.query) and len(self.gallery):
            yield from rerank_blocks(
                *self._embeddings,
                self.search.reranking,
                metric=self.search.metric,
                visibility=self._visibility,
            )

    @cached_property
    def _kept_blocks(self) -> list[tuple[int, Tensor]]:
        return list(self._reranked_blocks())


def compare(
    query: Features, gallery: Features, protocol: str | Protocol, search: Search | None = None
) -> Comparison:
    """Take the queries and the gallery of a protocol.

    Args:
        query: features of all queries.
        gallery: features of the whole gallery.
        protocol: a name, or a protocol of your own.
        search: how distances are made; plain cosine distances if None.

    Raises:
        ConfigError: the protocol is unknown or wants a list that the features do not have, or the
            search is a query expansion and the features have parts.
    """
    chosen = get_protocol(protocol)
    how = Search() if search is None else search
    if how.expansion is not None and query.visibility is not None:
        raise ConfigError(
            "query expansion averages embeddings, one of each image; this network gives one of "
            "each part: leave the expansion out (re-ranking works with parts)"
        )
    lists = membership(chosen, query.lists, gallery.lists)
    rows, columns = chosen.select(query.views, gallery.views, lists)
    return Comparison(chosen, query.take(rows), gallery.take(columns), rows, columns, how)
