"""Compiles the native sources and says what was built, for which targets, what not and why.

Three extension modules, each built when its tools are there:

- ``gsalign_kernels._cpu``: C++ operators and every operator schema, on the LibTorch stable ABI;
- ``gsalign_kernels._cuda``: CUDA operators, on the LibTorch stable ABI;
- ``gsalign_kernels._bindings``: pybind11, free of torch: build report and ranking.

Environment:

- ``FORCE_CUDA=1`` builds the CUDA module or fails; ``FORCE_CUDA=0`` leaves it out.
- ``TORCH_CUDA_ARCH_LIST`` sets the CUDA targets, as ``"9.0;10.0+PTX"``.
- ``GSALIGN_BUILD_NATIVE=0`` compiles nothing.
- ``MAX_JOBS`` bounds the parallel compiler processes.

A present compiler that fails is an error; an absent one is not: the package then installs and runs
on what is left, and ``gsalign info`` says why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as PlainBuildExt
from setuptools.command.build_py import build_py as PlainBuildPy

ROOT = Path(__file__).parent
REPORT_NAME = "_build_report.json"

# The oldest PyTorch whose stable ABI the operators use: 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_CUDA_TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# -fopenmp-simd honours `#pragma omp simd` without the OpenMP runtime: threads come from PyTorch.
# -Wno-psabi: vectors are passed only to functions that are always inlined.
CXX_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-Wall", "-Wno-psabi", STABLE_ABI]
# One translation unit for several targets: nvcc compiles them side by side.
NVCC_FLAGS = [
    "-O3",
    "-lineinfo",
    f"--threads={min(os.cpu_count() or 1, 8)}",
    "-DUSE_CUDA",
    STABLE_ABI,
]


@dataclass
class Module:
    """What the build makes of one extension module."""

    built: bool
    reason: str = ""
    compiler: str = ""
    targets: list[str] = field(default_factory=list)


def first_line(*command: str) -> str:
    """First line a program prints, empty when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else ""


def import_torch():
    """PyTorch, or None with the reason why it cannot be imported."""
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        return None, None, f"PyTorch cannot be imported by the build: {error}"
    return torch, cpp_extension, ""


