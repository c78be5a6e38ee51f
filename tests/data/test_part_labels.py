"""Label maps: read, grouped, and moved as their images are."""

from __future__ import annotations

import pytest
import torch
from cargo_folder import labels_of, write_maps
from PIL import Image

from gsalign.data import AugmentationConfig, DataConfig, TrainTransform, load_dataset, train_loader
from gsalign.data.samplers import draws_of
from gsalign.data.synthetic import (
    BODY_PARTS,
    PART_GROUPS,
    PARTS,
    UNKNOWN,
    group_labels,
    part_groups,
    read_part_labels,
)
from gsalign.errors import ConfigError, DataError

ERASED = 255.0
GEOMETRY = {
    "crop": {"crop_padding": 7},
    "flip": {"flip": 0.5},
    "rotation and scale": {"rotation": 40.0, "scale": 0.2},
    "all": {"crop_padding": 7, "flip": 0.5, "rotation": 40.0, "scale": 0.2, "erasing": 0.8},
}


def blocks(count: int, height: int = 64, width: int = 32) -> torch.Tensor:
    """Label maps of large blocks of the labels 1 to 5."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(1, 6, (count, height // 16, width // 16), generator=generator)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)


@pytest.mark.parametrize("steps", GEOMETRY.values(), ids=GEOMETRY)
def test_a_label_map_moves_as_its_image(steps):
    """An image whose grey is its label: where the moved image shows one grey, that is the label."""
    config = AugmentationConfig.none().model_copy(
        update={**steps, "erasing_fill": (ERASED, ERASED, ERASED)}
    )
    transform = TrainTransform(config, seed=4)
    labels, draws = blocks(40), draws_of(range(40))
    images = (20 * labels).unsqueeze(1).expand(-1, 3, -1, -1)
    grey = transform(images, draws)[:, 0] * 127.5 + 127.5
    moved = transform.label_maps(labels, draws)
    assert moved.dtype == torch.uint8 and moved.shape == labels.shape and moved.is_contiguous()
    erased = grey > ERASED - 1
    assert not moved[erased].any()
    assert erased.any() == bool(config.erasing)
    clear = ((grey / 20 - (grey / 20).round()).abs() < 1e-3) & ~erased
    wanted = (grey / 20).round().to(torch.uint8)
    assert clear.float().mean() > 0.6
    # Between two blocks a mixed grey may be a third label's by accident.
    assert (moved[clear] == wanted[clear]).float().mean() > 0.999


def test_a_copied_label_map_is_exact():
    config = AugmentationConfig.none().model_copy(update={"crop_padding": 5, "flip": 0.5})
    transform = TrainTransform(config, seed=1)
    labels, draws = blocks(20), draws_of(range(20))
    grey = transform(labels.unsqueeze(1).expand(-1, 3, -1, -1), draws)[:, 0] * 127.5 + 127.5
    assert torch.equal(transform.label_maps(labels, draws), grey.round().to(torch.uint8))


def test_label_maps_must_be_bytes_one_per_draw():
    transform = TrainTransform(AugmentationConfig.light())
    with pytest.raises(ValueError, match="for 3 draws; wanted uint8"):
        transform.label_maps(blocks(2), draws_of(range(3)))
    with pytest.raises(ValueError, match=r"torch.int64 \(2, 64, 32\)"):
        transform.label_maps(blocks(2).long(), draws_of(range(2)))
    assert transform.label_maps(blocks(0), []).shape == (0, 64, 32)


@pytest.mark.parametrize("count", PART_GROUPS)
def test_every_part_is_in_one_group(count):
    groups = part_groups(count)
    assert len(groups) == count
    assert sorted(part for members in groups.values() for part in members) == sorted(BODY_PARTS)
    labels = torch.tensor([*range(len(PARTS)), UNKNOWN, 100], dtype=torch.uint8)
    grouped = group_labels(labels, count).tolist()
    for part, label in zip(PARTS, grouped, strict=False):
        members = [number for number, group in enumerate(groups.values(), 1) if part in group]
        assert [label] == (members or [0])
    assert grouped[-2:] == [UNKNOWN, UNKNOWN]


def test_there_are_no_seven_groups():
    with pytest.raises(ConfigError, match=r"model.parts 7: .* 1 to 6 groups"):
        group_labels(torch.zeros(1, dtype=torch.uint8), 7)


def settings(root) -> DataConfig:
    return DataConfig(
        root=root,
        image_size=(32, 16),
        identities_per_batch=4,
        images_per_identity=3,
        num_workers=0,
        augmentation=AugmentationConfig.none(),
    )


def test_training_batches_carry_their_images_maps(cargo):
    config = settings(cargo)
    split = load_dataset(config).train
    assert next(iter(train_loader(split, config, part_groups=4))).part_labels is None
    write_maps(cargo, split.paths)
    assert next(iter(train_loader(split, config))).part_labels is None
    for batch in train_loader(split, config, part_groups=4):
        assert batch.part_labels.shape == (len(batch), 32, 16)
        wanted = labels_of(batch.indices, 4).view(-1, 1, 1)
        assert torch.equal(batch.part_labels[:, :, 2:], wanted.expand(-1, 32, 14))
        assert (batch.part_labels[:, :, 0] == UNKNOWN).all()
        assert torch.equal(batch.to("cpu").part_labels, batch.part_labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_maps_do_not_depend_on_workers(cargo, workers):
    config = settings(cargo).model_copy(
        update={"augmentation": AugmentationConfig.cargo(), "num_workers": workers}
    )
    split = load_dataset(config).train
    write_maps(cargo, split.paths)
    (batch,) = train_loader(split, config, seed=3, iterations=(4, 5), part_groups=6)
    assert batch.part_labels.any()
    (again,) = train_loader(
        split,
        config.model_copy(update={"num_workers": 0}),
        seed=3,
        iterations=(4, 5),
        part_groups=6,
    )
    assert torch.equal(batch.part_labels, again.part_labels)
    assert torch.equal(batch.images, again.images)


@pytest.mark.parametrize("fault", ["missing", "damaged", "colours", "label"])
def test_a_wrong_map_is_named(cargo, fault):
    config = settings(cargo)
    split = load_dataset(config).train
    write_maps(cargo, split.paths)
    file = cargo / "parts" / split.paths[0].relative_to(cargo).with_suffix(".png")
    if fault == "missing":
        file.unlink()
    elif fault == "damaged":
        file.write_bytes(file.read_bytes()[:40])
    elif fault == "colours":
        Image.new("RGB", (24, 48)).save(file)
    else:
        Image.new("L", (24, 48), len(PARTS)).save(file)
    told = {
        "missing": "no part labels",
        "damaged": "no part labels",
        "colours": "3 channels",
        "label": f"label {len(PARTS)}",
    }
    with pytest.raises(DataError, match=f"{file.name}.*{told[fault]}"):
        read_part_labels(cargo, split.paths[0])
    with pytest.raises(DataError, match=file.name):
        list(train_loader(split, config, part_groups=4, iterations=(0, 20)))


def as_table(root, images):
    """The training images of a set as a table of its own."""
    path = root / "people.csv"
    lines = [f"{image},{number % 2}" for number, image in enumerate(images)]
    splits = ["train"] * (len(lines) - 2) + ["query", "gallery"]
    rows = [f"{line},{split}" for line, split in zip(lines, splits, strict=True)]
    path.write_text("\n".join(["path,identity,split", *rows]))
    return path


def test_maps_of_a_table_lie_beside_it(cargo):
    config = settings(cargo)
    images = [path.relative_to(cargo) for path in load_dataset(config).train.paths]
    table = as_table(cargo, images)
    config = config.model_copy(update={"name": "table", "root": table, "identities_per_batch": 2})
    dataset = load_dataset(config)
    assert config.folder == dataset.root == cargo
    write_maps(cargo, dataset.train.paths)
    (batch,) = train_loader(dataset.train, config, iterations=(0, 1), part_groups=6)
    assert batch.part_labels.any()


@pytest.mark.parametrize("outside", ["../elsewhere/1.jpg", "{root}/elsewhere/1.jpg"])
def test_an_image_outside_the_set_has_no_map(cargo, outside):
    (cargo / "parts").mkdir()
    image = cargo / outside.format(root=cargo.parent)
    with pytest.raises(DataError, match=r"1\.jpg is not below .*has no place in"):
        read_part_labels(cargo, image)
