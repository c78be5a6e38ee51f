"""The part-aware network: masks, part embeddings, losses; and that it is the published one at 0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from gsalign.model import GSAlign, ModelConfig, load_model, losses, save_weights
from gsalign.model.mask_decoder import MaskDecoder
from gsalign_kernels import stripe_masks

PARTS = 3


@pytest.fixture
def config(tiny_config) -> ModelConfig:
    return tiny_config.model_copy(update={"parts": PARTS})


def test_without_parts_it_is_the_published_network_bit_for_bit(tiny_config, config, make_batch):
    """The parts are drawn last and read only: the rest is the same with them as without."""
    torch.manual_seed(5)
    plain = GSAlign(tiny_config)
    torch.manual_seed(5)
    parted = GSAlign(config)
    assert tiny_config.parts == 0 and plain.parts is None
    names = dict(plain.named_parameters())
    for name, parameter in parted.named_parameters():
        if not name.startswith("parts."):
            assert torch.equal(parameter, names.pop(name)), name
    assert not names
    batch = make_batch(tiny_config)
    left, right = plain.losses(*batch), parted.losses(*batch)
    assert set(right) - set(left) == {"part_identity", "part_collapse"}
    for name in ("view", "orthogonality", "deformation"):
        torch.testing.assert_close(left[name], right[name])


def test_masks_share_every_patch_with_the_background(config, make_model, make_batch):
    images, *_ = make_batch(config)
    seen = make_model(config).eval().forward_features(images).parts
    rows, columns = config.grid
    assert seen.masks.shape == (len(images), PARTS + 1, rows * columns)
    torch.testing.assert_close(seen.masks.sum(dim=1), torch.ones(len(images), rows * columns))
    torch.testing.assert_close(seen.visibility, seen.masks[:, 1:].amax(dim=2))


def test_pooled_is_the_weighted_mean_of_the_final_patches(config, make_model, make_batch):
    images, *_ = make_batch(config)
    model = make_model(config).eval()
    with torch.no_grad():
        seen = model.forward_features(images).parts
        tokens, *_ = model.backbone(model.backbone.patches(images), all_tokens=True)
        patches = model.backbone.norm(tokens)[:, 2:]
    logits = patches @ model.parts.mask.weight.T + model.parts.mask.bias
    masks = (logits + model.parts.position_bias.T).softmax(dim=2)[:, :, 1:]
    wanted = torch.einsum("bnp,bnc->bpc", masks, patches) / masks.sum(dim=1).unsqueeze(2)
    torch.testing.assert_close(seen.pooled, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 2])
def test_every_parameter_learns(config, make_model, make_batch, cells):
    model = make_model(config.model_copy(update={"part_cells": cells})).train()
    sum(model.losses(*make_batch(config)).values()).backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not idle


def test_embed_is_the_parts_in_one_vector(config, make_model, make_batch):
    images, *_ = make_batch(config)
    model = make_model(config).eval()
    with torch.no_grad():
        parts, flat = model.embed_parts(images), model.embed(images)
        plain = model.identity_head.embed(model.forward_features(images).feature)
    assert flat.shape == (len(images), config.embedding_size)
    assert torch.equal(parts.visibility[:, 0], torch.ones(len(images)))
    torch.testing.assert_close(parts.vectors[:, 0], plain)
    unit = normalize(parts.vectors, dim=2)
    weights = (parts.visibility.unsqueeze(1) * parts.visibility.unsqueeze(0)).sqrt()
    cosines = torch.einsum("apc,bpc->abp", unit, unit)
    torch.testing.assert_close(flat @ flat.T, (weights * cosines).sum(dim=2), rtol=1e-4, atol=1e-5)


def test_a_network_without_parts_has_the_whole_image_as_its_only_one(
    tiny_config, make_model, make_batch
):
    images, *_ = make_batch(tiny_config)
    model = make_model(tiny_config).eval()
    parts = model.embed_parts(images)
    assert torch.equal(parts.vectors, model.embed(images).unsqueeze(1))
    assert torch.equal(parts.visibility, torch.ones(len(images), 1))


def test_a_part_cannot_lower_its_loss_by_hiding(config, make_model, make_batch):
    images, identities, _ = make_batch(config)
    model = make_model(config).train()
    seen = model.forward_features(images).parts
    visibility = seen.visibility.detach().requires_grad_()
    hidden = replace(seen, visibility=visibility)
    loss = model.parts.identity_loss(hidden, identities)
    assert loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, visibility, allow_unused=True)
    assert gradient is None


def test_weighted_classification_against_a_loop():
    logits, labels = torch.randn(4, 3, 5), torch.tensor([0, 4, 2, 2])
    weights = torch.rand(4, 3)
    terms = [
        weights[b, p] * cross_entropy(logits[b, p], labels[b]) for b in range(4) for p in range(3)
    ]
    wanted = sum(terms) / weights.sum()
    torch.testing.assert_close(losses.weighted_classification(logits, labels, weights), wanted)
    assert losses.weighted_classification(logits, labels, torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("cells", [1, 4])
def test_masks_start_as_stripes(config, cells):
    config = config.model_copy(update={"part_cells": cells})
    branch = GSAlign(config).parts
    tokens = torch.zeros(1, 2 + math.prod(config.grid), config.width)
    winners = branch(tokens, torch.zeros(1, 3, *config.image_size)).masks[0].argmax(dim=0)
    stripes = stripe_masks(config.mask_grid, PARTS)
    assert torch.equal(winners, 1 + stripes.argmax(dim=0))


def test_cells_hear_of_their_own_patch_and_its_pixels():
    """A token or a pixel reaches its patch's cells, or its cell, and two cells further."""
    size, patch, cells = (4, 3), 8, 4
    decoder = MaskDecoder(width=7, size=size, patch=patch, cells=cells, outputs=3)
    torch.nn.init.normal_(decoder.out.weight)
    tokens = torch.randn(1, 12, 7, requires_grad=True)
    images = torch.randn(1, 3, 32, 24, requires_grad=True)
    logits = decoder(tokens, images).view(3, 16, 12)
    for row, column in ((0, 0), (5, 6), (15, 11), (8, 3)):
        told, seen = torch.autograd.grad(
            logits[:, row, column].sum(), (tokens, images), retain_graph=True
        )
        told, seen = told.abs().sum(dim=2).view(4, 3), seen.abs().sum(dim=(0, 1))
        assert told[row // cells, column // cells] > 0
        side = patch // cells
        pixels = seen.view(16, side, 12, side).sum(dim=(1, 3))
        for y in range(16):
            for x in range(12):
                near = abs(y - row) <= 2 and abs(x - column) <= 2
                assert (pixels[y, x] > 0) == near
        patches = torch.zeros(4, 3, dtype=torch.bool)
        for y, x in pixels.nonzero().tolist():
            patches[y // cells, x // cells] = True
        assert torch.equal(told > 0, patches)


def test_the_mask_of_a_patch_is_the_mean_over_its_cells(config, make_model, make_batch):
    config = config.model_copy(update={"part_cells": 4})
    images, *_ = make_batch(config)
    seen = make_model(config).eval().forward_features(images).parts
    rows, columns = config.grid
    cells = seen.masks.view(len(images), PARTS + 1, rows, 4, columns, 4)
    torch.testing.assert_close(seen.logits.softmax(dim=1), cells.mean(dim=(3, 5)).flatten(2))


def test_visibility_is_the_mean_of_the_fullest_patchs_worth_of_cells(
    config, make_model, make_batch
):
    config = config.model_copy(update={"part_cells": 2})
    images, *_ = make_batch(config)
    seen = make_model(config, 0.5).eval().forward_features(images).parts
    for image in range(len(images)):
        for part in range(PARTS):
            fullest = sorted(seen.masks[image, 1 + part].tolist(), reverse=True)[:4]
            assert seen.visibility[image, part].item() == pytest.approx(sum(fullest) / 4, rel=1e-5)


def label_loss(logits, labels, grid):
    return losses.part_labels(losses.part_label_costs(logits, labels, grid))


@pytest.mark.parametrize("grid", [(2, 3), (4, 6), (8, 12)])
def test_label_loss_against_a_loop(grid):
    """Pixel by pixel: every known pixel costs the logarithm of its part's mask in its cell."""
    rows, columns = grid
    labels = torch.randint(0, PARTS + 1, (2, 8, 12), dtype=torch.uint8)
    labels[0, :3] = 255
    logits = torch.randn(2, PARTS + 1, rows * columns, dtype=torch.float64, requires_grad=True)
    log_masks = logits.log_softmax(dim=1).view(2, PARTS + 1, rows, columns)
    costs = [
        -log_masks[b, int(labels[b, y, x]), y * rows // 8, x * columns // 12]
        for b in range(2)
        for y in range(8)
        for x in range(12)
        if labels[b, y, x] != 255
    ]
    wanted = sum(costs) / len(costs)
    got = label_loss(logits, labels, grid)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, wanted))
    )
    assert torch.autograd.gradcheck(lambda x: label_loss(x, labels, grid), logits)


