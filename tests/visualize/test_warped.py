"""Images read through a layer's warp."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import network

from gsalign.visualize.warped import warped_images


def test_a_warp_that_moves_nothing_shows_the_image():
    ltps = network().backbone.ltps["0"]
    images = torch.rand(2, 3, 32, 16)
    same = warped_images(ltps, torch.zeros(2), images)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own_points", [False, True])
@torch.no_grad()
def test_at_the_centres_of_patches_it_reads_where_the_layer_reads(own_points):
    settings = {"hidden": (8, 4), "points_per_image": own_points}
    ltps = network(ltps=settings).double().backbone.ltps["0"]
    offsets = 0.1 * torch.randn(2, 4, 2, dtype=torch.float64) if own_points else None
    ltps.source_points += 0.1 * torch.randn_like(ltps.source_points)
    angle = torch.tensor([0.3, -0.2], dtype=torch.float64)
    # Two ramps tell where a pixel was read: in pixels, whose patches are 8 wide.
    down, across = torch.meshgrid(
        torch.arange(32, dtype=torch.float64), torch.arange(16, dtype=torch.float64), indexing="ij"
    )
    ramps = torch.stack([across, down]).expand(2, -1, -1, -1)
    read = warped_images(ltps, angle, ramps, offsets)
    # A patch of 8 is centred between its pixels 3 and 4.
    middle = torch.stack([read[..., 3 + i :: 8, 3 + j :: 8] for i in (0, 1) for j in (0, 1)]).mean(
        0
    )
    grid = ltps.sampling_grid(angle, offsets)
    wanted = torch.stack(
        [(grid[..., 0] + 1) / 2 * 8 + 3.5, ((grid[..., 1] + 1) / 2 * 3) * 8 + 3.5], dim=1
    )
    inside = ((grid.abs() < 0.9).all(-1)).unsqueeze(1).expand_as(wanted)
    assert inside.any()
    # The spline bends little within a patch.
    torch.testing.assert_close(middle[inside], wanted[inside], rtol=0, atol=0.05)


@torch.no_grad()
def test_a_turn_by_half_a_circle_is_the_image_upside_down():
    ltps = network().backbone.ltps["0"]
    images = torch.rand(1, 3, 32, 16)
    turned = warped_images(ltps, torch.tensor([math.pi]), images)
    torch.testing.assert_close(turned, images.flip(2, 3), rtol=0, atol=1e-5)
