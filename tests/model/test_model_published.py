"""Loading checkpoints of the published code: sizes from shapes, every key accounted for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, ModelConfig, load_published
from gsalign.model.ltps import control_grid
from gsalign.model.published import published_names, read_config

KEYS = Path(__file__).parents[1] / "golden" / "official_keys.txt"


def constants(points: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The spline constants as the published code stores them: float32, by a plain inverse."""

    def radial(a, b):
        squared = (a[:, None] - b[None]).square().sum(-1)
        return 0.5 * squared * squared.clamp(min=1e-8).log()

    count = len(points)
    affine = torch.cat([torch.ones(count, 1), points], dim=1)
    matrix = torch.zeros(count + 3, count + 3)
    matrix[:count, :count] = radial(points, points)
    matrix[:count, count:], matrix[count:, :count] = affine, affine.T
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    lattice = torch.stack([x, y], dim=-1).reshape(-1, 2)
    representation = torch.cat(
        [radial(lattice, points), torch.ones(len(lattice), 1), lattice], dim=1
    )
    return {
        "dst_points": points.clone(),
        "grid_gen.inverse_kernel": torch.inverse(matrix).contiguous(),
        "grid_gen.padding": torch.zeros(3, 2),
        "grid_gen.target_coord_repr": representation,
    }


def as_published(model: GSAlign) -> dict[str, torch.Tensor]:
    """The state dict the published code would have written."""
    ours, config = model.state_dict(), model.config
    state = {theirs: ours[name].clone() for theirs, name in published_names(config).items()}
    points = control_grid(config.ltps.control_points).float()
    for layer in config.ltps_layers:
        for name, value in constants(points, config.grid).items():
            state[f"backbone.blocks.{layer}.tps.{name}"] = value
    width = config.width
    for head in ("heads", "view_heads"):
        state[f"{head}.head_body_distill.0.weight"] = torch.randn(width, width, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{head}.head_body_distill.1.{name}"] = torch.randn(width)
        state[f"{head}.head_body_distill.1.num_batches_tracked"] = torch.tensor(3)
    return state


@pytest.fixture
def published(tiny_config, make_model):
    return as_published(make_model(tiny_config))


def load(state, **kwargs):
    return load_published(state, **{"image_size": (32, 16), "num_heads": 3, **kwargs})


def test_every_official_key_is_accounted_for():
    rows = [line.split("\t") for line in KEYS.read_text().splitlines()]
    shapes = {name: [int(n) for n in shape.strip("()").split(",") if n] for name, shape, _ in rows}
    assert len(shapes) == 313
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = read_config(state, image_size=(256, 128), num_heads=12, eta=0.1, drop_path=0.1)
    assert config == ModelConfig()
    names = published_names(config)
    with torch.device("meta"):
        ours = GSAlign(config).state_dict()
    assert sorted(names.values()) == sorted(ours)
    assert all(list(ours[name].shape) == shapes[theirs] for theirs, name in names.items())
    rest = {re.sub(r"^(backbone\.blocks\.\d+|\w+)\.", "", key) for key in set(shapes) - set(names)}
    batch_norm = ("weight", "bias", "num_batches_tracked", "running_mean", "running_var")
    assert rest == {
        "tps.dst_points",
        *(f"tps.grid_gen.{n}" for n in ("inverse_kernel", "padding", "target_coord_repr")),
        "head_body_distill.0.weight",
        *(f"head_body_distill.1.{n}" for n in batch_norm),
    }


@pytest.mark.parametrize(
    "values",
    [
        {"ltps": {"control_points": 9, "hidden": (8, 6)}},
        {"ltps": {"control_points": 36, "hidden": (16, 4)}, "image_size": (48, 40)},
        {"width": 40, "num_heads": 5, "depth": 1, "mlp_ratio": 2.5, "num_identities": 11},
        {"ltps": {"layers": [1], "hidden": (8, 6)}},
        {"ltps": {"layers": []}, "dam": {"enabled": False}},
        {"patch_size": 4, "num_views": 3},
        {"width": 27, "mlp_ratio": 100 / 27},
    ],
    ids=str,
)
def test_sizes_are_read_from_the_shapes(tiny_config, make_model, make_batch, values):
    config = ModelConfig.model_validate({**tiny_config.model_dump(), **values})
    model = make_model(config).eval()
    loaded = load_published(
        as_published(model), image_size=config.image_size, num_heads=config.num_heads, eta=0.1
    )
    assert not loaded.training
    assert loaded.config.ltps_layers == config.ltps_layers
    for field in ("grid", "patch_size", "width", "depth", "num_identities", "num_views", "dam"):
        assert getattr(loaded.config, field) == getattr(config, field)
    batch = make_batch(config)
    assert torch.equal(loaded.embed(batch[0]), model.embed(batch[0]))
    wanted = model.losses(*batch)
    assert all(torch.equal(term, wanted[name]) for name, term in loaded.losses(*batch).items())


def test_eta_and_stochastic_depth_are_arguments(published):
    model = load(published, eta=0.4, drop_path=0.2)
    assert model.config.ltps.eta == 0.4 and model.backbone.ltps["1"].eta == 0.4
    assert model.config.drop_path == 0.2
    assert load(published).config.drop_path == 0.0


@pytest.mark.parametrize(
    "name", ["best.pth", "nested.pth", "parallel.pth", "best.safetensors", "parallel.safetensors"]
)
def test_files(published, tmp_path, name):
    path = tmp_path / name
    state = published
    if path.stem == "parallel":
        state = {f"module.{key}": value for key, value in published.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if path.stem == "nested" else state, path)
    loaded = load(path)
    assert torch.equal(loaded.backbone.position, published["backbone.pos_embed"])
    assert torch.equal(load(str(path)).backbone.position, published["backbone.pos_embed"])


def test_numpy_arrays(published):
    loaded = load({name: value.numpy() for name, value in published.items()})
    assert torch.equal(loaded.backbone.position, published["backbone.pos_embed"])


def test_loading_leaves_the_mapping_alone(published):
    before = {name: value.clone() for name, value in published.items()}
    model = load(published)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in published.items())


