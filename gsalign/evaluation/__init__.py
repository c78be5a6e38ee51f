"""Features, distances, ranking, protocols and the tables of results."""

from __future__ import annotations

from gsalign.evaluation.distances import distance_blocks, pairwise_distances
from gsalign.evaluation.evaluate import evaluate, evaluate_protocols
from gsalign.evaluation.metrics import EvaluationResult
from gsalign.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from gsalign.evaluation.ranking import rank, ranking_report

__all__ = [
    "PROTOCOLS",
    "EvaluationResult",
    "Protocol",
    "distance_blocks",
    "evaluate",
    "evaluate_protocols",
    "get_protocol",
    "pairwise_distances",
    "rank",
    "ranking_report",
]
