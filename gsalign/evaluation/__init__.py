"""Features, distances, ranking, protocols and the tables of results."""

from __future__ import annotations

from gsalign.evaluation.baselines import ChanceLevel, chance_level, histogram_features
from gsalign.evaluation.comparison import Comparison, Search, compare
from gsalign.evaluation.distances import distance_blocks, pairwise_distances
from gsalign.evaluation.embedding import embed_batch, embed_parts_batch, extract_features
from gsalign.evaluation.evaluate import evaluate, evaluate_protocols
from gsalign.evaluation.expansion import Expansion, expand_embeddings
from gsalign.evaluation.features import Features
from gsalign.evaluation.metrics import EvaluationResult
from gsalign.evaluation.nearest import nearest
from gsalign.evaluation.part_agreement import PartAgreement, PartCounts, PartMatch
from gsalign.evaluation.person_agreement import PersonAgreement, PersonCounts, PersonMatch
from gsalign.evaluation.protocols import (
    KNOWN_PROTOCOLS,
    PROTOCOLS,
    Protocol,
    get_protocol,
    protocol_title,
)
from gsalign.evaluation.ranking import Ranking, rank, ranking_report
from gsalign.evaluation.report import Summarised, result_rows, results_dict, results_table
from gsalign.evaluation.reranking import Reranking, rerank, rerank_blocks
from gsalign.evaluation.retrieval import evaluate_features, feature_distances
from gsalign.evaluation.roll_agreement import (
    RollAgreement,
    RollMatch,
    circular_correlation,
    roll_agreement,
)
from gsalign.evaluation.verification import (
    ErrorRates,
    OpenSetThreshold,
    Verification,
    calibrate_threshold,
    error_rates,
    verify,
)

__all__ = [
    "KNOWN_PROTOCOLS",
    "PROTOCOLS",
    "ChanceLevel",
    "Comparison",
    "ErrorRates",
    "EvaluationResult",
    "Expansion",
    "Features",
    "OpenSetThreshold",
    "PartAgreement",
    "PartCounts",
    "PartMatch",
    "PersonAgreement",
    "PersonCounts",
    "PersonMatch",
    "Protocol",
    "Ranking",
    "Reranking",
    "RollAgreement",
    "RollMatch",
    "Search",
    "Summarised",
    "Verification",
    "calibrate_threshold",
    "chance_level",
    "circular_correlation",
    "compare",
    "distance_blocks",
    "embed_batch",
    "embed_parts_batch",
    "error_rates",
    "evaluate",
    "evaluate_features",
    "evaluate_protocols",
    "expand_embeddings",
    "extract_features",
    "feature_distances",
    "get_protocol",
    "histogram_features",
    "nearest",
    "pairwise_distances",
    "protocol_title",
    "rank",
    "ranking_report",
    "rerank",
    "rerank_blocks",
    "result_rows",
    "results_dict",
    "results_table",
    "roll_agreement",
    "verify",
]
