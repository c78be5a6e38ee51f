"""Writing a generated set to disk: all of it or nothing, and never over anything else."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from gsalign.data.synthetic.config import RENDERER_VERSION, SyntheticConfig
from gsalign.data.synthetic.identity import Appearance, sample_appearances
from gsalign.data.synthetic.part_labels import part_label_path
from gsalign.data.synthetic.plan import ImageSpec, plan_images
from gsalign.data.synthetic.render import render
from gsalign.data.synthetic.truth import TruthRow, write_truth
from gsalign.errors import DataError
from gsalign.files import atomic_write

MARKER_FILE = "generated.json"
# Pixels per batch: large enough to drown the cost of a call, small enough for the caches.
_BATCH_PIXELS = 16 * 128 * 64


@dataclass(frozen=True)
class GenerationReport:
    """What a call of :func:`generate` left on disk.

    Attributes:
        root: folder of the set.
        train_images: number of images for training.
        query_images: number of queries.
        gallery_images: number of images in the gallery.
        identities: people in the set, distractors included.
        seconds: wall-clock time of this call.
        reused: the set was there already and nothing was rendered.
    """

    root: Path
    train_images: int
    query_images: int
    gallery_images: int
    identities: int
    seconds: float
    reused: bool

    @property
    def images(self) -> int:
        """Number of images over all splits."""
        return self.train_images + self.query_images + self.gallery_images


def generate(
    root: str | Path,
    config: SyntheticConfig | None = None,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> GenerationReport:
    """Render a set into a folder laid out like CARGO.

    The folder holds ``{train,query,gallery}/Cam{1..13}/Cam2_day_2519_320.jpg`` (camera, day or
    night, identity, image id), ``truth.csv``, ``generated.json`` and, if asked for, ``parts/`` with
    the label maps. It is written beside its final place and renamed when complete, so that an
    interrupted call leaves nothing under the final name. A folder that already holds the set of
    the same settings is left as it is.

    Args:
        root: folder to make.
        config: settings; None for the defaults.
        workers: processes to render with, 0 for this one. Worker processes are spawned: a script
            that uses them needs the usual ``if __name__ == "__main__":`` guard.
        device: where to render. With workers each of them uses this device.
        progress: called after every batch with (images done, images in all), in this process. What
            it raises ends the call and is raised by it.
        overwrite: replace a generated set of other settings.

    Returns:
        Counts and time.

    Raises:
        DataError: ``root`` is something other than a generated set, or one of other settings and
            ``overwrite`` is false; or it cannot be written.
        ValueError: ``workers`` is negative.
    """
    started = time.perf_counter()
    config = SyntheticConfig() if config is None else config
    # Renaming needs the folder itself, not a link to it.
    root = Path(os.path.realpath(root))
    if workers < 0:
        raise ValueError(f"workers is {workers}; wanted 0 (this process) or a number of processes")
    specs = plan_images(config)

    def report(reused: bool) -> GenerationReport:
        count = {
            name: sum(s.split == name for s in specs) for name in ("train", "query", "gallery")
        }
        return GenerationReport(
            root=root,
            train_images=count["train"],
            query_images=count["query"],
            gallery_images=count["gallery"],
            identities=len({s.identity for s in specs}),
            seconds=time.perf_counter() - started,
            reused=reused,
        )

    if _holds(root, config, overwrite):
        return report(reused=True)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.generating-"))
    except OSError as error:
        raise DataError(f"root {root} cannot be made: {error}") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for spec in specs:
            (temporary / spec.path).parent.mkdir(parents=True, exist_ok=True)
            if config.write_parts:
                maps = temporary / part_label_path(PurePosixPath(spec.path))
                maps.parent.mkdir(parents=True, exist_ok=True)
        rows: dict[str, TruthRow] = {}
        with _single_thread():
            for batch in _render_all(temporary, specs, config, workers, str(device)):
                rows.update((row.path, row) for row in batch)
                if progress is not None:
                    progress(len(rows), len(specs))
        write_truth(temporary, (rows[spec.path] for spec in specs))
        marker = {
            "renderer_version": RENDERER_VERSION,
            "fingerprint": config.fingerprint(),
            "config": config.model_dump(mode="json"),
            "images": len(specs),
        }
        with atomic_write(temporary / MARKER_FILE) as path:
            path.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        _put(temporary, root)
    except OSError as error:
        raise DataError(f"root {root} cannot be written: {error}") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a process of workers={workers} died; pass a smaller number, or 0 to render in this "
            "process (a script that uses workers needs an if __name__ == '__main__' guard)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report(reused=False)


def _holds(root: Path, config: SyntheticConfig, overwrite: bool) -> bool:
    """True when the set is there; raises when something else is in the way."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise DataError(f"root {root} is a file; name a new folder")
    if not any(root.iterdir()):
        return False
    marker = root / MARKER_FILE
    try:
        fingerprint = json.loads(marker.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"root {root} is not empty and was not made by the generator (no valid {MARKER_FILE}); "
            "name a new folder"
        ) from None
    if fingerprint == config.fingerprint():
        return True
    if not overwrite:
        raise DataError(
            f"root {root} holds a generated set of other settings or of another renderer version; "
            "name another folder, or pass overwrite=True to replace it"
        )
    return False


