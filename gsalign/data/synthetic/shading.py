"""Light: sun or lamp, sky, and the soft shadows that the body casts on itself and on the ground."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import dot, normalise, smoothstep, vector
from gsalign.data.synthetic.identity import People
from gsalign.data.synthetic.pose import Pose

LIGHTINGS = ("sun", "overcast", "sodium", "led")


@dataclass(frozen=True)
class Light:
    """A batch of lightings. Colours are linear RGB ``[B, 3]``.

    Attributes:
        direction: ``[B, 3]`` unit, from the ground towards the light.
        key: colour of the direct light.
        sky: colour of the light from above and around.
        bounce: colour of the light that the ground throws back.
        softness: ``[B]`` how fast a shadow's edge widens with distance.
        kind: ``[B]`` int64, index into LIGHTINGS.
        night: ``[B]`` float, 1 at night.
    """

    direction: Tensor
    key: Tensor
    sky: Tensor
    bounce: Tensor
    softness: Tensor
    kind: Tensor
    night: Tensor

    def take(self, index: Tensor) -> Light:
        """The lighting of some images of the batch, ``index`` ``[N]`` int64."""
        return Light(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def make_light(night: Tensor, draws: Draws) -> Light:
    """Draw the lighting of every image; ``night`` is ``[B]`` float, 1 at night."""
    azimuth = draws["sun_azimuth"] * 6.2831853
    elevation = draws.between("sun_elevation", 0.55, 1.15) + 0.15 * night
    flat = torch.cos(elevation)
    direction = vector(flat * torch.cos(azimuth), flat * torch.sin(azimuth), torch.sin(elevation))
    overcast = (draws["sun_strength"] < 0.38).float() * (1.0 - night)
    sun = (1.0 - overcast) * (1.0 - night)
    sodium = (draws["night_lamp"] < 0.5).float() * night
    led = night - sodium

    def mix(
        a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...], d: tuple[float, ...]
    ) -> Tensor:
        colours = torch.tensor((a, b, c, d), dtype=torch.float32, device=night.device)
        weights = torch.stack((sun, overcast, sodium, led), dim=1)
        return (weights.unsqueeze(-1) * colours).sum(1)

    key = mix((1.15, 1.07, 0.95), (0.30, 0.30, 0.30), (0.36, 0.275, 0.180), (0.275, 0.295, 0.32))
    sky = mix((0.52, 0.55, 0.61), (0.74, 0.76, 0.79), (0.085, 0.083, 0.095), (0.085, 0.094, 0.118))
    strength = 0.88 + 0.26 * draws["haze"]
    bounce = sky * 0.35 + key * (0.13 * direction[:, 2:])
    kind = (overcast + 2.0 * sodium + 3.0 * led).long()
    return Light(
        direction=direction,
        key=key * strength.unsqueeze(-1),
        sky=sky,
        bounce=bounce,
        softness=0.03 + 0.30 * overcast + 0.04 * night,
        kind=kind,
        night=night,
    )


# The last capsules: they shade the ground, not the body.
_FEET = 2


@dataclass(frozen=True)
class Blockers:
    """Capsules that stand for the body when it casts shadows.

    Seen along the light a capsule is a flat one of the same radius: ``start`` and ``axis``
    are ``[B, K, 2]`` in the plane across the light; ``level`` and ``slope`` ``[B, K]`` the height
    of its axis along the light; ``radius`` ``[B, K]``, 0 where there is none.
    """

    first: Tensor  # [B, 3] axes of the plane across the light
    second: Tensor
    direction: Tensor
    start: Tensor
    axis: Tensor
    level: Tensor
    slope: Tensor
    radius: Tensor
    softness: Tensor


def make_blockers(people: People, pose: Pose, light: Light, turn: Tensor) -> Blockers:
    """Capsules of a batch of poses.

    Args:
        people: appearances.
        pose: joints in the body frame.
        light: lighting.
        turn: ``[B]`` angle that takes the body frame to the world.
    """
    height = pose.height
    heavy = 1.0 + 0.14 * people.build
    skirted = people.is_("lower", "skirt", "long_skirt") + people.is_("upper", "coat")
    skirted = skirted.clamp(max=1.0)
    long_skirt = people.is_("lower", "long_skirt")
    pack = people.is_("bag", "backpack")
    hat = (people.headwear > 0).float()
    behind = pose.pelvis - pose.chest_front * (0.10 * height).unsqueeze(-1)
    ends: list[tuple[Tensor, Tensor, Tensor]] = [
        (pose.head, pose.head, (0.058 + 0.006 * hat) * height),
        (pose.neck, pose.head, 0.030 * height),
        (
            behind + pose.spine * (0.11 * height).unsqueeze(-1),
            behind + pose.spine * (0.23 * height).unsqueeze(-1),
            0.062 * height * pack,
        ),
        (pose.neck, pose.pelvis, 0.064 * height * heavy),
    ]
    feet: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(2):
        inner = pose.shoulder[i] * 0.7 + pose.neck * 0.3
        inner = inner - pose.spine * (0.02 * height).unsqueeze(-1)
        ends += [
            (inner, pose.hip[i], 0.050 * height * heavy),
            (pose.shoulder[i], pose.elbow[i], 0.030 * height * heavy),
            (pose.elbow[i], pose.wrist[i] * 1.35 - pose.elbow[i] * 0.35, 0.022 * height * heavy),
            (pose.hip[i], pose.knee[i], (0.046 + 0.022 * skirted) * height * heavy),
            (pose.knee[i], pose.ankle[i], (0.034 + 0.030 * long_skirt) * height * heavy),
        ]
        sole = pose.ankle[i] - pose.spine * (0.02 * height).unsqueeze(-1)
        toe = sole + pose.foot_front[i] * (0.08 * height).unsqueeze(-1)
        feet.append((sole, toe, 0.024 * height))
    ends += feet
    start = torch.stack([a for a, _, _ in ends], dim=1)
    end = torch.stack([b for _, b, _ in ends], dim=1)
    sin, cos = torch.sin(turn)[:, None], torch.cos(turn)[:, None]

    def world(p: Tensor) -> Tensor:
        x, y, z = p.unbind(-1)
        return torch.stack((cos * x - sin * y, sin * x + cos * y, z), dim=-1)

    start, end = world(start), world(end)
    direction = light.direction
    zero = torch.zeros_like(direction[:, 0])
    first = normalise(torch.stack((direction[:, 1], -direction[:, 0], zero), dim=-1))
    second = torch.stack(
        (
            direction[:, 1] * first[:, 2] - direction[:, 2] * first[:, 1],
            direction[:, 2] * first[:, 0] - direction[:, 0] * first[:, 2],
            direction[:, 0] * first[:, 1] - direction[:, 1] * first[:, 0],
        ),
        dim=-1,
    )

    def flat(p: Tensor) -> tuple[Tensor, Tensor]:
        plane = torch.stack((dot(p, first[:, None]), dot(p, second[:, None])), dim=-1)
        return plane, dot(p, direction[:, None])

    a, level_a = flat(start)
    b, level_b = flat(end)
    return Blockers(
        first=first,
        second=second,
        direction=direction,
        start=a,
        axis=b - a,
        level=level_a,
        slope=level_b - level_a,
        radius=torch.stack([r for _, _, r in ends], dim=1),
        softness=light.softness,
    )


def _shadow(
    x: Tensor, y: Tensor, level: Tensor, columns: list[Tensor], softness: Tensor, bias: float
) -> Tensor:
    """Light that passes one capsule, 0 to 1, at points across (x, y) and along the light."""
    ax, ay, dx, dy, inverse, base, slope, radius = columns
    px, py = x - ax, y - ay
    t = (px * dx).add_(py * dy).mul_(inverse).clamp_(0.0, 1.0)
    px.sub_(t * dx)
    py.sub_(t * dy)
    distance = px.mul_(px).add_(py.mul_(py)).sqrt_()
    above = t.mul_(slope).add_(base).sub_(level)
    blur = above.clamp(min=0.0).mul_(softness).add_(0.012)
    # An edge that has widened beyond the capsule also grows fainter.
    depth = radius / (0.6 * blur).add_(radius)
    shade = smoothstep(radius + blur, radius - blur, distance).mul_(depth)
    return shade.mul_(smoothstep(bias, bias + 0.04, above)).neg_().add_(1.0)


def _columns(blockers: Blockers) -> Tensor:
    length = blockers.axis[..., 0] ** 2 + blockers.axis[..., 1] ** 2
    return torch.stack(
        (
            blockers.start[..., 0],
            blockers.start[..., 1],
            blockers.axis[..., 0],
            blockers.axis[..., 1],
            1.0 / (length + 1e-6),
            blockers.level,
            blockers.slope,
            blockers.radius,
        ),
        dim=-1,
    )  # [B, K, 8]


def _plain(x: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1]``."""
    return x.view(-1, 1, 1)


