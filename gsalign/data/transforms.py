"""From uint8 images to network input: the test transform and the batched training augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

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
        height, width = images.shape[-2:]
        drawn = self._draw(draws, height, width)
        pixels = self._geometry(images, drawn)
        for i in np.flatnonzero(drawn.augmix).tolist():
            pixels[i] = self._mix(pixels[i], int(drawn.augmix_seed[i]))
        result = self._colour(pixels, drawn)
        fill = torch.tensor(self.config.erasing_fill).sub_(127.5).div_(127.5).view(3, 1, 1)
        for i, rectangle in enumerate(drawn.erased):
            if rectangle is not None:
                top, left, h, w = rectangle
                result[i, :, top : top + h, left : left + w] = fill
        return result

    def label_maps(self, labels: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Move label maps as their images are moved: what a pixel shows, its label says.

        Where nothing of the image is left, in the black border and in an erased rectangle, the
        label is 0, the background: nobody can be seen there.

        Args:
            labels: uint8 ``[B, H, W]``; not changed.
            draws: the B draws the images come from.

        Returns:
            uint8 ``[B, H, W]``, contiguous; by the label of the nearest pixel.
        """
        if labels.dtype != torch.uint8 or labels.dim() != 3 or len(labels) != len(draws):
            raise ValueError(
                f"labels is {labels.dtype} {tuple(labels.shape)} for {len(draws)} draws; wanted "
                "uint8 [B, H, W], one map per draw"
            )
        if not len(labels):
            return labels.clone()
        drawn = self._draw(draws, *labels.shape[-2:])
        result = self._geometry(labels.unsqueeze(1), drawn, mode="nearest")
        result = result.squeeze(1).to(torch.uint8)
        for i, rectangle in enumerate(drawn.erased):
            if rectangle is not None:
                top, left, h, w = rectangle
                result[i, top : top + h, left : left + w] = 0
        return result

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

    def _geometry(self, images: Tensor, drawn: _Parameters, *, mode: str = "bilinear") -> Tensor:
        """Crop, flip, rotate and scale; float32 ``[B, C, H, W]``, values 0 .. 255."""
        if self.config.rotation == 0.0 and self.config.scale == 0.0:
            return self._copy(images, drawn)
        height, width = images.shape[-2:]
        # In pixels from the centre: output -> crop frame (turned back, shrunk back, flipped back)
        # -> image (shifted). The map is affine, so each coordinate is a term of the column plus
        # a term of the row.
        cos, sin = np.cos(drawn.angle) / drawn.scale, np.sin(drawn.angle) / drawn.scale
        sign = np.where(drawn.flip, -1.0, 1.0)
        columns, rows = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
        x = _sums(np.outer(sign * cos, columns), np.outer(sign * -sin, rows), 2.0 / width)
        y = _sums(np.outer(sin, columns), np.outer(cos, rows), 2.0 / height)
        if self.config.crop_padding:
            # -1 and 1 are the outer edges of the crop.
            outside = (x.abs() > 1.0).logical_or_(y.abs() > 1.0)
            shift = torch.from_numpy(drawn.shift * (2.0 / np.array([height, width]))).float()
            y += shift[:, 0, None, None]
            x += shift[:, 1, None, None]
            # Far away is black, too.
            x.masked_fill_(outside, 9.0)
        return F.grid_sample(
            images.float(),
            torch.stack([x, y], dim=-1),
            mode=mode,
            padding_mode="zeros",
            align_corners=False,
        )

    def _copy(self, images: Tensor, drawn: _Parameters) -> Tensor:
        padding = self.config.crop_padding
        height, width = images.shape[-2:]
        result = images
        if padding:
            padded = F.pad(images, [padding] * 4)
            result = torch.empty_like(images)
            for i, (y, x) in enumerate((drawn.shift + padding).tolist()):
                result[i] = padded[i, :, y : y + height, x : x + width]
        pixels = result.float()
        flip = torch.from_numpy(drawn.flip)
        if drawn.flip.any():
            pixels[flip] = pixels[flip].flip(-1)
        return pixels

    def _mix(self, image: Tensor, seed: int) -> Tensor:
        # AugMix draws from the global generator: lend it one, and put back what was there.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            mixed = self._augmix(image.round().clamp_(0, 255).to(torch.uint8))
        return mixed.float()

    def _colour(self, pixels: Tensor, drawn: _Parameters) -> Tensor:
        if self.config.color_jitter == 0.0:
            return pixels.sub_(127.5).div_(127.5).clamp_(-1.0, 1.0)
        batch, _, height, width = pixels.shape
        grey = torch.tensor(_GREY)
        # brightness: b x; contrast about the mean grey m: c b x + (1 - c) b m;
        # saturation about the grey of each pixel: S y with S = s I + (1 - s) 1 grey^T.
        # S leaves the grey offset (1 - c) b m as it is, because the weights sum to one.
        b, c, s = (
            torch.from_numpy(value).float().view(-1, 1, 1)
            for value in (drawn.brightness, drawn.contrast, drawn.saturation)
        )
        mean = (pixels.mean((2, 3)) @ grey).view(-1, 1, 1)
        matrix = (b * c) * (s * torch.eye(3) + (1.0 - s) * grey.expand(3, 3))
        offset = (1.0 - c) * b * mean
        result = torch.baddbmm(
            ((offset - 127.5) / 127.5).expand(batch, 3, 1),
            matrix / 127.5,
            pixels.reshape(batch, 3, height * width),
        )
        return result.clamp_(-1.0, 1.0).view(batch, 3, height, width)


def _sums(columns: NDArray[np.float64], rows: NDArray[np.float64], factor: float) -> Tensor:
    """Return ``factor * (columns[b, j] + rows[b, i])`` as float32 ``[B, H, W]``."""
    one = torch.from_numpy(columns * factor).float()
    other = torch.from_numpy(rows * factor).float()
    return one[:, None, :] + other[:, :, None]
