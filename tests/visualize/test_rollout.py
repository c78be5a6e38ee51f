"""Attention roll-out: against one written by hand, and the picture of it."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import colours, network, texts

from gsalign.model.ltps import PREFIX
from gsalign.model.vit import attend, attended_from
from gsalign.visualize import attention_maps, attention_rollout
from gsalign.visualize.looking import look_at
from gsalign.visualize.rollout import layer_mixing, maps_of, warp_mixing

TURNED = 0.4


def turning(**settings):
    """A network in float64 whose every warp turns and bends."""
    model = network(**settings).double().eval()
    with torch.no_grad():
        model.backbone.view_token.normal_(std=0.02)
        for ltps in model.backbone.ltps.values():
            ltps.predictor.out.bias.fill_(TURNED)
            ltps.source_points += 0.1 * torch.randn_like(ltps.source_points)
            if ltps.offsets is not None:
                ltps.offsets.weight.normal_()
    return model


def images_of(model, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *model.config.image_size, dtype=torch.float64) * 2 - 1


def bilinear(grid: torch.Tensor) -> torch.Tensor:
    """Weights ``[N, N]`` by which positions ``[H, W, 2]`` in [-1, 1] read the cells of a map."""
    rows, columns = grid.shape[:2]
    weights = torch.zeros(rows * columns, rows * columns, dtype=grid.dtype)
    for place, (x, y) in enumerate(grid.flatten(0, 1).tolist()):
        across = min(max((x + 1) / 2 * (columns - 1), 0.0), columns - 1.0)
        down = min(max((y + 1) / 2 * (rows - 1), 0.0), rows - 1.0)
        for row in range(rows):
            for column in range(columns):
                share = max(0.0, 1 - abs(down - row)) * max(0.0, 1 - abs(across - column))
                weights[place, row * columns + column] = share
    return weights


def by_hand(model, image: torch.Tensor, heads: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Roll-out and last tokens of one image, layer by layer with plain matrices."""
    backbone = model.backbone
    patches = backbone.patch_embed.proj(image.unsqueeze(0)).flatten(2).transpose(1, 2)[0]
    tokens = torch.cat([backbone.class_token[0], backbone.view_token[0], patches])
    tokens = tokens + backbone.position[0]
    flow = torch.eye(len(tokens), dtype=torch.float64)
    for index, block in enumerate(backbone.blocks):
        if str(index) in backbone.ltps:
            ltps = backbone.ltps[str(index)]
            grid = ltps.sampling_grid(*ltps(tokens.unsqueeze(0))[1:])[0]
            warp = torch.eye(len(tokens), dtype=torch.float64)
            warp[PREFIX:, PREFIX:] += ltps.eta * bilinear(grid)
            tokens = warp @ tokens
            flow = warp / warp.sum(dim=1, keepdim=True) @ flow
        packed = block.attn.qkv(block.norm1(tokens))
        query, key, value = packed.chunk(3, dim=1)
        attended, weights = [], []
        for q, k, v in zip(*(part.chunk(2, dim=1) for part in (query, key, value)), strict=True):
            weights.append((q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1))
            attended.append(weights[-1] @ v)
        tokens = tokens + block.attn.proj(torch.cat(attended, dim=1))
        tokens = tokens + block.mlp(block.norm2(tokens))
        tokens = torch.cat([tokens[:1] - tokens[1:2], tokens[1:]])
        both = torch.stack(weights)
        joined = both.mean(0) if heads == "mean" else both.max(0).values
        joined = joined / joined.sum(dim=1, keepdim=True)
        flow = (0.5 * joined + 0.5 * torch.eye(len(tokens), dtype=torch.float64)) @ flow
    return flow, tokens


@pytest.mark.parametrize(("heads", "own_points"), [("mean", False), ("max", False), ("mean", True)])
@torch.no_grad()
def test_roll_out_is_the_one_written_by_hand(heads, own_points):
    model = turning(ltps={"hidden": (8, 4), "points_per_image": own_points})
    images = images_of(model)
    made = attention_rollout(model, images, heads=heads)
    for image, flow in zip(images, made, strict=True):
        wanted, tokens = by_hand(model, image, heads)
        torch.testing.assert_close(flow, wanted, rtol=0, atol=1e-12)
        # And the hand went where the network goes.
        out, *_ = model.backbone(model.backbone.patches(image.unsqueeze(0)), all_tokens=True)
        torch.testing.assert_close(out[0], tokens, rtol=0, atol=1e-12)


def test_rows_sum_to_one_and_the_network_is_as_before():
    model = turning(drop_path=0.5).train()
    images = images_of(model)
    flow = attention_rollout(model, images)
    assert flow.shape == (2, PREFIX + 8, PREFIX + 8) and not flow.requires_grad
    torch.testing.assert_close(flow.sum(2), torch.ones_like(flow[..., 0]), rtol=0, atol=1e-14)
    assert (flow >= 0).all()
    assert model.training
    assert not any(block.norm1._forward_hooks for block in model.backbone.blocks)
    # Stochastic depth does not act.
    assert torch.equal(flow, attention_rollout(model, images))


