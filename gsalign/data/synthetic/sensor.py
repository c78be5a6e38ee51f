"""From light to file: blur, lost resolution, exposure, tint, noise, eight bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.shading import Light

# White balance and contrast of each camera, 1..13: red gain, blue gain, gamma.
_CAMERAS = (
    (1.03, 0.96, 1.00), (0.97, 1.04, 1.05), (1.05, 0.93, 0.97), (1.00, 1.00, 1.02),
    (0.95, 1.06, 1.00), (1.04, 0.97, 0.98), (0.97, 1.03, 1.04), (1.07, 0.92, 1.00),
    (1.00, 1.02, 0.95), (0.94, 1.07, 1.02), (1.02, 0.95, 1.05), (0.99, 1.05, 0.97),
    (1.05, 1.00, 1.00),
)  # fmt: skip


def _shift(image: Tensor, dy: int, dx: int) -> Tensor:
    """Move the content by whole pixels, repeating the border."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height, device=image.device) - dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device) - dx).clamp(0, width - 1)
    if dy:
        image = image.index_select(-2, rows)
    if dx:
        image = image.index_select(-1, columns)
    return image


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur ``[B, C, H, W]``, one sigma ``[B]`` (pixels) per image, five taps."""
    index = torch.nonzero(sigma > 0.25).flatten()  # below, the neighbours weigh nothing
    if not index.numel():
        return image
    blurred, sigma = image[index], sigma[index]
    inverse = 0.5 / (sigma * sigma + 0.02)
    one, two = torch.exp(-inverse), torch.exp(-4.0 * inverse)
    total = 1.0 + 2.0 * one + 2.0 * two
    a, b, c = ((v / total).view(-1, 1, 1, 1) for v in (torch.ones_like(one), one, two))
    for dy, dx in ((1, 0), (0, 1)):
        near = _shift(blurred, dy, dx).add_(_shift(blurred, -dy, -dx))
        wide = _shift(blurred, 2 * dy, 2 * dx).add_(_shift(blurred, -2 * dy, -2 * dx))
        blurred = blurred.mul_(a).add_(near.mul_(b)).add_(wide.mul_(c))
    result = image.clone()
    result[index] = blurred
    return result


def _motion(image: Tensor, strength: Tensor, direction: Tensor) -> Tensor:
    """Blur along one of four directions; ``strength`` ``[B]`` weighs the neighbours, 0 for none."""
    image = image.clone()
    for number, (dy, dx) in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
        index = torch.nonzero((strength > 0) & (direction == number)).flatten()
        if index.numel():
            sharp = image[index]
            smear = (_shift(sharp, dy, dx) + _shift(sharp, -dy, -dx)) * 0.5
            image[index] = sharp + (smear - sharp) * strength[index].view(-1, 1, 1, 1)
    return image


def _lose_resolution(image: Tensor, levels: Tensor) -> Tensor:
    """Scale some images down and up again: level 1 to 2/3, level 2 to 1/2 of their size."""
    height, width = image.shape[-2:]
    result = image.clone()
    for level, factor in ((1, 0.67), (2, 0.5)):
        index = torch.nonzero(levels == level).flatten()
        if index.numel():
            small = (max(8, round(height * factor)), max(4, round(width * factor)))
            reduced = F.interpolate(
                image[index], size=small, mode="bilinear", antialias=True, align_corners=False
            )
            result[index] = F.interpolate(
                reduced, size=(height, width), mode="bicubic", align_corners=False
            )
    return result


def expose(radiance: Tensor, cameras: Tensor, light: Light, draws: Draws) -> Tensor:
    """Turn radiance ``[B, 3, H, W]`` into an image ``[B, 3, H, W]`` uint8, RGB.

    Args:
        radiance: linear RGB.
        cameras: ``[B]`` int64, 1..13.
        light: lighting; at night the exposure is longer and the noise stronger.
        draws: random numbers of the images, with their noise field.
    """
    size_factor = radiance.shape[-2] / 128.0
    aerial = (cameras <= 5).float()
    sigma = draws["defocus"] ** 2 * (0.50 + 0.15 * aerial) * size_factor
    image = _blur(radiance, sigma)
    moving = ((draws["motion"] - 0.70).clamp(min=0.0) / 0.3) * (0.65 + 0.35 * light.night)
    image = _motion(image, moving, (draws["motion_direction"] * 4).long())
    resolution = draws["resolution"]
    image = _lose_resolution(image, (resolution > 0.66).long() + (resolution > 0.92).long())

    table = torch.tensor(_CAMERAS, device=radiance.device)[cameras - 1]
    red = table[:, 0] * draws.between("tint_r", 0.96, 1.04)
    blue = table[:, 1] * draws.between("tint_b", 0.96, 1.04)
    gain = torch.stack((red, torch.ones_like(red), blue), dim=1).view(-1, 3, 1, 1)
    exposure = draws.between("exposure", 0.90, 1.28) * (1.0 + 1.05 * light.night)
    image = (image * gain * exposure.view(-1, 1, 1, 1)).clamp(min=0.0)
    # A shoulder instead of clipped lights; gamma 2 for the display.
    image = image * (1.0 + image * 0.25) / (1.0 + image * 0.45)
    image = torch.sqrt(image)
    contrast = (draws.between("contrast", 0.90, 1.12) * table[:, 2]).view(-1, 1, 1, 1)
    image = (image - 0.42) * contrast + 0.42 - 0.02 * light.night.view(-1, 1, 1, 1)
    dark = light.night.view(-1, 1, 1, 1)
    grain = draws.noise
    smooth = (
        grain * 2.0
        + _shift(grain, 0, 1)
        + _shift(grain, 0, -1)
        + _shift(grain, 1, 0)
        + _shift(grain, -1, 0)
    ) * 0.35
    common = smooth.mean(1, keepdim=True)
    level = (0.005 + 0.010 * draws["noise"]).view(-1, 1, 1, 1) * (1.0 + 0.5 * dark)
    image = image + level * (0.55 * smooth + 1.1 * common) * (1.15 - 0.5 * image.clamp(0.0, 1.0))
    return (image.clamp(0.0, 1.0) * 255.0 + 0.5).floor().to(torch.uint8)
