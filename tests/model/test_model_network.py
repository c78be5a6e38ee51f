"""GSAlign as a whole: modes, sizes, shortcuts, compilation, precision, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gsalign.model import GSAlign, ModelConfig
from gsalign.model.vit import run_block

NAMES = ["identity", "triplet", "view", "orthogonality", "mask", "deformation"]


def change(config: ModelConfig, **values) -> ModelConfig:
    return ModelConfig.model_validate({**config.model_dump(), **values})


def total(terms):
    return sum(terms.values())


def test_parameter_counts_of_the_published_network():
    with torch.device("meta"):
        model = GSAlign(ModelConfig())
        images = torch.empty(2, 3, 256, 128)
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_modules()}
    dead = 2 * (768 * 768 + 2 * 768)  # head_body_distill, twice
    assert count["backbone.blocks"] == 85_054_464
    assert count["backbone.ltps"] == 21_633_132
    assert count["dam"] == 1_182_720
    assert count[""] == 111_671_148 - dead
    assert model.embed(images).shape == (2, 768)


def test_work_per_image_of_the_published_network():
    with torch.device("meta"):
        model = GSAlign(ModelConfig())
        images = torch.empty(1, 3, 256, 128)
    with FlopCounterMode(display=False) as counter:
        model.embed(images)
    # Published: 14.164 GMAC. The last block's patches are not computed here.
    assert counter.get_total_flops() / 2 < 13.5e9


@pytest.mark.parametrize("training", [True, False])
def test_embed_means_the_same_in_both_modes(tiny_config, make_model, make_batch, training):
    config = change(tiny_config, drop_path=0.5)
    model = make_model(config).train(training)
    with torch.no_grad():
        model.identity_head.neck.running_mean.normal_()
        model.identity_head.neck.running_var.uniform_(0.5, 2.0)
    before = copy.deepcopy(model.state_dict())
    images = make_batch(config)[0]
    embeddings = model.embed(images)
    assert torch.equal(embeddings, model.embed(images))
    assert torch.equal(embeddings, copy.deepcopy(model).eval()(images))
    output = copy.deepcopy(model).eval().forward_features(images)
    neck = copy.deepcopy(model.identity_head.neck).eval()
    torch.testing.assert_close(embeddings, neck(output.feature))
    torch.testing.assert_close(output.feature, output.global_feature - output.view_feature)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_embedding_of_an_image_does_not_depend_on_its_batch(tiny_config, make_model, make_batch):
    model = make_model(tiny_config)
    images = make_batch(tiny_config)[0]
    torch.testing.assert_close(model.embed(images)[2:3], model.embed(images[2:3]))
    assert model.embed(images[:0]).shape == (0, 24)


def test_forward_is_losses_with_labels_and_embeddings_without(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).eval()
    images, identities, views = make_batch(tiny_config)
    assert torch.equal(model(images), model.embed(images))
    terms, wanted = model(images, identities, views), model.losses(images, identities, views)
    assert list(terms) == NAMES
    assert all(torch.equal(terms[name], wanted[name]) for name in NAMES)
    with pytest.raises(ValueError, match="views must be given"):
        model(images, identities)


@pytest.mark.parametrize("layers", [[], [1], [0, 1], "all"])
@pytest.mark.parametrize("dam", [True, False])
def test_subsets_of_the_parts(tiny_config, make_model, make_batch, layers, dam):
    config = change(tiny_config, ltps={"layers": layers, "hidden": (8, 6)}, dam={"enabled": dam})
    model = make_model(config).train()
    batch = make_batch(config)
    layers_of = {name.split(".")[2] for name in model.state_dict() if ".ltps." in name}
    assert layers_of == {str(layer) for layer in config.ltps_layers}
    assert any(name.startswith("dam.") for name in model.state_dict()) == dam
    terms = model.losses(*batch)
    assert list(terms) == NAMES
    assert (terms["mask"] > 0) == dam
    assert (terms["deformation"] > 0) == bool(config.ltps_layers)
    assert model.forward_features(batch[0]).angles.shape == (len(config.ltps_layers), 6)
    total(terms).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


@pytest.mark.parametrize("count", [4, 9, 16, 25, 36])
def test_every_number_of_control_points_learns(tiny_config, make_model, make_batch, count):
    config = change(tiny_config, ltps={"control_points": count, "hidden": (8, 6)})
    model = make_model(config).train()
    total(model.losses(*make_batch(config))).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all()
    gradient = model.backbone.ltps["0"].source_points.grad
    assert gradient.shape == (count, 2) and gradient.abs().max() > 0


def test_frozen_neck_bias_is_the_only_frozen_parameter(tiny_config):
    model = GSAlign(tiny_config)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["identity_head.neck.bias", "view_head.neck.bias"]


def test_short_last_block_gives_the_full_block_s_numbers(tiny_config, make_model):
    block = make_model(tiny_config).backbone.blocks[1].double()
    tokens = torch.randn(3, 10, 24, dtype=torch.float64, requires_grad=True)
    full = run_block(block, tokens)
    assert torch.equal(full, block(tokens))
    short = run_block(block, tokens, queries=2)
    torch.testing.assert_close(short, full[:, :2])
    upstream = torch.randn_like(short)
    inputs = [tokens, *block.parameters()]
    for ours, wanted in zip(
        torch.autograd.grad(short, inputs, upstream),
        torch.autograd.grad(full[:, :2], inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


def test_stochastic_depth_acts_in_training_losses_only(tiny_config, make_model, make_batch):
    config = change(tiny_config, drop_path=0.6)
    model = make_model(config)
    batch = make_batch(config)

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        return total(model.losses(*batch)).item()

    assert len({run(seed) for seed in range(4)}) > 1
    model.eval()
    assert len({run(seed) for seed in range(4)}) == 1


def test_weights_of_the_losses_are_applied(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).eval()
    batch = make_batch(tiny_config)
    terms = model.losses(*batch)
    weights = dict(zip(NAMES, [2.0, 0.5, 1.0, 0.0, 1.0, 0.0], strict=True))
    other = GSAlign(change(tiny_config, losses=weights)).eval()
    other.load_state_dict(model.state_dict())
    published = tiny_config.losses.model_dump()
    for name, value in other.losses(*batch).items():
        torch.testing.assert_close(value, terms[name] * (weights[name] / published[name]))


def test_labels_of_any_integer_type(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).eval()
    images, identities, views = make_batch(tiny_config)
    wanted = total(model.losses(images, identities, views))
    assert torch.equal(total(model.losses(images, identities.int(), views.bool())), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(6, 3, 16, 32), None, None), r"images must be \[B, 3, 32, 16\]"),
        ((torch.zeros(3, 32, 16), None, None), r"got \[3, 32, 16\]"),
        ((None, torch.zeros(5, dtype=torch.int64), None), r"identities must be \[6\]"),
        ((None, None, torch.zeros(6, 1, dtype=torch.int64)), r"views must be \[6\]"),
    ],
)
def test_errors_name_the_argument(tiny_config, make_batch, arguments, message):
    model = GSAlign(tiny_config)
    batch = [
        given if given is not None else default
        for given, default in zip(arguments, make_batch(tiny_config), strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        model.losses(*batch)


def test_bytes_and_single_images_are_refused(tiny_config, make_batch):
    model = GSAlign(tiny_config)
    images, identities, views = make_batch(tiny_config)
    with pytest.raises(TypeError, match="images must be floating point"):
        model.embed(images.byte())
    with pytest.raises(ValueError, match="at least 2 images"):
        model.losses(images[:1], identities[:1], views[:1])


def test_bfloat16_autocast_on_the_cpu(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).train()
    batch = make_batch(tiny_config)
    wanted = copy.deepcopy(model).losses(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model.losses(*batch)
        embeddings = model.embed(batch[0])
    for name in NAMES:
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], wanted[name], rtol=0.05, atol=1e-3)
    assert embeddings.dtype == torch.float32
    total(terms).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()


def test_bfloat16_weights(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).eval()
    images = make_batch(tiny_config)[0]
    wanted = model.embed(images)
    embeddings = model.bfloat16().embed(images.bfloat16())
    assert embeddings.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(embeddings.float(), wanted)
    assert cosine.min() > 0.99


def test_float64_throughout(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).double()
    images, identities, views = make_batch(tiny_config)
    terms = model.losses(images.double(), identities, views)
    assert {term.dtype for term in terms.values()} == {torch.float64}


@pytest.mark.parametrize("training", [True, False])
def test_embed_compiles_in_one_graph(tiny_config, make_model, make_batch, training):
    model = make_model(tiny_config).train(training)
    images = make_batch(tiny_config)[0]
    embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(embed(images), model.embed(images))


def test_losses_compile_in_one_graph(tiny_config, make_model, make_batch):
    eager = make_model(tiny_config).train()
    model = copy.deepcopy(eager)
    batch = make_batch(tiny_config)
    terms = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch)
    wanted = eager.losses(*batch)
    for name in NAMES:
        torch.testing.assert_close(terms[name], wanted[name])
    total(terms).backward()
    total(wanted).backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exports_with_a_free_batch_size(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).eval()
    images = make_batch(tiny_config)[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    torch.testing.assert_close(program.module()(images[:3]), model(images[:3]))


def test_state_dict_round_trip(tiny_config, make_model, make_batch):
    model = make_model(tiny_config)
    other = GSAlign(tiny_config)
    assert not torch.equal(other.backbone.class_token, model.backbone.class_token)
    other.load_state_dict(model.state_dict())
    images = make_batch(tiny_config)[0]
    assert torch.equal(other.embed(images), model.embed(images))


def test_a_step_of_training_lowers_the_loss(tiny_config, make_model, make_batch):
    model = make_model(tiny_config).train()
    batch = make_batch(tiny_config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = total(model.losses(*batch))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_start_follows_the_published_code():
    model = GSAlign(ModelConfig(image_size=(64, 32), width=192, depth=1, num_heads=3))
    backbone = model.backbone
    assert torch.equal(backbone.view_token, torch.zeros(1, 1, 192))
    for tensor in (backbone.class_token, backbone.position, backbone.blocks[0].mlp.fc1.weight):
        assert 0.016 < tensor.std().item() < 0.024
    assert backbone.patch_embed.proj.weight.std().item() == pytest.approx(
        (2 / (16 * 16 * 192)) ** 0.5, rel=0.02
    )
    assert model.identity_head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    points = backbone.ltps["0"].source_points
    assert points.tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]


def test_stochastic_depth_rises_linearly():
    model = GSAlign(ModelConfig(width=24, depth=3, num_heads=3, drop_path=0.1))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.backbone.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_distributed_data_parallel_takes_every_parameter(
    tiny_config, make_model, make_batch, tmp_path
):
    model = make_model(tiny_config).train()
    alone = copy.deepcopy(model)
    batch = make_batch(tiny_config)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # an unused parameter is an error of the second step
            total(wrapped(*batch)).backward()
            total(alone(*batch)).backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)