def ground_shadow(blockers: Blockers, x: Tensor, y: Tensor) -> Tensor:
    """Share of the direct light that reaches ground points ``[B, H, W]`` (world x and y)."""
    a = x * _plain(blockers.first[:, 0]) + y * _plain(blockers.first[:, 1])
    b = x * _plain(blockers.second[:, 0]) + y * _plain(blockers.second[:, 1])
    level = x * _plain(blockers.direction[:, 0]) + y * _plain(blockers.direction[:, 1])
    table = _columns(blockers)
    softness = _plain(blockers.softness)
    passed = torch.ones_like(x)
    for k in range(table.shape[1]):
        columns = [table[:, k, c].view(-1, 1, 1) for c in range(8)]
        shadow = _shadow(a, b, level, columns, softness, 0.0)
        torch.minimum(passed, shadow, out=passed)
    return passed


def body_shadow(blockers: Blockers, points: Tensor, image: Tensor) -> Tensor:
    """Share of the direct light that reaches points of the body.

    Args:
        blockers: the capsules.
        points: ``[N, 3]`` world coordinates.
        image: ``[N]`` which person.
    """
    px, py, pz = points.unbind(-1)

    def along(axis: Tensor) -> Tensor:
        v = axis.index_select(0, image)
        return px * v[:, 0] + py * v[:, 1] + pz * v[:, 2]

    a, b, level = along(blockers.first), along(blockers.second), along(blockers.direction)
    table = _columns(blockers)
    softness = blockers.softness.index_select(0, image)
    passed = torch.ones_like(a)
    for k in range(table.shape[1] - _FEET):
        columns = list(table[:, k].t().contiguous().index_select(1, image).unbind(0))
        # The bias keeps a limb from shading itself: it starts a diameter above the surface.
        bias = 0.10
        shadow = _shadow(a, b, level, columns, softness, bias)
        torch.minimum(passed, shadow, out=passed)
    return passed


def irradiance(
    light: Light, normal: Tensor, image: Tensor, direct: Tensor, ambient: Tensor
) -> Tensor:
    """Light arriving at points with normals ``[N, 3]``: ``[N, 3]`` linear RGB."""
    facing = dot(normal, light.direction.index_select(0, image)).clamp(min=0.0) * direct
    upward = 0.5 + 0.5 * normal[:, 2]
    return (
        light.key.index_select(0, image) * facing.unsqueeze(-1)
        + light.sky.index_select(0, image) * (upward * ambient).unsqueeze(-1)
        + light.bounce.index_select(0, image) * ((1.0 - upward) * ambient).unsqueeze(-1)
    )
