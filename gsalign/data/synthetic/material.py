"""Colour of every visible point of a person: skin, face, hair, cloth and its patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsalign.data.synthetic.body import SLOT
from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import smoothstep
from gsalign.data.synthetic.identity import UPPER_PATTERNS, People
from gsalign.data.synthetic.noise import CLOUD, CLOUD_2, GRAIN, MIXED, sample_noise


@dataclass(frozen=True)
class Surface:
    """Visible points.

    Attributes:
        albedo: ``[N, 3]`` linear RGB.
        bump: ``[N, 3]`` added to the normal: folds of cloth, strands of hair.
        gloss: ``[N]`` strength of the highlight.
    """

    albedo: Tensor
    bump: Tensor
    gloss: Tensor


def _mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return a + (b - a) * weight.unsqueeze(-1)


def _frac(x: Tensor) -> Tensor:
    return x - torch.floor(x)


class _Points:
    """The visible points of some slots, with the columns of their people at hand."""

    def __init__(
        self, people: People, index: Tensor, image: Tensor, slot: Tensor, surface: Tensor
    ) -> None:
        self._people = people
        self.index = index
        self.image = image.index_select(0, index)
        self.slot = slot.index_select(0, index)
        u, v, w, _ = surface.index_select(0, index).unbind(1)
        self.u, self.v, self.w = u.contiguous(), v.contiguous(), w.contiguous()
        # 1 where a garment's tube shows skin; a painter may set it.
        self.bare: Tensor | None = None
        self.height = people.height.index_select(0, self.image)

    def rgb(self, field: str) -> Tensor:
        return self._people.rgb(field).index_select(0, self.image)

    def is_(self, field: str, *names: str) -> Tensor:
        return self._people.is_(field, *names).index_select(0, self.image)

    def value(self, field: str) -> Tensor:
        return getattr(self._people, field).float().index_select(0, self.image)


def _pattern(p: _Points, along: Tensor, around: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Patterns that repeat, the same on torso, sleeves and coat tails.

    Args:
        p: the points.
        along: ``[N]`` metres along the garment.
        around: ``[N]`` metres around it.
        first: ``[N, 3]`` main colour.
        second: ``[N, 3]`` the other one.
    """
    scale = p.value("pattern_scale")
    kind = {name: p.is_("upper_pattern", name) for name in UPPER_PATTERNS}
    stripes = (_frac(along / (0.105 * scale)) < 0.48).float() * kind["stripes"]
    pins = (_frac(around / (0.075 * scale)) < 0.34).float() * kind["pinstripes"]
    square = 0.16 * scale
    row = (_frac(along / square) < 0.5).float()
    column = (_frac(around / square) < 0.5).float()
    checks = 0.5 * (row + column) * kind["checks"]
    cell = 0.088 * scale
    y = along / cell
    x = around / cell + 0.5 * (_frac(torch.floor(y) * 0.5) > 0.25).float()
    dx, dy = _frac(x) - 0.5, _frac(y) - 0.5
    dots = (dx * dx + dy * dy < 0.085).float() * kind["dots"]
    noise = sample_noise(around * 1.1 / scale + 0.3, along * 1.1 / scale)
    marble = smoothstep(0.05, 0.25, noise[CLOUD] + 0.35 * noise[MIXED]) * kind["marble"]
    return _mix(first, second, stripes + pins + checks + dots + marble)


def _garment_hem(p: _Points) -> Tensor:
    """Rest height where the upper garment ends on the torso."""
    tucked = (p.value("looseness") < 0.3).float() * p.is_("upper", "tshirt", "longsleeve", "tank")
    skirted = p.is_("lower", "skirt", "long_skirt")
    return (
        0.492
        + 0.008 * p.is_("upper", "jacket")
        + 0.072 * torch.maximum(tucked, skirted * p.is_("upper", "tshirt", "longsleeve", "tank"))
    )


