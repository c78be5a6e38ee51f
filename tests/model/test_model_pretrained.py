"""Starting from a plain ViT's weights."""

from __future__ import annotations

from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, ModelConfig, create_model, load_pretrained
from gsalign.model.pretrained import resize_position


def plain_vit(**kwargs) -> VisionTransformer:
    arguments = {
        "img_size": 24,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 7,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
    }
    vit = VisionTransformer(**{**arguments, **kwargs})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.3)
    return vit.eval()


def test_without_our_parts_the_network_is_that_vit():
    """Same map, no LTPS, and a view token that nobody attends to: timm's own class token."""
    vit = plain_vit()
    config = ModelConfig(
        image_size=(24, 24),
        patch_size=8,
        width=24,
        depth=2,
        num_heads=3,
        ltps={"layers": []},
    )
    model = GSAlign(config).eval()
    load_pretrained(model, vit.state_dict())
    images = torch.randn(2, 3, 24, 24)
    tokens = model.backbone.patches(images)
    torch.testing.assert_close(tokens, vit.patch_embed(images))
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], dim=1) + vit.pos_embed
    for ours, theirs in zip(model.backbone.blocks, vit.blocks, strict=True):
        torch.testing.assert_close(ours(tokens), theirs(tokens))
        tokens = theirs(tokens)
    torch.testing.assert_close(model.backbone.norm(tokens), vit.norm(tokens))


def test_position_embedding(tiny_config):
    vit = plain_vit()
    model = GSAlign(tiny_config)
    load_pretrained(model, vit.state_dict())
    position, old = model.backbone.position[0], vit.pos_embed[0]
    assert torch.equal(position[0], old[0])
    assert torch.equal(position[1], old[1])
    image = old[1:].T.reshape(1, 24, 3, 3)
    wanted = torch.nn.functional.interpolate(image, size=(4, 2), mode="bilinear")
    torch.testing.assert_close(position[2:], wanted.flatten(2)[0].T)
    assert torch.equal(model.backbone.view_token, torch.zeros(1, 1, 24))


def test_position_embedding_of_imagenet_s_map():
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).reshape(1, 196, 2)
    made = resize_position(torch.cat([torch.full((1, 1, 2), -1.0), grid], dim=1), (16, 8))
    assert made.shape == (1, 130, 2)
    assert made[0, 0].tolist() == [-1, -1] and made[0, 1].tolist() == [0, 0]
    # Pixel centres: new column j lies at (j + 1/2) * 14/8 - 1/2.
    torch.testing.assert_close(made[0, 2:10, 1], (torch.arange(8.0) + 0.5) * 14 / 8 - 0.5)
    torch.testing.assert_close(
        made[0, 2::8, 0], ((torch.arange(16.0) + 0.5) * 14 / 16 - 0.5).clamp(min=0, max=13)
    )


def test_same_map_is_copied():
    position = torch.randn(1, 10, 4)
    made = resize_position(position, (3, 3))
    assert torch.equal(made[:, 2:], position[:, 1:])


def test_report(tiny_config):
    model = GSAlign(tiny_config)
    report = load_pretrained(model, plain_vit().state_dict())
    ours = {name for name, _ in model.named_parameters()}
    assert set(report.loaded) | set(report.untouched) == ours
    assert not set(report.loaded) & set(report.untouched)
    assert set(report.left_out) == {"head.weight", "head.bias"}
    assert {name.split(".")[0] for name in report.untouched} == {
        "backbone",
        "dam",
        "identity_head",
        "view_head",
    }
    assert all(".ltps." in n for n in report.untouched if n.startswith("backbone"))
    text = str(report)
    assert "9 + 1 -> 4x2 + 2" in text and "left out head.weight, head.bias" in text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_by_configuration(tiny_config, tmp_path, suffix):
    vit = plain_vit()
    path = tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        torch.save({"model": vit.state_dict()}, path)
    else:
        safetensors.torch.save_file(vit.state_dict(), path)
    config = tiny_config.model_copy(update={"pretrained": str(path)})
    model, report = create_model(config)
    assert report.source == str(path)
    assert torch.equal(model.backbone.class_token, vit.cls_token)
    assert create_model(tiny_config)[1] is None


def test_distilled_deit(tiny_config):
    state = plain_vit().state_dict()
    state["dist_token"] = torch.zeros(1, 1, 24)
    position = state["pos_embed"]
    state["pos_embed"] = torch.cat([position[:, :1], torch.ones(1, 1, 24), position[:, 1:]], dim=1)
    model = GSAlign(tiny_config)
    report = load_pretrained(model, state)
    assert "dist_token" in report.left_out
    assert torch.equal(model.backbone.position[:, :2], position[:, :2])


def test_timm_by_name(monkeypatch, tiny_config):
    vit = plain_vit()
    seen = []

    def create(name, pretrained):
        seen.append((name, pretrained))
        return vit

    monkeypatch.setattr(timm, "create_model", create)
    model = GSAlign(tiny_config)
    report = load_pretrained(model, "vit_tiny_patch16_224.augreg_in21k")
    assert seen == [("vit_tiny_patch16_224.augreg_in21k", True)]
    assert report.source == "vit_tiny_patch16_224.augreg_in21k"
    assert torch.equal(model.backbone.class_token, vit.cls_token)


def test_failures_of_timm(monkeypatch, tiny_config):
    model = GSAlign(tiny_config)
    with pytest.raises(CheckpointError, match="neither a file nor a model of timm"):
        load_pretrained(model, "no_such_model")

    def create(name, pretrained):
        raise OSError("the network is down")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(CheckpointError, match="the network is down"):
        load_pretrained(model, "vit_tiny_patch16_224")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="is a Linear, wanted a plain ViT"):
        load_pretrained(model, "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 3}, r"unknown blocks\.2"),
        ({"depth": 1}, r"nothing for backbone\.blocks\.1"),
        ({"init_values": 0.1}, r"unknown blocks\.0\.ls1\.gamma"),
        ({"reg_tokens": 2}, "unknown reg_token"),
        ({"pre_norm": True}, r"unknown norm_pre"),
        ({"class_token": False, "global_pool": "avg"}, r"nothing for backbone\.class_token"),
        ({"embed_dim": 48}, r"is \[1, 1, 48\], the network has \[1, 1, 24\]"),
        ({"patch_size": 4}, r"patch_embed\.proj\.weight is \[24, 3, 4, 4\]"),
        ({"img_size": (24, 16)}, "no square map"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(tiny_config, arguments, message):
    model = GSAlign(tiny_config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, plain_vit(**arguments).state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_missing_file(tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_pretrained(GSAlign(tiny_config), tmp_path / "absent.pth")