def sources(*patterns: str) -> list[str]:
    """Native sources by pattern, relative to the root as setuptools wants them, in stable order."""
    found = [path for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def headers() -> list[str]:
    """What the sources include: a change of one is a change of every module."""
    return sources("*/*.h", "*/*.cuh", "*/*.inl")


def plan_cxx() -> Module:
    """Whether C++ can be compiled, and with what."""
    if os.environ.get("GSALIGN_BUILD_NATIVE", "1") == "0":
        return Module(False, "GSALIGN_BUILD_NATIVE=0 was set")
    command = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(command) is None:
        return Module(False, f"no C++ compiler was found (looked for '{command}'; set CXX)")
    return Module(True, compiler=first_line(command, "--version"))


def find_nvcc(cpp_extension) -> str | None:
    """Nvcc under the CUDA home that PyTorch's build tools use, or on the PATH."""
    if cpp_extension.CUDA_HOME:
        candidate = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
        if candidate.exists():
            return str(candidate)
    return shutil.which("nvcc")


def toolkit_of(nvcc: str) -> str | None:
    """The toolkit's folder as nvcc itself names it: the one on the PATH may be a wrapper."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    found = re.search(r"^#\$ TOP=(.+)$", told.stdout + told.stderr, re.MULTILINE)
    return os.path.realpath(found[1].strip()) if found else None


def cuda_targets(nvcc: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST``, or the defaults that this nvcc knows, with PTX for the newest."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return [target for target in re.split(r"[;\s]+", asked) if target]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [
        target
        for target in DEFAULT_CUDA_TARGETS
        if f"compute_{target.replace('.', '')}\n" in listed + "\n"
    ]
    return [*known[:-1], known[-1] + "+PTX"] if known else []


def plan_cuda(torch, cpp_extension, cxx: Module) -> Module:
    """Whether CUDA can be compiled; never asks whether a GPU is in this machine."""
    wanted = os.environ.get("FORCE_CUDA")
    if wanted == "0":
        return Module(False, "FORCE_CUDA=0 was set")
    force = wanted == "1"
    if not cxx.built:
        return Module(False, cxx.reason)
    if torch.version.cuda is None and not force:
        return Module(False, "the build's PyTorch is a build without CUDA (FORCE_CUDA=1 overrides)")
    nvcc = find_nvcc(cpp_extension)
    if nvcc is None:
        if force:
            raise SystemExit("FORCE_CUDA=1, but nvcc was not found: set CUDA_HOME")
        return Module(False, "nvcc was not found (install the CUDA toolkit or set CUDA_HOME)")
    if "CUDA_HOME" not in os.environ:
        cpp_extension.CUDA_HOME = toolkit_of(nvcc) or cpp_extension.CUDA_HOME
    release = re.search(r"release (\d+)\.(\d+)", subprocess.getoutput(f"{nvcc} --version"))
    if release and torch.version.cuda and not force:
        if release[1] != torch.version.cuda.split(".")[0]:
            return Module(
                False,
                f"nvcc is of CUDA {release[1]}.{release[2]} but PyTorch of CUDA "
                f"{torch.version.cuda} (install the same major version, or FORCE_CUDA=1)",
            )
    targets = cuda_targets(nvcc)
    if not targets:
        return Module(False, f"nvcc {nvcc} knows none of {', '.join(DEFAULT_CUDA_TARGETS)}")
    version = f"nvcc {release[1]}.{release[2]}" if release else "nvcc"
    return Module(True, compiler=version, targets=targets)


def plan_bindings(cxx: Module) -> tuple[Module, list[str]]:
    """Whether the pybind11 module can be compiled, and its include folders."""
    if not cxx.built:
        return Module(False, cxx.reason), []
    try:
        import pybind11
    except ImportError:
        return Module(False, "pybind11 is not installed"), []
    return Module(True, compiler=cxx.compiler, targets=[platform.machine()]), [
        pybind11.get_include()
    ]


def plan():
    """The modules to build, their extensions, and the report that says so."""
    cxx = plan_cxx()
    torch, cpp_extension, no_torch = import_torch()
    extensions = []
    cpu = Module(cxx.built, cxx.reason, cxx.compiler, [platform.machine()] if cxx.built else [])
    if torch is None:
        cpu = Module(False, no_torch)
        cuda = Module(False, no_torch)
    else:
        cuda = plan_cuda(torch, cpp_extension, cxx)
    if cpu.built:
        extensions.append(
            cpp_extension.CppExtension(
                "gsalign_kernels._cpu",
                sources("register.cpp", "*/*_cpu.cpp"),
                depends=headers(),
                extra_compile_args={"cxx": CXX_FLAGS},
                py_limited_api=True,
            )
        )
    if cuda.built:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda.targets)
        extensions.append(
            cpp_extension.CUDAExtension(
                "gsalign_kernels._cuda",
                sources("*/*_cuda.cu"),
                depends=headers(),
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
                py_limited_api=True,
            )
        )
    bindings, includes = plan_bindings(cxx)
    report = {
        "cpu": asdict(cpu),
        "cuda": asdict(cuda),
        "bindings": asdict(bindings),
        "torch": None if torch is None else torch.__version__,
        "python": platform.python_version(),
    }
    if bindings.built:
        arguments = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-pthread"]
        extensions.append(
            Extension(
                "gsalign_kernels._bindings",
                sources("bindings.cpp", "ranking/ranking.cpp"),
                depends=headers(),
                include_dirs=includes,
                # A C string literal that holds the report, which the module gives back.
                define_macros=[("GSALIGN_BUILD_REPORT_JSON", json.dumps(json.dumps(report)))],
                # BuildExtension wants a dictionary, plain setuptools a list.
                extra_compile_args={"cxx": arguments} if torch is not None else arguments,
                language="c++",
            )
        )
    build_ext = PlainBuildExt if torch is None else cpp_extension.BuildExtension
    return extensions, report, build_ext


def report_lines(report: dict) -> list[str]:
    """The report as the last lines of the build."""
    lines = ["", "gsalign: what was built"]
    for name in ("cpu", "cuda", "bindings"):
        module = report[name]
        if module["built"]:
            targets = ", ".join(module["targets"])
            lines.append(f"  {name:9} built for {targets} with {module['compiler']}")
        else:
            lines.append(f"  {name:9} NOT built: {module['reason']}")
    lines.append(f"  against PyTorch {report['torch']}; loads under PyTorch 2.11 and newer")
    return lines


EXTENSIONS, REPORT, BUILD_EXT = plan()


class BuildExt(BUILD_EXT):
    """Builds the extensions, then prints and keeps the report."""

    def finalize_options(self) -> None:
        """Keep objects where any later build of this checkout finds them.

        An editable install would have them in a temporary folder and compile all of them each time.
        """
        super().finalize_options()
        name = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / name)

    def run(self) -> None:
        """Build, print the report last, and leave it beside the modules it speaks of."""
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        path = folder / "gsalign_kernels" / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(REPORT, indent=2) + "\n", encoding="utf-8")
        print("\n".join(report_lines(REPORT)), file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        """The report is an output too, so that an uninstall removes it."""
        return [
            *super().get_outputs(),
            os.path.join(self.build_lib, "gsalign_kernels", REPORT_NAME),
        ]


class BuildPy(PlainBuildPy):
    """Runs the extension build even when there is nothing to compile, so the report is written."""

    def run(self) -> None:
        """Build Python files, then extensions or at least their report."""
        super().run()
        if not self.distribution.has_ext_modules():
            self.run_command("build_ext")


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
