"""A page with the answers of a search as pictures, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape

from PIL import Image

from gsalign.data import read_image
from gsalign.errors import DataError
from gsalign.files import atomic_write
from gsalign.search.answers import Hit
from gsalign.search.report import Answer

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --quiet: #7b8794; --faint: #e4e7eb;
  --right: #1a936f; --wrong: #d1495b; }
body { margin: 2rem; color: var(--ink); background: #fff;
  font: 14px/1.4 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .25rem; }
p { color: var(--quiet); margin: 0 0 1.5rem; max-width: 60rem; overflow-wrap: anywhere; }
section { display: flex; gap: 1.25rem; padding: 1rem 0; border-top: 1px solid var(--faint); }
ol { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0; padding: 0; list-style: none; }
figure { margin: 0; width: 8rem; }
figure img, figure .missing { display: block; width: 8rem; height: 16rem; object-fit: contain;
  background: #f5f7fa; border: 3px solid var(--faint); box-sizing: border-box; }
figure .missing { display: grid; place-items: center; color: var(--quiet); }
figure.query img { border-color: var(--ink); }
figure.right img { border-color: var(--right); }
figure.wrong img { border-color: var(--wrong); }
figcaption { font-size: .78rem; color: var(--quiet); overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
"""


def write_rank_sheet(
    answers: Sequence[Answer],
    path: str | os.PathLike[str],
    *,
    title: str,
    note: str = "",
    thumbnail: tuple[int, int] = (256, 128),
) -> None:
    """Write answers as an HTML page with the pictures in it.

    Where query and hit both have an identity, the frame is green for the same and red for another.
    A picture that cannot be read any more is left blank.

    Args:
        answers: the rows.
        path: the page.
        title: of the page.
        note: a line below it.
        thumbnail: (height, width) that pictures are made to fit into, in pixels.
    """
    rows = "\n".join(_section(answer, thumbnail) for answer in answers)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n{rows}\n</body>\n</html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(answer: Answer, thumbnail: tuple[int, int]) -> str:
    labels = _labels(answer.identity, answer.camera, answer.view)
    query = _figure(answer.path, f"<b>query</b> {labels}", "query", thumbnail)
    hits = "\n".join(
        f"<li>{_hit(answer, hit, rank, thumbnail)}</li>" for rank, hit in enumerate(answer.hits, 1)
    )
    return f"<section>\n{query}\n<ol>\n{hits}\n</ol>\n</section>"


def _hit(answer: Answer, hit: Hit, rank: int, thumbnail: tuple[int, int]) -> str:
    kind = ""
    if answer.identity and hit.identity:
        kind = "right" if answer.identity == hit.identity else "wrong"
    caption = (
        f"<b>{rank}</b> at <b>{hit.distance:.3f}</b> {_labels(hit.identity, hit.camera, hit.view)}"
    )
    return _figure(hit.path, caption, kind, thumbnail)


def _labels(identity: str, camera: str, view: str) -> str:
    told = [f"id {identity}" if identity else "", f"camera {camera}" if camera else "", view]
    return escape(", ".join(text for text in told if text))


def _figure(path: str, caption: str, kind: str, thumbnail: tuple[int, int]) -> str:
    name = escape(os.path.basename(path))
    picture = _picture(path, thumbnail)
    shown = (
        f'<img src="{picture}" alt="{name}" title="{escape(path)}">'
        if picture
        else f'<span class="missing" title="{escape(path)}">not there</span>'
    )
    return f'<figure class="{kind}">{shown}<figcaption>{caption}<br>{name}</figcaption></figure>'


def _picture(path: str, thumbnail: tuple[int, int]) -> str:
    """A small JPEG as a data URL; empty if the image cannot be read."""
    try:
        pixels = read_image(path)
    except DataError:
        return ""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail(thumbnail[::-1], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