def _torso(p: _Points) -> Tensor:
    first, second = p.rgb("upper_colour"), p.rgb("upper_second")
    metres = p.height
    around = p.u * (6.2832 * 0.085) * metres
    side = torch.sin(p.u * 6.2832)  # -1 right, 1 left
    front = (p.u.abs() < 0.25).float()
    colour = _pattern(p, p.v * metres, around, first, second)
    block = (p.v > 0.695).float() * p.is_("upper_pattern", "block")
    colour = _mix(colour, second, block)
    # Print on chest and back.
    centred = torch.where(p.u.abs() < 0.25, p.u, 0.5 - p.u.abs())
    dx = centred * (6.2832 * 0.085) / 0.052
    dy = (p.v - 0.722) / 0.042
    disc = ((dx * dx + dy * dy) < 1.0).float()
    hole = ((dx * dx + dy * dy) < 0.22).float()
    colour = _mix(colour, second, (disc - hole) * p.is_("upper_pattern", "logo"))

    jacket = p.is_("upper", "jacket")
    opening = 0.050 + 0.035 * smoothstep(0.62, 0.84, p.v)
    inside = (p.u.abs() < opening).float() * jacket
    colour = _mix(colour, second, inside)
    edge = ((p.u.abs() - opening).abs() < 0.010).float() * jacket
    coat = p.is_("upper", "coat")
    edge = edge + ((p.u - 0.03).abs() < 0.006).float() * coat
    hoodie = p.is_("upper", "hoodie")
    pocket = (p.v < 0.60) & (p.v > 0.53) & (p.u.abs() < 0.15)
    inner = (p.v < 0.593) & (p.v > 0.537) & (p.u.abs() < 0.136)
    edge = edge + (pocket & ~inner).float() * hoodie
    colour = colour * (1.0 - 0.45 * edge.clamp(max=1.0)).unsqueeze(-1)
    button = ((_frac(p.v * 17.0) - 0.5).abs() < 0.14) & ((p.u.abs() - 0.055).abs() < 0.010)
    light = torch.full_like(colour, 0.6)
    colour = _mix(colour, light, button.float() * coat * front * 0.7)
    # Collar and lapels.
    lapel = ((p.v > 0.775) & (p.u.abs() < opening + 0.05) & (p.u.abs() > opening)).float() * (
        jacket + coat
    ).clamp(max=1.0)
    colour = colour * (1.0 - 0.28 * lapel).unsqueeze(-1)

    # Neckline.
    skin = p.rgb("skin")
    light_wear = p.is_("upper", "tshirt", "longsleeve", "tank")
    tank = p.is_("upper", "tank")
    dip = smoothstep(0.20 - 0.05 * tank, 0.0 * tank, p.u.abs()) * (0.028 + 0.022 * tank)
    bare = smoothstep(-0.003, 0.003, p.v - (0.838 - 0.012 * tank - dip)) * light_wear
    straps = tank * ((p.v > 0.785) & (side.abs() > 0.82)).float()
    colour = _mix(colour, skin, torch.maximum(bare, straps))

    # Trousers below the hem, with a belt when the shirt is tucked in.
    hem = _garment_hem(p)
    lower = p.rgb("lower_colour")
    below = (p.v < hem).float()
    seam = ((p.v - hem).abs() < 0.005).float() * (1.0 - (hem > 0.55).float())
    colour = _mix(colour, lower, below)
    belt = ((p.v < hem) & (p.v > hem - 0.020)).float() * (hem > 0.55).float()
    colour = _mix(colour, torch.full_like(colour, 0.02), belt * 0.85)
    colour = colour * (1.0 - 0.35 * seam).unsqueeze(-1)

    # Straps of bags.
    bag = p.rgb("bag_colour")
    pack = p.is_("bag", "backpack")
    strap = ((side.abs() - 0.62).abs() < 0.15).float() * (p.v > 0.655).float() * pack
    cross = p.is_("bag", "crossbody")
    sign = -p.value("side")  # the bag hangs there in units of ``side``
    t = (p.v - 0.545) / 0.27
    line = sign * (0.95 - 1.65 * t)
    strap = strap + ((side - line).abs() < 0.17).float() * ((t > 0.0) & (t < 1.05)).float() * cross
    return _mix(colour, bag * 0.85, strap.clamp(max=1.0))


