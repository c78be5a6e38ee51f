"""An account of every tensor that a network starts from."""

from __future__ import annotations

from dataclasses import dataclass

from gsalign.model.weights import name_some


@dataclass(frozen=True)
class PretrainedReport:
    """What became of every tensor.

    Attributes:
        source: name or path the weights came from.
        loaded: our tensors that were set.
        resized: how the position embedding was fitted, or an empty string.
        left_out: tensors of the source with no place in the network.
        untouched: our parameters that keep their initial values (LTPS, DAM, heads).
    """

    source: str
    loaded: tuple[str, ...]
    resized: str
    left_out: tuple[str, ...]
    untouched: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} tensors from {self.source}"]
        if self.resized:
            parts.append(self.resized)
        if self.left_out:
            parts.append(f"left out {name_some(self.left_out)}")
        parts.append(f"{len(self.untouched)} parameters start fresh")
        return "; ".join(parts)
