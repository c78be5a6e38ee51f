"""Sets aligned by their truth: aerial images with the head up, people before grey."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import oracle
from gsalign.data import load_cargo, read_image
from gsalign.data.synthetic import SyntheticConfig, generate, read_part_labels, read_truth


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("oracle") / "set"
    sizes = SyntheticConfig(
        train_identities=2,
        test_identities=2,
        images_per_identity_aerial=2,
        images_per_identity_ground=2,
        queries_per_identity=2,
        image_size=(64, 64),
        write_parts=True,
    )
    generate(root, sizes)
    return root


def test_every_image_is_turned_by_its_true_roll(root, tmp_path, capsys):
    out = tmp_path / "turned"
    oracle.main(["--data", str(root), "--turn", "--out", str(out)])
    assert "16 images" in capsys.readouterr().out
    names = {path.relative_to(out) for path in out.rglob("*.jpg")}
    assert names == {path.relative_to(root) for path in root.rglob("*.jpg")}
    assert load_cargo(out).train.num_identities == 2
    assert len(list(tmp_path.iterdir())) == 1

    # Turning the picture back by PIL, clockwise, gives the one that was rendered.
    inner = torch.zeros(64, 64, dtype=torch.bool)
    grid = torch.arange(64) - 31.5
    inner[grid.square()[:, None] + grid.square() < 28**2] = True
    for row in read_truth(root):
        turned = read_image(out / row.path)
        back = torch.from_numpy(turn_clockwise(turned, row.roll))
        error = (back.float() - read_image(root / row.path).float()).abs()[:, inner].mean()
        assert error < 6.0, row
    with pytest.raises(SystemExit):
        oracle.main(["--data", str(root), "--turn", "--out", str(out)])


@pytest.mark.parametrize("turned", [False, True])
def test_only_the_person_is_left(root, tmp_path, turned):
    out = tmp_path / "cut-out"
    oracle.main(["--data", str(root), "--cut-out", "--out", str(out)] + turned * ["--turn"])
    for row in read_truth(root):
        cut, image = (read_image(folder / row.path).float() for folder in (out, root))
        labels = read_part_labels(root, root / row.path)
        person = (labels > 0) & (labels < 7)
        if turned:  # somewhere else, as large as before but for the border
            grey = ((cut - 127.5).abs() < 4.0).all(dim=0)
            assert not grey.all() and abs((~grey).sum() - person.sum()) < 0.4 * person.sum(), row
            continue
        assert (cut - image).abs()[:, person].mean() < 4.0, row
        assert (cut - 127.5).abs()[:, ~person].mean() < 4.0, row


def test_with_nothing_to_do_nothing_is_made(root, tmp_path):
    with pytest.raises(SystemExit):
        oracle.main(["--data", str(root), "--out", str(tmp_path / "same")])
    assert not list(tmp_path.iterdir())


def turn_clockwise(image: torch.Tensor, degrees: float) -> NDArray[np.uint8]:
    """The picture turned clockwise about its centre, uint8 ``[3, H, W]``."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    turned = picture.rotate(-degrees, resample=Image.Resampling.BICUBIC)
    return np.asarray(turned).transpose(2, 0, 1).copy()