def _put(temporary: Path, root: Path) -> None:
    """Move the finished folder to its place; an older set is removed only afterwards."""
    old = None
    if root.exists():
        old = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.old-"))
    try:
        if old is not None:
            os.replace(root, old)
        os.replace(temporary, root)
    except BaseException:
        if old is not None:
            if root.exists():
                old.rmdir()
            else:
                os.replace(old, root)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: the tensors are small, and processes scale better."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(specs: list[ImageSpec], config: SyntheticConfig) -> list[list[ImageSpec]]:
    height, width = config.image_size
    size = max(1, min(32, _BATCH_PIXELS // (height * width)))
    return [specs[i : i + size] for i in range(0, len(specs), size)]


def _render_all(
    folder: Path, specs: list[ImageSpec], config: SyntheticConfig, workers: int, device: str
) -> Iterator[list[TruthRow]]:
    """Render and write every batch; yields the truth of each as it is done, in any order."""
    batches = _batches(specs, config)
    if workers == 0:
        appearances = _appearances(config)
        for batch in batches:
            yield _write_batch(folder, batch, appearances, config, device)
        return
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(batches)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(folder, config, device),
    )
    try:
        pending = {pool.submit(_work, batch) for batch in batches}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BaseException:
        for future in pending:
            future.cancel()
        raise
    finally:
        # Waits for the batches under way, so that nobody writes into the folder afterwards.
        pool.shutdown(wait=True, cancel_futures=True)


def _appearances(config: SyntheticConfig) -> list[Appearance]:
    total = config.train_identities + config.test_identities + config.distractor_identities
    return sample_appearances(config.seed, total)


_worker: tuple[Path, SyntheticConfig, str, list[Appearance]] | None = None


def _start_worker(folder: Path, config: SyntheticConfig, device: str) -> None:
    global _worker
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker = (folder, config, device, _appearances(config))


def _work(batch: list[ImageSpec]) -> list[TruthRow]:
    assert _worker is not None
    folder, config, device, appearances = _worker
    return _write_batch(folder, batch, appearances, config, device)


def _write_batch(
    folder: Path,
    batch: list[ImageSpec],
    appearances: list[Appearance],
    config: SyntheticConfig,
    device: str,
) -> list[TruthRow]:
    rendering = render(batch, appearances, config, device=device)
    images = rendering.images.numpy()
    labels = None if rendering.labels is None else rendering.labels.numpy()
    for index, spec in enumerate(batch):
        picture = Image.fromarray(images[index])
        picture.save(folder / spec.path, quality=config.jpeg_quality, subsampling=0)
        if labels is not None:
            Image.fromarray(labels[index]).save(folder / part_label_path(PurePosixPath(spec.path)))
    return rendering.truth


def generation_settings(root: str | Path) -> dict[str, object]:
    """Settings, fingerprint and renderer version of a generated set, from ``generated.json``.

    Raises:
        DataError: the folder is not a generated set.
    """
    marker = Path(root) / MARKER_FILE
    try:
        settings = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"root {root} has no readable {MARKER_FILE}: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{marker} is not what the generator writes; generate the set again")
    return settings


__all__ = ["MARKER_FILE", "GenerationReport", "generate", "generation_settings"]
