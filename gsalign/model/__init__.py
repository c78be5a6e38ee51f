"""The network: ViT with view decoupling, LTPS and DAM, its losses, and its checkpoints."""

from __future__ import annotations

from gsalign.model.config import DamConfig, HeadsConfig, LossConfig, LtpsConfig, ModelConfig
from gsalign.model.network import FeatureOutput, GSAlign
from gsalign.model.published import load_published

__all__ = [
    "DamConfig",
    "FeatureOutput",
    "GSAlign",
    "HeadsConfig",
    "LossConfig",
    "LtpsConfig",
    "ModelConfig",
    "load_published",
]
