"""Operators at a glance: one line each, our time beside eager PyTorch and the fastest other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import REFERENCE
from gsalign.files import atomic_write

Row = dict[str, str]

OURS = ("cuda", "triton", "cpp")
OTHERS = (
    "torch.compile",
    "torch.compile of a gather",
    "kornia",
    "torch.linalg.solve",
    "torch.linalg.solve of a matrix",
    "torch.bmm",
    "torch",
    "loop over labels",
)
# Operator, shape and type; both passes of each.
LINES = (
    ("warp_tokens", "B128 16x8 C768 K4", "float32"),
    ("warp_tokens", "B128 16x8 C768 K4", "bfloat16"),
    ("warp_image", "B32 3x256x128 K25", "float32"),
    ("tps_solve", "B1024 n28", "float32"),
    ("tps_grid", "B8 256x128 K25", "float32"),
    ("masked_part_pool", "B64 N128 C768 P6", "float32"),
    ("masked_prototype_loss", "B128 D768 labels 32", "float32"),
)
BOTH_PASSES = "forward+backward"

_OURS_COLOUR, _OTHER_COLOUR, _EAGER_COLOUR = "#2e8b57", "#7d5ba6", "#9aa5b1"


@dataclass(frozen=True)
class Line:
    """Milliseconds of one call with its backward pass: ours, eager, and the fastest of the others.

    Attributes:
        label: operator, shape and type.
        ours: name and time of our fastest implementation.
        eager: time of the eager reference.
        other: name and time of the fastest of the others; None where there is none but eager.
    """

    label: str
    ours: tuple[str, float]
    eager: float
    other: tuple[str, float] | None

    @property
    def gain(self) -> float:
        """How many times as fast as the fastest that is not ours."""
        return min(self.eager, self.other[1] if self.other else self.eager) / self.ours[1]


def read_lines(rows: Sequence[Row]) -> list[Line]:
    """Those of :data:`LINES` that the rows have, with ours and the reference measured."""
    found = []
    for op, shape, dtype in LINES:
        times = {
            row["implementation"]: float(row["p50_ms"])
            for row in rows
            if (row["op"], row["shape"], row["dtype"], row["pass"])
            == (op, shape, dtype, BOTH_PASSES)
            and row["p50_ms"]
        }
        ours = _fastest(times, OURS)
        if ours is not None and REFERENCE in times:
            label = f"{op}\n{shape}, {dtype}"
            found.append(Line(label, ours, times[REFERENCE], _fastest(times, OTHERS)))
    return found


def _fastest(times: dict[str, float], names: Sequence[str]) -> tuple[str, float] | None:
    there = [(name, times[name]) for name in names if name in times]
    return min(there, key=lambda pair: pair[1], default=None)


def draw_glance(rows: Sequence[Row], target: Path) -> bool:
    """Draws the lines over a logarithmic axis of time.

    Args:
        rows: as :func:`benchmarks.rows.read_csv` gives them.
        target: the picture, written atomically.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_lines(rows)
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(8.0, 0.62 * len(lines) + 1.3))
    for place, line in enumerate(lines):
        name, ours = line.ours
        slowest = max(line.eager, line.other[1] if line.other else 0.0)
        axes.plot([ours, slowest], [place, place], color="#d5dae0", linewidth=5, zorder=1)
        axes.scatter(line.eager, place, s=55, color=_EAGER_COLOUR, zorder=2)
        axes.scatter(ours, place, s=75, color=_OURS_COLOUR, zorder=4)
        if line.other:
            axes.scatter(line.other[1], place, s=45, color=_OTHER_COLOUR, marker="D", zorder=3)
            axes.annotate(
                line.other[0], (line.other[1], place), (0, 7), textcoords="offset points",
                ha="center", fontsize=7, color=_OTHER_COLOUR,
            )  # fmt: skip
        text = f"{line.gain:.3g}x  {_time(ours)}" + ("" if name != "triton" else " (triton)")
        axes.annotate(
            text, (ours, place), (-9, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, fontweight="bold", color=_OURS_COLOUR,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    shortest = min(line.ours[1] for line in lines)
    longest = max(max(line.eager, line.other[1] if line.other else 0.0) for line in lines)
    axes.set_xlim(shortest / (longest / shortest) ** 0.35, longest * 1.6)
    axes.set_ylim(len(lines) - 0.4, -0.75)
    axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("milliseconds, forward and backward; medians", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#eceff2", zorder=0)
    axes.set_axisbelow(True)
    for colour, marker, label in (
        (_OURS_COLOUR, "o", "this library, times as fast as the next"),
        (_OTHER_COLOUR, "D", "fastest other"),
        (_EAGER_COLOUR, "o", "eager PyTorch"),
    ):
        axes.scatter([], [], color=colour, marker=marker, label=label)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8, frameon=False,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    axes.set_title(f"{devices}, PyTorch {rows[0]['torch']}", fontsize=10, loc="left", pad=24)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return True


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds >= 1.0 else f"{1000.0 * milliseconds:.3g} µs"
