"""GSAlign: aerial-ground person re-identification on fused TPS and masked-pooling kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gsalign.evaluation import evaluate
    from gsalign.model import GSAlign, ModelConfig, load_published

__all__ = ["GSAlign", "ModelConfig", "__version__", "evaluate", "load_published"]

_HOMES = {
    "GSAlign": "gsalign.model",
    "ModelConfig": "gsalign.model",
    "evaluate": "gsalign.evaluation",
    "load_published": "gsalign.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import gsalign`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gsalign' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *_HOMES})
