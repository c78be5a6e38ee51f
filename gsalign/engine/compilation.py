"""torch.compile of the network, our operators inside: one graph each, or an error that says why."""

from __future__ import annotations

import torch

from gsalign.model import GSAlign

BACKEND = "inductor"


def compile_losses(network: GSAlign) -> None:
    """Compile what a call of the network in training computes; in place."""
    network.compile(fullgraph=True, backend=BACKEND)


def compile_embedding(network: GSAlign) -> None:
    """Compile ``embed`` and ``embed_parts``; in place.

    The last batch of a split is smaller: PyTorch then compiles once more, for any size.
    """
    for name in ("embed", "embed_parts"):
        compiled = torch.compile(getattr(network, name), fullgraph=True, backend=BACKEND)
        setattr(network, name, compiled)
