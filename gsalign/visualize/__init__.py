"""Pictures: training curves, rank lists, LTPS grids, part masks, studies."""

from __future__ import annotations

from gsalign.visualize.curves import training_curves
from gsalign.visualize.ltps_grids import ltps_grids
from gsalign.visualize.part_masks import part_masks
from gsalign.visualize.rank_lists import RankList, choose_queries, rank_lists
from gsalign.visualize.study import study_curves, study_points

__all__ = [
    "RankList",
    "choose_queries",
    "ltps_grids",
    "part_masks",
    "rank_lists",
    "study_curves",
    "study_points",
    "training_curves",
]
