"""Triton kernels in Triton's interpreter: the shared tests, in a process that interprets.

Whether kernels are interpreted is settled when triton is imported, so it takes its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

FLOAT64 = "float64 is left to cpp and the reference"

# Per file: tests that must have been among those run, and what is skipped there on purpose.
FILES = {
    "test_warp_tokens.py": (
        ["test_opcheck[gsalign_triton]", "test_agrees_with_float64", "test_identity_is_exact"],
        (),
    ),
    "test_tps.py": (
        ["test_opcheck[tps_solve-triton]", "test_agrees_with_scipy", "test_gradcheck"],
        (),
    ),
    "test_warp_image.py": (
        ["test_opcheck[triton]", "test_agrees_with_float64", "test_odd_sizes"],
        (FLOAT64,),
    ),
    "test_pool.py": (
        ["test_opcheck[0-1-False", "test_agrees_with_the_reference", "test_empty_lengths"],
        (FLOAT64, "takes minutes in the interpreter"),
    ),
    "test_conv_relu_mean.py": (
        ["test_opcheck[dtype0-triton]", "test_agrees_with_the_reference", "test_signs"],
        (FLOAT64,),
    ),
    "test_prototype.py": (
        ["test_opcheck[dtype0-triton]", "test_agrees_with_the_reference", "test_clamped_norms"],
        (FLOAT64,),
    ),
}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", FILES)
def test_shared_tests_pass_in_the_interpreter(file, tmp_path):
    expected, skipped_on_purpose = FILES[file]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GSALIGN_KERNELS", "PYTEST_ADDOPTS") and not name.startswith("PYTEST_XDIST")
    }
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER / file)]
    command += ["-k", "triton", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command += ["-n", "2"] if find_spec("xdist") else []
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment,
        cwd=FOLDER.parents[1],
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        # Triton up to 3.6 counts its loops in a way that NumPy 2.4 refuses, in any kernel.
        pytest.skip("this triton's interpreter has no loops with this NumPy")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    names = [case.get("name") for case in cases]
    skipped = {
        case.get("name"): case.find("skipped").get("message")
        for case in cases
        if case.find("skipped") is not None
    }
    assert set(skipped.values()) <= set(skipped_on_purpose), skipped
    ran = [name for name in names if name not in skipped]
    assert len(ran) > 20
    for test in expected:
        assert any(name.startswith(test) and "triton" in name for name in ran), test
