"""Label maps that a network writes, and a run that learns from them."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, read_files

from gsalign.config import load_config
from gsalign.data import load_dataset, normalize, read_image, resize, train_loader
from gsalign.data.synthetic import PARTS, UNKNOWN, group_labels, part_groups, read_part_labels
from gsalign.engine.agreement import measure_parts
from gsalign.engine.build import build_trainer
from gsalign.engine.distributed import build_accelerator
from gsalign.engine.part_teacher import write_part_labels
from gsalign.errors import ConfigError, DataError
from gsalign.model import GSAlign, ModelConfig, save_weights


@pytest.fixture
def set_with(people, tmp_path):
    """A data set of one's own, its settings and a network of three parts with decided masks."""
    root = shutil.copytree(people, tmp_path / "set", ignore=shutil.ignore_patterns("parts"))
    config = load_config(
        None,
        [
            *TINY,
            f"data.root={root}",
            f"output={tmp_path / 'run'}",
            "model.parts=3",
            "model.part_cells=2",
            "model.losses.part_labels=1.0",
        ],
    )
    torch.manual_seed(0)
    teacher = GSAlign(config.model)
    torch.nn.init.normal_(teacher.parts.mask.out.weight, std=2.0)
    return root, config, teacher


def label(teacher, config, root, **options):
    split = load_dataset(config.data).train
    return write_part_labels(
        teacher, split, root, config.data, build_accelerator(device="cpu"), **options
    )


def test_maps_are_what_the_masks_see(set_with):
    root, config, teacher = set_with
    split = load_dataset(config.data).train
    assert label(teacher, config, root, sure=0.7) == len(split)
    assert not list(root.glob(".parts*"))
    firsts = [PARTS.index(group[0]) for group in part_groups(3).values()]
    seen = set()
    for record in split.records:
        image = normalize(resize(read_image(record.path), config.model.image_size))
        with torch.no_grad():
            masks = teacher.eval().forward_features(image.unsqueeze(0)).parts.masks
        masks = masks.unflatten(2, config.model.mask_grid)
        smooth = torch.nn.functional.interpolate(
            masks, size=config.model.image_size, mode="bilinear", align_corners=False
        )[0]
        labels = read_part_labels(root, record.path)
        unknown = labels == UNKNOWN
        near = (smooth.amax(dim=0) - 0.7).abs() < 1e-4
        assert torch.equal(unknown[~near], (smooth.amax(dim=0) < 0.7)[~near])
        known = ~unknown & ~near
        values = torch.tensor([0, *firsts], dtype=torch.uint8)
        assert torch.equal(labels[known], values[smooth.argmax(dim=0)][known])
        grouped = group_labels(labels, 3)
        assert torch.equal(grouped[known].long(), smooth.argmax(dim=0)[known])
        seen |= set(labels.tolist()[0])
    assert len(seen) > 1


def test_maps_of_turned_images_are_turned_back(set_with):
    """A teacher that turns all images by half a circle labels as one that sees them so."""
    root, config, teacher = set_with
    upright = {"orientation": {"enabled": True}}
    model = config.model.model_validate({**config.model.model_dump(), **upright})
    turning = GSAlign(model)
    turning.load_state_dict(teacher.state_dict(), strict=False)
    half = torch.tensor([-1.0, 0.0])
    turning.uprighting.predictor.forward = lambda maps: half.expand(len(maps), 2)
    label(turning, config, root, sure=0.0)
    record = load_dataset(config.data).train.records[0]
    image = normalize(resize(read_image(record.path), config.model.image_size))
    with torch.no_grad():
        masks = teacher.eval().forward_features(image.flip(1, 2).unsqueeze(0)).parts.masks
    smooth = torch.nn.functional.interpolate(
        masks.unflatten(2, config.model.mask_grid), size=config.model.image_size, mode="bilinear"
    )[0].flip(1, 2)
    best = smooth.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-3
    labels = group_labels(read_part_labels(root, record.path), 3).long()
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], best.indices[0][clear])
    assert not torch.equal(labels, labels.flip(0, 1))


