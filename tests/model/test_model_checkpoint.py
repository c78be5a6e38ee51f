"""Our own weights on disk."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from gsalign.errors import CheckpointError
from gsalign.model import (
    GSAlign,
    ModelConfig,
    load_model,
    load_weights,
    read_weights_config,
    save_weights,
)


def test_round_trip(tiny_config, make_model, make_batch, tmp_path):
    model = make_model(tiny_config).train()
    batch = make_batch(tiny_config)
    model.losses(*batch)
    path = tmp_path / "runs" / "best.safetensors"
    save_weights(model, path)
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]
    assert read_weights_config(path) == tiny_config
    loaded = load_model(path)
    assert not loaded.training and loaded.config == tiny_config
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded.embed(batch[0]), model.embed(batch[0]))


def test_channels_last_and_float64_networks_are_saved(tiny_config, make_model, tmp_path):
    model = make_model(tiny_config).double().to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "m.safetensors")
    other = GSAlign(tiny_config).double()
    load_weights(other, tmp_path / "m.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_another_size_is_named_tensor_by_tensor_and_nothing_changes(
    tiny_config, make_model, tmp_path
):
    path = tmp_path / "m.safetensors"
    save_weights(make_model(tiny_config), path)
    config = ModelConfig.model_validate(
        {**tiny_config.model_dump(), "num_identities": 7, "image_size": (32, 32)}
    )
    other = GSAlign(config)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, path)
    message = str(caught.value)
    assert "backbone.position is [1, 10, 24], the network has [1, 18, 24]" in message
    assert "identity_head.classifier.weight is [5, 24], the network has [7, 24]" in message
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_missing_and_unknown_tensors_are_named(tiny_config, make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(make_model(tiny_config), path)
    config = ModelConfig.model_validate(
        {**tiny_config.model_dump(), "dam": {"enabled": False}, "depth": 3}
    )
    with pytest.raises(CheckpointError, match=r"missing backbone\.blocks\.2.*unknown dam\.mask"):
        load_weights(GSAlign(config), path)


def test_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="carries no configuration"):
        load_model(path)
    safetensors.torch.save_file(
        {"a": torch.zeros(1)}, path, {"format": "gsalign-weights-1", "config": '{"colour": 1}'}
    )
    with pytest.raises(CheckpointError, match="do not know"):
        load_model(path)
    path.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="as safetensors"):
        load_model(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_model(tmp_path / "absent.safetensors")


def test_an_interrupted_save_keeps_the_old_file(tiny_config, make_model, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_weights(make_model(tiny_config), path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_weights(make_model(tiny_config, 0.5), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_loading_draws_no_random_numbers(tiny_config, make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(make_model(tiny_config), path)
    before = torch.get_rng_state()
    model = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
