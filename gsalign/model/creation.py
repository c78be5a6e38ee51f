"""A new network, with the weights it starts from."""

from __future__ import annotations

from gsalign.model.checkpoint import holds_our_weights
from gsalign.model.config import ModelConfig
from gsalign.model.network import GSAlign
from gsalign.model.pretrained import load_pretrained
from gsalign.model.pretrained_report import PretrainedReport
from gsalign.model.transfer import transfer_weights


def create_model(config: ModelConfig) -> tuple[GSAlign, PretrainedReport | None]:
    """A network as configured, started from ``config.pretrained`` when it names something.

    Raises:
        CheckpointError: the pretrained weights cannot be had or do not fit.
    """
    model = GSAlign(config)
    if config.pretrained is None:
        return model, None
    start = transfer_weights if holds_our_weights(config.pretrained) else load_pretrained
    return model, start(model, config.pretrained)
