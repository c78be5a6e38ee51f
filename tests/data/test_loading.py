from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from cargo_folder import write_image
from PIL import Image

import gsalign.data.images as images_module
from gsalign.data import (
    AugmentationConfig,
    DataConfig,
    ImageStore,
    evaluation_loader,
    load_cargo,
    load_dataset,
    normalize,
    read_image,
    resize,
    train_loader,
)
from gsalign.errors import DataError


def settings(root, **changes) -> DataConfig:
    values = {
        "root": root,
        "image_size": (32, 16),
        "identities_per_batch": 4,
        "images_per_identity": 3,
        "eval_batch_size": 4,
        "num_workers": 0,
        "augmentation": AugmentationConfig.light(),
    }
    return DataConfig(**(values | changes))


def same(one, other) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.identities, other.identities)
        and torch.equal(one.indices, other.indices)
        and one.paths == other.paths
    )


def test_a_training_batch(cargo):
    config = settings(cargo)
    split = load_dataset(config).train
    loader = train_loader(split, config, seed=1)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert loader.num_identities == 8
    for batch in batches:
        assert len(batch) == 12
        assert batch.images.shape == (12, 3, 32, 16)
        assert batch.images.dtype == torch.float32
        assert -1.0 <= batch.images.min() and batch.images.max() <= 1.0
        assert batch.identities.dtype == torch.int64
        assert set(batch.identities.tolist()) <= set(range(8))
        records = [split.records[index] for index in batch.indices]
        assert loader.classes[batch.identities].tolist() == [r.identity for r in records]
        assert batch.views.tolist() == [record.view for record in records]
        assert batch.cameras.tolist() == [record.camera for record in records]
        assert batch.paths == tuple(str(record.path) for record in records)
        assert batch.broken == ()


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_workers_and_cache_change_nothing(cargo, cache):
    config = settings(cargo)
    split = load_dataset(config).train
    wanted = list(train_loader(split, config, seed=1, iterations=(0, 5)))
    changed = config.model_copy(update={"num_workers": 2, "cache": cache})
    got = list(train_loader(split, changed, seed=1, iterations=(0, 5)))
    assert len(got) == 5
    assert all(same(one, other) for one, other in zip(wanted, got, strict=True))


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(cargo):
    config = settings(cargo)
    split = load_dataset(config).train
    whole = list(train_loader(split, config, seed=1, iterations=(0, 6)))
    resumed = list(train_loader(split, config, seed=1, iterations=(3, 6)))
    assert [same(one, other) for one, other in zip(whole[3:], resumed, strict=True)] == [True] * 3


def test_epochs_differ_and_repeat(cargo):
    config = settings(cargo, num_workers=1)
    loader = train_loader(load_dataset(config).train, config, seed=1)
    loader.set_epoch(3)
    one = list(loader)
    loader.set_epoch(4)
    two = list(loader)
    loader.set_epoch(3)
    again = list(loader)
    assert all(same(a, b) for a, b in zip(one, again, strict=True))
    assert not any(same(a, b) for a, b in zip(one, two, strict=True))
    evaluation = evaluation_loader(load_dataset(config).query, config)
    with pytest.raises(TypeError, match="epochs"):
        evaluation.set_epoch(1)


def test_loading_does_not_advance_the_global_generator(cargo):
    config = settings(cargo, num_workers=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(train_loader(load_dataset(config).train, config))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_and_raw_identities(cargo, workers):
    config = settings(cargo, num_workers=workers)
    split = load_dataset(config).gallery
    loader = evaluation_loader(split, config)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(15))
    identities = torch.cat([batch.identities for batch in batches])
    assert identities.tolist() == split.identities.tolist()
    image = normalize(resize(read_image(split.paths[5]), (32, 16)))
    assert torch.equal(batches[1].images[1], image)


def test_ranks_share_the_evaluation(cargo):
    config = settings(cargo)
    split = load_dataset(config).gallery
    seen = []
    for rank in range(2):
        for batch in evaluation_loader(split, config, rank=rank, world_size=2):
            seen += batch.indices.tolist()
    assert seen == list(range(15))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_clear_line(cargo, workers):
    config = settings(cargo, num_workers=workers)
    split = load_dataset(config).gallery
    split.paths[6].write_bytes(b"not an image")
    with pytest.raises(DataError) as caught:
        list(evaluation_loader(split, config))
    message = str(caught.value)
    assert "\n" not in message
    assert str(split.paths[6]) in message
    assert "'skip'" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_can_be_left_out_of_evaluation(cargo, workers, caplog):
    config = settings(cargo, on_broken="skip", num_workers=workers)
    split = load_dataset(config).gallery
    for index in (4, 5, 6, 7, 9):
        split.paths[index].write_bytes(b"")
    loader = evaluation_loader(split, config)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    # The second batch would be empty: it is not handed out at all.
    assert [batch.indices.tolist() for batch in batches] == [
        [0, 1, 2, 3], [8, 10, 11], [12, 13, 14],
    ]  # fmt: skip
    assert len(loader.broken) == 5
    assert caplog.text.count("left out") == 5
    list(loader)
    assert len(loader.broken) == 5


