"""An embedder of a tiny network, and photographs with names that make trouble."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from cargo_folder import write_image
from search_support import tiny_network

from gsalign.model import save_weights
from gsalign.search import Embedder


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
