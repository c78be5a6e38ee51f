"""Exported networks compute what the network computes, and say what they want."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gsalign.cli.main import main
from gsalign.errors import ConfigError
from gsalign.export import (
    EmbeddingModule,
    ExportError,
    export_compiled,
    export_onnx,
    export_program,
)
from gsalign.export.check import compare
from gsalign.model import GSAlign, ModelConfig, save_weights
from gsalign.search import Embedder, fingerprint
from gsalign_kernels import use_kernels


def network(parts: int = 0, **ltps: object) -> GSAlign:
    """One with parts cuts people out and turns them by these, one with switches turns by rays."""
    torch.manual_seed(0)
    orientation = {"enabled": bool(parts or ltps)}
    if parts:
        orientation |= {"reads": "parts", "cuts_out": True}
    config = {
        "image_size": (32, 16), "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2,
        "num_identities": 4, "ltps": {"hidden": (8, 4), **ltps}, "parts": parts,
        "part_cells": 2, "orientation": orientation,
    }  # fmt: skip
    return GSAlign(ModelConfig.model_validate(config)).eval()


@pytest.fixture(scope="module")
def module() -> EmbeddingModule:
    return EmbeddingModule(network())


def test_the_module_is_the_embedder(module):
    pixels = (torch.rand(3, 3, 32, 16) * 255).to(torch.uint8)
    wanted = Embedder(network())(list(pixels))
    inside = EmbeddingModule(network(), "inside")(pixels.float())
    outside = module(pixels.float().sub(127.5).div(127.5))
    np.testing.assert_allclose(inside.numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(outside.numpy(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="normalisation is 'twice'"):
        EmbeddingModule(network(), "twice")


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = EmbeddingModule(network(parts=2), "inside")
    path = tmp_path / "out" / "model.onnx"
    agreement = export_onnx(module, path)
    assert agreement.largest < 1e-5 and agreement.images == 4
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(path, full_check=True)
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said["normalisation"] == "inside" and said["slots"] == "3"
    assert said["network"] == fingerprint(network(parts=2)).network
    # In a batch that the exporter never saw, through no hands of ours.
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = module.example(7, seed=9)
    found = session.run(["embeddings"], {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, module(images).numpy(), atol=1e-5)


@pytest.mark.parametrize("aspect_true", [True, False])
def test_onnx_has_the_switches_of_ltps(tmp_path, aspect_true):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    given = network(angle="direction", aspect_true=aspect_true, points_per_image=not aspect_true)
    with torch.no_grad():
        for offsets in (ltps.offsets for ltps in given.backbone.ltps.values() if ltps.offsets):
            offsets.weight.normal_()
    module = EmbeddingModule(given)
    assert export_onnx(module, tmp_path / "model.onnx").largest < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
def test_a_program(module, tmp_path, kernels):
    path = tmp_path / "model.pt2"
    with use_kernels(kernels):
        assert export_program(module, path).largest < 1e-6
    said = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=said)
    assert '"normalisation": "outside"' in said["metadata.json"]
    ours = any("gsalign" in str(node.target) for node in program.graph.nodes)
    assert ours == (kernels == "cpp")


def test_a_compiled_network_runs_in_another_process(module, tmp_path):
    path = tmp_path / "model.pt2"
    with use_kernels("cpp"):
        assert export_compiled(module, path).largest < 1e-5
    images = module.example(5)
    torch.save([images, module(images)], tmp_path / "pair.pt")
    code = """
import sys, torch, gsalign_kernels
package = torch._inductor.aoti_load_package(sys.argv[1])
images, wanted = torch.load(sys.argv[2], weights_only=True)
assert torch.allclose(package(images), wanted, atol=1e-5)
print(package.get_metadata()["normalisation"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "pair.pt")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "outside"


def test_what_differs_is_refused(module):
    assert compare(module, module).largest == 0
    for wrong in (
        lambda images: module(images) + 2e-4,
        lambda images: module(images * 2),
        lambda images: module(images) * torch.nan,
    ):
        with pytest.raises(ExportError, match=r"differs from the network by .*nothing was"):
            compare(module, wrong)


def test_a_file_that_differs_is_not_left_behind(module, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("the old one")

    def differs(*_):
        raise ExportError("differs")

    monkeypatch.setattr("gsalign.export.program.compare", differs)
    with pytest.raises(ExportError):
        export_program(module, path)
    assert path.read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("export", [export_onnx, export_program, export_compiled])
def test_a_wrong_name_is_told(module, tmp_path, export):
    with pytest.raises(ConfigError, match=r"wanted a name that ends with \.(onnx|pt2)"):
        export(module, tmp_path / "model.bin")


def test_the_command(tmp_path, capsys):
    save_weights(network(), tmp_path / "w.safetensors")
    arguments = ["export", "--checkpoint", str(tmp_path / "w.safetensors"), "--format", "program"]
    out = tmp_path / "it is.pt2"
    assert main([*arguments, "--out", str(out), "--kernels", "reference"]) == 0
    told = capsys.readouterr().out
    assert "4 images, largest difference 0.0e+00" in told and "[batch, 3, 32, 16]" in told
    assert out.is_file()
    assert main([*arguments, "--out", str(tmp_path / "x.onnx")]) == 2
    assert "ends with .pt2" in capsys.readouterr().err


def test_what_a_network_costs(tmp_path, capsys):
    save_weights(network(parts=2), tmp_path / "w.safetensors")
    assert main(["info", "--model", str(tmp_path / "w.safetensors")]) == 0
    total = sum(parameter.numel() for parameter in network(parts=2).parameters())
    assert f"{total:,}" in capsys.readouterr().out
    assert main(["info", "--model", str(Path(tmp_path) / "w.pth")]) == 2
    assert "wanted a configuration (.yaml) or weights" in capsys.readouterr().err