def _arms(p: _Points) -> Tensor:
    first, second = p.rgb("upper_colour"), p.rgb("upper_second")
    around = p.u * (6.2832 * 0.03) * p.height
    colour = _pattern(p, p.v * 0.16 * p.height + 0.03, around, first, second)
    contrast = p.is_("upper_pattern", "sleeves")
    contrast = contrast + p.is_("upper_pattern", "block") * (p.v < 0.45).float()
    colour = _mix(colour, second, contrast)
    end = 1.96 - 1.35 * p.is_("upper", "tshirt") - 3.0 * p.is_("upper", "tank")
    skin = p.rgb("skin")
    cuff = ((p.v - end + 0.05).abs() < 0.035).float()
    colour = colour * (1.0 - 0.3 * cuff).unsqueeze(-1)
    p.bare = (p.v > end).float()
    return _mix(colour, skin, p.bare)


def _skin(p: _Points) -> Tensor:
    return p.rgb("skin")


def _neck(p: _Points) -> Tensor:
    collar = p.is_("upper", "jacket", "coat", "hoodie") * (p.v < 0.55).float()
    return _mix(p.rgb("skin"), p.rgb("upper_colour") * 0.85, collar)


def _head(p: _Points) -> Tensor:
    skin = p.rgb("skin")
    hair = p.rgb("hair_colour")
    beside = p.u.abs()
    warm = torch.tensor([1.06, 0.92, 0.88], device=skin.device)
    cheek = torch.exp(-(((beside - 0.11) / 0.05) ** 2) - ((p.v + 0.28) / 0.16) ** 2)
    colour = skin * (1.0 + (warm - 1.0) * cheek.unsqueeze(-1))
    # Stubble of a shaven or thin-haired skull, so that the hair's edge is soft.
    scalp = (p.v > 0.5).float() * (1.0 - p.is_("hair_style", "bald"))
    colour = _mix(colour, hair, scalp * 0.8)
    socket = torch.exp(-(((beside - 0.075) / 0.042) ** 2) - ((p.v - 0.01) / 0.09) ** 2)
    colour = colour * (1.0 - 0.35 * socket).unsqueeze(-1)
    white = (((beside - 0.075) / 0.034) ** 2 + ((p.v + 0.005) / 0.055) ** 2 < 1.0).float()
    iris = (((beside - 0.075) / 0.016) ** 2 + ((p.v + 0.005) / 0.055) ** 2 < 1.0).float()
    colour = _mix(colour, torch.full_like(colour, 0.62), white * 0.8)
    colour = _mix(colour, torch.full_like(colour, 0.015), iris)
    brow = smoothstep(0.045, 0.025, (beside - 0.078).abs()) * smoothstep(
        0.055, 0.03, (p.v - 0.175).abs()
    )
    colour = _mix(colour, hair * 0.6, brow * 0.85)
    lips = smoothstep(0.062, 0.045, beside) * smoothstep(0.065, 0.035, (p.v + 0.56).abs())
    red = torch.tensor([0.75, 0.40, 0.38], device=skin.device)
    colour = _mix(colour, skin * red, lips * 0.8)
    nostril = smoothstep(0.03, 0.018, (beside - 0.022).abs()) * smoothstep(
        0.05, 0.02, (p.v + 0.33).abs()
    )
    colour = colour * (1.0 - 0.3 * nostril).unsqueeze(-1)
    beard = p.value("beard") * smoothstep(-0.34, -0.46, p.v - 0.5 * (beside - 0.12).clamp(min=0.0))
    beard = beard * smoothstep(0.30, 0.26, beside) * (1.0 - 0.8 * lips)
    colour = _mix(colour, hair, beard * 0.85)
    lens = (((beside - 0.078) / 0.052) ** 2 + ((p.v + 0.02) / 0.13) ** 2 < 1.0).float()
    bridge = ((p.v - 0.03).abs() < 0.035).float() * (beside < 0.25).float()
    glasses = p.value("glasses") * torch.maximum(lens, bridge)
    return _mix(colour, torch.full_like(colour, 0.012), glasses * 0.9)


def _hair(p: _Points) -> Tensor:
    strands = sample_noise(p.u * 3.0 + p.value("hair_colour") * 0.17, p.v * 0.25)
    tone = 1.0 + 0.22 * strands[GRAIN] + 0.12 * strands[CLOUD]
    return p.rgb("hair_colour") * tone.clamp(min=0.4).unsqueeze(-1)


