"""A generated aerial-ground data set: walking people rendered from drones and from the ground."""

from __future__ import annotations

from gsalign.data.synthetic.body import PARTS
from gsalign.data.synthetic.config import RENDERER_VERSION, SyntheticConfig
from gsalign.data.synthetic.contact_sheet import contact_sheet
from gsalign.data.synthetic.part_groups import PART_GROUPS, UNKNOWN, group_labels, part_groups
from gsalign.data.synthetic.part_labels import has_part_labels, read_part_labels
from gsalign.data.synthetic.truth import BODY_PARTS, TRUTH_FILE, TruthRow, read_truth
from gsalign.data.synthetic.writer import GenerationReport, generate, generation_settings

__all__ = [
    "BODY_PARTS",
    "PARTS",
    "PART_GROUPS",
    "RENDERER_VERSION",
    "TRUTH_FILE",
    "UNKNOWN",
    "GenerationReport",
    "SyntheticConfig",
    "TruthRow",
    "contact_sheet",
    "generate",
    "generation_settings",
    "group_labels",
    "has_part_labels",
    "part_groups",
    "read_part_labels",
    "read_truth",
]
