"""Things between the camera and the person: posts, low walls, leaves, cars, other people."""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import smoothstep
from gsalign.data.synthetic.identity import CLOTHING_COLOURS
from gsalign.data.synthetic.noise import CLOUD, GRAIN, MIXED, sample_noise
from gsalign.data.synthetic.shading import Light


def _b(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def render_occluders(
    draws: Draws, light: Light, aerial: Tensor, share: float, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Draw what hides part of the person.

    Args:
        draws: random numbers of the images.
        light: lighting.
        aerial: ``[B]`` float, 1 for aerial images.
        share: share of the images that get an occluder.
        size: (height, width).

    Returns:
        radiance ``[B, 3, H, W]`` and opacity ``[B, H, W]``, which is 0 where nothing stands.
    """
    device = aerial.device
    radiance = torch.zeros(len(aerial), 3, *size, device=device)
    opacity = torch.zeros(len(aerial), *size, device=device)
    index = torch.nonzero(draws.below("occluded", share)).flatten()
    if index.numel():
        drawn = _draw(draws.take(index), light.take(index), aerial[index], size)
        radiance[index], opacity[index] = drawn
    return radiance, opacity


def _draw(
    draws: Draws, light: Light, aerial: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Radiance and opacity of the images that do have an occluder."""
    height, width = size
    device = aerial.device
    y = ((torch.arange(height, device=device) + 0.5) / height).view(1, -1, 1)
    x = ((torch.arange(width, device=device) + 0.5) / width).view(1, 1, -1)
    y, x = y.expand(1, height, width), x.expand(1, height, width)
    edge = 1.2 / height
    kind = draws["occluder"]
    place = _b(draws["occluder_x"])
    amount = _b(draws["occluder_size"])
    aspect = width / height
    noise = sample_noise(
        x * aspect * 0.55 + _b(draws["occluder_x"]), y * 0.55 + _b(draws["occluder_y"])
    )
    left = (place < 0.5).float()

    def is_(low: float, high: float, where: Tensor) -> Tensor:
        return _b(((kind >= low) & (kind < high)).float() * where)

    ground = 1.0 - aerial
    # Ground: post, low wall, hedge, car, passer-by. Aerial: lamp arm, crown of a tree, roof.
    post = is_(0.0, 0.28, ground) + is_(0.0, 0.30, aerial)
    low_wall = is_(0.28, 0.48, ground)
    hedge = is_(0.48, 0.66, ground)
    car = is_(0.66, 0.82, ground)
    person = is_(0.82, 1.01, ground)
    crown = is_(0.30, 0.75, aerial)
    roof = is_(0.75, 1.01, aerial)

    tilt = (_b(draws["occluder_y"]) - 0.5) * (0.06 + 2.2 * _b(aerial))
    middle = 0.2 + 0.6 * place + tilt * (y - 0.5)
    half = 0.035 + 0.055 * amount
    across = (x - middle) / half
    post_alpha = smoothstep(1.0 + edge / half, 1.0 - edge / half, across.abs())
    post_tone = 0.55 + 0.5 * torch.sqrt((1.0 - across * across).clamp(min=0.0)) * (
        1.0 - 0.35 * across
    )

    top = 0.88 - 0.24 * amount + 0.04 * (x - 0.5)
    wall_alpha = smoothstep(top - edge, top + edge, y)
    wall_tone = (1.25 - 0.45 * smoothstep(0.02, 0.035, y - top)) * (1.0 + 0.04 * noise[CLOUD])
    hedge_top = 0.88 - 0.28 * amount + 0.020 * noise[MIXED] + 0.012 * noise[GRAIN]
    hedge_alpha = smoothstep(hedge_top - edge * 1.5, hedge_top + edge * 1.5, y)
    leaves = (0.8 + 0.35 * noise[MIXED] + 0.3 * noise[GRAIN]).clamp(min=0.15)
    # A car's bonnet slopes to one side.
    slope = (x - 0.5) * (0.22 * (left * 2.0 - 1.0))
    bonnet = 0.86 - 0.18 * amount + slope + 0.08 * (x - 0.5) ** 2
    car_alpha = smoothstep(bonnet - edge, bonnet + edge, y)
    car_tone = 1.35 - 0.9 * smoothstep(0.0, 0.12, y - bonnet) * (
        1.0 - 0.3 * smoothstep(0.1, 0.3, y - bonnet)
    )

    # A passer-by at one edge, out of focus.
    px = x - (left * (0.02 + 0.10 * amount) + (1.0 - left) * (0.98 - 0.10 * amount))
    lift = 0.10 * _b(draws["occluder_y"])
    head = torch.sqrt((px / 0.105) ** 2 + ((y - 0.075 - lift) / 0.068) ** 2)
    shoulder = smoothstep(0.13, 0.24, y - lift)
    body_half = 0.07 + 0.16 * shoulder - 0.05 * smoothstep(0.5, 0.62, y - lift)
    soft = edge * 2.5
    body = smoothstep(body_half + soft * 2, body_half - soft * 2, px.abs()) * smoothstep(
        0.13, 0.15, y - lift
    )
    head_alpha = smoothstep(1.0 + soft / 0.07, 1.0 - soft / 0.07, head)
    person_alpha = torch.maximum(head_alpha, body)

    corner_x = left * x + (1.0 - left) * (1.0 - x)
    top_side = (_b(draws["occluder_y"]) < 0.5).float()
    corner_y = top_side * y + (1.0 - top_side) * (1.0 - y)
    reach = 0.30 + 0.30 * amount + 0.085 * noise[MIXED] + 0.05 * noise[GRAIN]
    from_corner = torch.sqrt(corner_x * corner_x + (corner_y / 1.35) ** 2)
    crown_alpha = smoothstep(reach + 0.02, reach - 0.02, from_corner)
    direction = _b(draws["occluder_hue"]) * 1.2 + 0.2
    lean = corner_x * torch.cos(direction) + corner_y * torch.sin(direction)
    roof_edge = 0.16 + 0.18 * amount
    roof_alpha = smoothstep(roof_edge + edge, roof_edge - edge, lean)
    roof_tone = 0.85 + 0.4 * smoothstep(0.03, 0.02, roof_edge - lean)

    hue = (draws["occluder_hue"] * 6).long()
    dull = torch.tensor(
        [
            (0.16, 0.17, 0.18), (0.30, 0.29, 0.27), (0.10, 0.11, 0.12),
            (0.26, 0.20, 0.14), (0.34, 0.33, 0.32), (0.12, 0.16, 0.20),
        ],
        device=device,
    )[hue]  # fmt: skip
    vivid = torch.tensor(
        [
            (0.5, 0.5, 0.52), (0.03, 0.03, 0.035), (0.2, 0.21, 0.22),
            (0.32, 0.04, 0.04), (0.05, 0.09, 0.22), (0.62, 0.62, 0.6),
        ],
        device=device,
    )[hue]  # fmt: skip
    cloth = torch.tensor(CLOTHING_COLOURS, device=device)
    cloth = (cloth * cloth)[(draws["occluder_value"] * len(CLOTHING_COLOURS)).long()]
    green = torch.tensor([0.055, 0.115, 0.03], device=device).expand_as(dull)

    def rgb(colour: Tensor) -> Tensor:
        return colour.view(-1, 3, 1, 1)

    opacity = torch.zeros(len(aerial), height, width, device=device)
    albedo = torch.zeros(len(aerial), 3, height, width, device=device)

    def layer(mask: Tensor, alpha: Tensor, colour: Tensor, tone: Tensor) -> None:
        nonlocal opacity, albedo
        weight = (mask * alpha).unsqueeze(1)
        albedo = albedo + (rgb(colour) * tone.unsqueeze(1) - albedo) * weight
        opacity = torch.maximum(opacity, mask * alpha)

    layer(post, post_alpha, dull, post_tone)
    layer(low_wall, wall_alpha, dull * 1.3, wall_tone)
    layer(hedge, hedge_alpha, green, leaves)
    layer(car, car_alpha, vivid, car_tone)
    fold = 0.75 + 0.12 * noise[CLOUD] + 0.25 * smoothstep(-0.2, 0.2, px)
    layer(person, person_alpha, cloth * 0.8 + 0.01, fold)
    dark_hair = torch.full_like(cloth, 0.02)
    layer(person, head_alpha * (1.0 - body), dark_hair + 0.0 * cloth, fold)
    layer(crown, crown_alpha, green * 1.2, leaves)
    layer(roof, roof_alpha, dull, roof_tone)
    level = light.key * 0.55 + light.sky * 0.75
    return albedo * rgb(level), opacity
