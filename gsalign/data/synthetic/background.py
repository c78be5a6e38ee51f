"""What is behind the person: streets, paving, grass, and for ground cameras a facade or a hedge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gsalign.data.synthetic.cameras import Viewpoint
from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import smoothstep
from gsalign.data.synthetic.noise import CLOUD, CLOUD_2, GRAIN, MIXED, sample_noise
from gsalign.data.synthetic.shading import Blockers, Light, ground_shadow

_GROUNDS = ("asphalt", "tiles", "grass", "slabs", "bricks", "gravel")
# Linear RGB of each ground, before its random brightness.
_GROUND_RGB = (
    (0.125, 0.125, 0.130),
    (0.330, 0.300, 0.265),
    (0.105, 0.165, 0.050),
    (0.300, 0.300, 0.290),
    (0.270, 0.150, 0.110),
    (0.340, 0.285, 0.210),
)
_WALLS = (
    (0.36, 0.17, 0.12), (0.48, 0.42, 0.33), (0.30, 0.31, 0.33), (0.60, 0.58, 0.54),
    (0.20, 0.24, 0.29), (0.42, 0.33, 0.20),
)  # fmt: skip
_CARS = (
    (0.55, 0.56, 0.58), (0.03, 0.03, 0.035), (0.22, 0.23, 0.24), (0.35, 0.04, 0.04),
    (0.05, 0.10, 0.24), (0.70, 0.70, 0.69),
)  # fmt: skip


def _b(x: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1]``."""
    return x.view(-1, 1, 1)


def _frac(x: Tensor) -> Tensor:
    return x - torch.floor(x)


def _line(distance: Tensor, half: Tensor | float, blur: Tensor) -> Tensor:
    """Coverage of a line of half width ``half`` seen with a blur, at a distance from its middle."""
    thin = half / (half + 0.5 * blur)
    return smoothstep(half + blur, (half - blur), distance.abs()) * thin


def _periodic(x: Tensor, period: Tensor | float) -> Tensor:
    """Signed distance to the nearest multiple of the period."""
    return x - period * torch.round(x / period)


def _pick(palette: tuple[tuple[float, float, float], ...], index: Tensor) -> Tensor:
    """Rows of a palette as ``[3, B, 1, 1]``."""
    table = torch.tensor(palette, dtype=torch.float32, device=index.device)
    return table[index].t().reshape(3, -1, 1, 1)


def _ground_type(draw: Tensor) -> Tensor:
    edges = torch.tensor([0.30, 0.50, 0.64, 0.80, 0.92], device=draw.device)
    return torch.bucketize(draw, edges)