def test_dead_and_derivable_keys_may_be_absent(published):
    lean = {k: v for k, v in published.items() if "distill" not in k and "grid_gen" not in k}
    assert torch.equal(load(lean).backbone.position, published["backbone.pos_embed"])


@pytest.mark.parametrize(
    "key",
    [
        "backbone.norm.weight",
        "backbone.cls_token",
        "backbone.blocks.1.attn.qkv.bias",
        "backbone.blocks.1.tps.src_points",
        "backbone.blocks.0.tps.angle_predictor.6.bias",
        "backbone.mask_generator.mlp.1.bias",
        "backbone.patch_embed.proj.weight",
        "heads.weight",
        "heads.bottleneck.0.running_var",
        "view_heads.bottleneck.0.bias",
    ],
)
def test_missing_keys_are_named(published, key):
    del published[key]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(published)


def test_unknown_keys_are_named(published):
    published["backbone.sie_embed"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"unknown backbone\.sie_embed"):
        load(published)


def test_many_problems_are_counted(published):
    for index in range(9):
        published[f"extra.{index}"] = torch.zeros(1)
    del published["backbone.norm.bias"]
    with pytest.raises(CheckpointError, match=r"missing backbone\.norm\.bias.*and 3 more"):
        load(published)


@pytest.mark.parametrize(
    "name",
    ["dst_points", "grid_gen.inverse_kernel", "grid_gen.padding", "grid_gen.target_coord_repr"],
)
@pytest.mark.parametrize("kind", ["value", "nan", "shape"])
def test_derivable_constants_are_checked(published, name, kind):
    key = f"backbone.blocks.1.tps.{name}"
    if kind == "shape":
        published[key] = torch.zeros(5, 5)
    else:
        published[key][1, 1] += 0.05 if kind == "value" else float("nan")
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(published)


def test_rows_for_columns_is_noticed(published):
    # Same number of patches, another map: only the spline constants can tell.
    with pytest.raises(CheckpointError, match="image_size"):
        load(published, image_size=(16, 32))


def test_wrong_image_size(published):
    with pytest.raises(CheckpointError, match=r"10 positions.*needs 18"):
        load(published, image_size=(64, 16))
    with pytest.raises(CheckpointError, match="not a multiple of patch_size"):
        load(published, image_size=(33, 16))


def test_wrong_number_of_heads(published):
    with pytest.raises(CheckpointError, match="num_heads 5"):
        load(published, num_heads=5)


def test_wrong_shape_is_named_with_both_shapes(published):
    published["backbone.blocks.1.mlp.fc2.bias"] = torch.zeros(7)
    with pytest.raises(
        CheckpointError, match=r"backbone\.blocks\.1\.mlp\.fc2\.bias is \[7\].*\[24\]"
    ):
        load(published)


def test_points_off_the_square_grid(published):
    for layer in range(2):
        published[f"backbone.blocks.{layer}.tps.src_points"] = torch.zeros(5, 2)
    with pytest.raises(CheckpointError, match="square number"):
        load(published)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04garbage"])
def test_damaged_files(tmp_path, content):
    for name in ("broken.pth", "broken.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
            load(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(tmp_path / "absent.pth")


class Payload:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"model": Payload()}, path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"model": {}}, [1, 2], {"a": "text"}])
def test_content_that_is_no_state_dict(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError):
        load(path)
