"""The network: ViT with view decoupling, LTPS and DAM, its losses, and its checkpoints."""

from __future__ import annotations

from gsalign.model.checkpoint import load_model, load_weights, read_weights_config, save_weights
from gsalign.model.config import (
    DamConfig,
    HeadsConfig,
    LossConfig,
    LtpsConfig,
    ModelConfig,
    OrientationConfig,
)
from gsalign.model.creation import create_model
from gsalign.model.network import FeatureOutput, GSAlign
from gsalign.model.parts import PartEmbeddings, PartOutput
from gsalign.model.pretrained import load_pretrained
from gsalign.model.pretrained_report import PretrainedReport
from gsalign.model.published import load_published
from gsalign.model.transfer import transfer_weights

__all__ = [
    "DamConfig",
    "FeatureOutput",
    "GSAlign",
    "HeadsConfig",
    "LossConfig",
    "LtpsConfig",
    "ModelConfig",
    "OrientationConfig",
    "PartEmbeddings",
    "PartOutput",
    "PretrainedReport",
    "create_model",
    "load_model",
    "load_pretrained",
    "load_published",
    "load_weights",
    "read_weights_config",
    "save_weights",
    "transfer_weights",
]