def test_attention_that_is_even_gives_an_even_map():
    model = network().double()
    width = model.config.width
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.attn.qkv.weight[: 2 * width] = 0
        for ltps in model.backbone.ltps.values():
            ltps.predictor.out.weight.zero_()  # no turn; the points start on the grid
    maps = maps_of(attention_rollout(model, images_of(model)), model.config.grid)
    assert maps.shape == (2, 2, 4, 2)
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 8), rtol=0, atol=1e-14)


def test_a_warp_leaves_class_and_view_token_alone():
    model = turning()
    ltps = model.backbone.ltps["0"]
    angle = torch.tensor([0.0, 1.2], dtype=torch.float64)
    mixing = warp_mixing(ltps, angle)
    unit = torch.eye(PREFIX + 8, dtype=torch.float64)
    for matrix, grid in zip(mixing, ltps.sampling_grid(angle).detach(), strict=True):
        assert torch.equal(matrix[:PREFIX], unit[:PREFIX])
        assert torch.equal(matrix[:, :PREFIX], unit[:, :PREFIX])
        patches = (unit[PREFIX:, PREFIX:] + ltps.eta * bilinear(grid)) / (1 + ltps.eta)
        torch.testing.assert_close(matrix[PREFIX:, PREFIX:], patches, rtol=0, atol=1e-12)
    assert not torch.allclose(mixing[0], mixing[1])


def test_what_is_read_counts_whatever_the_sign_of_eta():
    ltps = turning(ltps={"hidden": (8, 4), "eta": -0.5}).backbone.ltps["1"]
    mixing = warp_mixing(ltps, torch.tensor([0.7], dtype=torch.float64))
    assert (mixing >= 0).all()
    torch.testing.assert_close(mixing.sum(2), torch.ones_like(mixing[..., 0]))


@torch.no_grad()
def test_weights_made_again_are_those_that_attention_uses():
    attention = turning().backbone.blocks[0].attn
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    packed = attention.qkv(tokens)
    weights = attended_from(attention, tokens)
    assert weights.shape == (2, 2, 5, 5)
    value = packed[..., 48:].unflatten(2, (2, 12)).transpose(1, 2)
    mixed = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, attend(attention, packed), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_map_is_of_the_image_as_it_was_turned():
    model = turning(orientation={"enabled": True})
    images = images_of(model)
    made = attention_rollout(model, images)
    upright = model.uprighting(images).images
    assert not torch.allclose(upright, images)
    model.uprighting = None
    torch.testing.assert_close(made, attention_rollout(model, upright), rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [-0.1, 1.5])
def test_a_residual_that_is_no_share_is_refused(residual):
    with pytest.raises(ValueError, match=r"residual is .*from 0 to 1"):
        layer_mixing(torch.ones(1, 1, 2, 2), residual=residual)


def test_attention_is_drawn_over_the_images(tmp_path, dataset, panels):
    model = network().train()
    records = dataset.query.records[:3]
    path = tmp_path / "attention.png"
    attention_maps(model, records, path, title="attention")
    assert model.training and len(colours(path)) > 50
    (figure,) = panels
    pictures, _ = look_at(model, records)
    size = model.config.image_size
    images = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5
    wanted = maps_of(attention_rollout(model, images), model.config.grid) * 8
    for row, maps in enumerate(wanted.transpose(0, 1)):
        for column, ratios in enumerate(maps):
            axes = figure.axes[3 * (row + 1) + column]
            drawn = axes.images[1]
            torch.testing.assert_close(torch.from_numpy(drawn.get_array().data), ratios)
            assert drawn.get_extent() == [-0.5, size[1] - 0.5, size[0] - 0.5, -0.5]
    told = texts(figure)
    assert {"attention", "image", "class token", "view token", "times an even share"} <= set(told)
    assert "as the network aligned them" not in " ".join(told)


def test_a_picture_of_turned_images_says_so(tmp_path, dataset, panels):
    model = network(orientation={"enabled": True})
    attention_maps(model, dataset.query.records[:1], tmp_path / "attention.png", heads="max")
    told = " ".join(texts(panels[0]))
    assert "max over heads; images are shown as the network aligned them" in told


def test_attention_over_nothing_or_in_an_unknown_way_is_refused(tmp_path, dataset):
    path = tmp_path / "attention.png"
    with pytest.raises(ValueError, match="records is empty"):
        attention_maps(network(), [], path)
    with pytest.raises(ValueError, match="heads is 'min'; wanted one of mean, max"):
        attention_maps(network(), dataset.query.records[:1], path, heads="min")
    with pytest.raises(ValueError, match="heads is 'min'"):
        attention_rollout(network(), torch.zeros(1, 3, 32, 16), heads="min")
    assert not path.exists()
