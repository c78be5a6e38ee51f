"""The roll from where head, torso and legs lie: learned from label maps of body parts.

The direction in which the parts rise, in pixels, is up in an upright image and turns with it. So
nobody has to know an angle: a human parser, or the renderer of generated people, tells where the
parts are, and a small network learns to find them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign.model import losses
from gsalign.model.config import OrientationConfig
from gsalign.model.orientation import Uprighting
from gsalign.model.precision import promote

LOOK_ROWS = 64
"""The small image that is looked at has at least as many rows, where the image has them."""

HEAD, TORSO, LEGS = 1, 2, 3
"""What is found, 0 being the background. Arms and bag count as torso, feet as legs."""

GROUPS = {
    3: (0, HEAD, TORSO, LEGS),
    4: (0, HEAD, TORSO, LEGS, LEGS),
    5: (0, HEAD, TORSO, TORSO, LEGS, LEGS),
    6: (0, HEAD, TORSO, TORSO, LEGS, LEGS, TORSO),
}
"""Number of groups in which label maps come -> what the background and every group are."""

UNKNOWN = 255

NOBODY = 0.02
"""Share of an image below which nobody is found: 7,680 generated people have over 0.07 each."""


def body_axis(shares: Tensor, aspect: float) -> Tensor:
    """In which direction of the image the parts of the body rise.

    The covariance, over the person, of place and height: legs 0, torso 1, head 4, since its area is
    small, and seen from above it alone still tells the direction. A part that is hidden leaves it
    to the others; the more a body is foreshortened, the shorter the axis.

    Args:
        shares: ``[B, 4, h, w]``, of every cell how much is background, head, torso and legs.
        aspect: width over height of the image.

    Returns:
        ``[B, 2]`` (up, right), places in image heights; 0 where fewer than two parts are seen.
    """
    person = shares[:, 1:].sum(dim=1)
    height = 4 * shares[:, HEAD] + shares[:, TORSO]
    area = person.sum(dim=(1, 2)).clamp(min=1e-6).view(-1, 1, 1)
    risen = height / area - person * height.sum(dim=(1, 2), keepdim=True) / area.square()
    up = -(risen.sum(dim=2) @ _middles(risen.shape[1], risen))
    right = risen.sum(dim=1) @ _middles(risen.shape[2], risen)
    return torch.stack([up, aspect * right], dim=1)


def _middles(size: int, like: Tensor) -> Tensor:
    """Of the cells of a row or column, from -1/2 to 1/2, ``[size]``."""
    return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size - 0.5


class PartFinder(nn.Module):
    """Head, torso and legs in a small image: three times coarser, three times finer again.

    Args:
        width: channels of the finest of its four scales; a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.at_1 = _stage(3, width)
        self.at_2 = nn.Sequential(_stage(width, 2 * width, 2), _stage(2 * width, 2 * width))
        self.at_4 = nn.Sequential(_stage(2 * width, 4 * width, 2), _stage(4 * width, 4 * width))
        self.at_8 = nn.Sequential(_stage(4 * width, 4 * width, 2), _stage(4 * width, 4 * width))
        self.from_4 = nn.Conv2d(4 * width, 4 * width, 1)
        self.to_2 = _stage(4 * width, 2 * width)
        self.from_2 = nn.Conv2d(2 * width, 2 * width, 1)
        self.to_1 = _stage(2 * width, width)
        self.from_1 = nn.Conv2d(width, width, 1)
        self.last = _stage(width, width)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, h, w]`` to logits ``[B, 4, h, w]``."""
        whole = self.at_1(images)
        half = self.at_2(whole)
        quarter = self.at_4(half)
        seen = _enlarged(self.at_8(quarter), quarter) + self.from_4(quarter)
        seen = _enlarged(self.to_2(seen), half) + self.from_2(half)
        seen = _enlarged(self.to_1(seen), whole) + self.from_1(whole)
        logits: Tensor = self.out(self.last(seen))
        return logits


def _stage(width: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, outputs, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


def _enlarged(maps: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(maps, size=like.shape[2:], mode="nearest")


class UprightingByParts(Uprighting):
    """Finds the parts of the body, and turns the direction in which they rise upwards.

    What is found to be of the body can be cut out, unless it is next to nothing.

    An image is looked at twice, the second time upside down, and the shares are averaged: the
    answer to an image upside down is the opposite of that to the image, whatever the weights are.

    Args:
        image_size: (height, width) of the images.
        config: of the finder.
        label_groups: in how many groups label maps come, a key of :data:`GROUPS`; 0 where none do.
    """

    def __init__(
        self, image_size: tuple[int, int], config: OrientationConfig, label_groups: int
    ) -> None:
        super().__init__(image_size, config)
        self.reduction = look_reduction(image_size)
        self.finder = PartFinder(config.finder_width)
        self.groups = GROUPS.get(label_groups, ())

    def logits(self, images: Tensor) -> Tensor:
        """What every cell shows: ``[B, 3, H, W] -> [B, 4, h, w]``, float32 or float64."""
        small = promote(functional.avg_pool2d(images, self.reduction))
        small = small - small.mean(dim=(2, 3), keepdim=True)
        spread = small.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        # 0.1: noise of an image of one colour stays noise.
        return promote(self.finder((small / (spread + 0.1)).to(self.finder.out.weight.dtype)))

    def shares(self, images: Tensor) -> Tensor:
        """Of every cell how much is background, head, torso and legs, by both looks at it."""
        looks = self.logits(images), self.logits(images.flip(2, 3)).flip(2, 3)
        return torch.stack([look.softmax(dim=1) for look in looks]).mean(dim=0)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Uprighting.see`; upright where no body is found."""
        shares = self.shares(images)
        up, right = body_axis(shares, self.aspect).unbind(dim=1)
        # So little tells nothing of a body, but turns an image of which nothing else is known.
        direction = functional.normalize(torch.stack([up + 1e-4, right], dim=1))
        if not self.cuts_out:
            return direction, None
        person = 1 - shares[:, :1]
        # Cut out of nothing an image says nothing; whole, it may still be known.
        found = person.mean(dim=(2, 3), keepdim=True) >= NOBODY
        person = torch.where(found, person, 1.0)
        return direction, functional.interpolate(person, size=images.shape[2:], mode="bilinear")

    def look(self, images: Tensor, part_labels: Tensor | None) -> tuple[Tensor]:
        """Costs of the label maps, see :func:`gsalign.model.losses.part_label_costs`.

        Every other image is looked at upside down.

        Raises:
            ValueError: there are no label maps.
        """
        if part_labels is None:
            raise ValueError(
                "part_labels is None, wanted label maps of the images: model.orientation.reads "
                "'parts' learns from them; without any take 'rays'"
            )
        labels = _every_other_upside_down(_parts_of(part_labels, self.groups))
        logits = self.logits(_every_other_upside_down(images.detach()))
        grid = (logits.shape[2], logits.shape[3])
        return (losses.part_label_costs(logits.flatten(2), labels, grid),)

    def loss(self, looked: Sequence[Tensor], identities: Tensor, views: Tensor) -> Tensor:
        """Mean cross-entropy over the cells of which something is known."""
        (costs,) = looked
        return losses.part_labels(costs)


def look_reduction(image_size: tuple[int, int]) -> int:
    """How many pixels of an image along a side are one of the small image: a power of 2."""
    height, width = image_size
    reduction = 1
    while (
        height >= 2 * reduction * LOOK_ROWS
        and height % (2 * reduction) == 0
        and width % (2 * reduction) == 0
    ):
        reduction *= 2
    return reduction


def _parts_of(labels: Tensor, groups: Sequence[int]) -> Tensor:
    """Labels of groups as what the groups are; other labels are unknown."""
    parts = torch.full_like(labels, UNKNOWN)
    for group, part in enumerate(groups):
        parts = parts.masked_fill(labels == group, part)
    return parts


def _every_other_upside_down(rows: Tensor) -> Tensor:
    """``[B, ..., H, W]``: the second, fourth, ... of the rows turned by half a circle."""
    turned = torch.arange(rows.shape[0], device=rows.device) % 2 == 1
    turned = turned.view(-1, *[1] * (rows.dim() - 1))
    return torch.where(turned, rows.flip(-2, -1), rows)