def test_a_run_learns_from_them(set_with):
    """Started from the teacher, which labelled the set: the images' maps are what it reads."""
    root, config, teacher = set_with
    label(teacher, config, root)
    file = root.parent / "teacher.safetensors"
    save_weights(teacher, file)
    model = config.model.model_copy(update={"pretrained": str(file)})
    config = config.model_copy(update={"model": model})
    trainer = build_trainer(config)
    assert torch.equal(trainer.network.parts.mask.out.weight, teacher.parts.mask.out.weight)
    trainer.train()
    assert trainer.losses["part_labels"].item() > 0
    # Maps without a table of truth are a teacher's: nothing to measure masks by.
    dataset = load_dataset(config.data)
    accelerator = build_accelerator(device="cpu")
    assert measure_parts(teacher, [dataset.query], root, config.data, accelerator) is None


def test_without_maps_the_loss_is_0_and_the_log_says_so(set_with, caplog):
    root, config, _ = set_with
    trainer = build_trainer(config)
    with caplog.at_level("WARNING", logger="gsalign"):
        trainer.train()
    assert trainer.losses["part_labels"].item() == 0.0
    assert f"{root} has no label maps" in caplog.text


def test_without_maps_the_roll_cannot_be_learned_from_parts(set_with):
    root, config, _ = set_with
    orientation = {"enabled": True, "reads": "parts"}
    model = {**config.model.model_dump(), "parts": 0, "orientation": orientation}
    trainer = build_trainer(config.model_copy(update={"model": ModelConfig.model_validate(model)}))
    with pytest.raises(
        ConfigError, match=f"{root} has no label maps .* model.orientation.reads=rays"
    ):
        trainer.train()


def test_maps_that_are_there_stay(set_with):
    root, config, teacher = set_with
    label(teacher, config, root, sure=0.0)
    file = next((root / "parts").rglob("*.png"))
    before = file.read_bytes()
    assert not (np.asarray(Image.open(file)) == UNKNOWN).any()
    with pytest.raises(DataError, match=r"has label maps in parts/ already; --overwrite"):
        label(teacher, config, root)
    assert file.read_bytes() == before
    label(teacher, config, root, sure=1.0, overwrite=True)
    assert (np.asarray(Image.open(file)) == UNKNOWN).any()
    assert not (root / "parts" / "old").exists()
    (root / "generated.json").write_text("{}")
    with pytest.raises(DataError, match="was generated: its label maps are the truth"):
        label(teacher, config, root, overwrite=True)


@pytest.mark.parametrize("fault", ["all broken", "no move"])
def test_a_teacher_that_fails_loses_no_older_maps(set_with, monkeypatch, fault):
    root, config, teacher = set_with
    label(teacher, config, root)
    before = read_files(root / "parts")
    if fault == "all broken":
        told = "no image of train could be read"
        data = config.data.model_copy(update={"on_broken": "skip"})
        config = config.model_copy(update={"data": data})
        for file in (root / "train").rglob("*.jpg"):
            file.write_bytes(b"no image")
    else:
        told = "cannot be written: .*Input/output error"
        replace = os.replace

        def refused(source, target):
            if ".labelling-" in str(source) and source.name == "parts":
                raise OSError(5, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(DataError, match=told):
        label(teacher, config, root, overwrite=True)
    assert read_files(root / "parts") == before
    assert not list(root.glob(".parts*"))


def test_an_interrupted_teacher_leaves_nothing(set_with):
    root, config, teacher = set_with

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(teacher, config, root, progress=stop)
    assert not (root / "parts").exists() and not list(root.glob(".parts*"))


def test_a_network_that_knows_no_parts_is_no_teacher(set_with):
    root, config, _ = set_with
    for parts, told in ((0, "the network has no parts"), (7, "1 to 6 groups")):
        network = GSAlign(config.model.model_copy(update={"parts": parts}))
        with pytest.raises(ConfigError, match=told):
            label(network, config, root)
    with pytest.raises(ConfigError, match="1 to 6 groups"):
        (root / "parts").mkdir()
        next(iter(train_loader(load_dataset(config.data).train, config.data, part_groups=7)))
