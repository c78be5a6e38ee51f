"""The benchmark of the roll's predictor: it learns, and prints figures of both views."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import roll
from gsalign.data.synthetic import SyntheticConfig, generate


def test_it_trains_and_prints_a_table(tmp_path, monkeypatch, capsys):
    sizes = SyntheticConfig(
        train_identities=2,
        test_identities=2,
        images_per_identity_aerial=2,
        images_per_identity_ground=2,
        queries_per_identity=2,
        image_size=(32, 16),
    )
    generate(tmp_path / "set", sizes)
    made: list[roll.Uprighting] = []
    started: list[torch.Tensor] = []

    class Seen(roll.Uprighting):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)
            started.append(self.predictor.out.weight.detach().clone())

    monkeypatch.setattr(roll, "Uprighting", Seen)
    roll.main(["--data", str(tmp_path / "set"), "--steps", "2", "--people", "2"])
    told = capsys.readouterr().out
    assert "angles against the true roll" in told
    rows = [line.split() for line in told.splitlines() if line.strip().startswith("image")]
    assert [row[:3] for row in rows] == [["image", "aerial", "4"], ["image", "ground", "4"]]
    assert not torch.equal(made[0].predictor.out.weight, started[0])
