"""Pictures: what is drawn, in which colours, and that nothing half written stays behind."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from drawn import colours, network, rgb, texts
from matplotlib.figure import Figure
from PIL import Image

from gsalign.data import ImageRecord, read_image, resize
from gsalign.errors import DataError
from gsalign.evaluation import PROTOCOLS
from gsalign.model.ltps import rotated
from gsalign.visualize import (
    RankList,
    alignment,
    choose_queries,
    ltps_grids,
    part_masks,
    rank_lists,
    training_curves,
)
from gsalign.visualize import style as style_module
from gsalign.visualize.looking import image_label, look_at
from gsalign.visualize.ltps_grids import _to_pixels
from gsalign.visualize.part_masks import OPACITY, _cover, part_colour
from gsalign.visualize.style import RIGHT, RIGHT_SAME_VIEW, WRONG, house_style


def run_records(evaluations: int = 1, layers: int = 2) -> list[dict]:
    """What a run of 40 iterations writes into its metrics."""
    records = []
    for step in range(10, 50, 10):
        losses = {"identity": 30.0 / step, "triplet": 1.0 / step, "mask": 0.0}
        angle = {"mean": 0.001 * step, "std": 0.002, "absolute": 0.001 * step}
        records.append(
            {
                "kind": "train",
                "iteration": step,
                "epoch": step / 10,
                "total_loss": sum(losses.values()),
                "losses": losses,
                "lr": 0.01 / step,
                "time": 0.1,
                "data_time": 0.01,
                "max_mem": 100,
                "angles": {str(layer): angle for layer in range(layers)},
            }
        )
    figures = {"Rank-1": 40.0, "Rank-5": 60.0, "Rank-10": 80.0, "mAP": 30.0, "mINP": 20.0}
    figures |= {"metric": 35.0, "queries": 8, "valid_queries": 8, "gallery": 8}
    for number in range(evaluations):
        records.append(
            {
                "kind": "evaluation",
                "iteration": 40 - 10 * (evaluations - 1 - number),
                "epoch": 4.0,
                "split": "test",
                "protocols": {name: copy.copy(figures) for name in PROTOCOLS},
            }
        )
    return records


def test_training_curves_draw_every_loss_that_counts(tmp_path, panels):
    path = tmp_path / "new" / "curves.png"
    training_curves(run_records(), path, title="a run")
    assert len(colours(path)) > 50
    (figure,) = panels
    axes = figure.axes[0]
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([3.1, 3.0, 0.1])
    assert list(axes.lines[0].get_xdata()) == [10, 20, 30, 40]
    told = texts(figure)
    assert {"a run", "total", "identity", "triplet", "layer 0", "layer 1"} <= set(told)
    # A loss that is switched off has no line.
    assert "mask" not in told
    assert [path.name for path in path.parent.iterdir()] == ["curves.png"]


def test_angles_are_drawn_in_degrees(tmp_path, panels):
    training_curves(run_records(), tmp_path / "curves.png")
    line = panels[0].axes[2].lines[0]
    assert list(line.get_ydata()) == pytest.approx(
        [math.degrees(0.001 * step) for step in (10, 20, 30, 40)]
    )


def test_one_evaluation_is_drawn_as_bars_and_several_as_lines(tmp_path, panels):
    training_curves(run_records(evaluations=1), tmp_path / "one.png")
    training_curves(run_records(evaluations=3), tmp_path / "three.png")
    bars, lines = (figure.axes[1] for figure in panels)
    assert len(bars.patches) == 2 * len(PROTOCOLS) and not bars.lines
    assert {bar.get_height() for bar in bars.patches} == {40.0, 30.0}
    assert len(lines.lines) == 2 * len(PROTOCOLS) and not lines.patches
    assert list(lines.lines[0].get_xdata()) == [20, 30, 40]


@pytest.mark.parametrize(("evaluations", "layers"), [(0, 0), (1, 0), (0, 2), (2, 12)])
def test_training_curves_of_any_run_have_room_for_all_parts(tmp_path, panels, evaluations, layers):
    records = run_records(evaluations, layers)
    training_curves(records, tmp_path / "curves.png")
    told = texts(panels[0])
    assert ("this network has no LTPS" in told) == (layers == 0)
    assert ("not evaluated yet" in told) == (evaluations == 0)


def test_a_protocol_without_a_valid_query_leaves_a_gap(tmp_path, panels):
    records = run_records(evaluations=1)
    figures = records[-1]["protocols"]["aerial-to-ground"]
    figures.update({"mAP": None, "Rank-1": None, "valid_queries": 0})
    training_curves(records, tmp_path / "curves.png")
    heights = [bar.get_height() for bar in panels[0].axes[1].patches]
    assert sum(math.isnan(height) for height in heights) == 2
    later = {**records[-1], "iteration": 50}
    training_curves([*records, later], tmp_path / "curves.png")
    told = texts(panels[1])
    assert PROTOCOLS["ground-to-aerial"].title in told
    assert PROTOCOLS["aerial-to-ground"].title not in told


def test_one_line_of_the_log_is_enough_and_none_is_refused(tmp_path):
    records = run_records()
    training_curves(records[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no train record"):
        training_curves(records[-1:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_queries_are_spread_from_best_to_worst_of_each_view():
    views = np.array([0, 0, 0, 0, 0, 1, 1, 1], dtype=np.int64)
    precision = np.array([0.2, 0.9, 0.5, np.nan, 0.1, 0.3, 0.6, np.nan])
    assert choose_queries(views, precision, per_view=3) == [6, 5, 1, 0, 4]
    assert choose_queries(views, precision, per_view=2) == [6, 5, 1, 4]
    assert choose_queries(views, precision, per_view=1) == [6, 1]
    assert choose_queries(views, np.full(8, np.nan)) == []


def test_frames_tell_right_from_wrong(tmp_path, dataset, panels):
    def first(view: int, identity: int, records):
        return next(r for r in records if (r.view, r.identity) == (view, identity))

    gallery = dataset.gallery.records
    query = first(1, 101, dataset.query.records)
    answers = (first(0, 101, gallery), first(1, 101, gallery), first(0, 102, gallery))
    path = tmp_path / "lists.png"
    rank_lists([RankList(query, answers, 0.25)], path, image_size=(32, 16), title="lists")
    framed = [
        matplotlib.colors.to_hex(axes.patches[0].get_edgecolor()) for axes in panels[0].axes[2:]
    ]
    assert framed == [RIGHT, RIGHT_SAME_VIEW, WRONG]
    assert {rgb(colour) for colour in framed} <= colours(path)
    told = texts(panels[0])
    assert "aerial\nid 101\nAP 0.25" in told
    assert {"lists", "query", "1", "2", "3", "✓ right person, other view"} <= set(told)
    # Not by colour alone.
    marks = [next(t for t in texts(axes) if t in "✓✕") for axes in panels[0].axes[2:]]
    assert marks == ["✓", "✓", "✕"]


def test_people_and_cameras_go_by_their_own_names(tmp_path, dataset, panels):
    named = {"identity_text": "Ada", "camera_text": "gate"}
    query, answer = (
        type(record)(**{**vars(record), **named}) for record in dataset.query.records[:2]
    )
    rank_lists([RankList(query, (answer,), 1.0)], tmp_path / "lists.png", image_size=(32, 16))
    told = " ".join(texts(panels[0]))
    assert "id Ada" in told and " gate" in told and "id 1" not in told


def test_images_of_nobody_known_go_by_their_files():
    def label(name: str) -> str:
        return image_label(ImageRecord(Path("somewhere") / name, identity=-1, camera=-1, view=0))

    assert label("a.png") == "a.png"
    assert label("gate_0000000017.jpg") == "gate_\n0000000017.jpg"
    assert label("0123456789012345.jpg") == "01234567890123\n45.jpg"
    assert label("gate_of_long_garden_000000017.jpg") == "gate_of_long_\n…000000017.jpg"


def test_rows_may_differ_in_length(tmp_path, dataset):
    gallery = dataset.gallery.records
    rows = [
        RankList(dataset.query.records[0], gallery[:4], 1.0),
        RankList(dataset.query.records[1], gallery[:1], 0.5),
    ]
    rank_lists(rows, tmp_path / "lists.png", image_size=(32, 16))
    with Image.open(tmp_path / "lists.png") as picture:
        assert picture.width > picture.height
    with pytest.raises(ValueError, match="lists is empty"):
        rank_lists([], tmp_path / "none.png")


def test_a_broken_image_is_told_and_leaves_no_picture(tmp_path, dataset):
    record = dataset.query.records[0]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(record.path.read_bytes()[:60])
    bad = type(record)(**{**vars(record), "path": broken})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DataError, match=r"broken\.jpg"):
        rank_lists([RankList(bad, (record,), 1.0)], out / "lists.png", image_size=(32, 16))
    assert list(out.iterdir()) == []


def test_ltps_grids_draw_a_net_per_layer_and_image_and_keep_the_mode(tmp_path, dataset, panels):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "grids.png"
    ltps_grids(model, dataset.query.records[:3], path, title="grids")
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len(colours(path)) > 50
    (figure,) = panels
    nets = [axes for axes in figure.axes if axes.collections]
    read = [axes for axes in figure.axes if axes.images and not axes.collections]
    # The image and two layers' nets, and what each of these reads.
    assert len(nets) == 6 and len(read) == 3 + 6
    for axes in nets:
        plain, warped, dots = axes.collections
        # 4 rows and 2 columns of patches.
        assert len(plain.get_segments()) == len(warped.get_segments()) == 4 + 2
        assert len(dots.get_offsets()) == 4
    told = texts(figure)
    assert {"layer 0", "layer 1", "grids"} <= set(told)
    assert sum(text.endswith("°") for text in told) == 6


def test_the_grid_of_an_image_has_its_own_points(tmp_path, dataset, panels):
    model = network(ltps={"hidden": (8, 4), "layers": (1,), "points_per_image": True})
    with torch.no_grad():
        model.backbone.ltps["1"].offsets.weight.normal_()
    records = dataset.query.records[:2]
    ltps_grids(model, records, tmp_path / "grids.png")
    nets = [axes for axes in panels[0].axes if axes.collections]
    _, seen = look_at(model, records)
    wanted = rotated(model.backbone.ltps["1"].points(seen.offsets[0]), seen.angles[0])
    for axes, points in zip(nets, wanted.detach(), strict=True):
        _, warped, dots = axes.collections
        np.testing.assert_allclose(dots.get_offsets(), _to_pixels(points, (32, 16), 8), rtol=1e-5)
        # The corners of the net are control points.
        vertices = np.concatenate(warped.get_segments())
        for dot in dots.get_offsets():
            assert np.abs(vertices - dot).sum(axis=1).min() < 1e-3
    assert np.abs(nets[0].collections[2].get_offsets() - nets[1].collections[2].get_offsets()).max()


def test_the_grid_of_a_network_that_turns_is_turned(tmp_path, dataset, panels):
    model = network(ltps={"hidden": (8, 4), "layers": (1,)})
    with torch.no_grad():
        for parameter in model.backbone.ltps["1"].parameters():
            if parameter.requires_grad and parameter.ndim == 1 and parameter.numel() == 1:
                parameter.fill_(0.5)
    ltps_grids(model, dataset.query.records[:1], tmp_path / "grids.png")
    (axes,) = [axes for axes in panels[0].axes if axes.collections]
    plain, warped, _ = axes.collections
    moved = np.abs(
        np.concatenate(plain.get_segments()) - np.concatenate(warped.get_segments())
    ).max()
    (told,) = [text for text in texts(panels[0]) if text.endswith("°")]
    assert abs(float(told[:-1])) > 5 and moved > 1


def test_part_masks_paint_every_image_and_show_what_is_visible(tmp_path, dataset, panels):
    model = network(parts=3).train()
    records = dataset.query.records[:4]
    path = tmp_path / "masks.png"
    part_masks(model, records, path, title="masks")
    assert model.training
    (figure,) = panels
    assert len(figure.axes) == 3 * 4
    _, output = look_at(model, records)
    assert not output.parts.visibility.requires_grad and model.training
    for axes, visibility in zip(figure.axes[8:], output.parts.visibility, strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx(visibility.tolist())
    assert "masks" in texts(figure)


def test_colour_is_as_strong_as_the_mask():
    images = torch.full((1, 3, 4, 4), 0.5)
    masks = torch.zeros(1, 3, 2, 2)
    masks[:, 0, 0], masks[:, 1, 1, 0], masks[:, 2, 1, 1] = 1.0, 1.0, 1.0
    covered = torch.from_numpy(_cover(images, masks, (4, 4)))
    assert covered.shape == (1, 4, 4, 3)
    assert (covered[0, :2] == 0.5).all()  # the background keeps the image
    for column, part in ((0, 0), (3, 1)):
        colour = torch.tensor(matplotlib.colors.to_rgb(part_colour(part)))
        wanted = (1 - OPACITY) * 0.5 + OPACITY * colour
        torch.testing.assert_close(covered[0, 3, column], wanted)


def test_part_masks_of_nothing_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="the network has no parts"):
        part_masks(network(), dataset.query.records[:1], tmp_path / "a.png")
    with pytest.raises(ValueError, match="records is empty"):
        part_masks(network(parts=2), [], tmp_path / "a.png")


@pytest.mark.parametrize("does", ["turns", "cuts_out", "both"])
def test_the_alignment_shows_images_before_and_after(tmp_path, dataset, panels, does):
    orientation = {
        "enabled": True,
        "reads": "parts",
        "finder_width": 4,
        "turns": does != "cuts_out",
        "cuts_out": does != "turns",
    }
    model = network(orientation=orientation).train()
    records = dataset.query.records[:3]
    alignment(model, records, tmp_path / "alignment.png", title="aligned")
    assert model.training
    (figure,) = panels
    shown = [axes.images[0].get_array() for axes in figure.axes]
    aligned, output = look_at(model, records)
    images, *person, seen = [shown[start : start + 3] for start in range(0, len(shown), 3)]
    assert len(person) == (does != "turns")
    for place, record in enumerate(records):
        image = resize(read_image(record.path), model.config.image_size)
        assert np.array_equal(images[place], image.permute(1, 2, 0))
        assert np.array_equal(seen[place], aligned[place])
        if person:
            assert np.array_equal(person[0][place], output.person[place, 0])
    told = [text for text in texts(figure) if text.endswith("°")]
    assert len(told) == 3 * (does != "cuts_out") and "aligned" in texts(figure)


def test_an_alignment_of_nothing_is_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="the network aligns no images"):
        alignment(network(), dataset.query.records[:1], tmp_path / "a.png")
    with pytest.raises(ValueError, match="records is empty"):
        alignment(network(orientation={"enabled": True}), [], tmp_path / "a.png")


def test_places_are_centres_of_patches():
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    pixels = _to_pixels(corners, (32, 16), 8)
    # Pixel centres are whole numbers, so the first patch of 8 is centred on 3.5.
    assert pixels.tolist() == [[3.5, 3.5], [11.5, 27.5], [7.5, 15.5]]


def test_grids_of_nothing_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="the network has no LTPS"):
        ltps_grids(network(ltps={"layers": ()}), dataset.query.records[:1], tmp_path / "a.png")
    with pytest.raises(ValueError, match="records is empty"):
        ltps_grids(network(), [], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_other_figures_of_the_process_keep_their_style(tmp_path):
    before = dict(matplotlib.rcParams)
    training_curves(run_records(), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    with house_style():
        assert matplotlib.rcParams["text.color"] == style_module.INK


def test_a_picture_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"the picture before")

    def fail(self, *arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        training_curves(run_records(), path)
    assert path.read_bytes() == b"the picture before"
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
