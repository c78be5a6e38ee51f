"""Watching the LTPS angles of a training network: they may die out, or all run to the limit."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsalign.model.ltps import LTPS, control_grid
from gsalign.model.network import GSAlign

logger = logging.getLogger(__name__)

COLLAPSED = 0.01
"""Mean and spread of the angle below which a layer is said to have collapsed, radians."""

TOLERANCE = 0.1
"""Of a patch, beyond the border: less is not called clamped, or any angle would clamp the rim."""

IMAGE = "image"
"""Name of the angle by which the image itself is turned, beside those of the layers."""

SATURATED = 0.98 * math.pi / 2
"""Mean absolute angle above which a layer is said to be saturated, radians."""


@dataclass(frozen=True)
class AngleStatistics:
    """The angle of one layer over a batch, in radians.

    Attributes:
        mean: signed mean.
        std: spread over the images of the batch.
        absolute: mean of the absolute value.
        moved: of the control points, root mean square distance from the regular grid, whose map
            reaches from -1 to 1.
        clamped: share of the map's positions that are read beyond its border, by more than a
            tenth of a patch.
        full_circle: whether the angle goes all round, so that it has no limit to run to.
    """

    mean: float
    std: float
    absolute: float
    moved: float = 0.0
    clamped: float = 0.0
    full_circle: bool = False

    @property
    def state(self) -> str:
        """``"collapsed"``, ``"saturated"`` or ``"alive"``."""
        if self.absolute < COLLAPSED and self.std < COLLAPSED:
            return "collapsed"
        saturated = not self.full_circle and self.absolute > SATURATED
        return "saturated" if saturated else "alive"


def atan2_of(direction: Tensor) -> Tensor:
    """(cos, sin) ``[..., 2]`` as angles in (-pi, pi]."""
    return torch.atan2(direction[..., 1].float(), direction[..., 0].float())


class AngleMonitor:
    """Keeps the angles of the last batch and reads them when asked.

    Adds forward hooks to the LTPS layers, so that training needs no second forward and no other
    return value than the losses. Keeping is free; only :meth:`read` waits for the device.

    Args:
        model: the network, unwrapped and not yet compiled.
    """

    def __init__(self, model: GSAlign) -> None:
        self._last: dict[str, Tensor] = {}
        self._told: dict[str, str] = {}
        self._layers: dict[str, LTPS] = {}
        if model.uprighting is not None:
            model.uprighting.register_forward_hook(self._keeper(IMAGE))
        for layer, module in model.backbone.ltps.items():
            assert isinstance(module, LTPS)
            self._layers[layer] = module
            module.register_forward_hook(self._keeper(layer))

    def _keeper(self, layer: str) -> Any:
        def keep(module: nn.Module, arguments: object, output: tuple[Tensor, Tensor]) -> None:
            angle = output[1].detach()
            self._last[layer] = angle if angle.dim() == 1 else atan2_of(angle)

        return keep

    def read(self) -> dict[str, AngleStatistics]:
        """Statistics over the last batch of this process, by block number.

        Where the network turns images, those of that turn come first, as ``"image"``.
        """
        if not self._last:
            return {}
        angles = torch.stack(list(self._last.values())).float()
        columns = torch.stack(
            [angles.mean(1), angles.std(1, correction=0), angles.abs().mean(1)], dim=1
        ).tolist()
        return {
            layer: AngleStatistics(
                mean, std, absolute, *self._warp_of(layer), full_circle=layer == IMAGE
            )
            for layer, (mean, std, absolute) in zip(self._last, columns, strict=True)
        }

    @torch.no_grad()
    def _warp_of(self, layer: str) -> tuple[float, float]:
        """How far the control points have moved, and the share of positions beyond the border."""
        if layer not in self._layers:
            return 0.0, 0.0
        module = self._layers[layer]
        points = module.source_points.double().cpu()
        moved = (points - control_grid(module.control_points)).square().sum(dim=1).mean().sqrt()
        grid = module.sampling_grid(self._last[layer])
        rows, columns = module.size
        patch = grid.new_tensor([2 / (columns - 1), 2 / (rows - 1)])
        beyond = (grid.abs() > 1 + TOLERANCE * patch).any(dim=-1).float().mean()
        return float(moved), float(beyond)

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
