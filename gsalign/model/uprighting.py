"""The way of turning images upright that a configuration names."""

from __future__ import annotations

from gsalign.model.config import ModelConfig
from gsalign.model.orientation import Uprighting
from gsalign.model.orientation_parts import UprightingByParts
from gsalign.model.orientation_rays import UprightingByRays


def create_uprighting(config: ModelConfig) -> Uprighting:
    """What predicts the rolls and undoes them, freshly drawn."""
    if config.orientation.reads == "parts":
        return UprightingByParts(config.image_size, config.orientation, config.label_groups)
    return UprightingByRays(config.image_size, config.orientation)
