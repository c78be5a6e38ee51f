"""The set that is turned upright: the same images, aerial ones with the head up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import upright
from gsalign.data import load_cargo, read_image
from gsalign.data.synthetic import SyntheticConfig, generate, read_truth


def test_every_image_is_turned_by_its_true_roll(tmp_path, capsys):
    sizes = SyntheticConfig(
        train_identities=2,
        test_identities=2,
        images_per_identity_aerial=2,
        images_per_identity_ground=2,
        queries_per_identity=2,
        image_size=(64, 64),
    )
    root, out = tmp_path / "set", tmp_path / "turned"
    generate(root, sizes)
    upright.main(["--data", str(root), "--out", str(out)])
    assert "16 images" in capsys.readouterr().out
    names = {path.relative_to(out) for path in out.rglob("*.jpg")}
    assert names == {path.relative_to(root) for path in root.rglob("*.jpg")}
    assert load_cargo(out).train.num_identities == 2
    assert len(list(tmp_path.iterdir())) == 2

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
        upright.main(["--data", str(root), "--out", str(out)])


def turn_clockwise(image: torch.Tensor, degrees: float) -> NDArray[np.uint8]:
    """The picture turned clockwise about its centre, uint8 ``[3, H, W]``."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    turned = picture.rotate(-degrees, resample=Image.Resampling.BICUBIC)
    return np.asarray(turned).transpose(2, 0, 1).copy()