def _ground(draws: Draws, x: Tensor, y: Tensor, footprint: Tensor) -> Tensor:
    """Albedo ``[3, B, H, W]`` of the ground at world x, y; footprint is metres per pixel."""
    angle = _b(draws["ground_angle"] * 6.2831853)
    sin, cos = torch.sin(angle), torch.cos(angle)
    p = x * cos + y * sin
    # The person walks somewhere within 3 m of the border between two grounds.
    q = y * cos - x * sin + _b(draws.between("ground_offset", -3.0, 3.0))
    p = p + _b(draws["ground_u"] * 40.0)
    blur = footprint * 0.75
    coarse = sample_noise(p / 5.3, q / 5.3)
    dense = sample_noise(p / 1.7 + 0.31, q / 1.7 + 0.17)
    detail = smoothstep(0.10, 0.02, footprint)
    everywhere = (p, q, blur, footprint, detail)

    first = _ground_type(draws["ground_a"])
    second = _ground_type(draws["ground_b"])
    one = (draws["ground_split"] < 0.45).float()
    side = smoothstep(-blur, blur, q) * (1.0 - _b(one)) + _b(one)

    def covered(kind: Tensor, of: Tensor | slice) -> Tensor:
        """Albedo of the images ``of`` if the ground is of some kind ``[N]`` everywhere."""
        p, q, blur, footprint, detail = (x[of] for x in everywhere)
        broad, fine = coarse[:, of], dense[:, of]
        is_kind = [_b((kind == k).float()) for k in range(len(_GROUNDS))]
        rough = is_kind[0] * 0.16 + is_kind[2] * 0.38 + is_kind[5] * 0.26
        rough = rough + (is_kind[1] + is_kind[3] + is_kind[4]) * 0.09
        tone = 1.0 + rough * detail * (0.6 * fine[GRAIN] + 0.5 * fine[MIXED]) + 0.10 * broad[CLOUD]
        tone = tone + is_kind[2] * 0.16 * broad[MIXED]
        colour = _pick(_GROUND_RGB, kind) * tone
        # Joints: square tiles, large slabs, bricks in running bond.
        size = is_kind[1] * 0.45 + is_kind[3] * 1.1 + is_kind[4] * 0.24
        size = size + (is_kind[0] + is_kind[2] + is_kind[5])
        length = size * (1.0 + is_kind[4])
        row = torch.floor(q / size + 0.5)
        shift = is_kind[4] * 0.5 * length * (_frac(row * 0.5) > 0.25).float()
        joint_q = _line(_periodic(q - 0.5 * size, size), 0.012 + 0.006 * is_kind[3], blur)
        joint_p = _line(_periodic(p + shift - 0.5 * length, length), 0.012, blur)
        paved = is_kind[1] + is_kind[3] + is_kind[4]
        joint = torch.maximum(joint_q, joint_p) * paved
        column = torch.floor((p + shift) / length + 0.5)
        each = sample_noise(column * 0.3711 + row * 0.1193, row * 0.2917 + column * 0.0731)
        fade = smoothstep(0.9 * size, 0.25 * size, footprint)
        colour = colour * (1.0 + paved * fade * 0.09 * each[GRAIN] - 0.42 * joint)
        # Patches of dry grass, tar joints in the road.
        dry = is_kind[2] * smoothstep(0.3, 1.4, broad[CLOUD_2])
        colour = colour * (
            1.0 + dry * torch.tensor([0.9, 0.25, 0.3], device=x.device).view(3, 1, 1, 1)
        )
        crack = is_kind[0] * _line(broad[CLOUD_2] * 0.5, 0.010, blur * 0.6 + 0.004)
        return colour * (1.0 - 0.35 * crack * detail)

    value = draws.between("ground_value", 0.75, 1.35).view(1, -1, 1, 1)
    colour = covered(first, slice(None))
    split = torch.nonzero(one == 0).flatten()
    if split.numel():
        under = covered(second[split], split)
        colour[:, split] = under + (colour[:, split] - under) * side[split]
    colour = colour * value

    # Paint on the road's side, and the kerb.
    road = _b(((first == 0) | (first == 3)).float()) * side
    marking = draws["marking"]
    lane = _b(((marking > 0.25) & (marking < 0.52)).float())
    zebra = _b(((marking >= 0.52) & (marking < 0.66)).float())
    bays = _b(((marking >= 0.66) & (marking < 0.80)).float())
    at = _b(draws.between("ground_v", -2.0, 3.0))
    dash = smoothstep(-blur, blur, _periodic(p, 4.0).abs() - 0.9)
    dash = torch.maximum(dash, _b((draws["ground_v"] < 0.5).float()))
    paint = lane * _line(q - at, 0.065, blur) * dash
    stripes = smoothstep(blur, -blur, _periodic(p, 1.0).abs() - 0.25)
    across = smoothstep(1.7 + blur, 1.7 - blur, (q - at).abs())
    paint = paint + zebra * stripes * across
    paint = paint + bays * torch.maximum(
        _line(_periodic(p, 2.6), 0.05, blur) * smoothstep(blur, -blur, (q - at).abs() - 2.4),
        _line(q - at - 2.4, 0.05, blur),
    )
    worn = (0.86 + 0.20 * dense[CLOUD] * detail).clamp(0.3, 1.0)
    paint = (paint * worn * road).clamp(0.0, 1.0)
    colour = colour + (0.62 - colour) * paint
    kerb = (1.0 - _b(one)) * _line(q + 0.07, 0.07, blur)
    colour = colour + (0.36 * (1.0 + 0.1 * dense[MIXED]) - colour) * kerb
    gutter = (1.0 - _b(one)) * _line(q - 0.03, 0.025, blur)
    colour = colour * (1.0 - 0.5 * gutter)
    # A manhole or drain now and then.
    lid = _b((marking > 0.93).float())
    du, dv = p - _b(draws["ground_u"] * 40.0 + draws.between("ground_v", -0.9, 0.9)), q - at * 0.4
    radius = torch.sqrt(du * du + dv * dv)
    ring = smoothstep(0.33 + blur, 0.33 - blur, radius)
    groove = 0.75 + 0.2 * smoothstep(-blur, blur, _periodic(du, 0.10).abs() - 0.02) * detail
    colour = colour * (1.0 - lid * ring) + lid * ring * 0.12 * groove
    return colour.clamp(0.01, 0.95)


