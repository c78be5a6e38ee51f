"""From uint8 images to network input: the test transform and the batched training augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from gsalign.data.augmentation import Augmentation
from gsalign.data.config import AugmentationConfig
from gsalign.data.samplers import Draw

# Luma weights of ITU-R BT.601, the grey of Pillow and torchvision.
_GREY = (0.299, 0.587, 0.114)
_ERASING_ATTEMPTS = 10


def normalize(images: Tensor) -> Tensor:
    """Map pixel values 0 .. 255 to -1 .. 1: ``(x - 127.5) / 127.5``.

    Args:
        images: uint8 or float, any shape.

    Returns:
        float32, or the type given if it is a floating one.
    """
    if not images.is_floating_point():
        images = images.float()
    return images.sub(127.5).div_(127.5)


def denormalize(images: Tensor) -> Tensor:
    """Undo ``normalize``: -1 .. 1 to uint8 0 .. 255, rounded and clamped."""
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _Parameters:
    """What was drawn for each image of a batch; arrays of length B."""

    shift: NDArray[np.int64]  # [B, 2] (y, x): source pixel minus crop pixel
    flip: NDArray[np.bool_]
    angle: NDArray[np.float64]  # radians, counter-clockwise as one sees the image
    scale: NDArray[np.float64]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    augmix: NDArray[np.bool_]
    augmix_seed: NDArray[np.int64]
    erased: list[tuple[int, int, int, int] | None]  # top, left, height, width


class TrainTransform:
    """The augmentation of a whole batch at once, each image with parameters of its own.

    In order: pad with black and crop at random, flip, rotate and scale about the centre, AugMix,
    colour jitter, erase a rectangle, normalise. Geometry is one bilinear warp per image: crop,
    flip, rotation and scale are composed into one affine map, which is the same distribution as
    one after the other, with one interpolation instead of several. Parts that the crop cut off
    stay black when the rotation would turn them back in. Without rotation and scale the crop and
    the flip are exact copies of pixels.

    Colour jitter changes brightness, then contrast about the mean grey, then saturation; the three
    make one affine map of colours, clamped once at the end.

    What is drawn for an image depends on the seed, the epoch and the position of the draw, by a
    counter-based generator; not on the batch it is in, nor on the process that loads it. No global
    random state is used or changed.

    Args:
        config: the augmentation.
        seed: of the draws, not negative.
    """

    def __init__(self, config: AugmentationConfig, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._augmix = v2.AugMix(
            severity=config.augmix_severity,
            mixture_width=config.augmix_width,
            chain_depth=config.augmix_depth,
            alpha=config.augmix_alpha,
        )

    def __call__(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Augment and normalise.

        Args:
            images: uint8 RGB ``[B, 3, H, W]``, already of the final size; not changed.
            draws: the B draws the images come from.

        Returns:
            float32 ``[B, 3, H, W]`` in [-1, 1], contiguous.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise TypeError(
                f"images is {images.dtype} {tuple(images.shape)}; wanted uint8 [B, 3, H, W]"
            )
        if len(draws) != len(images):
            raise ValueError(f"{len(draws)} draws for {len(images)} images")
        if not len(images):
            return images.float()
        drawn = self._draw(draws, *images.shape[-2:])
        chosen = np.flatnonzero(drawn.augmix).tolist()

        def mix(pixels: Tensor) -> Tensor:
            for i in chosen:
                pixels[i] = self._mix(pixels[i], int(drawn.augmix_seed[i]))
            return pixels

        plan = self._as_tensors(drawn, *images.shape[-2:])
        return plan(images, between=mix if chosen else None)

    def plan(self, draws: Sequence[Draw], size: tuple[int, int]) -> Augmentation:
        """What to do with a batch, to be done elsewhere: ``plan(draws, size)(images)``.

        AugMix, which is PyTorch's own and draws on the CPU, is no part of it.

        Args:
            draws: the B draws the images come from.
            size: ``(height, width)`` of the images.
        """
        return self._as_tensors(self._draw(draws, *size), *size)

    def label_maps(self, labels: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Move label maps as their images are moved, see :meth:`Augmentation.label_maps`.

        Args:
            labels: uint8 ``[B, H, W]``; not changed.
            draws: the B draws the images come from.

        Returns:
            uint8 ``[B, H, W]``, contiguous.

        Raises:
            ValueError: the maps are no bytes, or not one per draw.
        """
        if labels.dtype != torch.uint8 or labels.dim() != 3 or len(labels) != len(draws):
            raise ValueError(
                f"labels is {labels.dtype} {tuple(labels.shape)} for {len(draws)} draws; wanted "
                "uint8 [B, H, W], one map per draw"
            )
        if not len(labels):
            return labels.clone()
        height, width = labels.shape[1:]
        return self.plan(draws, (height, width)).label_maps(labels)

    def _draw(self, draws: Sequence[Draw], height: int, width: int) -> _Parameters:
        config = self.config
        # One row of uniform numbers per image, with a fixed column for every use.
        u = np.stack(
            [
                np.random.Generator(
                    np.random.Philox(key=[self.seed, (draw.epoch << 32) | draw.position])
                ).random(11 + 4 * _ERASING_ATTEMPTS)
                for draw in draws
            ]
        )
        symmetric = 2.0 * u - 1.0
        choices = 2 * config.crop_padding + 1
        shift = np.floor(u[:, 0:2] * choices).astype(np.int64) - config.crop_padding
        jitter = 1.0 + config.color_jitter * symmetric[:, 5:8]
        erase = u[:, 10] < config.erasing
        return _Parameters(
            shift=shift,
            flip=u[:, 2] < config.flip,
            angle=np.deg2rad(config.rotation * symmetric[:, 3]),
            scale=1.0 + config.scale * symmetric[:, 4],
            brightness=jitter[:, 0],
            contrast=jitter[:, 1],
            saturation=jitter[:, 2],
            augmix=u[:, 8] < config.augmix,
            augmix_seed=np.floor(u[:, 9] * 2**53).astype(np.int64),
            erased=[
                self._rectangle(row[11:], height, width) if wanted else None
                for row, wanted in zip(u, erase.tolist(), strict=True)
            ],
        )

    def _rectangle(
        self, u: NDArray[np.float64], height: int, width: int
    ) -> tuple[int, int, int, int] | None:
        """Return the first of ten drawn rectangles that is smaller than the image, if any."""
        (low_area, high_area), (low, high) = self.config.erasing_area, self.config.erasing_ratio
        for area, ratio, top, left in u.reshape(_ERASING_ATTEMPTS, 4).tolist():
            pixels = height * width * (low_area + (high_area - low_area) * area)
            aspect = low * (high / low) ** ratio  # uniform in the logarithm
            h, w = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
            if 0 < h < height and 0 < w < width:
                return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
        return None

    def _as_tensors(self, drawn: _Parameters, height: int, width: int) -> Augmentation:
        config = self.config
        corner = flip = columns = rows = shift = colour = grey = erased = fill = None
        if config.rotation == 0.0 and config.scale == 0.0:
            if config.crop_padding or config.flip:
                corner = torch.from_numpy(drawn.shift + config.crop_padding)
                flip = torch.from_numpy(drawn.flip)
        else:
            columns, rows = _geometry(drawn, height, width)
            if config.crop_padding:
                moved = drawn.shift[:, ::-1] * (2.0 / np.array([width, height]))
                shift = torch.from_numpy(moved).float()
        if config.color_jitter:
            colour, grey = _colours(drawn)
        if config.erasing:
            erased = torch.tensor([rectangle or (0, 0, 0, 0) for rectangle in drawn.erased])
            fill = torch.tensor(config.erasing_fill).sub_(127.5).div_(127.5)
        return Augmentation(
            corner=corner,
            flip=flip,
            columns=columns,
            rows=rows,
            shift=shift,
            colour=colour,
            grey=grey,
            erased=erased,
            fill=fill,
            padding=config.crop_padding,
        )

    def _mix(self, image: Tensor, seed: int) -> Tensor:
        # AugMix draws from the global generator: lend it one, and put back what was there.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            mixed = self._augmix(image.round().clamp_(0, 255).to(torch.uint8))
        return mixed.float()


