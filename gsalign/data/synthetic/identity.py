"""What a person looks like, whatever the camera: build, hair, clothes and bags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Shared by all identities on purpose: a colour alone must not give anybody away. sRGB, 0..1.
CLOTHING_COLOURS: tuple[tuple[float, float, float], ...] = (
    (0.07, 0.07, 0.08),  # black
    (0.42, 0.43, 0.45),  # grey
    (0.90, 0.90, 0.88),  # white
    (0.76, 0.68, 0.53),  # beige
    (0.36, 0.23, 0.15),  # brown
    (0.74, 0.11, 0.12),  # red
    (0.41, 0.08, 0.15),  # burgundy
    (0.87, 0.66, 0.16),  # mustard
    (0.15, 0.42, 0.21),  # green
    (0.40, 0.42, 0.24),  # olive
    (0.10, 0.50, 0.52),  # teal
    (0.16, 0.32, 0.68),  # blue
    (0.09, 0.12, 0.26),  # navy
    (0.78, 0.42, 0.56),  # pink
)
SKIN_TONES: tuple[tuple[float, float, float], ...] = (
    (0.95, 0.78, 0.68),
    (0.90, 0.70, 0.57),
    (0.80, 0.58, 0.43),
    (0.65, 0.44, 0.31),
    (0.48, 0.31, 0.21),
    (0.34, 0.21, 0.15),
)
HAIR_COLOURS: tuple[tuple[float, float, float], ...] = (
    (0.06, 0.05, 0.05),
    (0.18, 0.11, 0.07),
    (0.33, 0.20, 0.11),
    (0.50, 0.22, 0.10),
    (0.78, 0.62, 0.36),
    (0.62, 0.61, 0.60),
)

HAIR_STYLES = ("bald", "buzz", "short", "curly", "bob", "long", "ponytail", "bun")
HEADWEAR = ("none", "cap", "beanie")
UPPERS = ("tshirt", "longsleeve", "jacket", "hoodie", "coat", "tank")
UPPER_PATTERNS = (
    "plain", "stripes", "pinstripes", "checks", "block", "logo", "sleeves", "dots", "marble",
)  # fmt: skip
LOWERS = ("trousers", "slim", "wide", "shorts", "skirt", "long_skirt")
LOWER_PATTERNS = ("plain", "side_stripe", "checks", "two_tone")
SHOES = ("sneakers", "shoes", "boots")
BAGS = ("none", "backpack", "handbag", "crossbody")

_IDENTITY_STREAM = 2


@dataclass(frozen=True)
class Appearance:
    """One person. Integers index the tuples of this module; the rest are ratios.

    ``height`` is in metres; ``build`` runs from -1 (thin) to 1 (heavy), ``figure`` from 0 (broad
    shoulders, narrow hips) to 1 (narrow shoulders, wide hips); ``stride`` scales the walk cycle;
    ``pattern_scale`` the size of the clothes' patterns; ``side`` is the side of a bag (+1 right).
    """

    height: float
    build: float
    figure: float
    stride: float
    looseness: float
    pattern_scale: float
    skin: int
    hair_style: int
    hair_colour: int
    headwear: int
    headwear_colour: int
    upper: int
    upper_colour: int
    upper_second: int
    upper_pattern: int
    lower: int
    lower_colour: int
    lower_second: int
    lower_pattern: int
    shoe: int
    shoe_colour: int
    bag: int
    bag_colour: int
    side: int
    glasses: int
    beard: int

    def look(self) -> tuple[int, ...]:
        """The discrete choices that can be seen; no two identities of a set share them."""
        upper = UPPERS[self.upper]
        shows_second = UPPER_PATTERNS[self.upper_pattern] != "plain" or upper == "jacket"
        return (
            self.hair_style if HEADWEAR[self.headwear] != "beanie" else -1,
            self.hair_colour if HAIR_STYLES[self.hair_style] != "bald" else -1,
            self.headwear,
            self.headwear_colour if self.headwear else -1,
            self.upper,
            self.upper_colour,
            self.upper_second if shows_second else -1,
            self.upper_pattern,
            self.lower,
            self.lower_colour,
            self.lower_second if self.lower_pattern else -1,
            self.lower_pattern,
            self.bag,
            self.bag_colour if self.bag else -1,
        )


def _sample(rng: np.random.Generator) -> Appearance:
    def pick(names: tuple[str, ...], weights: tuple[float, ...]) -> int:
        return int(rng.choice(len(names), p=np.asarray(weights) / sum(weights)))

    def colour(*other_than: int) -> int:
        while True:
            index = int(rng.integers(len(CLOTHING_COLOURS)))
            if index not in other_than:
                return index

    figure = float(rng.random())
    feminine = figure > 0.5
    height = float(np.clip(rng.normal(1.66 if feminine else 1.77, 0.065), 1.5, 1.98))
    hair = (
        (0.0, 0.3, 1.2, 0.7, 1.5, 2.2, 1.8, 1.0)
        if feminine
        else (1.0, 1.5, 4, 1, 0.4, 0.4, 0.3, 0.1)
    )
    lower = (1.5, 2, 1.2, 0.9, 1.6, 1.2) if feminine else (3, 1.5, 1, 1.6, 0, 0)
    hair_style = pick(HAIR_STYLES, hair)
    lower_kind = pick(LOWERS, lower)
    upper = pick(UPPERS, (2.2, 1.8, 2.0, 1.6, 0.0 if lower_kind == 5 else 1.0, 0.7))
    upper_colour = colour()
    lower_colour = colour(upper_colour)
    return Appearance(
        height=height,
        build=float(np.clip(rng.normal(0.0, 0.45), -0.9, 1.1)),
        figure=figure,
        stride=float(rng.uniform(0.8, 1.2)),
        looseness=float(rng.uniform(0.0, 1.0)),
        pattern_scale=float(rng.uniform(0.8, 1.35)),
        skin=int(rng.integers(len(SKIN_TONES))),
        hair_style=hair_style,
        hair_colour=int(rng.choice(len(HAIR_COLOURS), p=(0.3, 0.25, 0.15, 0.1, 0.12, 0.08))),
        headwear=pick(HEADWEAR, (7.5, 1.6, 0.9)),
        headwear_colour=colour(),
        upper=upper,
        upper_colour=upper_colour,
        upper_second=colour(upper_colour),
        upper_pattern=pick(UPPER_PATTERNS, (3.0, 1.3, 0.7, 1.2, 1.1, 1.0, 1.0, 0.6, 0.6)),
        lower=lower_kind,
        lower_colour=lower_colour,
        lower_second=colour(lower_colour),
        lower_pattern=pick(LOWER_PATTERNS, (6, 1.3, 0.9, 0.8)),
        shoe=pick(SHOES, (3, 2, 1)),
        shoe_colour=colour(),
        bag=pick(BAGS, (5, 2.2, 1.3, 1.5)),
        bag_colour=colour(upper_colour),
        side=1 if rng.random() < 0.5 else -1,
        glasses=int(rng.random() < 0.2),
        beard=int(not feminine and rng.random() < 0.3),
    )


def sample_appearances(seed: int, count: int) -> list[Appearance]:
    """Draw ``count`` people, no two with the same :meth:`Appearance.look`.

    The first ``n`` of them do not depend on ``count``.
    """
    people: list[Appearance] = []
    looks: set[tuple[int, ...]] = set()
    for index in range(count):
        rng = np.random.default_rng([seed, _IDENTITY_STREAM, index])
        person = _sample(rng)
        while person.look() in looks:
            person = _sample(rng)
        looks.add(person.look())
        people.append(person)
    return people


class People:
    """Columns of a list of appearances, gathered for a batch of images.

    Every field of :class:`Appearance` is an attribute: a tensor ``[B]``, float32 or int64.
    Colour indices are also there as linear RGB: ``rgb("upper_colour")`` gives ``[B, 3]``.
    """

    def __init__(self, people: list[Appearance], device: torch.device | str = "cpu") -> None:
        self._columns: dict[str, Tensor] = {}
        for field in dataclasses.fields(Appearance):
            values = [getattr(person, field.name) for person in people]
            dtype = torch.float32 if field.type in ("float", float) else torch.int64
            self._columns[field.name] = torch.tensor(values, dtype=dtype, device=device)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def is_(self, field: str, *names: str) -> Tensor:
        """Float mask ``[B]``: 1 where the named choice of ``field`` is one of ``names``."""
        choices = _CHOICES[field]
        column = self._columns[field]
        mask = torch.zeros_like(column, dtype=torch.bool)
        for name in names:
            mask |= column == choices.index(name)
        return mask.float()

    def rgb(self, field: str) -> Tensor:
        """Linear RGB ``[B, 3]`` of a colour field (``skin`` and ``hair_colour`` included)."""
        palette = {"skin": SKIN_TONES, "hair_colour": HAIR_COLOURS}.get(field, CLOTHING_COLOURS)
        column = self._columns[field]
        table = torch.tensor(palette, dtype=torch.float32, device=column.device)
        # Gamma 2 stands for the sRGB curve throughout the renderer: exact in floating point.
        return (table * table)[column]


_CHOICES = {
    "hair_style": HAIR_STYLES,
    "headwear": HEADWEAR,
    "upper": UPPERS,
    "upper_pattern": UPPER_PATTERNS,
    "lower": LOWERS,
    "lower_pattern": LOWER_PATTERNS,
    "shoe": SHOES,
    "bag": BAGS,
}
