"""GSAlign: aerial-ground person re-identification on fused TPS and masked-pooling kernels."""

from __future__ import annotations

__version__ = "0.1.0"
