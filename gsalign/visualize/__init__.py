"""Pictures: curves, rank lists, embedding map, alignment, attention, grids, part masks, studies."""

from __future__ import annotations

from gsalign.visualize.alignment import alignment
from gsalign.visualize.attention import attention_maps
from gsalign.visualize.cmc import cmc_curves
from gsalign.visualize.compared_curves import compared_curves
from gsalign.visualize.curves import training_curves
from gsalign.visualize.embedding_map import embedding_map
from gsalign.visualize.ltps_grids import ltps_grids
from gsalign.visualize.part_masks import part_masks
from gsalign.visualize.rank_lists import RankList, choose_queries, rank_lists
from gsalign.visualize.rollout import attention_rollout
from gsalign.visualize.study import study_curves, study_points

__all__ = [
    "RankList",
    "alignment",
    "attention_maps",
    "attention_rollout",
    "choose_queries",
    "cmc_curves",
    "compared_curves",
    "embedding_map",
    "ltps_grids",
    "part_masks",
    "rank_lists",
    "study_curves",
    "study_points",
    "training_curves",
]
