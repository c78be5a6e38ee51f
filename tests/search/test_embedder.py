"""From images of any kind to embeddings, the same ones that evaluation uses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from search_support import tiny_network

from gsalign.data import DataConfig, ImageRecord, Split, evaluation_loader, read_image
from gsalign.errors import CheckpointError, ConfigError, DataError
from gsalign.evaluation import extract_features, feature_distances
from gsalign.search import Embedder, embed_images, fingerprint, list_images


def test_paths_pictures_arrays_and_tensors_are_one_and_the_same(embedder, photographs):
    path = photographs / "camera 0" / "img0.jpg"
    pixels = read_image(path)
    ways = [
        path,
        str(path),
        pixels,
        pixels.permute(1, 2, 0).numpy(),
        Image.fromarray(pixels.permute(1, 2, 0).numpy()),
    ]
    together = embedder(ways)
    assert together.shape == (5, embedder.dimension) and together.dtype == np.float32
    np.testing.assert_allclose(together, np.repeat(embedder(path), 5, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert embedder([]).shape == (0, embedder.dimension)


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("flip_test", ["off", "mean"])
def test_distances_are_those_of_evaluation(photographs, parts, flip_test):
    network = tiny_network(parts=parts)
    embedder = Embedder(network, flip_test=flip_test, batch_size=3)
    table = list_images([photographs])
    split = Split("images", tuple(ImageRecord(Path(path), 0, 0, 0) for path in table.paths))
    data = DataConfig(image_size=(32, 16), num_workers=0, eval_batch_size=11)
    features = extract_features(network, evaluation_loader(split, data), flip_test=flip_test)
    wanted = feature_distances(features, features, slice(0, 11)).numpy()

    _, vectors = embed_images(embedder, table)
    parted = torch.from_numpy(vectors).unflatten(1, (embedder.slots, -1))
    mine = dataclasses.replace(
        features,
        embeddings=parted if parts else parted[:, 0],
        visibility=parted.square().sum(dim=2) if parts else None,
    )
    np.testing.assert_allclose(
        feature_distances(mine, mine, slice(0, 11)).numpy(), wanted, atol=2e-6
    )


def test_images_of_any_kind(embedder, tmp_path):
    grey = np.linspace(0, 65535, 32 * 16).reshape(32, 16)
    pictures = {
        "cmyk.jpg": Image.new("CMYK", (20, 30), (10, 200, 30, 40)),
        "one.png": Image.new("RGB", (1, 1), "red"),
        "palette.gif": Image.new("P", (8, 8), 3),
        "alpha.png": Image.new("RGBA", (8, 8), (1, 2, 3, 4)),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16)),
        "sixteen.tif": Image.fromarray(grey.astype(np.uint16)),
        "eight.png": Image.fromarray((grey.astype(np.uint16) / 257).round().astype(np.uint8)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    vectors = dict(zip(pictures, embedder([tmp_path / name for name in pictures]), strict=True))
    assert all(np.isfinite(vector).all() for vector in vectors.values())
    # The same picture with 16 bits and with 8.
    for name in ("sixteen.png", "sixteen.tif"):
        assert torch.equal(read_image(tmp_path / name), read_image(tmp_path / "eight.png"))


@pytest.mark.parametrize(
    ("image", "error", "told"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError, "array of float32; wanted uint8"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, r"array \[3, 4, 4\]; wanted \[H, W, 3\]"),
        (torch.zeros(3, 4, 4), TypeError, "tensor of torch.float32; wanted uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"wanted \[3, H, W\]"),
        ([7], TypeError, "an image is int; wanted a path"),
        (Image.new("F", (4, 4)), DataError, "floating-point"),
    ],
)
def test_what_is_no_image_is_told(embedder, image, error, told):
    with pytest.raises(error, match=told):
        embedder(image)


def test_settings_that_are_none_are_told(tmp_path):
    network = tiny_network()
    for name, value in (("precision", "fp8"), ("flip_test", "twice"), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
            Embedder(network, **{name: value})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Embedder.load(tmp_path / "none.safetensors")


def test_weights_that_are_not_finite_are_told_with_the_image(photographs):
    network = tiny_network()
    with torch.no_grad():
        network.identity_head.neck.running_mean[0] = torch.nan
    with pytest.raises(DataError, match="image 0 is not finite"):
        Embedder(network)(photographs / "camera 0" / "img0.jpg")
    with pytest.raises(DataError, match=r"img0\.jpg is not finite"):
        embed_images(Embedder(network), list_images([photographs / "camera 0" / "img0.jpg"]))


def test_a_loaded_embedder_has_the_fingerprint_of_its_network(checkpoint):
    loaded = Embedder.load(checkpoint)
    assert loaded.fingerprint == fingerprint(tiny_network())
    assert loaded.checkpoint == str(checkpoint)
    assert not loaded.network.training


def test_fingerprints_tell_what_differs():
    one = fingerprint(tiny_network())
    assert one == fingerprint(tiny_network()) and not one.difference(one)
    other = fingerprint(tiny_network(seed=1))
    assert one.difference(other) == f"network {one.network[:12]} against {other.network[:12]}"
    assert one.difference(fingerprint(tiny_network(), flip_test="mean")) == (
        "flip_test off against mean"
    )
    # A weight that differs by one bit is another network.
    network = tiny_network()
    with torch.no_grad():
        network.backbone.norm.bias[3] = 1e-30
    assert fingerprint(network).network != one.network