def _hat(p: _Points) -> Tensor:
    colour = p.rgb("headwear_colour")
    beanie = p.is_("headwear", "beanie")
    ribs = beanie * (0.5 + 0.5 * torch.sin(p.u * 6.2832 * 22.0)) * (p.v < 0.4).float()
    seam = (1.0 - beanie) * (_frac(p.u * 6.0) < 0.08).float() * 0.6
    band = beanie * ((p.v - 0.42).abs() < 0.04).float()
    return colour * (1.0 - 0.25 * ribs - 0.3 * seam - 0.4 * band).unsqueeze(-1)


def _brim(p: _Points) -> Tensor:
    return p.rgb("headwear_colour") * 0.85


def _gingham(p: _Points, along: Tensor, around: Tensor) -> Tensor:
    square = 0.17 * p.value("pattern_scale")
    row = (_frac(along / square) < 0.5).float()
    column = (_frac(around / square) < 0.5).float()
    return 0.5 * (row + column)


def _legs(p: _Points) -> Tensor:
    first, second = p.rgb("lower_colour"), p.rgb("lower_second")
    sign = torch.where(p.slot == SLOT["leg_right"], 1.0, -1.0)
    outer = ((sign * p.u - 0.25).abs() < 0.062).float()
    around = p.u * (6.2832 * 0.045) * p.height
    weight = outer * p.is_("lower_pattern", "side_stripe")
    weight = weight + _gingham(p, p.v * 0.245 * p.height, around) * p.is_("lower_pattern", "checks")
    weight = weight + (p.v > 0.95).float() * p.is_("lower_pattern", "two_tone")
    colour = _mix(first, second, weight)
    # Denim fades on the thigh.
    slim = p.is_("lower", "slim")
    fade = slim * smoothstep(0.22, 0.0, p.u.abs()) * torch.exp(-(((p.v - 0.55) / 0.35) ** 2))
    colour = colour * (1.0 + 0.35 * fade).unsqueeze(-1)
    shorts = p.is_("lower", "shorts")
    skirt = p.is_("lower", "skirt", "long_skirt")
    end = 2.03 - 1.14 * shorts - 4.0 * skirt
    hem = ((p.v - end + 0.03).abs() < 0.02).float()
    colour = colour * (1.0 - 0.3 * hem).unsqueeze(-1)
    bare = p.rgb("skin")
    tights = skirt * (p.value("looseness") > 0.6).float()
    bare = _mix(bare, torch.full_like(bare, 0.02) + 0.1 * bare, tights)
    sock = (p.v > 1.80).float() * p.is_("shoe", "sneakers") * (1.0 - tights)
    bare = _mix(bare, torch.full_like(bare, 0.7), sock)
    p.bare = (p.v > end).float()
    colour = _mix(colour, bare, p.bare)
    boots = p.is_("shoe", "boots") * (p.v > 1.62).float()
    narrow = torch.maximum(torch.maximum(shorts, skirt), slim)
    return _mix(colour, p.rgb("shoe_colour") * 0.8, boots * narrow)


def _feet(p: _Points) -> Tensor:
    colour = p.rgb("shoe_colour")
    sneakers = p.is_("shoe", "sneakers")
    sole = (p.w < 0.011).float()
    white = torch.full_like(colour, 0.75)
    dark = torch.full_like(colour, 0.02)
    toe = sneakers * (p.v > 0.080).float()
    colour = _mix(colour, white, (sneakers * sole + toe).clamp(max=1.0) * 0.9)
    colour = _mix(colour, dark, (1.0 - sneakers) * sole * 0.8)
    laces = sneakers * ((p.u.abs() < 0.08) & (p.v > 0.02) & (p.v < 0.07)).float()
    return _mix(colour, white, laces * 0.5)


def _skirt(p: _Points) -> Tensor:
    first, second = p.rgb("lower_colour"), p.rgb("lower_second")
    around = p.u * (6.2832 * 0.11) * p.height
    weight = ((p.w > 0.72) & (p.w < 0.90)).float() * p.is_("lower_pattern", "side_stripe")
    weight = weight + _gingham(p, p.v * p.height, around) * p.is_("lower_pattern", "checks")
    weight = weight + (p.w > 0.5).float() * p.is_("lower_pattern", "two_tone")
    colour = _mix(first, second, weight)
    band = (p.w < 0.06).float() + (p.w > 0.965).float()
    return colour * (1.0 - 0.3 * band).unsqueeze(-1)


