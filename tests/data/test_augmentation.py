"""Augmentation on a device: what was drawn travels with the bytes, and is done without waiting."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from gsalign.data import (
    AugmentationConfig,
    DataConfig,
    TrainTransform,
    evaluation_loader,
    load_cargo,
    train_loader,
)
from gsalign.data.samplers import draws_of

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from cargo_folder import labels_of, write_maps
from host_waits import NoHostWaits

SETS = {
    "cargo": AugmentationConfig.cargo(),
    "ag_reid": AugmentationConfig.ag_reid().model_copy(update={"augmix": 0.0}),
    "light": AugmentationConfig.light(),
    "none": AugmentationConfig.none(),
}


def config_of(cargo: Path, name: str, **changes) -> DataConfig:
    return DataConfig(
        root=cargo, image_size=(32, 16), identities_per_batch=2, images_per_identity=2,
        num_workers=0, augmentation=SETS[name], **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_bytes_and_what_was_drawn_make_the_batch_of_the_cpu(cargo, name):
    split = load_cargo(cargo).train
    plain = list(train_loader(split, config_of(cargo, name), seed=2))
    late = list(train_loader(split, config_of(cargo, name, augment_on_device=True), seed=2))
    assert len(plain) == len(late) > 0
    for done, open_ in zip(plain, late, strict=True):
        assert open_.images.dtype == torch.uint8 and done.augmentation is None
        assert torch.equal(open_.to("cpu").pixels(), done.images)
        assert torch.equal(done.pixels(), done.images)
        assert torch.equal(open_.identities, done.identities)


@pytest.mark.parametrize("name", SETS)
def test_label_maps_on_a_device_are_those_of_the_loader(cargo, name):
    split = load_cargo(cargo).train
    write_maps(cargo, split.paths)
    plain, late = (
        list(train_loader(split, config_of(cargo, name, augment_on_device=device), part_groups=6))
        for device in (False, True)
    )
    assert len(plain) == len(late) > 0
    for done, open_ in zip(plain, late, strict=True):
        assert done.label_maps() is done.part_labels
        assert done.part_labels.any()
        assert torch.equal(open_.to("cpu").label_maps(), done.part_labels)
    moved = [not torch.equal(open_.part_labels, open_.label_maps()) for open_ in late]
    assert any(moved) == (name != "none")


@pytest.mark.parametrize("name", SETS)
def test_nothing_waits_and_nothing_is_made_on_the_host(name):
    plan = TrainTransform(SETS[name], seed=1).plan(draws_of(range(4)), (32, 16))
    images = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    labels = images[:, 0]
    with NoHostWaits():
        done, maps = plan(images), plan.label_maps(labels)
    assert done.shape == images.shape and -1 <= done.min() and done.max() <= 1
    assert maps.shape == labels.shape and maps.dtype == torch.uint8
    there, bytes_there = plan.map(lambda tensor: tensor.to("meta")), images.to("meta")
    with NoHostWaits():
        assert there(bytes_there).device.type == "meta"
        assert there.label_maps(bytes_there[:, 0]).device.type == "meta"


def test_rectangles_by_mask_are_those_written_one_by_one():
    plan = TrainTransform(SETS["cargo"], seed=1).plan(draws_of(range(16)), (32, 16))
    assert (plan.erased[:, 2] > 0).any() and (plan.erased[:, 2] == 0).any()
    images = torch.zeros(16, 3, 32, 16)
    masked = plan._masked(images, plan.erased, plan.fill)
    assert masked.ne(0).any()
    assert torch.equal(masked, plan._without_rectangles(images.clone(), plan.fill))
    labels = torch.full((16, 1, 32, 16), 3, dtype=torch.uint8)
    masked = plan._masked(labels, plan.erased, labels.new_zeros(1))
    assert masked.dtype == torch.uint8 and masked.eq(0).any()
    assert torch.equal(masked, plan._without_rectangles(labels.clone(), labels.new_zeros(1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("name", SETS)
def test_a_gpu_makes_the_same_images(name):
    plan = TrainTransform(SETS[name], seed=1).plan(draws_of(range(8)), (64, 32))
    images = torch.randint(0, 256, (8, 3, 64, 32), dtype=torch.uint8)
    mine = plan.map(lambda tensor: tensor.cuda())(images.cuda()).cpu()
    different = (mine - plan(images)).abs().amax(1) > 1e-3
    # At a border of the crop a rounding decides between black and not.
    assert different.float().mean() < 1e-3
    maps = plan.map(lambda tensor: tensor.cuda()).label_maps(images[:, 0].cuda()).cpu()
    assert maps.ne(plan.label_maps(images[:, 0])).float().mean() < 1e-3


def test_augmix_is_refused_on_a_device(cargo):
    with pytest.raises(ValidationError, match=r"AugMix runs on the CPU only.*augmix=0"):
        DataConfig(root=cargo, augmentation=AugmentationConfig.ag_reid(), augment_on_device=True)


def test_evaluation_batches_of_bytes(cargo):
    config, split = config_of(cargo, "cargo"), load_cargo(cargo).query
    pairs = zip(
        evaluation_loader(split, config),
        evaluation_loader(split, config, as_bytes=True),
        strict=True,
    )
    for done, open_ in pairs:
        assert open_.images.dtype == torch.uint8
        assert torch.equal(open_.pixels(), done.images)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_person_nobody_can_read_leaves_the_batch_as_large(cargo, on_device):
    split = load_cargo(cargo).train
    first = split.records[0].identity
    for record in split.records:
        if record.identity == first:
            record.path.write_bytes(b"no image")
    write_maps(cargo, split.paths)
    config = config_of(cargo, "none", on_broken="skip", augment_on_device=on_device)
    batches = list(train_loader(split, config, iterations=(0, 6), part_groups=6))
    assert {len(batch) for batch in batches} == {4}
    assert any(batch.broken for batch in batches)
    assert all(len(batch.images) == len(batch.identities) == 4 for batch in batches)
    for batch in batches:
        assert torch.equal(batch.label_maps()[:, 0, -1], labels_of(batch.indices, 6))
