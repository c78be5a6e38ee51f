"""The body as tubes: rings of vertices lofted along the bones, one fixed topology for everyone.

Closed-form primitives look like a mannequin at the joints; lofted tubes bend, taper and carry
coordinates for the clothes' patterns, and cost less, since a triangle touches few pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import cross, dot, normalise, smoothstep, vector
from gsalign.data.synthetic.identity import People
from gsalign.data.synthetic.pose import Pose

# Body parts, as in the label maps: 0 is background, the last one what hides the person.
PARTS = ("background", "head", "torso", "arms", "legs", "feet", "bag", "occluder")


@dataclass(frozen=True)
class Slot:
    """One tube: its name, rings, sides, part (index into PARTS), and how square its rings are."""

    name: str
    rings: int
    sides: int
    part: int
    square: float = 2.0
    two_sided: bool = False


SLOTS = (
    Slot("torso", 16, 20, 2, square=2.5),
    Slot("arm_left", 14, 10, 3),
    Slot("arm_right", 14, 10, 3),
    Slot("hand_left", 6, 8, 3),
    Slot("hand_right", 6, 8, 3),
    Slot("leg_left", 16, 12, 4),
    Slot("leg_right", 16, 12, 4),
    Slot("foot_left", 8, 10, 5, square=2.7),
    Slot("foot_right", 8, 10, 5, square=2.7),
    Slot("neck", 5, 10, 1),
    Slot("head", 12, 18, 1),
    Slot("hair", 12, 18, 1),
    Slot("drape", 8, 10, 1),
    Slot("hat", 10, 16, 1),
    Slot("brim", 4, 14, 1),
    Slot("skirt", 8, 28, 4, square=2.6, two_sided=True),
    Slot("coat", 8, 24, 2, square=2.5, two_sided=True),
    Slot("hood", 6, 10, 2),
    Slot("bag", 8, 16, 6, square=4.0),
    Slot("handle", 3, 6, 6),
)
SLOT = {slot.name: index for index, slot in enumerate(SLOTS)}

# Torso profile: height of a ring, half width and half depth, all over the person's height.
_TORSO = (
    (0.455, 0.020, 0.020),
    (0.475, 0.074, 0.058),
    (0.500, 0.091, 0.067),
    (0.530, 0.094, 0.068),
    (0.565, 0.087, 0.062),
    (0.605, 0.077, 0.056),
    (0.650, 0.081, 0.059),
    (0.700, 0.090, 0.064),
    (0.740, 0.098, 0.066),
    (0.770, 0.103, 0.064),
    (0.795, 0.104, 0.058),
    (0.812, 0.099, 0.052),
    (0.824, 0.085, 0.046),
    (0.834, 0.064, 0.041),
    (0.845, 0.045, 0.037),
    (0.858, 0.030, 0.031),
)
_ARM_S = (-0.115, -0.09, -0.035, 0.05, 0.22, 0.45, 0.7, 0.9, 1.05, 1.2, 1.45, 1.7, 1.9, 2.02)
_ARM_R = (
    0.004, 0.019, 0.028, 0.031, 0.031, 0.029, 0.026, 0.0245, 0.0245, 0.0245, 0.023, 0.020, 0.0175,
    0.0165,
)  # fmt: skip
_LEG_S = (
    -0.18, -0.08, 0.05, 0.2, 0.4, 0.6, 0.78, 0.90, 1.02, 1.14, 1.3, 1.5, 1.7, 1.86, 1.97, 2.06,
)  # fmt: skip
_LEG_R = (
    0.030, 0.050, 0.053, 0.052, 0.048, 0.043, 0.038, 0.035, 0.0345, 0.035, 0.037, 0.035, 0.029,
    0.024, 0.022, 0.021,
)  # fmt: skip
# Foot: along the sole, half width, height.
_FOOT = (
    (-0.050, 0.004, 0.020),
    (-0.044, 0.019, 0.046),
    (-0.022, 0.024, 0.056),
    (0.012, 0.024, 0.054),
    (0.045, 0.027, 0.038),
    (0.072, 0.028, 0.029),
    (0.094, 0.020, 0.022),
    (0.103, 0.005, 0.012),
)
# Hand: along the fingers, half width, half thickness.
_HAND = (
    (-0.006, 0.015, 0.013),
    (0.015, 0.019, 0.013),
    (0.040, 0.024, 0.013),
    (0.066, 0.022, 0.011),
    (0.088, 0.015, 0.009),
    (0.099, 0.004, 0.003),
)
# Head: height in half heads, half width factor, half depth factor, shift to the front.
_HEAD = (
    (-1.00, 0.16, 0.16, 0.42),
    (-0.90, 0.46, 0.48, 0.36),
    (-0.70, 0.66, 0.70, 0.22),
    (-0.45, 0.80, 0.86, 0.08),
    (-0.20, 0.90, 0.95, 0.02),
    (0.05, 0.97, 0.99, 0.00),
    (0.30, 1.00, 1.00, -0.02),
    (0.52, 0.96, 0.96, -0.03),
    (0.72, 0.82, 0.82, -0.03),
    (0.87, 0.60, 0.60, -0.03),
    (0.97, 0.30, 0.30, -0.03),
    (1.00, 0.03, 0.03, -0.03),
)


@lru_cache(maxsize=2)
def topology(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mesh all people share.

    Returns:
        faces ``[F, 3]`` int64, counter-clockwise from outside; slot of each face ``[F]``; part of
        each face ``[F]``; two-sided faces ``[F]`` bool.
    """
    faces, slots, parts, two_sided = [], [], [], []
    base = 0
    for index, slot in enumerate(SLOTS):
        columns = slot.sides + 1
        for r in range(slot.rings - 1):
            for s in range(slot.sides):
                a = base + r * columns + s
                faces += [(a, a + 1, a + columns), (a + 1, a + columns + 1, a + columns)]
        count = 2 * (slot.rings - 1) * slot.sides
        slots += [index] * count
        parts += [slot.part] * count
        two_sided += [slot.two_sided] * count
        base += slot.rings * columns
    return (
        torch.tensor(faces, device=device),
        torch.tensor(slots, device=device),
        torch.tensor(parts, device=device),
        torch.tensor(two_sided, device=device),
    )