def _coat(p: _Points) -> Tensor:
    first, second = p.rgb("upper_colour"), p.rgb("upper_second")
    around = p.u * (6.2832 * 0.09) * p.height
    colour = _pattern(p, p.v * p.height, around, first, second)
    slit = ((p.u - 0.03).abs() < 0.008).float() + (p.w > 0.96).float()
    belt = ((p.w - 0.03).abs() < 0.05).float() * (p.value("looseness") > 0.5).float()
    return colour * (1.0 - 0.5 * slit.clamp(max=1.0) - 0.4 * belt).clamp(min=0.2).unsqueeze(-1)


def _hood(p: _Points) -> Tensor:
    return p.rgb("upper_colour") * 0.9


def _bag(p: _Points) -> Tensor:
    colour = p.rgb("bag_colour")
    pack = p.is_("bag", "backpack")
    pocket = ((p.u.abs() < 0.13) & (p.v > 0.10) & (p.v < 0.52)).float()
    inner = ((p.u.abs() < 0.115) & (p.v > 0.125) & (p.v < 0.49)).float()
    line = pocket - inner + ((p.v - 0.72).abs() < 0.02).float()
    colour = colour * (1.0 - 0.4 * line * pack).unsqueeze(-1)
    colour = colour * (1.0 + 0.12 * inner * pack).unsqueeze(-1)
    flap = (1.0 - pack) * (p.v > 0.62).float()
    clasp = (
        (1.0 - pack)
        * ((p.v - 0.60).abs() < 0.05).float()
        * ((p.u.abs() - 0.25).abs() < 0.03).float()
    )
    colour = colour * (1.0 - 0.25 * flap).unsqueeze(-1)
    return _mix(colour, torch.full_like(colour, 0.5), clasp * 0.6)


_LEATHER, _CLOTH, _HAIR, _SKIN = range(4)
_PAINTERS: tuple[tuple[tuple[str, ...], Callable[[_Points], Tensor], int], ...] = (
    (("torso",), _torso, _CLOTH),
    (("arm_left", "arm_right"), _arms, _CLOTH),
    (("hand_left", "hand_right"), _skin, _SKIN),
    (("leg_left", "leg_right"), _legs, _CLOTH),
    (("foot_left", "foot_right"), _feet, _LEATHER),
    (("neck",), _neck, _SKIN),
    (("head",), _head, _SKIN),
    (("hair", "drape"), _hair, _HAIR),
    (("hat",), _hat, _CLOTH),
    (("brim",), _brim, _CLOTH),
    (("skirt",), _skirt, _CLOTH),
    (("coat",), _coat, _CLOTH),
    (("hood",), _hood, _CLOTH),
    (("bag", "handle"), _bag, _LEATHER),
)


def paint(people: People, draws: Draws, image: Tensor, slot: Tensor, surface: Tensor) -> Surface:
    """Colour visible points.

    Args:
        people: appearances of the batch.
        draws: random numbers of the images; cloth falls differently in every one.
        image: ``[N]`` which person.
        slot: ``[N]`` which tube.
        surface: ``[N, 4]`` as in :class:`gsalign.data.synthetic.body.Mesh`.
    """
    count = image.numel()
    albedo = torch.zeros(count, 3, device=image.device)
    kind = torch.zeros(count, dtype=torch.int64, device=image.device)
    for names, painter, material in _PAINTERS:
        mask = slot == SLOT[names[0]]
        for name in names[1:]:
            mask |= slot == SLOT[name]
        index = torch.nonzero(mask).flatten()
        points = _Points(people, index, image, slot, surface)
        albedo[index] = painter(points)
        kind[index] = material
        if points.bare is not None:
            kind[index] = torch.where(points.bare > 0.5, _SKIN, material)

    u, v = surface[:, 0], surface[:, 1]
    fold = sample_noise(
        u * 0.55 + draws["fold_u"].index_select(0, image) + slot * 0.37,
        v * 0.55 + draws["fold_v"].index_select(0, image),
    )
    strength = torch.tensor([0.10, 0.30, 0.32, 0.02], device=image.device).index_select(0, kind)
    bump = torch.stack((fold[CLOUD], fold[CLOUD_2], fold[MIXED] * 0.8), dim=1)
    gloss = torch.tensor([0.10, 0.0, 0.10, 0.05], device=image.device).index_select(0, kind)
    return Surface(albedo=albedo, bump=bump * strength.unsqueeze(-1), gloss=gloss)
