"""Telling whether two embeddings can be compared: the fingerprint of network and preprocessing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from gsalign.evaluation.embedding import FlipTest
from gsalign.model import GSAlign

# What a configuration says about training only.
_TRAINING_ONLY: dict[str, Any] = {
    "losses": True, "pretrained": True, "drop_path": True, "heads": True,
    "orientation": {"pretrained"},
}  # fmt: skip


class Fingerprint(BaseModel):
    """What an embedding was made by. Embeddings of different ones mean nothing to each other.

    Attributes:
        network: sha256 of the network's configuration and of every weight.
        preprocessing: how an image becomes the network's input, and the output an embedding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str
    preprocessing: dict[str, Any]

    def difference(self, other: Fingerprint) -> str:
        """What differs, in words; empty where the embeddings can be compared."""
        told = []
        if self.network != other.network:
            told.append(f"network {self.network[:12]} against {other.network[:12]}")
        for key in sorted(self.preprocessing.keys() | other.preprocessing.keys()):
            mine, theirs = self.preprocessing.get(key), other.preprocessing.get(key)
            if mine != theirs:
                told.append(f"{key} {mine} against {theirs}")
        return ", ".join(told)


def fingerprint(network: GSAlign, *, flip_test: FlipTest = "off") -> Fingerprint:
    """The fingerprint of a network and of the preprocessing it is used with here."""
    return Fingerprint(
        network=_hash_network(network),
        preprocessing={
            "image_size": list(network.config.image_size),
            "resize": "bicubic, antialiased",
            "normalisation": "(x - 127.5) / 127.5",
            "flip_test": flip_test,
            "embedding": "unit length",
        },
    )


def _hash_network(network: GSAlign) -> str:
    settings = network.config.model_dump(mode="json", exclude=_TRAINING_ONLY)
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        state.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        state.update(values.flatten().view(torch.uint8).numpy())
    return state.hexdigest()
