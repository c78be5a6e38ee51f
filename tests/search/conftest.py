"""A tiny network with an embedder, photographs of all kinds, and embeddings out of thin air."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from cargo_folder import write_image

from gsalign.model import GSAlign, ModelConfig, save_weights
from gsalign.search import Embedder, Extraction, Fingerprint, ImageTable, open_extraction
from gsalign.search.documents import record_file, write_document
from gsalign.search.extraction import ExtractionManifest
from gsalign.search.table import write_table

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


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads wait for each other in vain where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder(tiny_network(), batch_size=4)


@pytest.fixture(scope="session")
def part_embedder() -> Embedder:
    return Embedder(tiny_network(parts=2), batch_size=4)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(tiny_network(), path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images in two folders, with names that make trouble; not to be changed."""
    root = tmp_path_factory.mktemp("photographs") / "a folder, 文件夹"
    for number in range(9):
        write_image(root / f"camera {number % 2}" / f"img{number}.jpg", seed=number)
    write_image(root / "camera 0" / "Größe & <b>名前 'x'.png", seed=20)
    write_image(root / "camera 1" / '=1+1, "quoted".jpg', seed=21)
    (root / "notes.txt").write_text("no image", encoding="utf-8")
    write_image(root / ".hidden" / "x.jpg", seed=30)
    return root


@pytest.fixture
def own_photographs(photographs: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(photographs, tmp_path / "own"))


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
