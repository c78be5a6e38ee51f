"""ONNX, checked in onnxruntime before the file is where it was wanted."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gsalign.errors import ConfigError
from gsalign.export.check import Agreement, compare
from gsalign.export.embedding import LARGEST_BATCH, EmbeddingModule
from gsalign.extras import import_extra
from gsalign.files import atomic_write
from gsalign_kernels import use_kernels

# The first with GridSample of any rank, in the form that PyTorch's exporter makes.
OPSET = 20


def export_onnx(module: EmbeddingModule, path: str | os.PathLike[str]) -> Agreement:
    """Write a network as one ONNX file with a batch of any size.

    The operators are the reference's, so that the file needs nothing of this library. Its metadata
    says what goes in and what comes out.

    Args:
        module: what to export, float32 on the CPU.
        path: ``.onnx``; replaced if it exists.

    Returns:
        How onnxruntime's embeddings agree with PyTorch's.

    Raises:
        ConfigError: the path has another suffix.
        ExportError: they differ by more than 1e-4; no file is written.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise ConfigError(f"the file is {target}; wanted a name that ends with .onnx")
    onnx = import_extra("onnx", extra="export")
    import_extra("onnxscript", extra="export")
    runtime = import_extra("onnxruntime", extra="export")
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with use_kernels("reference"), torch.no_grad(), _silence():
        program = torch.onnx.export(
            module,
            (module.example(2),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, module.metadata())
    with atomic_write(target) as temporary:
        # Beyond 2 GB a model needs a second file for its weights; ours are far smaller.
        onnx.save_model(model, temporary)
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def exported(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        return compare(module, exported)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's talk off the terminal; what matters it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
