"""Searching one's own images: embed, index, search."""

from __future__ import annotations

from gsalign.extras import MissingExtraError
from gsalign.search.answers import Filter, Hit
from gsalign.search.budget import MemoryLimitError
from gsalign.search.embedder import Embedder
from gsalign.search.extraction import Extraction, ExtractionManifest, extract, open_extraction
from gsalign.search.fingerprint import Fingerprint, fingerprint
from gsalign.search.index import SearchIndex
from gsalign.search.index_files import IndexManifest, IndexSettings
from gsalign.search.listing import list_images
from gsalign.search.stream import EmbeddingStream, embed_images
from gsalign.search.table import ImageTable, read_table, write_table

__all__ = [
    "Embedder",
    "EmbeddingStream",
    "Extraction",
    "ExtractionManifest",
    "Filter",
    "Fingerprint",
    "Hit",
    "ImageTable",
    "IndexManifest",
    "IndexSettings",
    "MemoryLimitError",
    "MissingExtraError",
    "SearchIndex",
    "embed_images",
    "extract",
    "fingerprint",
    "list_images",
    "open_extraction",
    "read_table",
    "write_table",
]
