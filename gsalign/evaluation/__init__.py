"""Features, distances, ranking, protocols and the tables of results."""

from __future__ import annotations

from gsalign.evaluation.baselines import ChanceLevel, chance_level, histogram_features
from gsalign.evaluation.distances import distance_blocks, pairwise_distances
from gsalign.evaluation.evaluate import evaluate, evaluate_protocols
from gsalign.evaluation.features import (
    Features,
    embed_batch,
    embed_parts_batch,
    evaluate_features,
    extract_features,
    feature_distances,
)
from gsalign.evaluation.metrics import EvaluationResult
from gsalign.evaluation.part_agreement import PartAgreement, PartCounts, PartMatch
from gsalign.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from gsalign.evaluation.ranking import rank, ranking_report
from gsalign.evaluation.report import result_rows, results_dict, results_table
from gsalign.evaluation.roll_agreement import RollAgreement, circular_correlation, roll_agreement

__all__ = [
    "PROTOCOLS",
    "ChanceLevel",
    "EvaluationResult",
    "Features",
    "PartAgreement",
    "PartCounts",
    "PartMatch",
    "Protocol",
    "RollAgreement",
    "chance_level",
    "circular_correlation",
    "distance_blocks",
    "embed_batch",
    "embed_parts_batch",
    "evaluate",
    "evaluate_features",
    "evaluate_protocols",
    "extract_features",
    "feature_distances",
    "get_protocol",
    "histogram_features",
    "pairwise_distances",
    "rank",
    "ranking_report",
    "result_rows",
    "results_dict",
    "results_table",
    "roll_agreement",
]
