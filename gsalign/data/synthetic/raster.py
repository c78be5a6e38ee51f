"""Triangles to pixels: which triangle is in front at every pixel of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EMPTY = torch.iinfo(torch.int64).max
# Spans reach this far (pixels) beyond their exact ends, so that rounding leaves no pinholes
# between neighbouring triangles; the depth test settles the overlap.
_SLACK = 1e-3


@dataclass(frozen=True)
class Hits:
    """The pixels that show a triangle.

    Attributes:
        pixel: ``[N]`` int64, flat index into ``[B, H, W]``, ascending.
        image: ``[N]`` int64, which image of the batch.
        face: ``[N]`` int64, index into the faces.
        weights: ``[N, 3]`` barycentric weights of the face's corners at the pixel's centre.
        silhouette: ``[B, P]`` int64, pixels onto which a part projects, hidden or not.
    """

    pixel: Tensor
    image: Tensor
    face: Tensor
    weights: Tensor
    silhouette: Tensor


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Rows by index; several times faster than ``values[index]`` on the CPU."""
    return values.index_select(0, index)


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every i, ``counts[i]`` entries: their owner i and their number within it."""
    owner = torch.repeat_interleave(counts)
    start = torch.cumsum(counts, 0) - counts
    number = torch.arange(owner.numel(), device=counts.device) - _at(start, owner)
    return owner, number


def _count(mask: Tensor) -> Tensor:
    """True entries of every row ``[N, M]`` of a bool mask.

    Adds eight bytes at a time: summing booleans one by one takes longer than drawing them.
    """
    rows, length = mask.shape
    if length % 512:
        return mask.sum(1)
    lanes = mask.view(torch.int64).view(rows, 64, length // 512)  # no lane exceeds 64
    return lanes.sum(1).view(torch.uint8).view(rows, -1).sum(1)


def rasterise(
    screen: Tensor,
    faces: Tensor,
    keep: Tensor,
    two_sided: Tensor,
    part: Tensor,
    parts: int,
    size: tuple[int, int],
) -> Hits:
    """Z-buffer a batch of meshes that share one topology.

    A face is cut into pixel rows and each row into the exact span between its edges, so that the
    per-pixel work is on covered pixels only. Depth is linear in the image within a face.

    Args:
        screen: ``[B, V, 3]`` x (right) and y (down) in pixels, pixel (0, 0) covering 0..1, and
            depth (positive, larger is farther).
        faces: ``[F, 3]`` corner indices, counter-clockwise seen from outside.
        keep: ``[B, F]`` bool, the faces that exist.
        two_sided: ``[F]`` bool, faces that show their back as well.
        part: ``[F]`` int64, body part of a face.
        parts: number of parts P.
        size: (height, width).
    """
    height, width = size
    batch = screen.shape[0]
    device = screen.device
    corners = [screen.index_select(1, faces[:, i]) for i in range(3)]  # three times [B, F, 3]
    (ax, ay, _), (bx, by, _), (cx, cy, _) = (c.unbind(-1) for c in corners)
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    top = torch.minimum(torch.minimum(ay, by), cy)
    bottom = torch.maximum(torch.maximum(ay, by), cy)
    left = torch.minimum(torch.minimum(ax, bx), cx)
    right = torch.maximum(torch.maximum(ax, bx), cx)
    first = torch.ceil(top - 0.5).clamp(min=0)
    last = torch.floor(bottom - 0.5).clamp(max=height - 1)
    visible = keep & ((area < -1e-6) | (two_sided & (area > 1e-6)))
    visible &= (last >= first) & (right > 0) & (left < width)
    chosen = torch.nonzero(visible.flatten()).flatten()

    table = torch.cat(corners, dim=-1).reshape(-1, 9).index_select(0, chosen)
    ax, ay, az, bx, by, bz, cx, cy, cz = (column.contiguous() for column in table.unbind(1))
    inverse = 1.0 / ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
    depth_x = ((bz - az) * (cy - ay) - (cz - az) * (by - ay)) * inverse
    depth_y = ((cz - az) * (bx - ax) - (bz - az) * (cx - ax)) * inverse
    nearest = torch.minimum(torch.minimum(az, bz), cz)
    image = chosen // faces.shape[0]
    face = chosen - image * faces.shape[0]

    # Rows of every face, and the span of each row.
    first = _at(first.flatten(), chosen)
    owner, number = _expand((_at(last.flatten(), chosen) - first + 1).long())
    row = _at(first, owner) + number
    centre = row + 0.5
    low = torch.full_like(centre, 1e9)
    high = torch.full_like(centre, -1e9)
    for px, py, qx, qy in ((ax, ay, bx, by), (bx, by, cx, cy), (cx, cy, ax, ay)):
        rise = qy - py
        slope = torch.where(rise.abs() > 1e-12, (qx - px) / rise, torch.zeros_like(rise))
        edge_x = _at(px, owner) + (centre - _at(py, owner)) * _at(slope, owner)
        active = (centre >= _at(torch.minimum(py, qy), owner)) & (
            centre <= _at(torch.maximum(py, qy), owner)
        )
        low = torch.where(active, torch.minimum(low, edge_x), low)
        high = torch.where(active, torch.maximum(high, edge_x), high)
    begin = torch.ceil(low - 0.5 - _SLACK).clamp(min=0)
    end = torch.floor(high - 0.5 + _SLACK).clamp(max=width - 1)
    count = (end - begin + 1).clamp(min=0)
    row_depth = (
        _at(az, owner)
        + _at(depth_x, owner) * (begin + 0.5 - _at(ax, owner))
        + _at(depth_y, owner) * (centre - _at(ay, owner))
    )
    row_start = (_at(image, owner) * height + row.long()) * width + begin.long()

    # Pixels of every span.
    span, number = _expand(count.long())
    triangle = _at(owner, span)
    pixel = _at(row_start, span) + number
    depth = _at(row_depth, span) + _at(depth_x, triangle) * number
    # Thin faces seen edge on have steep depth planes; never let them come nearer than they are.
    depth = torch.maximum(depth, _at(nearest, triangle))
    # Positive floats sort like their bits: depth above, the face below, one minimum for both.
    key = (depth.view(torch.int32).long() << 32) | triangle
    buffer = torch.full((batch * height * width,), _EMPTY, dtype=torch.int64, device=device)
    buffer.scatter_reduce_(0, pixel, key, "amin")

    coverage = torch.zeros(batch * parts * height * width, dtype=torch.bool, device=device)
    pixels = height * width
    # pixel + image * pixels * (parts - 1) + part * pixels, per triangle.
    offset = (image * (parts - 1) + _at(part, face)) * pixels
    coverage[pixel + _at(offset, triangle)] = True

    shown = torch.nonzero(buffer != _EMPTY).flatten()
    winner = _at(buffer, shown) & 0xFFFFFFFF
    x = (shown % width).float() + 0.5
    y = ((shown // width) % height).float() + 0.5
    ax, ay, bx, by = _at(ax, winner), _at(ay, winner), _at(bx, winner), _at(by, winner)
    cx, cy, inverse = _at(cx, winner), _at(cy, winner), _at(inverse, winner)
    weight_b = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) * inverse
    weight_c = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) * inverse
    weight_b = weight_b.clamp(0.0, 1.0)
    weight_c = torch.minimum(weight_c.clamp(min=0.0), 1.0 - weight_b)
    weights = torch.stack((1.0 - weight_b - weight_c, weight_b, weight_c), dim=1)
    return Hits(
        pixel=shown,
        image=_at(image, winner),
        face=_at(face, winner),
        weights=weights,
        silhouette=_count(coverage.view(batch * parts, pixels)).view(batch, parts),
    )
