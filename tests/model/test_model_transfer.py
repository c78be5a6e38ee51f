"""Starting from a network of ours that knows other people."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, create_model, save_weights, transfer_weights

FRESH = ("identity_head.", "parts.heads.")


@pytest.fixture
def taught(tiny_config, make_model, tmp_path):
    """A network with parts, and the file it was saved to."""
    model = make_model(tiny_config.model_copy(update={"parts": 3, "part_cells": 2})).eval()
    path = tmp_path / "taught.safetensors"
    save_weights(model, path)
    return model, path


def test_masks_come_along_and_identities_do_not(taught, make_batch):
    teacher, path = taught
    config = teacher.config.model_copy(update={"num_identities": 11, "pretrained": str(path)})
    torch.manual_seed(2)
    fresh = GSAlign(config).state_dict()
    torch.manual_seed(2)
    model, report = create_model(config)
    theirs = teacher.state_dict()
    for name, value in model.state_dict().items():
        wanted = fresh if name.startswith(FRESH) else theirs
        assert torch.equal(value, wanted[name]), name
    assert "parts.mask.out.weight" in report.loaded and "backbone.ltps.0" in " ".join(report.loaded)
    assert set(report.untouched) == {n for n, _ in model.named_parameters() if n.startswith(FRESH)}
    assert all(name.startswith(FRESH) for name in report.left_out)
    assert str(path) in str(report)
    images, *_ = make_batch(config)
    seen = [net.eval().forward_features(images).parts.masks for net in (model, teacher)]
    assert torch.equal(*seen)


def test_parts_dam_and_the_turn_may_be_missing_on_either_side(taught, tiny_config, tmp_path):
    teacher, path = taught
    without = GSAlign(
        tiny_config.model_copy(
            update={"dam": tiny_config.dam.model_copy(update={"enabled": False})}
        )
    )
    report = transfer_weights(without, path)
    assert torch.equal(without.backbone.position, teacher.backbone.position)
    assert {name.split(".")[0] for name in report.left_out} == {"identity_head", "parts", "dam"}
    plain = tmp_path / "plain.safetensors"
    save_weights(without, plain)
    orientation = tiny_config.orientation.model_copy(update={"enabled": True})
    model = GSAlign(teacher.config.model_copy(update={"orientation": orientation}))
    masks = model.parts.mask.out.weight.clone()
    report = transfer_weights(model, plain)
    assert torch.equal(model.backbone.position, teacher.backbone.position)
    assert torch.equal(model.parts.mask.out.weight, masks)
    assert {"parts.mask.out.weight", "uprighting.predictor.out.weight"} <= set(report.untouched)
    turning = tmp_path / "turning.safetensors"
    save_weights(model, turning)
    report = transfer_weights(without, turning)
    assert "uprighting.predictor.out.weight" in report.left_out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"part_cells": 4}, r"parts.position_bias is \[4, 32\], the network has \[4, 128\]"),
        ({"part_cells": 1}, "nothing for parts.mask.weight"),
        ({"depth": 3}, "nothing for backbone.blocks.2"),
        ({"depth": 1}, "no place for backbone.blocks.1"),
    ],
)
def test_another_network_is_refused_whole(taught, change, told):
    teacher, path = taught
    model = GSAlign(teacher.config.model_copy(update=change))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=told):
        transfer_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_files_of_ours(taught, tmp_path):
    teacher, _ = taught
    path = tmp_path / "strange.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="carries no configuration"):
        transfer_weights(GSAlign(teacher.config), path)
    # By create_model it is taken for a plain ViT's, as ever.
    with pytest.raises(CheckpointError, match="does not fit a plain ViT"):
        create_model(teacher.config.model_copy(update={"pretrained": str(path)}))
