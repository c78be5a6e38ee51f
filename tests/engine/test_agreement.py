"""What a network cuts out, compared with the true person of a generated set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import TINY

from gsalign.config import load_config
from gsalign.data import load_dataset
from gsalign.data.synthetic import (
    PARTS,
    TRUTH_FILE,
    UNKNOWN,
    SyntheticConfig,
    generate,
    read_part_labels,
)
from gsalign.engine.agreement import measure_cut_out, measure_parts, measure_rolls
from gsalign.engine.distributed import build_accelerator
from gsalign.errors import DataError
from gsalign.model import GSAlign

CUTS_ALONE = (
    "model.orientation.enabled=true",
    "model.orientation.reads=parts",
    "model.orientation.cuts_out=true",
    "model.orientation.turns=false",
    "model.ltps.layers=[]",
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """A set with true label maps that no test may change."""
    root: Path = tmp_path_factory.mktemp("agreement") / "set"
    sizes = SyntheticConfig(
        train_identities=1,
        test_identities=2,
        images_per_identity_aerial=2,
        images_per_identity_ground=2,
        queries_per_identity=2,
        image_size=(32, 16),
        write_parts=True,
    )
    generate(root, sizes)
    return root


@pytest.fixture
def own(generated, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(generated, tmp_path / "own"))


def measure(what, root: Path, *settings: str, shares=None, seen=None, direction=None):
    """Measure a new network on query and gallery.

    Args:
        what: ``measure_cut_out``, or one of those beside it.
        root: the set.
        settings: of the network.
        shares: of the person in the images, in their order ``[N, H, W]``; None: what it finds.
        seen: where to put the sizes of the batches.
        direction: of the roll that it finds, with shares.
    """
    config = load_config(None, [*TINY, *CUTS_ALONE, *settings, f"data.root={root}"])
    torch.manual_seed(0)
    network = GSAlign(config.model).train()
    if shares is not None:
        done = 0

        def see(images):
            nonlocal done
            mine = shares[done : done + len(images)].unsqueeze(1)
            done += len(images)
            return torch.tensor([direction or (1.0, 0.0)]).expand(len(images), 2), mine

        network.uprighting.see = see
    dataset = load_dataset(config.data)
    splits = [dataset.query, dataset.gallery]
    progress = None if seen is None else seen.append
    accelerator = build_accelerator(device="cpu")
    found = what(network, splits, root, config.data, accelerator, progress=progress)
    assert network.training
    return found


def true_person(root: Path) -> torch.Tensor:
    """Which pixels are the person in query and gallery, ``[N, H, W]``."""
    dataset = load_dataset(load_config(None, [*TINY, f"data.root={root}"]).data)
    paths = [record.path for split in (dataset.query, dataset.gallery) for record in split.records]
    maps = torch.stack([read_part_labels(root, path) for path in paths])
    bodies = [PARTS.index(part) for part in ("head", "torso", "arms", "legs", "feet", "bag")]
    person = torch.isin(maps, torch.tensor(bodies, dtype=torch.uint8))
    assert person.any() and not person.all()
    return person


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("turns", ["false", "true"])
def test_the_truth_agrees_with_itself(generated, batch, turns):
    """In the images as they came: a turn after the cut changes nothing."""
    person, done = true_person(generated).float(), []
    found = measure(
        measure_cut_out,
        generated,
        f"data.eval_batch_size={batch}",
        f"model.orientation.turns={turns}",
        shares=person,
        seen=done,
        direction=(0.0, 1.0),
    )
    assert found.as_dict() == {
        view: {"images": 4, "iou": 1.0, "person_kept": 1.0, "background_left": 0.0}
        for view in ("aerial", "ground")
    }
    assert done == ([3, 4, 7, 8] if batch == 3 else [4, 8])


def test_half_of_everything(generated):
    """Nobody is found, half of all is left; and a finder that has learned nothing is between."""
    shares = torch.full((8, 32, 16), 0.5)
    for match in measure(measure_cut_out, generated, shares=shares).matches:
        assert (match.iou, match.kept, match.left) == (0.0, 0.5, 0.5)
    for match in measure(measure_cut_out, generated).matches:
        assert 0.0 < match.kept < 1.0 and 0.0 < match.left < 1.0


def test_what_hides_the_person_is_background_and_unknown_pixels_do_not_count(own):
    person = true_person(own)
    for file in (own / "parts").rglob("*.png"):
        labels = torch.full((32, 16), PARTS.index("occluder"), dtype=torch.uint8)
        labels[:8], labels[8:12] = PARTS.index("bag"), UNKNOWN
        Image.fromarray(labels.numpy()).save(file)
    shares = torch.full_like(person, 0.25, dtype=torch.float32)
    shares[:, :4], shares[:, 8:12] = 0.75, 1.0
    for match in measure(measure_cut_out, own, shares=shares).matches:
        assert (match.iou, match.kept, match.left) == (0.5, 0.5, 0.25)


def test_maps_of_another_size_are_read_at_the_size_of_the_networks_images(generated):
    """Every label of the small map stands for four pixels of the network's images."""
    person = true_person(generated)
    large = person.repeat_interleave(2, 1).repeat_interleave(2, 2).float()
    found = measure(measure_cut_out, generated, "model.image_size=[64,32]", shares=large)
    assert all((m.iou, m.kept, m.left) == (1.0, 1.0, 0.0) for m in found.matches)


def test_who_only_cuts_out_has_no_rolls(generated):
    assert measure(measure_rolls, generated) is None
    assert measure(measure_parts, generated) is None
    turning = measure(measure_rolls, generated, "model.orientation.turns=true")
    assert {match.angle for match in turning.matches} == {"image"}


@pytest.mark.parametrize(
    "settings",
    [
        ("model.orientation.enabled=false",),
        ("model.orientation.cuts_out=false", "model.orientation.turns=true"),
    ],
    ids=["as it came", "turned"],
)
def test_a_network_that_cuts_nothing_out_has_no_table(generated, settings):
    assert measure(measure_cut_out, generated, *settings) is None


def test_a_set_without_true_maps_has_no_table(own):
    (own / TRUTH_FILE).rename(own / "away.csv")
    assert measure(measure_cut_out, own) is None
    (own / "away.csv").rename(own / TRUTH_FILE)
    next((own / "parts" / "query").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="has no part labels"):
        measure(measure_cut_out, own)
    shutil.rmtree(own / "parts")
    assert measure(measure_cut_out, own) is None
