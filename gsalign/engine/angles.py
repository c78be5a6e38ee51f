"""Watching the LTPS angles of a training network: they may die out, or all run to the limit."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gsalign.model.network import GSAlign

logger = logging.getLogger(__name__)

COLLAPSED = 0.01
"""Mean and spread of the angle below which a layer is said to have collapsed, radians."""

SATURATED = 0.98 * math.pi / 2
"""Mean absolute angle above which a layer is said to be saturated, radians."""


@dataclass(frozen=True)
class AngleStatistics:
    """The angle of one layer over a batch, in radians.

    Attributes:
        mean: signed mean.
        std: spread over the images of the batch.
        absolute: mean of the absolute value.
    """

    mean: float
    std: float
    absolute: float

    @property
    def state(self) -> str:
        """``"collapsed"``, ``"saturated"`` or ``"alive"``."""
        if self.absolute < COLLAPSED and self.std < COLLAPSED:
            return "collapsed"
        return "saturated" if self.absolute > SATURATED else "alive"


class AngleMonitor:
    """Keeps the angles of the last training batch and reads them when asked.

    Adds a forward hook to the backbone, so that training needs no second forward and no other
    return value than the losses. Keeping is free; only :meth:`read` waits for the device.

    Args:
        model: the network, unwrapped and not yet compiled.
    """

    def __init__(self, model: GSAlign) -> None:
        self._layers = tuple(str(layer) for layer in model.config.ltps_layers)
        self._last: Tensor | None = None
        self._told: dict[str, str] = {}
        # Not of the LTPS layers: what is computed again in the backward pass has no hooks.
        model.backbone.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: object, output: tuple[Tensor, Tensor]) -> None:
        if module.training:
            self._last = output[1].detach()

    def read(self) -> dict[str, AngleStatistics]:
        """Statistics of every layer over the last batch of this process, by block number."""
        if self._last is None or not self._layers:
            return {}
        angles = self._last.float()
        columns = torch.stack(
            [angles.mean(1), angles.std(1, correction=0), angles.abs().mean(1)], dim=1
        ).tolist()
        return {
            layer: AngleStatistics(*row) for layer, row in zip(self._layers, columns, strict=True)
        }

    def warn(self, statistics: dict[str, AngleStatistics]) -> None:
        """Warn when a layer's angle has collapsed or saturated; once, until it changes again."""
        changed: dict[str, list[str]] = {}
        for layer, angle in statistics.items():
            if angle.state != self._told.get(layer, "alive"):
                changed.setdefault(angle.state, []).append(layer)
            self._told[layer] = angle.state
        meaning = {
            "collapsed": f"all within {COLLAPSED} rad of 0, so LTPS turns no image; "
            "model.losses.deformation is what pulls them there",
            "saturated": "at the limit of 90 degrees for nearly all images, so LTPS does not tell "
            "images apart; model.losses.deformation holds them back",
        }
        for state, layers in changed.items():
            if state in meaning:
                logger.warning(
                    "LTPS angles have %s in layer %s: %s", state, ", ".join(layers), meaning[state]
                )