def test_label_loss_is_least_at_the_shares_and_0_where_nothing_is_known():
    labels = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, 255]]], dtype=torch.uint8)
    shares = torch.tensor([[[0.25, 0.0], [0.75, 0.0], [0.0, 1.0]]])
    logits = (shares + 1e-30).log().requires_grad_()
    (gradient,) = torch.autograd.grad(label_loss(logits, labels, (1, 2)), logits)
    assert gradient.abs().max() < 1e-6
    nothing = torch.full_like(labels, 255)
    loss = label_loss(logits, nothing, (1, 2))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0 and not gradient.any()


def test_label_maps_teach_the_masks_and_need_not_be_there(config, make_model, make_batch):
    taught = config.model_copy(
        update={"part_cells": 2, "losses": config.losses.model_copy(update={"part_labels": 2.0})}
    )
    images, identities, views = make_batch(taught)
    labels = torch.randint(0, PARTS + 1, (len(images), *taught.image_size), dtype=torch.uint8)
    model = make_model(taught).train()
    without = model.losses(images, identities, views)
    assert without["part_labels"].item() == 0.0
    terms = model(images, identities, views, labels)
    seen = model.forward_features(images).parts
    wanted = 2.0 * label_loss(seen.cell_logits, labels, taught.mask_grid)
    torch.testing.assert_close(terms["part_labels"], wanted)
    for name in set(terms) - {"part_labels"}:
        torch.testing.assert_close(terms[name], without[name])
    gradient = torch.autograd.grad(terms["part_labels"], model.parts.mask.out.weight)[0]
    assert gradient.flatten(1).any(dim=1).all()
    with pytest.raises(ValueError, match=r"part_labels must be \[6, 32, 16\].*got \[6, 16, 32\]"):
        model.losses(images, identities, views, labels.transpose(1, 2))


