"""Programs of PyTorch with our operators inside: exported, and compiled ahead of time.

Loading either wants ``import gsalign_kernels`` before, which defines the operators.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from torch.export import ExportedProgram

from gsalign.errors import ConfigError
from gsalign.export.check import Agreement, ExportError, compare
from gsalign.export.embedding import LARGEST_BATCH, EmbeddingModule
from gsalign.files import atomic_write

METADATA = "metadata.json"


def export_program(module: EmbeddingModule, path: str | os.PathLike[str]) -> Agreement:
    """Write a network as an exported program, for ``torch.export.load``.

    The implementation in force is the one inside: ``use_kernels("reference")`` makes a program that
    needs nothing of this library.

    Args:
        module: what to export.
        path: ``.pt2``; replaced if it exists.

    Returns:
        How the loaded program's embeddings agree with the network's.

    Raises:
        ConfigError: the path has another suffix.
        ExportError: they differ by more than 1e-4; no file is written.
    """
    target = _named(path)
    program = _program(module)
    with atomic_write(target) as temporary:
        torch.export.save(program, temporary, extra_files={METADATA: json.dumps(module.metadata())})
        return compare(module, torch.export.load(temporary).module())


def export_compiled(module: EmbeddingModule, path: str | os.PathLike[str]) -> Agreement:
    """Write a network compiled by AOTInductor, for ``torch._inductor.aoti_load_package``.

    The file holds machine code for processors like this one. It loads without Python's compiler, in
    C++ too, where the library of our operators has to be loaded before.

    Args:
        module: what to export.
        path: ``.pt2``; replaced if it exists.

    Returns:
        How the compiled network's embeddings agree with the original's.

    Raises:
        ConfigError: the path has another suffix.
        ExportError: there is no C++ compiler, it fails, or embeddings differ by more than 1e-4; no
            file is written.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    target = _named(path)
    program = _program(module)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with atomic_write(target) as temporary:
        try:
            aoti_compile_and_package(
                program,
                package_path=str(temporary),
                inductor_configs={"aot_inductor.metadata": module.metadata()},
            )
        except (InductorError, InvalidCxxCompiler, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"compiling the network failed: {reason}") from error
        return compare(module, aoti_load_package(str(temporary)))


def _named(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ConfigError(f"the file is {target}; wanted a name that ends with .pt2")
    return target


def _program(module: EmbeddingModule) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        return torch.export.export(module, (module.example(2),), dynamic_shapes=({0: batch},))