def _geometry(drawn: _Parameters, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What columns ``[B, 2, W]`` and rows ``[B, 2, H]`` add to where the output reads (x, y).

    In pixels from the centre: output -> crop frame (turned back, shrunk back, flipped back). The
    map is affine, so each coordinate is a term of the column plus a term of the row.
    """
    cos, sin = np.cos(drawn.angle) / drawn.scale, np.sin(drawn.angle) / drawn.scale
    sign = np.where(drawn.flip, -1.0, 1.0)
    column, row = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    factors = np.array([2.0 / width, 2.0 / height])[:, None]
    columns = np.stack([np.outer(sign * cos, column), np.outer(sin, column)], axis=1) * factors
    rows = np.stack([np.outer(sign * -sin, row), np.outer(cos, row)], axis=1) * factors
    return torch.from_numpy(columns).float(), torch.from_numpy(rows).float()


def _colours(drawn: _Parameters) -> tuple[Tensor, Tensor]:
    """The map of colours ``[B, 3, 3]`` to the normalised scale, and the mean's weights ``[B, 3]``.

    Brightness: b x; contrast about the mean grey m: c b x + (1 - c) b m; saturation about the grey
    of each pixel: S y with S = s I + (1 - s) 1 grey^T. S leaves the grey offset (1 - c) b m as it
    is, because the weights sum to one.
    """
    weights = torch.tensor(_GREY)
    b, c, s = (
        torch.from_numpy(value).float().view(-1, 1, 1)
        for value in (drawn.brightness, drawn.contrast, drawn.saturation)
    )
    matrix = (b * c) * (s * torch.eye(3) + (1.0 - s) * weights.expand(3, 3))
    return matrix / 127.5, ((1.0 - c) * b).view(-1, 1) * weights
