"""Watching the LTPS angles of a training network: they may die out, or all run to the limit."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gsalign.model.ltps import LTPS, control_grid
from gsalign.model.network import GSAlign
from gsalign.model.orientation import Aligned

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
            reaches from -1 to 1; over those of all images, where each has its own.
        clamped: share of the map's positions that are read beyond its border, by more than a
            tenth of a patch.
        full_circle: whether the angle goes all round, so that it has no limit to run to.
        points_std: of the control points, root mean square distance from their mean over the
            images; None where these share them.
    """

    mean: float
    std: float
    absolute: float
    moved: float = 0.0
    clamped: float = 0.0
    full_circle: bool = False
    points_std: float | None = None

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


def _figures(angles: Tensor, warp: LTPS | None = None, offsets: Tensor | None = None) -> Tensor:
    """Those of :class:`AngleStatistics` over ``[B]``, ``[6]`` on the device of the angles."""
    told = [angles.mean(), angles.std(correction=0), angles.abs().mean()]
    zero = angles.new_zeros(())
    told += (zero, zero) if warp is None else _warp_of(warp, angles, offsets)
    told.append(zero if offsets is None else _length(offsets - offsets.mean(dim=0)))
    return torch.stack(told)


def _length(vectors: Tensor) -> Tensor:
    """Root mean square length of ``[..., 2]``."""
    return vectors.square().sum(dim=-1).mean().sqrt()


def _warp_of(module: LTPS, angles: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far the control points have moved, and the share of positions beyond the border."""
    regular = control_grid(module.control_points).to(angles.device)
    moved = _length(module.points(offsets).double() - regular)
    # The step may just have thrown them to infinity: the next loss tells, and JSON has no infinity.
    moved = moved.to(angles).nan_to_num(nan=torch.finfo(angles.dtype).max)
    grid = module.sampling_grid(angles, offsets)
    rows, columns = module.size
    patch = grid.new_tensor([2 / max(columns - 1, 1), 2 / max(rows - 1, 1)])
    beyond = (grid.abs() > 1 + TOLERANCE * patch).any(dim=-1)
    return moved, beyond.to(angles).mean()


class AngleMonitor:
    """Keeps the angles of the last training batch and reads them when asked.

    Adds forward hooks to the backbone and to what turns images, so that training needs no second
    forward and no other return value than the losses. Keeping is free; only :meth:`read` waits for
    the device.

    Args:
        model: the network, unwrapped and not yet compiled.
    """

    def __init__(self, model: GSAlign) -> None:
        self._layers = {
            str(layer): cast(LTPS, model.backbone.ltps[str(layer)])
            for layer in model.config.ltps_layers
        }
        self._full_circle = {IMAGE} | (
            set(self._layers) if model.config.ltps.angle == "direction" else set()
        )
        self._last: Tensor | None = None
        self._offsets: Tensor | None = None
        self._direction: Tensor | None = None
        self._told: dict[str, str] = {}
        # Not of the LTPS layers: what is computed again in the backward pass has no hooks.
        model.backbone.register_forward_hook(self._keep)
        if model.uprighting is not None:
            model.uprighting.register_forward_hook(self._keep_direction)

    def _keep(
        self,
        module: nn.Module,
        arguments: object,
        output: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        if module.training:
            _, angles, offsets = output
            self._last = angles.detach()
            self._offsets = None if offsets is None else offsets.detach()

    def _keep_direction(self, module: nn.Module, arguments: object, output: Aligned) -> None:
        if module.training and output.direction is not None:
            self._direction = output.direction.detach()

    @torch.no_grad()
    def read(self) -> dict[str, AngleStatistics]:
        """Statistics over the last batch of this process, by block number.

        Where the network turns images, those of that turn come first, as ``"image"``. Warps are
        those that the angles make with the control points as they now are.
        """
        rows: dict[str, Tensor] = {}
        if self._direction is not None:
            rows[IMAGE] = _figures(atan2_of(self._direction))
        if self._last is not None:
            own = [None] * len(self._layers) if self._offsets is None else self._offsets.float()
            for (layer, module), angles, offsets in zip(
                self._layers.items(), self._last.float(), own, strict=True
            ):
                rows[layer] = _figures(angles, module, offsets)
        if not rows:
            return {}
        # All in one copy, the only time that the host waits.
        figures = torch.stack(list(rows.values())).tolist()
        return {
            layer: AngleStatistics(
                mean,
                std,
                absolute,
                moved,
                clamped,
                full_circle=layer in self._full_circle,
                points_std=None if layer == IMAGE or self._offsets is None else points_std,
            )
            for layer, (mean, std, absolute, moved, clamped, points_std) in zip(
                rows, figures, strict=True
            )
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
