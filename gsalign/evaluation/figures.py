"""Figures that may not exist, NaN then: for JSON and for tables."""

from __future__ import annotations

import math
from collections.abc import Mapping


def in_percent(shares: Mapping[str, float]) -> dict[str, float | int | None]:
    """Shares of 1 in percent, by name; None where there is none."""
    return {name: None if math.isnan(share) else 100.0 * share for name, share in shares.items()}


def rounded(value: float) -> float | None:
    """A figure with four decimals; None where there is none."""
    return None if math.isnan(value) else round(value, 4)


def figure_text(value: float) -> str:
    """A figure with three decimals; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}"
