"""Parameter groups: every parameter once, each kind with its own weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gsalign.engine.config import OptimizerConfig
from gsalign.engine.optimizer import build_optimizer, parameter_groups, parameter_kinds
from gsalign.model import GSAlign, ModelConfig

DECAYS = {
    "weight_decay": 0.1,
    "weight_decay_norm": 0.2,
    "weight_decay_bias": 0.3,
    "weight_decay_tokens": 0.4,
}


@pytest.fixture(scope="module")
def network():
    config = ModelConfig(
        image_size=(32, 16), patch_size=8, width=24, depth=2, num_heads=2, num_identities=5,
        ltps={"hidden": (8, 4)},
    )  # fmt: skip
    return GSAlign(config)


def test_every_trained_parameter_is_in_one_group_under_its_name(network):
    groups = parameter_groups(network, OptimizerConfig())
    found = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert name not in found
            found[name] = parameter
    wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert all(found[name] is wanted[name] for name in wanted)


def test_kinds_follow_from_what_a_parameter_belongs_to(network):
    modules = dict(network.named_modules())
    kinds = {name: kind for name, _, kind in parameter_kinds(network)}
    assert set(kinds.values()) == {"bias", "norm", "tokens", "weight"}
    norms = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
    for name, kind in kinds.items():
        owner, _, last = name.rpartition(".")
        if last == "bias":
            assert kind == "bias", name
        elif isinstance(modules[owner], norms):
            assert kind == "norm", name
        elif isinstance(modules[owner], (nn.Linear, nn.Conv2d)):
            assert kind == "weight", name
    for name in ("class_token", "view_token", "position"):
        assert kinds[f"backbone.{name}"] == "tokens"


def test_each_kind_decays_as_configured(network):
    kinds = {name: kind for name, _, kind in parameter_kinds(network)}
    names = {
        "weight": "weight_decay",
        "norm": "weight_decay_norm",
        "bias": "weight_decay_bias",
        "tokens": "weight_decay_tokens",
    }
    groups = parameter_groups(network, OptimizerConfig(**DECAYS))
    assert len(groups) == 4
    for group in groups:
        for name in group["names"]:
            assert group["weight_decay"] == DECAYS[names[kinds[name]]], name


def test_null_means_the_decay_of_the_weights_and_equal_decays_share_a_group(network):
    config = OptimizerConfig(
        weight_decay=0.25,
        weight_decay_norm=None,
        weight_decay_bias=0.0,
        weight_decay_tokens=None,
    )
    groups = parameter_groups(network, config)
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    free = next(group for group in groups if group["weight_decay"] == 0.0)
    assert all(name.endswith("bias") for name in free["names"])


def test_the_published_recipe_decays_norms_and_biases_five_times_as_much(network):
    kinds = {name: kind for name, _, kind in parameter_kinds(network)}
    for group in parameter_groups(network, OptimizerConfig()):
        some = {kinds[name] for name in group["names"]}
        assert some in ({"weight", "tokens"}, {"norm", "bias"})
        assert group["weight_decay"] == (1e-4 if "weight" in some else 5e-4)


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert [name for name, _, _ in parameter_kinds(layer)] == ["weight"]


def test_the_optimizer_is_the_one_named(network):
    sgd = build_optimizer(network, OptimizerConfig(name="sgd", lr=0.5, momentum=0.75))
    assert type(sgd) is torch.optim.SGD
    assert {(group["lr"], group["momentum"]) for group in sgd.param_groups} == {(0.5, 0.75)}
    adamw = build_optimizer(network, OptimizerConfig(name="adamw", lr=0.5, betas=(0.5, 0.75)))
    assert type(adamw) is torch.optim.AdamW
    assert {(group["lr"], group["betas"]) for group in adamw.param_groups} == {(0.5, (0.5, 0.75))}


def test_decay_shrinks_a_parameter_without_gradient_by_its_own_rate():
    norm = nn.LayerNorm(4)
    config = OptimizerConfig(
        lr=0.5, momentum=0.0, weight_decay_norm=0.5, weight_decay_bias=0.25, weight_decay=0.0
    )
    optimizer = build_optimizer(norm, config)
    with torch.no_grad():
        norm.bias.fill_(1.0)
    for parameter in norm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(norm.weight.detach(), torch.full((4,), 1 - 0.5 * 0.5))
    torch.testing.assert_close(norm.bias.detach(), torch.full((4,), 1 - 0.5 * 0.25))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_step_is_fused_where_pytorch_fuses(name):
    layer = nn.Linear(3, 2)
    config = OptimizerConfig(name=name)
    assert all(group["fused"] for group in build_optimizer(layer, config).param_groups)
    elsewhere = build_optimizer(layer.to("meta"), config)
    assert not any(group["fused"] for group in elsewhere.param_groups)


@pytest.mark.parametrize("change", [{"ltps_lr_factor": 0.5}, {"ltps_warmup": 10}])
def test_ltps_with_a_rate_of_its_own_has_groups_of_its_own(network, change):
    plain = parameter_groups(network, OptimizerConfig(**DECAYS))
    assert not any(group["ltps"] for group in plain)
    groups = parameter_groups(network, OptimizerConfig(**DECAYS, **change))
    apart = [name for group in groups if group["ltps"] for name in group["names"]]
    wanted = [name for name, _ in network.named_parameters() if name.startswith("backbone.ltps.")]
    assert wanted and sorted(apart) == sorted(wanted)
    decay_of = {name: group["weight_decay"] for group in plain for name in group["names"]}
    found = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert found == decay_of