def test_label_maps_are_not_read_at_weight_0(config, make_model, make_batch):
    images, identities, views = make_batch(config)
    labels = torch.zeros(len(images), *config.image_size, dtype=torch.uint8)
    model = make_model(config).eval()
    without, given = (
        model.losses(images, identities, views),
        model.losses(images, identities, views, labels),
    )
    assert list(without) == list(given)
    assert all(torch.equal(without[name], given[name]) for name in without)


def test_collapse_knows_its_extremes():
    shared = torch.full((2, 4, 30), -100.0)
    for part in range(1, 4):
        shared[:, part, 10 * (part - 1) : 10 * part] = 100.0
    assert losses.part_collapse(shared).item() == pytest.approx(0.0, abs=1e-6)
    shared[:, 0] = -100.0
    shared[:, :, 5] = -100.0
    shared[:, 0, 5] = shared[:, 0, 15] = shared[:, 0, 25] = 100.0
    shared[:, 2, 15] = shared[:, 3, 25] = -100.0
    # The background may have any share, as long as the parts share the rest.
    assert losses.part_collapse(shared).item() == pytest.approx(0.0, abs=1e-6)
    taken = torch.full((2, 4, 30), -100.0)
    taken[:, 1] = 100.0
    assert losses.part_collapse(taken).item() == pytest.approx(1.0)
    # Each image a part's own: no better.
    taken[1] = -100.0
    taken[1, 2] = 100.0
    assert losses.part_collapse(taken).item() == pytest.approx(1.0)
    assert losses.part_collapse(torch.zeros(2, 4, 30)).item() == pytest.approx(1.0)
    assert losses.part_collapse(torch.zeros(2, 2, 30)).item() == pytest.approx(1.0)
    one = torch.full((2, 2, 30), -100.0)
    one[:, 1] = 100.0
    assert losses.part_collapse(one).item() == pytest.approx(0.0, abs=1e-6)


def test_collapse_against_a_loop():
    logits = 3 * torch.randn(2, 4, 8, dtype=torch.float64)
    masks = logits.softmax(dim=1)
    entropy = sum(-m * math.log(m) for m in masks.flatten().tolist()) / 16
    spread = 0.0
    for image in masks[:, 1:].sum(dim=2).tolist():
        shares = [part / sum(image) for part in image]
        spread += sum(-share * math.log(share) for share in shares) / 2
    wanted = entropy / math.log(4) + 1 - spread / math.log(3)
    assert losses.part_collapse(logits).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("cells", [1, 2])
def test_runs_under_autocast_and_in_float64(cells, config, make_model, make_batch):
    config = config.model_copy(update={"part_cells": cells})
    images, identities, views = make_batch(config)
    model = make_model(config).train()
    wanted = model.losses(images, identities, views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model.losses(images, identities, views)
    for name in ("part_identity", "part_collapse"):
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], wanted[name], rtol=0.05, atol=0.02)
    terms = model.double().losses(images.double(), identities, views)
    assert {term.dtype for term in terms.values()} == {torch.float64}


@pytest.mark.parametrize("cells", [1, 2])
def test_compiles_in_one_graph(cells, config, make_model, make_batch):
    config = config.model_copy(update={"part_cells": cells})
    images, identities, views = make_batch(config)
    model = make_model(config).eval()
    wanted = model.losses(images, identities, views)
    compiled = torch.compile(model.losses, fullgraph=True, backend="aot_eager")
    for name, term in compiled(images, identities, views).items():
        torch.testing.assert_close(term, wanted[name])
    with torch.no_grad():
        embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(embed(images), model.embed(images))


@pytest.mark.parametrize("cells", [1, 2])
def test_saves_and_loads_with_its_parts(cells, config, make_model, make_batch, tmp_path):
    config = config.model_copy(update={"part_cells": cells})
    images, *_ = make_batch(config)
    model = make_model(config).eval()
    save_weights(model, tmp_path / "parts.safetensors")
    loaded = load_model(tmp_path / "parts.safetensors")
    assert loaded.config == config
    assert torch.equal(loaded.embed(images), model.embed(images))