def test_in_training_another_image_of_the_identity_stands_in(cargo):
    config = settings(cargo, on_broken="skip")
    split = load_dataset(config).train
    lost = [i for i, record in enumerate(split.records) if record.identity == 10][:3]
    for index in lost:
        split.paths[index].write_bytes(b"")
    loader = train_loader(split, config, iterations=(0, 6))
    batches = list(loader)
    assert all(len(batch) == 12 for batch in batches)
    for batch in batches:
        assert batch.identities.view(4, 3).eq(batch.identities.view(4, 3)[:, :1]).all()
        assert not set(batch.indices.tolist()) & set(lost)
    assert 1 <= len(loader.broken) <= 3


def test_a_batch_of_nothing_but_broken_images_is_an_error(cargo):
    config = settings(cargo, on_broken="skip")
    split = load_dataset(config).train
    for path in split.paths:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image of a batch could be read"):
        list(train_loader(split, config))


def test_batches_move_between_devices(cargo):
    config = settings(cargo)
    batch = next(iter(evaluation_loader(load_dataset(config).query, config)))
    moved = batch.to("meta")
    assert moved.images.device.type == moved.identities.device.type == "meta"
    assert moved.paths == batch.paths


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_models_become_rgb(tmp_path, mode):
    image = Image.open(write_image(tmp_path / "rgb.jpg", 3)).convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 48, 24)
    wanted = np.array(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 3


def test_formats_that_torchvision_does_not_know_are_read_too(tmp_path):
    Image.new("RGB", (5, 7), (10, 20, 30)).save(tmp_path / "a.bmp")
    pixels = read_image(tmp_path / "a.bmp")
    assert pixels.shape == (3, 7, 5)
    assert pixels[:, 2, 2].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"hello", "cannot be read"), (None, "does not exist")],
)
def test_unreadable_files_are_named(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_an_error(tmp_path):
    path = write_image(tmp_path / "a.jpg", 1)
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(DataError, match="truncated"):
        read_image(path)


def test_the_cache_reads_every_file_once(cargo, monkeypatch):
    paths = load_cargo(cargo).query.paths
    reads = []
    original = images_module.read_image
    monkeypatch.setattr(
        images_module, "read_image", lambda path: reads.append(path) or original(path)
    )
    cached = ImageStore(paths, (32, 16), cache="memory")
    plain = ImageStore(paths, (32, 16))
    for _ in range(2):
        for i in range(len(paths)):
            assert torch.equal(cached[i], resize(original(paths[i]), (32, 16)))
    assert sorted(reads) == sorted(paths)
    _ = plain[0], plain[0]
    assert len(reads) == len(paths) + 2


def test_a_cache_survives_the_way_to_a_spawned_process(cargo):
    paths = load_cargo(cargo).query.paths
    store = ImageStore(paths, (32, 16), cache="memory")
    first = store[0].clone()
    data = pickle.dumps(store)
    assert len(data) < 10_000  # without the pixels
    assert torch.equal(pickle.loads(data)[0], first)


def test_a_cache_that_does_not_fit_says_so(cargo, monkeypatch):
    monkeypatch.setattr(images_module, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"cache='memory' needs .* use cache='none'"):
        ImageStore(load_cargo(cargo).query.paths, (32, 16), cache="memory")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"image_size": (0, 16)}, "image_size"),
        ({"cache": "disk"}, "cache"),
        ({"num_workers": -1}, "num_workers"),
        ({"batch": 3}, "batch"),
    ],
)
def test_wrong_settings_are_named(cargo, changes, where):
    with pytest.raises(ValueError, match=where):
        settings(cargo, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_page_locked_where_there_is_a_gpu(cargo):
    config = settings(cargo, num_workers=1)
    split = load_dataset(config).train
    batch = next(iter(train_loader(split, config)))
    assert batch.images.is_pinned() and batch.identities.is_pinned()
    assert batch.to("cuda", non_blocking=True).images.is_cuda
    assert not next(iter(train_loader(split, config, pin_memory=False))).images.is_pinned()