@lru_cache(maxsize=2)
def vertex_slots(device: str) -> Tensor:
    """Slot of every vertex ``[V]``."""
    counts = [slot.rings * (slot.sides + 1) for slot in SLOTS]
    return torch.repeat_interleave(torch.tensor(counts, device=device))


@dataclass(frozen=True)
class Mesh:
    """A batch of bodies.

    Attributes:
        position: ``[B, V, 3]`` metres, body frame.
        normal: ``[B, V, 3]`` unit, outward.
        surface: ``[B, V, 4]``: u, turns from the front of the tube, -0.5 to 0.5; v, along the
            tube (its meaning is the slot's: rest height over body height for torso and skirts,
            bones for limbs, half heads for the head); w, the slot's own; ambient light, 0 to 1.
        enabled: ``[B, S]`` bool, which slots a person has.
    """

    position: Tensor
    normal: Tensor
    surface: Tensor
    enabled: Tensor


def _column(values: tuple[float, ...] | list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


@lru_cache(maxsize=64)
def _directions(sides: int, square: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Superellipse directions of a ring: along the front, along the side, and u ``[sides + 1]``."""
    u = [i / sides - 0.5 for i in range(sides + 1)]
    power = 2.0 / square

    def bent(x: float) -> float:
        return math.copysign(abs(x) ** power, x)

    front = [bent(math.cos(2 * math.pi * t)) for t in u]
    side = [bent(math.sin(2 * math.pi * t)) for t in u]
    make = lambda values: torch.tensor(values, dtype=torch.float32, device=device)  # noqa: E731
    return make(front), make(side), make(u)


class _Builder:
    """Collects the tubes slot by slot, in the order of SLOTS."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def loft(
        self,
        name: str,
        centre: Tensor,
        front: Tensor,
        tangent: Tensor,
        r_front: Tensor,
        r_side: Tensor,
        v: Tensor,
        *,
        radial: Tensor | None = None,
        w: Tensor | None = None,
        ambient: Tensor | None = None,
    ) -> None:
        """Add one tube.

        Args:
            name: slot.
            centre: ``[B, R, 3]``.
            front: ``[B, R or 1, 3]``, where u = 0 points; need not be orthogonal to the tangent.
            tangent: ``[B, R or 1, 3]``, direction of increasing ring.
            r_front: ``[B or 1, R]`` radius along the front.
            r_side: ``[B or 1, R]`` radius along the side.
            v: ``[B or 1, R]``.
            radial: ``[B or 1, R, S + 1]`` factor on the radius.
            w: ``[B or 1, R, S + 1]``.
            ambient: ``[B or 1, R, S + 1]``.
        """
        slot = SLOTS[SLOT[name]]
        cos, sin, u = _directions(slot.sides, slot.square, str(self.device))
        tangent = normalise(tangent)
        side = normalise(cross(tangent, front))
        front = cross(side, tangent)
        # At u the ring points to front * cos + side * sin.
        along = r_front.unsqueeze(-1) * cos
        across = r_side.unsqueeze(-1) * sin
        if radial is not None:
            along, across = along * radial, across * radial
        position = (
            centre.unsqueeze(2)
            + front.unsqueeze(2) * along.unsqueeze(-1)
            + side.unsqueeze(2) * across.unsqueeze(-1)
        )
        # Normals from neighbouring vertices; the seam's two columns share theirs.
        ring = position[:, :, :-1]
        around = torch.roll(ring, -1, 2) - torch.roll(ring, 1, 2)
        length = torch.cat(
            (
                ring[:, 1:2] - ring[:, :1],
                ring[:, 2:] - ring[:, :-2],
                ring[:, -1:] - ring[:, -2:-1],
            ),
            dim=1,
        )
        normal = normalise(cross(around, length), eps=1e-12)
        normal = torch.cat((normal, normal[:, :, :1]), dim=2)
        shape = position.shape[:3]
        zeros = torch.zeros(shape, device=self.device)
        surface = torch.stack(
            (
                u.expand(shape),
                v.unsqueeze(-1).expand(shape),
                zeros if w is None else w.expand(shape),
                zeros + 1.0 if ambient is None else ambient.expand(shape),
            ),
            dim=-1,
        )
        self.parts[name] = (
            position.reshape(self.batch, -1, 3),
            normal.reshape(self.batch, -1, 3),
            surface.reshape(self.batch, -1, 4),
        )

    def mesh(self, enabled: dict[str, Tensor]) -> Mesh:
        ordered = [self.parts[slot.name] for slot in SLOTS]
        always = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        return Mesh(
            position=torch.cat([p[0] for p in ordered], dim=1),
            normal=torch.cat([p[1] for p in ordered], dim=1),
            surface=torch.cat([p[2] for p in ordered], dim=1),
            enabled=torch.stack([enabled.get(s.name, always) for s in SLOTS], dim=1),
        )


def _limb(points: tuple[Tensor, Tensor, Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    """Points and tangents at ``s`` (``[R]`` or ``[B, R]``; 1 is the joint) of a two-bone limb.

    The joint is rounded: within 0.22 bones of it the line is a parabola.
    """
    start, joint, end = (p.unsqueeze(1) for p in points)
    s = s.unsqueeze(-1) if s.dim() == 2 else s.view(1, -1, 1)
    first, second = joint - start, end - joint
    reach = 0.22
    x = ((s - (1.0 - reach)) / (2.0 * reach)).clamp(0.0, 1.0)
    below = torch.minimum(s, torch.full_like(s, 1.0 - reach))
    above = (s - (1.0 + reach)).clamp(min=0.0)
    # Integrating a tangent that turns linearly from the first bone to the second.
    centre = (
        start
        + first * (below + 2.0 * reach * (x - 0.5 * x * x))
        + second * (2.0 * reach * 0.5 * x * x + above)
    )
    return centre, first * (1.0 - x) + second * x


def build_body(people: People, pose: Pose, draws: Draws) -> Mesh:
    """Put flesh and clothes on a batch of poses.

    Returns:
        The mesh in the body frame (x right, y forward, z up, metres).
    """
    height = pose.height.unsqueeze(1)  # [B, 1]
    batch, device = height.shape[0], height.device
    builder = _Builder(batch, device)
    like = height

    def tall(x: Tensor) -> Tensor:
        """Body heights to metres."""
        return x * height

    build = people.build.unsqueeze(1)
    figure = people.figure.unsqueeze(1)
    loose = people.looseness.unsqueeze(1)
    masks = {
        name: people.is_("upper", name).unsqueeze(1)
        for name in ("tshirt", "longsleeve", "jacket", "hoodie", "coat", "tank")
    }
    thick = masks["jacket"] + masks["hoodie"] + masks["coat"]
    lower = {
        name: people.is_("lower", name).unsqueeze(1)
        for name in ("trousers", "slim", "wide", "shorts", "skirt", "long_skirt")
    }
    skirted = lower["skirt"] + lower["long_skirt"]
    up = vector(torch.zeros_like(pose.height), 0.0, 1.0).unsqueeze(1)  # [B, 1, 3]
    spine = pose.spine.unsqueeze(1)
    chest_front = pose.chest_front.unsqueeze(1)
    pelvis_front = pose.pelvis_front.unsqueeze(1)

    # Torso.
    rest = _column([row[0] for row in _TORSO], like).unsqueeze(0)
    half_width = _column([row[1] for row in _TORSO], like).unsqueeze(0)
    half_depth = _column([row[2] for row in _TORSO], like).unsqueeze(0)

    def hump(centre: float, width: float) -> Tensor:
        x = (rest - centre) / width
        return torch.exp(-x * x)

    shoulders, hips = hump(0.79, 0.05), hump(0.515, 0.05)
    belly, bust = hump(0.61, 0.06), hump(0.725, 0.03)
    half_width = half_width * (
        (1.0 + 0.13 * build)
        * (1.0 + (0.05 - 0.12 * figure) * shoulders)
        * (1.0 + 0.11 * (figure - 0.3) * hips - 0.09 * (figure - 0.3) * belly)
        + 0.10 * build.clamp(min=0.0) * belly
    )
    paunch = build.clamp(min=0.0) * belly * 0.030
    breast = (figure - 0.45).clamp(min=0.0) * bust * 0.020
    seat = (0.006 + 0.006 * figure) * hips
    half_depth = half_depth * (1.0 + 0.12 * build) + paunch + breast + seat
    shift = paunch + breast - seat
    above_hip = smoothstep(0.47, 0.51, rest) * smoothstep(0.85, 0.80, rest)
    cloth = above_hip * (0.003 + 0.004 * loose + 0.009 * thick)
    turn = smoothstep(0.55, 0.77, rest).unsqueeze(-1)
    torso_front = pelvis_front * (1.0 - turn) + chest_front * turn
    centre = pose.pelvis.unsqueeze(1) + spine * tall(rest - 0.53).unsqueeze(-1)
    centre = centre + torso_front * tall(shift).unsqueeze(-1)
    cos, sin, _ = _directions(SLOTS[SLOT["torso"]].sides, 2.5, str(device))
    flank = (sin.abs() - 0.72).clamp(min=0.0) * 3.4
    between = (hump(0.66, 0.10) + 0.6 * hump(0.49, 0.02)).clamp(max=1.0)
    builder.loft(
        "torso",
        centre,
        torso_front,
        spine,
        tall(half_depth + cloth),
        tall(half_width + cloth),
        rest,
        ambient=1.0 - 0.30 * between.unsqueeze(-1) * flank,
    )

    # Arms and hands.
    arm_s = _column(_ARM_S, like)
    bare = _column(_ARM_R, like).unsqueeze(0) * (1.0 + 0.16 * build) * (1.06 - 0.14 * figure)
    short = smoothstep(0.66, 0.56, arm_s)
    long = smoothstep(2.0, 1.93, arm_s)
    sleeve = (
        masks["tshirt"] * short * (0.003 + 0.007 * (arm_s.clamp(0.0, 0.6)))
        + masks["longsleeve"] * long * 0.0035
        + thick * long * 0.009
    )
    arm_radius = tall(bare + sleeve)
    for index, name in enumerate(("left", "right")):
        sign = 1.0 if index else -1.0
        points = (pose.shoulder[index], pose.elbow[index], pose.wrist[index])
        centre, tangent = _limb(points, arm_s)
        cos, sin, _ = _directions(10, 2.0, str(device))
        # Limbs run downwards, so side = tangent x front points to the person's right.
        inward = (-sign * sin).clamp(min=0.0)
        builder.loft(
            f"arm_{name}",
            centre,
            chest_front,
            tangent,
            arm_radius,
            arm_radius * 0.95,
            arm_s.unsqueeze(0),
            ambient=(1.0 - 0.32 * inward * smoothstep(1.9, 0.3, arm_s).unsqueeze(-1)).unsqueeze(0),
        )
        along = _column([row[0] for row in _HAND], like)
        wide = _column([row[1] for row in _HAND], like).unsqueeze(0) * (1.05 - 0.12 * figure)
        thin = _column([row[2] for row in _HAND], like).unsqueeze(0)
        reach = normalise(pose.wrist[index] - pose.elbow[index]).unsqueeze(1)
        curl = chest_front * (along * along * 2.5).view(1, -1, 1)
        centre = pose.wrist[index].unsqueeze(1) + (reach * along.view(1, -1, 1) + curl) * (
            height.unsqueeze(-1)
        )
        builder.loft(
            f"hand_{name}",
            centre,
            chest_front,
            reach,
            tall(wide),
            tall(thin),
            along.unsqueeze(0),
        )

    # Legs and feet.
    leg_s = _column(_LEG_S, like)
    bare = _column(_LEG_R, like).unsqueeze(0) * (1.0 + 0.15 * build) * (0.98 + 0.05 * figure)
    covered = smoothstep(2.06, 1.97, leg_s)
    wide_leg = torch.maximum(bare + 0.008, 0.040 + 0.008 * leg_s.clamp(min=0.0) / 2.0)
    straight = torch.maximum(bare + 0.006 + 0.006 * loose, torch.full_like(bare, 0.029))
    trouser = (
        lower["trousers"] * (straight - bare)
        + lower["slim"] * 0.0025
        + lower["wide"] * (wide_leg - bare)
    ) * covered
    shorts = lower["shorts"] * smoothstep(0.94, 0.84, leg_s) * (0.008 + 0.012 * leg_s.clamp(0, 1))
    leg_radius = tall(bare + trouser + shorts)
    for index, name in enumerate(("left", "right")):
        sign = 1.0 if index else -1.0
        points = (pose.hip[index], pose.knee[index], pose.ankle[index])
        centre, tangent = _limb(points, leg_s)
        _, sin, _ = _directions(12, 2.0, str(device))
        inward = (-sign * sin).clamp(min=0.0)
        builder.loft(
            f"leg_{name}",
            centre,
            pelvis_front,
            tangent,
            leg_radius,
            leg_radius * 0.93,
            leg_s.unsqueeze(0),
            ambient=(1.0 - 0.38 * inward * smoothstep(1.5, 0.1, leg_s).unsqueeze(-1)).unsqueeze(0),
        )
        along = _column([row[0] for row in _FOOT], like)
        half = _column([row[1] for row in _FOOT], like).unsqueeze(0)
        rise = _column([row[2] for row in _FOOT], like).unsqueeze(0) / 2.0
        foot_front = pose.foot_front[index].unsqueeze(1)
        foot_up = normalise(up - foot_front * dot(up, foot_front).unsqueeze(-1))
        grown = 1.07 + 0.05 * people.is_("shoe", "sneakers", "boots").unsqueeze(1)
        centre = (
            pose.ankle[index].unsqueeze(1) + tall(along.unsqueeze(0)).unsqueeze(-1) * foot_front
        )
        centre = centre + tall(rise * grown - 0.040).unsqueeze(-1) * foot_up
        cos, _, _ = _directions(10, 2.7, str(device))
        level = rise.unsqueeze(-1) * (1.0 + cos)  # height above the sole
        builder.loft(
            f"foot_{name}",
            centre,
            foot_up,
            foot_front,
            tall(rise * grown),
            tall(half * grown),
            along.unsqueeze(0),
            w=level,
            ambient=0.7 + 0.3 * smoothstep(0.0, 0.03, level),
        )

    _build_head(builder, people, pose, draws)

    # Skirt and coat tails hang from the waist and follow the legs.
    wind = (draws["wind"] * 6.2832).view(-1, 1, 1)
    hem = {
        "skirt": lower["skirt"] * (0.345 + 0.06 * loose)
        + lower["long_skirt"] * (0.10 + 0.08 * loose),
        "coat": 0.27 + 0.10 * loose + 0.25 * (1.0 - masks["coat"]),
    }
    flare = {
        "skirt": 0.035 + 0.035 * loose - 0.01 * lower["long_skirt"],
        "coat": 0.018 + 0.01 * loose,
    }
    for name, folds in (("skirt", 7.0), ("coat", 4.0)):
        slot = SLOTS[SLOT[name]]
        t = torch.linspace(0.0, 1.0, slot.rings, device=device).unsqueeze(0)
        waist = 0.605 if name == "skirt" else 0.60
        rest_skirt = waist - t * (waist - hem[name].clamp(max=0.56))  # [B, R]
        s = ((0.53 - rest_skirt) / 0.245).clamp(0.0, 2.0)
        left, _ = _limb((pose.hip[0], pose.knee[0], pose.ankle[0]), s)
        right, _ = _limb((pose.hip[1], pose.knee[1], pose.ankle[1]), s)
        middle = (left + right) * 0.5
        side = cross(pelvis_front, up)
        spread = (right - left) * 0.5
        forth = dot(spread, pelvis_front).abs()
        apart = dot(spread, side).abs()
        follow = smoothstep(0.58, 0.50, rest_skirt)
        base = pose.pelvis.unsqueeze(1) + spine * tall(rest_skirt - 0.53).unsqueeze(-1)
        sway = dot(middle - base, pelvis_front) * follow
        centre = base + pelvis_front * sway.unsqueeze(-1)
        extra = 0.004 + (0.010 if name == "coat" else 0.0)
        hip_curve = smoothstep(0.605, 0.53, rest_skirt)
        body_side = (0.079 + 0.019 * hip_curve) * (1.0 + 0.13 * build) * (
            1.0 + 0.10 * (figure - 0.3) * hip_curve
        ) + 0.008 * build.clamp(min=0.0)
        body_front = (0.057 + 0.021 * hip_curve) * (1.0 + 0.12 * build) + 0.02 * build.clamp(
            min=0.0
        )
        cover = torch.full_like(rest_skirt, 0.055) * (1.0 + 0.12 * build) - 0.018 * s / 2.0
        r_side = tall(torch.maximum(body_side, cover + flare[name] * t) + extra)
        r_side = torch.maximum(r_side, apart * follow + tall(cover + extra + flare[name] * t))
        r_front = tall(torch.maximum(body_front, cover + flare[name] * t) + extra)
        r_front = torch.maximum(
            r_front, 1.06 * forth * follow + tall(cover + extra + 0.5 * flare[name] * t)
        )
        _, _, u = _directions(slot.sides, slot.square, str(device))
        angle = u.view(1, 1, -1) * 6.2832 * folds + wind
        wave = torch.sin(angle)
        depth = (0.075 if name == "skirt" else 0.045) * smoothstep(0.15, 1.0, t).unsqueeze(-1)
        builder.loft(
            name,
            centre,
            pelvis_front,
            -spine,
            r_front,
            r_side,
            rest_skirt,
            radial=1.0 + depth * (wave + 0.5),
            w=t.unsqueeze(-1).expand(batch, -1, slot.sides + 1),
            ambient=1.0 - 2.4 * depth * (0.5 - 0.5 * wave),
        )

    # Hood lying on the back.
    t = torch.linspace(0.0, 1.0, 6, device=device).unsqueeze(0)
    round_ = torch.sqrt((1.0 - (2.0 * t - 1.0) ** 2).clamp(min=0.002))
    centre = (
        pose.neck.unsqueeze(1)
        - chest_front * tall(0.038 + 0.0 * t).unsqueeze(-1)
        + up * tall(-0.045 + 0.07 * t).unsqueeze(-1)
        - chest_front * tall(0.02 * t).unsqueeze(-1)
    )
    builder.loft("hood", centre, chest_front, up, tall(0.036 * round_), tall(0.062 * round_), t)

    _build_bag(builder, people, pose)

    style = people.hair_style
    headwear = people.headwear
    return builder.mesh(
        {
            "hair": (style != 0),
            "drape": (style >= 5) & ~((style == 7) & (headwear != 0)),
            "hat": headwear > 0,
            "brim": headwear == 1,
            "skirt": (skirted[:, 0] > 0),
            "coat": masks["coat"][:, 0] > 0,
            "hood": masks["hoodie"][:, 0] > 0,
            "bag": people.bag > 0,
            "handle": people.is_("bag", "handbag") > 0,
        }
    )


def _build_head(builder: _Builder, people: People, pose: Pose, draws: Draws) -> None:
    """Neck, head, hair, headwear."""
    height = pose.height.unsqueeze(1)
    like = height
    device = str(height.device)
    build = people.build.unsqueeze(1)
    figure = people.figure.unsqueeze(1)
    front = pose.head_front.unsqueeze(1)
    up = pose.head_up.unsqueeze(1)
    head = pose.head.unsqueeze(1)

    t = torch.linspace(0.0, 1.0, 5, device=height.device).view(1, -1)
    collar = people.is_("upper", "jacket", "coat", "hoodie").unsqueeze(1)
    foot = pose.neck.unsqueeze(1) - pose.spine.unsqueeze(1) * (0.02 * height).unsqueeze(-1)
    top = head - up * (0.035 * height).unsqueeze(-1) - front * (0.012 * height).unsqueeze(-1)
    centre = foot + (top - foot) * t.unsqueeze(-1)
    radius = (0.0315 - 0.004 * figure) * (1.0 + 0.15 * build) * (1.0 + 0.35 * (1.0 - t) ** 3)
    radius = (radius + collar * 0.010 * smoothstep(0.62, 0.5, t)) * height
    builder.loft(
        "neck",
        centre,
        pose.chest_front.unsqueeze(1),
        top - foot,
        radius,
        radius,
        t,
        ambient=(1.0 - 0.35 * smoothstep(0.3, 1.0, t)).unsqueeze(-1).expand(1, 5, 11),
    )

    tau = _column([row[0] for row in _HEAD], like).unsqueeze(0)
    wide = _column([row[1] for row in _HEAD], like).unsqueeze(0)
    deep = _column([row[2] for row in _HEAD], like).unsqueeze(0)
    ahead = _column([row[3] for row in _HEAD], like).unsqueeze(0)
    half_height, half_width, half_depth = 0.066, 0.0455 + 0.002 * build, 0.0555

    def shell(level: Tensor, scale: Tensor | float) -> Tensor:
        centre = head + up * (level * half_height * scale * height).unsqueeze(-1)
        return centre + front * (ahead * half_depth * height).unsqueeze(-1)

    _, _, u = _directions(18, 2.0, device)
    facing = torch.cos(u * 6.2832).view(1, 1, -1)
    level = tau.unsqueeze(-1)
    nose = torch.exp(-(((level + 0.18) / 0.17) ** 2)) * smoothstep(0.92, 1.0, facing) * 0.17
    brow = torch.exp(-(((level - 0.16) / 0.10) ** 2)) * smoothstep(0.6, 0.9, facing) * 0.035
    eyes = torch.exp(-(((level - 0.0) / 0.09) ** 2)) * smoothstep(0.75, 0.9, facing) * 0.045
    ears = torch.exp(-(((level + 0.08) / 0.20) ** 2) - ((facing + 0.02) / 0.16) ** 2) * 0.14
    builder.loft(
        "head",
        shell(tau, 1.0),
        front,
        up,
        deep * half_depth * height,
        wide * half_width * height,
        tau,
        radial=1.0 + nose + brow - eyes + ears,
        ambient=1.0 - 0.35 * smoothstep(-0.75, -1.0, level) * torch.ones_like(facing),
    )

    # Hair: a second skull, drawn in where the face shows and below the hairline.
    style = people.hair_style.view(-1, 1, 1)
    thickness = _column([1.0, 1.035, 1.085, 1.26, 1.13, 1.10, 1.05, 1.06], like)[style]
    # Under a cap or beanie hair lies flat.
    worn = (people.headwear > 0).view(-1, 1, 1)
    thickness = torch.where(worn, thickness.clamp(max=1.05), thickness)
    nape = _column([0.0, -0.25, -0.38, -0.45, -0.92, -0.95, -0.42, -0.42], like)[style]
    line = _column([0.0, 0.52, 0.50, 0.45, 0.42, 0.46, 0.52, 0.54], like)[style]
    open_ = _column([0.0, 0.10, 0.12, 0.30, 0.42, 0.42, 0.05, 0.05], like)[style]
    is_face = smoothstep(open_ - 0.18, open_ + 0.18, facing) * smoothstep(
        line + 0.14, line - 0.1, level
    )
    below = smoothstep(nape + 0.04, nape - 0.18, level)
    sideburn = smoothstep(-0.5, 0.1, facing) * smoothstep(0.05, -0.35, level)
    sideburn = sideburn * ((style <= 2) | (style >= 6)).float()
    under_hat = worn.float() * smoothstep(0.10, 0.25, level)
    hidden = torch.maximum(torch.maximum(is_face, below), torch.maximum(sideburn, under_hat))
    clumps = torch.sin(
        u.view(1, 1, -1) * 6.2832 * 5.0 + level * 9.0 + people.hair_colour.view(-1, 1, 1)
    )
    curly = (style == 3).float() * 0.03 + 0.012
    builder.loft(
        "hair",
        shell(tau, thickness.squeeze(-1)),
        front,
        up,
        deep * half_depth * height,
        wide * half_width * height,
        tau,
        radial=(thickness + curly * clumps) * (1.0 - hidden) + 0.86 * hidden,
        ambient=(1.0 - 0.25 * smoothstep(0.2, -0.8, level)).expand(1, 12, 19),
    )

    # What hangs from it: long hair, a pony tail, a bun.
    t = torch.linspace(0.0, 1.0, 8, device=height.device).view(1, -1)
    flat = people.hair_style.unsqueeze(1)
    is_long, is_tail, is_bun = ((flat == k).float() for k in (5, 6, 7))
    world_up = vector(torch.zeros_like(pose.height), 0.0, 1.0).unsqueeze(1)
    round_ = torch.sqrt((1.0 - (2.0 * t - 1.0) ** 2).clamp(min=0.001))
    back = (
        is_long * (0.030 + 0.034 * smoothstep(0.2, 0.75, t))
        + is_tail * (0.050 + 0.030 * torch.sqrt(t) * (1.4 - t))
        + is_bun * 0.052
    )
    rise = (
        is_long * (0.028 - 0.215 * t)
        + is_tail * (0.030 - 0.165 * t * t - 0.01 * t)
        + is_bun * (0.060 - 0.045 * t)
    )
    swing = (is_long * 0.008 + is_tail * 0.02) * t * torch.sin(6.2832 * pose.phase).unsqueeze(1)
    head_side = cross(front, up)
    centre = (
        head
        - front * (back * height).unsqueeze(-1)
        + world_up * (rise * height).unsqueeze(-1)
        + head_side * (swing * height).unsqueeze(-1)
    )
    ends = smoothstep(0.0, 0.12, t) * smoothstep(1.02, 0.86, t) + 0.03
    r_side = (
        is_long * (0.044 + 0.006 * smoothstep(0.2, 0.6, t) - 0.012 * t) * ends
        + is_tail * (0.010 + 0.014 * torch.sqrt(t) * (1.25 - t)) * ends
        + is_bun * 0.024 * round_
    )
    r_front = is_long * (0.026 - 0.010 * t) * ends + is_tail * r_side + is_bun * 0.022 * round_
    tangent = torch.cat((centre[:, 1:] - centre[:, :-1], centre[:, -1:] - centre[:, -2:-1]), dim=1)
    builder.loft("drape", centre, front, tangent, r_front * height, r_side * height, t)

    # Cap or beanie: the crown of a larger skull, and the cap's peak.
    beanie = people.is_("headwear", "beanie").unsqueeze(1)
    crown = _column([0.0, 0.02, 0.16, 0.34, 0.52, 0.68, 0.82, 0.92, 0.98, 1.0], like).unsqueeze(0)
    lower = 0.06 + 0.0 * beanie
    level = lower + (1.0 - lower) * crown
    profile = torch.sqrt((1.0 - (crown * 0.999) ** 2.6).clamp(min=0.0)) + 0.01
    fold = beanie * 0.06 * smoothstep(0.45, 0.3, crown) * smoothstep(-0.01, 0.02, crown)
    scale = (1.09 + 0.03 * beanie) * profile + fold
    scale = scale * (1.0 - 0.2 * smoothstep(0.02, 0.0, crown))
    tilt = front * (0.02 * height).unsqueeze(-1)
    centre = head + up * ((level + 0.11 + 0.12 * beanie * crown) * half_height * height).unsqueeze(
        -1
    )
    builder.loft(
        "hat",
        centre,
        front,
        up + front * 0.0,
        scale * half_depth * height,
        scale * half_width * 1.03 * height,
        crown,
    )
    t = _column([0.0, 0.33, 0.66, 1.0], like).unsqueeze(0)
    scale = _column([0.05, 1.0, 1.0, 0.05], like).unsqueeze(0)
    centre = (
        head
        + tilt
        + front * (0.040 * height).unsqueeze(-1)
        + up * ((0.26 * half_height + 0.007 * (t - 0.5)) * height).unsqueeze(-1)
    )
    builder.loft(
        "brim",
        centre,
        front,
        normalise(up + front * 0.25),
        scale * 0.050 * height,
        scale * 0.044 * height,
        t,
    )


def _build_bag(builder: _Builder, people: People, pose: Pose) -> None:
    """Backpack, handbag or crossbody bag, and the handbag's handle."""
    height = pose.height.unsqueeze(1)
    like = height
    is_pack = people.is_("bag", "backpack").unsqueeze(1)
    is_hand = people.is_("bag", "handbag").unsqueeze(1)
    is_cross = people.is_("bag", "crossbody").unsqueeze(1)
    right = (people.side > 0).float().view(-1, 1, 1)
    wrist = pose.wrist[1].unsqueeze(1) * right + pose.wrist[0].unsqueeze(1) * (1.0 - right)
    sign = people.side.float().unsqueeze(1)
    chest_front = pose.chest_front.unsqueeze(1)
    spine = pose.spine.unsqueeze(1)
    up = vector(torch.zeros_like(pose.height), 0.0, 1.0).unsqueeze(1)
    side = cross(pose.pelvis_front.unsqueeze(1), up)
    t = _column([0.0, 0.03, 0.12, 0.3, 0.65, 0.86, 0.96, 1.0], like).unsqueeze(0)
    taper = _column([0.05, 0.80, 0.97, 1.0, 1.0, 0.93, 0.72, 0.05], like).unsqueeze(0)
    build = people.build.unsqueeze(1)
    size = 0.9 + 0.25 * people.looseness.unsqueeze(1)

    pack = (
        pose.pelvis.unsqueeze(1)
        + spine * ((0.065 + 0.205 * t) * height).unsqueeze(-1)
        - chest_front * ((0.104 + 0.008 * build) * height + 0.0 * t).unsqueeze(-1)
    )
    carried = wrist + up * ((-0.205 + 0.115 * t) * height).unsqueeze(-1)
    hung = (
        pose.pelvis.unsqueeze(1)
        + side * (sign * (0.112 + 0.016 * build) * height + 0.0 * t).unsqueeze(-1)
        + up * ((-0.04 + 0.10 * t) * height).unsqueeze(-1)
        + pose.pelvis_front.unsqueeze(1) * (0.02 * height).unsqueeze(-1)
    )
    centre = (
        pack * is_pack.unsqueeze(-1)
        + carried * is_hand.unsqueeze(-1)
        + hung * is_cross.unsqueeze(-1)
    )
    pouch = 1.0 - 0.25 * smoothstep(0.35, 0.9, t)
    r_front = (is_pack * 0.045 * pouch + is_hand * 0.068 + is_cross * 0.058) * taper * size
    r_side = (is_pack * 0.078 + is_hand * 0.026 + is_cross * 0.022) * taper * size
    builder.loft(
        "bag",
        centre,
        chest_front * (1.0 - 2.0 * is_pack.unsqueeze(-1)),
        spine,
        r_front * height,
        r_side * height,
        t,
    )
    t = torch.linspace(0.0, 1.0, 3, device=height.device).view(1, -1)
    centre = wrist + up * ((-0.10 + 0.06 * t) * height).unsqueeze(-1)
    radius = 0.007 * height * torch.ones_like(t)
    builder.loft("handle", centre, chest_front, up, radius * 2.5, radius, t)