def _box(
    x: Tensor, y: Tensor, half_x: Tensor | float, half_y: Tensor | float, blur: Tensor
) -> Tensor:
    """Coverage of a rectangle centred at the origin."""
    return smoothstep(half_x + blur, half_x - blur, x.abs()) * smoothstep(
        half_y + blur, half_y - blur, y.abs()
    )


def _rounded(
    x: Tensor,
    y: Tensor,
    half_x: Tensor | float,
    half_y: Tensor | float,
    radius: float,
    blur: Tensor,
) -> Tensor:
    """Coverage of a rectangle with round corners centred at the origin."""
    dx = (x.abs() - (half_x - radius)).clamp(min=0.0)
    dy = (y.abs() - (half_y - radius)).clamp(min=0.0)
    return smoothstep(radius + blur, radius - blur, torch.sqrt(dx * dx + dy * dy))


def _backdrop(draws: Draws, light: Light, s: Tensor, z: Tensor, blur: Tensor) -> Tensor:
    """Radiance ``[3, B, H, W]`` of the wall behind, sky included.

    ``s`` runs along the wall and ``z`` up, metres; ``blur`` is the width of an edge.
    """
    s = s + _b(draws["backdrop_u"] * 60.0)
    broad = sample_noise(s / 7.1, z / 7.1 + _b(draws["backdrop_v"]))
    fine = sample_noise(s / 2.3, z / 2.3)
    night = _b(light.night)
    kind = draws["backdrop"]
    is_facade = _b((kind < 0.42).float())
    is_shop = _b(((kind >= 0.42) & (kind < 0.62)).float())
    is_hedge = _b(((kind >= 0.62) & (kind < 0.84)).float())
    is_open = _b((kind >= 0.84).float())
    wall_index = (draws["backdrop_hue"] * len(_WALLS)).long()
    value = draws.between("backdrop_value", 0.6, 1.15).view(1, -1, 1, 1)
    wall = _pick(_WALLS, wall_index) * value * (1.0 + 0.05 * broad[CLOUD] + 0.03 * fine[MIXED])
    level = light.key * 0.42 * (0.6 + 0.4 * draws["sun_elevation"]).unsqueeze(-1) + light.sky * 0.72
    level = level.t().reshape(3, -1, 1, 1)
    # Foot of the wall is a little darker, plinth darker still.
    foot = 0.72 + 0.28 * smoothstep(0.0, 1.2, z)
    plinth = smoothstep(0.45 + blur, 0.45 - blur, z)
    colour = wall * level * foot * (1.0 - 0.30 * plinth * (is_facade + is_shop))

    # Windows: their panes are dark by day with a bright upper half, some are lit at night.
    period = _b(draws.between("backdrop_v", 2.1, 3.6))
    story = 3.3
    column = torch.floor(s / period + 0.5)
    row = torch.floor(z / story)
    ws = s - column * period
    wz = z - (row + 0.5) * story - 0.15
    half_s = is_facade * 0.55 + is_shop * (period * 0.5 - 0.16)
    half_z = is_facade * 0.78 + is_shop * 1.22
    some = is_facade + is_shop
    frame = _box(ws, wz, half_s + 0.09, half_z + 0.09, blur) * some
    pane = _box(ws, wz, half_s, half_z, blur) * some
    cell = sample_noise(column * 0.3713 + row * 0.117, row * 0.291 + column * 0.053)
    lit = smoothstep(0.3, 0.5, cell[GRAIN] + _b(draws.between("window_lit", -0.6, 0.8)))
    lit = lit * (night + 0.35 * is_shop)
    mirror = 0.10 + 0.16 * smoothstep(-0.8, 0.9, wz) + 0.05 * broad[CLOUD_2]
    sky_colour = light.sky.t().reshape(3, -1, 1, 1)
    glass = sky_colour * mirror.clamp(min=0.03)
    warm = torch.tensor([0.46, 0.33, 0.17], device=s.device).view(3, 1, 1, 1)
    inside = (0.55 + 0.25 * broad[CLOUD] + 0.2 * fine[CLOUD]).clamp(0.1, 1.2)
    glass = glass + lit * warm * inside * (0.75 - 0.25 * night)
    colour = colour + (wall * level * 1.35 - colour) * frame
    colour = colour + (glass - colour) * pane
    bar = _line(ws, 0.03, blur) * pane * is_facade
    colour = colour * (1.0 - 0.5 * bar)
    course = _line(_periodic(z, story), 0.10, blur) * some
    colour = colour * (1.0 + 0.25 * course)
    sign = _box(z - 2.95, z * 0.0, 0.28, 1.0, blur) * is_shop
    sign_colour = _pick(_CARS, (draws["car_hue"] * 5.99).long())
    colour = colour + (sign_colour * level * 0.9 - colour) * sign * 0.8

    # Hedge or trees, and an open square with a hazy skyline.
    leaf = torch.tensor([0.060, 0.125, 0.032], device=s.device).view(3, 1, 1, 1) * value
    shade = (0.95 + 0.34 * fine[MIXED] + 0.22 * fine[GRAIN] + 0.22 * broad[CLOUD]).clamp(min=0.15)
    hedge_height = (
        _b(draws.between("backdrop_v", 1.0, 5.0)) + 0.22 * fine[CLOUD] + 0.25 * broad[MIXED]
    )
    leaves = smoothstep(hedge_height + blur + 0.08, hedge_height - blur - 0.08, z)
    bright = 0.65 + 0.5 * smoothstep(0.0, 1.0, z / hedge_height.clamp(min=0.5))
    hedge = leaf * level * shade * bright * 1.3
    haze = sky_colour * 0.75
    roofs = sample_noise(torch.floor(s / 2.7) * 0.0917, s * 0.0 + _b(draws["backdrop_v"]))
    skyline = (3.6 + 1.5 * roofs[MIXED]).clamp(min=1.2)
    distant = smoothstep(skyline + blur, skyline - blur, z)
    far = wall * level * 0.55 + haze * 0.35
    open_colour = far * distant + sky_colour * (1.0 - distant)
    behind = sky_colour * (0.85 + 0.05 * broad[CLOUD]) * (1.0 - distant) + far * distant
    hedge = hedge * leaves + behind * (1.0 - leaves)
    colour = colour * some + hedge * is_hedge + open_colour * is_open

    # A parked car, a trunk or post.
    car = _b((draws["car"] < 0.34).float())
    cs = s - _b(draws["backdrop_u"] * 60.0 + draws.between("car_x", -2.4, 2.4))
    body = _rounded(cs, z - 0.62, 2.1, 0.34, 0.22, blur)
    cabin = _rounded(cs + 0.1, z - 1.12, 1.32 - 0.55 * (z - 1.0).clamp(0.0, 0.6), 0.34, 0.15, blur)
    glass_car = _rounded(
        cs + 0.1, z - 1.15, 1.12 - 0.55 * (z - 1.0).clamp(0.0, 0.6), 0.2, 0.08, blur
    )
    paint = _pick(_CARS, (draws["car_hue"] * len(_CARS)).long())
    sheen = 0.7 + 0.5 * smoothstep(0.3, 0.95, z)
    body_all = torch.maximum(body, cabin) * car
    colour = colour + (paint * level * sheen * 1.2 - colour) * body_all
    colour = colour + (sky_colour * 0.14 - colour) * glass_car * car
    for wheel_x in (-1.3, 1.32):
        radius = torch.sqrt((cs - wheel_x) ** 2 + (z - 0.33) ** 2)
        tyre = smoothstep(0.34 + blur, 0.34 - blur, radius) * car
        rim = smoothstep(0.19 + blur, 0.19 - blur, radius) * car
        colour = colour * (1.0 - tyre) + tyre * 0.012 + rim * level * 0.22
    under = _box(cs, z - 0.14, 1.9, 0.16, blur + 0.05) * car
    colour = colour * (1.0 - 0.75 * under)
    post = _b((draws["post"] < 0.30).float())
    width = torch.where(draws["tree"] < 0.5, 0.05 + 0.0 * draws["tree"], 0.16 + 0.0 * draws["tree"])
    ps = cs + _b(draws.between("post_x", -3.0, 3.0))
    stem = _line(ps, _b(width), blur) * post
    bark = torch.tensor([0.11, 0.085, 0.06], device=s.device).view(3, 1, 1, 1)
    steel = torch.tensor([0.16, 0.17, 0.18], device=s.device).view(3, 1, 1, 1)
    tree = _b((draws["tree"] >= 0.5).float())
    stem_colour = (
        (bark * tree + steel * (1.0 - tree)) * level * (1.0 - 0.5 * (ps / _b(width)).clamp(-1, 1))
    )
    colour = colour + (stem_colour - colour) * stem
    return colour.clamp(0.0, 1.5)


