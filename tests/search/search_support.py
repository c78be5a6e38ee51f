"""A network small enough for every test, and folders of embeddings out of thin air."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gsalign.model import GSAlign, ModelConfig
from gsalign.search import Extraction, Fingerprint, ImageTable, open_extraction, write_table
from gsalign.search.documents import record_file, write_document
from gsalign.search.extraction import ExtractionManifest

TINY = {
    "image_size": (32, 16),
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_identities": 4,
    "ltps": {"hidden": (8, 4)},
}


def tiny_network(*, parts: int = 0, seed: int = 0) -> GSAlign:
    torch.manual_seed(seed)
    return GSAlign(ModelConfig.model_validate({**TINY, "parts": parts})).eval()


def make_extraction(
    root: Path,
    count: int,
    *,
    slots: int = 1,
    width: int = 32,
    seed: int = 0,
    first: int = 0,
    network: str = "a" * 64,
) -> Extraction:
    """Random embeddings about one centre per identity, five images each, with all labels."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(first, first + count)
    centres = np.random.default_rng(1000).standard_normal((4000, slots, width))
    vectors = centres[numbers // 5] + 0.7 * rng.standard_normal((count, slots, width))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors[:, 1:] *= np.sqrt(rng.uniform(0.0, 1.0, (count, slots - 1, 1)))
    vectors = vectors.reshape(count, -1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    root.mkdir(parents=True)
    np.save(root / "embeddings.npy", vectors.astype(np.float32))
    table = ImageTable(
        tuple(f"/images/{number}.jpg" for number in numbers),
        tuple(str(number // 5) for number in numbers),
        tuple(str(number % 7) for number in numbers),
        tuple(("aerial", "ground")[number % 2] for number in numbers),
    )
    write_table(table, root / "images.csv")
    manifest = ExtractionManifest(
        count=count,
        dimension=slots * width,
        slots=slots,
        fingerprint=Fingerprint(network=network, preprocessing={"flip_test": "off"}),
        checkpoint="",
        precision="no",
        listing="",
        skipped=(),
        table="images.csv",
        files={name: record_file(root / name) for name in ("embeddings.npy", "images.csv")},
    )
    write_document(manifest, root / "embeddings.json")
    return open_extraction(root)
