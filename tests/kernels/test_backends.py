"""Which implementation serves a call: strength of the choices, reasons, errors, the report."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gsalign_kernels as kernels
from gsalign_kernels import backends, native

CPU = torch.device("cpu")


def test_automatic_takes_the_native_kernel_on_the_cpu():
    assert native.cpu_reason is None
    assert backends.select("warp_tokens", CPU, None) == "cpp"
    assert backends.select("warp_tokens", CPU, "auto") == "cpp"


def test_devices_without_kernels_are_served_by_the_reference():
    assert backends.select("warp_tokens", torch.device("meta"), None) == "reference"


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setattr(backends, "_environment", "reference")
    assert backends.select("warp_tokens", CPU, None) == "reference"
    with kernels.use_kernels("cpp"):
        assert backends.select("warp_tokens", CPU, None) == "cpp"
        with kernels.use_kernels("reference"):
            assert backends.select("warp_tokens", CPU, None) == "reference"
            assert backends.select("warp_tokens", CPU, "cpp") == "cpp"
        assert backends.select("warp_tokens", CPU, None) == "cpp"
    assert backends.select("warp_tokens", CPU, None) == "reference"


def test_context_is_left_behind_an_error():
    with pytest.raises(KeyError), kernels.use_kernels("reference"):
        raise KeyError
    assert backends.select("warp_tokens", CPU, None) == "cpp"


def test_naming_what_cannot_run_says_why_and_what_can():
    with pytest.raises(kernels.KernelUnavailableError) as caught:
        kernels.tps_solve(torch.rand(4, 2), torch.rand(1, 4, 2), implementation="cuda")
    assert "tps_solve: cuda cannot run" in str(caught.value)
    assert "What can: reference, cpp" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("choice", ["cuda", "triton"])
def test_wide_choice_that_nothing_can_serve_fails_at_once(choice):
    if choice == "triton" and backends._TRITON_INTERPRETED:
        pytest.skip("the interpreter serves triton")
    with pytest.raises(kernels.KernelUnavailableError, match="What can: auto, reference, cpp"):
        with kernels.use_kernels(choice):
            raise AssertionError("the block must not run")


def test_wide_choice_leaves_operators_without_it_to_auto(monkeypatch):
    monkeypatch.setattr(backends, "_context", "triton")
    assert backends.select("part_distance", CPU, None) == "cpp"


@pytest.mark.parametrize("choice", ["fast", "", "CPP"])
def test_unknown_choices_are_listed(choice):
    with pytest.raises(ValueError, match="wanted one of auto, reference, cpp, cuda, triton"):
        with kernels.use_kernels(choice):
            raise AssertionError("the block must not run")


def test_missing_library_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(native, "cpu_reason", "the cpu library was not built: no compiler")
    assert backends.select("warp_tokens", CPU, None) == "reference"
    with pytest.raises(kernels.KernelUnavailableError, match="no compiler"):
        backends.select("warp_tokens", CPU, "cpp")
    report = kernels.kernel_report()
    assert report.table["warp_tokens"]["cpp"] == "the cpu library was not built: no compiler"
    assert report.automatic["warp_tokens"] == "reference"


def test_what_an_old_triton_may_compile_badly_is_not_served_by_it(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "cuda_reason", "was not built")
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "_TRITON_VERSION", (3, 5))
    with pytest.raises(kernels.KernelUnavailableError, match=r"triton 3\.5 .* install 3\.6"):
        backends.select("masked_part_pool", cuda, "triton")
    assert backends.select("warp_tokens", cuda, "triton") == "triton"
    monkeypatch.setattr(backends, "_context", "triton")  # a wide choice leaves it to the others
    assert backends.select("masked_part_pool", cuda, None) == "reference"
    monkeypatch.setattr(backends, "_TRITON_VERSION", (3, 6))
    assert backends.select("masked_part_pool", cuda, None) == "triton"


def test_what_is_served_only_by_name_is_not_chosen_automatically(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "cuda_reason", "was not built")
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "_TRITON_VERSION", (3, 8))
    assert backends.select("masked_part_pool", cuda, None) == "reference"
    assert backends.select("masked_prototype_loss", cuda, None) == "triton"
    assert backends.select("masked_part_pool", cuda, "triton") == "triton"


@pytest.mark.parametrize(
    "operator", ["warp_tokens", "warp_image", "masked_part_pool", "masked_prototype_loss"]
)
def test_float64_is_left_to_who_takes_it(operator, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "cuda_reason", None)
    assert backends.select(operator, cuda, None, torch.float32) == "cuda"
    assert backends.select(operator, cuda, None, torch.float64) == "reference"
    with pytest.raises(kernels.KernelUnavailableError, match="takes no float64"):
        backends.select(operator, cuda, "cuda", torch.float64)
    assert backends.select(operator, CPU, None, torch.float64) == "cpp"


def test_report_covers_every_public_operator():
    report = kernels.kernel_report()
    public = {
        name
        for name in kernels.__all__
        if name.startswith(("tps_", "warp_", "masked_", "conv_", "part_"))
        and callable(getattr(kernels, name))
    }
    public.remove("tps_solve_ex")  # tps_solve with another result
    assert set(report.table) == public
    text = str(report)
    for operator in public:
        assert operator in text
    assert "torch " + torch.__version__ in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference"), ("cpp", "cpp"), ("", "cpp"), ("auto", "cpp")],
)
def test_environment_variable(value, expected):
    code = (
        "import torch; from gsalign_kernels import backends;"
        "print(backends.select('warp_tokens', torch.device('cpu'), None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GSALIGN_KERNELS": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def test_wrong_environment_variable_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import gsalign_kernels"],
        env={**os.environ, "GSALIGN_KERNELS": "fast"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "GSALIGN_KERNELS: wanted one of auto" in done.stderr


def test_compiled_code_follows_a_later_choice():
    tokens, points = torch.rand(1, 4, 3), torch.rand(4, 2)
    basis = torch.rand(4, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def function(tokens):
        return kernels.warp_tokens(tokens, points, torch.zeros(1), basis, size=(2, 2), eta=0.5)

    first = function(tokens)
    with kernels.use_kernels("reference"), torch.profiler.profile() as profile:
        second = function(tokens)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert any("grid_sampler" in event.key for event in profile.key_averages())
