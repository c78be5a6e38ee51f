"""Handing an index to Milvus, for collections beyond one machine: parquet files it imports.

Columns are those of a collection with the fields ``id`` (INT64, primary key, not automatic),
``vector`` (FLOAT_VECTOR) and ``path``, ``identity``, ``camera``, ``view`` (VARCHAR), as
https://milvus.io/docs/prepare-source-data.md describes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from gsalign.errors import ConfigError, DataError
from gsalign.extras import import_extra
from gsalign.files import atomic_write
from gsalign.search.index import SearchIndex

COLLECTION = "collection.json"


def export_milvus(
    index: SearchIndex, folder: str | os.PathLike[str], *, rows: int = 100_000
) -> list[Path]:
    """Write an index as ``part-000000.parquet``, ... and ``collection.json``, with the fields.

    Milvus compares vectors by one dot product. With one slot that is the metric of the index. With
    parts it is the cosine of whole embeddings, good for a short list that the part distance should
    rank.

    Args:
        index: the index.
        folder: where to; made if missing.
        rows: images in a file at most.

    Returns:
        The files written.

    Raises:
        ConfigError: ``rows`` is below 1.
        DataError: the folder holds other files, or the index is empty.
        MissingExtraError: pyarrow is not installed.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}; wanted 1 or more")
    arrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    root = Path(folder)
    if root.is_dir() and any(root.iterdir()):
        raise DataError(f"{root} holds other files: give a new folder")
    if not len(index):
        raise DataError(f"{index.root} is empty: there is nothing to export")
    texts = ("path", "identity", "camera", "view")
    longest = dict.fromkeys(texts, 1)
    files = []
    for number, (ids, images, vectors) in enumerate(index.blocks(rows)):
        columns = (images.paths, images.identities, images.cameras, images.views)
        for name, column in zip(texts, columns, strict=True):
            longest[name] = max(longest[name], *(len(text.encode()) for text in column))
        offsets = arrow.array(range(0, vectors.size + 1, vectors.shape[1]), arrow.int32())
        table = arrow.table(
            {
                "id": arrow.array(ids, arrow.int64()),
                "vector": arrow.ListArray.from_arrays(offsets, arrow.array(vectors.reshape(-1))),
                **{
                    name: arrow.array(column, arrow.string())
                    for name, column in zip(texts, columns, strict=True)
                },
            }
        )
        path = root / f"part-{number:06d}.parquet"
        with atomic_write(path) as temporary:
            parquet.write_table(table, temporary)
        files.append(path)
    fields = [
        {"name": "id", "type": "INT64", "is_primary": True, "auto_id": False},
        {"name": "vector", "type": "FLOAT_VECTOR", "dim": index.manifest.dimension},
        *({"name": name, "type": "VARCHAR", "max_length": longest[name]} for name in texts),
    ]
    document = {
        "fields": fields,
        "metric_type": "COSINE",
        "count": len(index),
        "files": [path.name for path in files],
        "fingerprint": index.fingerprint.model_dump(),
    }
    with atomic_write(root / COLLECTION) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [*files, root / COLLECTION]
