"""Taking a network elsewhere: ONNX, a program of PyTorch, a compiled package."""

from __future__ import annotations

from gsalign.export.check import Agreement, ExportError
from gsalign.export.embedding import EmbeddingModule
from gsalign.export.onnx import export_onnx
from gsalign.export.program import export_compiled, export_program

__all__ = [
    "Agreement",
    "EmbeddingModule",
    "ExportError",
    "export_compiled",
    "export_onnx",
    "export_program",
]
