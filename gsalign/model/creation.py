"""A new network, with the weights it starts from."""

from __future__ import annotations

from gsalign.model.checkpoint import holds_our_weights
from gsalign.model.config import ModelConfig
from gsalign.model.network import GSAlign
from gsalign.model.pretrained import load_pretrained
from gsalign.model.pretrained_report import PretrainedReport
from gsalign.model.transfer import transfer_weights
from gsalign.model.uprighting import take_uprighting


def create_model(config: ModelConfig) -> tuple[GSAlign, PretrainedReport | None]:
    """A network as configured, started from ``config.pretrained`` when it names something.

    What predicts rolls is that of ``config.orientation.pretrained``, when that names something.

    Raises:
        CheckpointError: the pretrained weights cannot be had or do not fit.
    """
    model = GSAlign(config)
    report = None
    if config.pretrained is not None:
        start = transfer_weights if holds_our_weights(config.pretrained) else load_pretrained
        report = start(model, config.pretrained)
    if model.uprighting is not None and config.orientation.pretrained is not None:
        take_uprighting(model.uprighting, config.orientation.pretrained)
    return model, report