def render_background(
    draws: Draws,
    view: Viewpoint,
    light: Light,
    blockers: Blockers,
    feet: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """Radiance ``[B, 3, H, W]`` of everything but the person, with the person's shadow.

    Args:
        draws: random numbers of the images.
        view: cameras.
        light: lighting.
        blockers: capsules of the person.
        feet: ``[B, 2, 3]`` world positions of the ankles.
        size: (height, width).
    """
    # Large images draw what is behind at two thirds of their size: lenses blur it anyway.
    raster = size if size[0] <= 160 else (round(size[0] / 1.5), round(size[1] / 1.5))
    rays = view.rays(size, raster)
    dx, dy, dz = rays.unbind(-1)
    px, py, pz = (_b(view.position[:, i]) for i in range(3))
    falling = (-dz).clamp(min=1e-4)
    t_ground = (pz / falling).clamp(max=400.0)
    gx, gy = px + t_ground * dx, py + t_ground * dy
    # Metres per pixel: across the ray, and stretched along the ground; a mean of both.
    pixel = size[0] / raster[0] / _b(torch.minimum(view.scale_x, view.scale_y))
    slant = torch.sqrt((1.0 / falling).clamp(max=16.0))
    footprint = t_ground * pixel * slant
    albedo = _ground(draws, gx, gy, footprint)

    passed = ground_shadow(blockers, gx, gy)
    contact = torch.zeros_like(gx)
    for i in range(2):
        fx, fy, fz = (_b(feet[:, i, j]) for j in range(3))
        squared = (gx - fx) ** 2 + (gy - fy) ** 2
        near = torch.exp(-squared / 0.022) * smoothstep(0.30, 0.06, fz)
        contact = torch.maximum(contact, near)
    contact = torch.maximum(contact, 0.35 * torch.exp(-(gx * gx + gy * gy) / 0.10))

    def rgb(x: Tensor) -> Tensor:
        return x.t().reshape(3, -1, 1, 1)

    # At night the lamp makes a pool of light.
    radius2 = (gx - _b(draws.between("cloud", -3.0, 3.0))) ** 2 + (gy - 1.0) ** 2
    pool = 1.0 - _b(light.night) * 0.65 * smoothstep(4.0, 260.0, radius2)
    # By day soft shadows of trees fall on some scenes.
    dapple = sample_noise(gx / 9.0 + _b(draws["ground_u"]), gy / 9.0 + _b(draws["ground_v"]))
    leafy = _b((draws["cloud"] > 0.62).float() * (1.0 - light.night))
    shade = leafy * smoothstep(0.35, 0.75, dapple[CLOUD] + 0.25 * dapple[MIXED])
    shade = shade * smoothstep(0.5, 2.5, torch.sqrt(gx * gx + gy * gy))
    direct = passed * (1.0 - 0.75 * shade) * pool * _b(light.direction[:, 2])
    radiance = albedo * (
        rgb(light.key) * direct + rgb(light.sky) * (1.0 - 0.62 * contact) * (0.4 + 0.6 * pool)
    )

    standing = torch.nonzero(view.elevation < 0.35).flatten()
    if standing.numel():
        seen = [v[standing] for v in (dx, dy, dz, gx, gy, t_ground)]
        radiance[:, standing] = _with_backdrop(
            draws.take(standing),
            light.take(standing),
            radiance[:, standing],
            view.position[standing],
            view.distance[standing],
            pixel[standing],
            seen,
        )
    radiance = radiance.movedim(0, 1)
    if raster == size:
        return radiance
    return F.interpolate(radiance.contiguous(), size=size, mode="bilinear", align_corners=False)


def _with_backdrop(
    draws: Draws,
    light: Light,
    radiance: Tensor,
    position: Tensor,
    distance: Tensor,
    pixel: Tensor,
    seen: list[Tensor],
) -> Tensor:
    """Put the wall behind the ground ``[3, B, H, W]`` that ground cameras see.

    ``seen`` holds the rays' x, y, z, the ground points' x, y and the rays' lengths to them.
    """
    dx, dy, dz, gx, gy, t_ground = seen
    px, py, pz = (_b(position[:, i]) for i in range(3))
    sky = light.sky.t().reshape(3, -1, 1, 1)
    # The wall stands behind the person, turned a little.
    yaw = draws.between("backdrop_yaw", -0.5, 0.5)
    nx, ny = _b(torch.sin(yaw)), _b(torch.cos(yaw))
    away = _b(draws.between("backdrop_distance", 2.5, 14.0))
    facing = dx * nx + dy * ny
    t_wall = ((away - px * nx - py * ny) / facing.clamp(min=1e-3)).clamp(0.0, 400.0)
    hit = (t_wall < t_ground) & (facing > 1e-3)
    wx, wy, wz = px + t_wall * dx, py + t_wall * dy, pz + t_wall * dz
    s = wx * ny - wy * nx
    # Out of focus: edges on the wall are as wide as a few pixels and a few centimetres.
    blur = t_wall * pixel * 1.2 + 0.012 * _b(draws["defocus"]) * away + 0.012
    wall = _backdrop(draws, light, s, wz, blur)
    # Where the ground meets the wall it gets darker; far away the air is hazy.
    base = smoothstep(1.2, 0.0, (away - gx * nx - gy * ny).abs())
    radiance = radiance * (1.0 - 0.3 * base)
    far = smoothstep(15.0, 120.0, t_ground - _b(distance))
    radiance = radiance + (sky * 0.6 - radiance) * far * 0.7
    return torch.where(hit, wall, radiance)
