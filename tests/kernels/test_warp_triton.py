"""The Triton token warp in Triton's interpreter: the shared tests, in a process that interprets.

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


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_shared_tests_pass_in_the_interpreter(tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GSALIGN_KERNELS", "PYTEST_ADDOPTS")
    }
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER / "test_warp_tokens.py")]
    command += ["-k", "triton", f"--junitxml={report}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=FOLDER.parents[1]
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
    assert skipped == {}
    assert len(names) > 20
    assert "test_opcheck[gsalign_triton]" in names
    for shared in ("test_agrees_with_float64", "test_identity_is_exact", "test_same_bits"):
        assert any(name.startswith(shared) and "triton" in name for name in names), shared
