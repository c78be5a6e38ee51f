"""``python -m benchmarks.plot RESULTS.csv --out FOLDER``: charts per family and at a glance."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.case import REFERENCE
from benchmarks.glance import draw_glance
from benchmarks.rows import read_csv, slug
from gsalign.files import atomic_write

FAMILIES = {
    "warp": ("warp_tokens", "warp_image"),
    "tps": ("tps_solve", "tps_grid"),
    "pool": ("masked_part_pool",),
    "prototype": ("masked_prototype_loss",),
    "conv": ("conv_relu_mean",),
    "distance": ("part_distance",),
    "ranking": ("rank",),
    "model": ("gsalign",),
}

# One colour per provider in every chart; ours are the saturated ones.
COLOURS = {
    REFERENCE: "#9aa5b1",
    "torch.compile": "#c9b18c",
    "torch.compile of a gather": "#a98b5b",
    "kornia": "#b39bb8",
    "torch.linalg.solve": "#8fb3a5",
    "torch.linalg.solve of a matrix": "#6f9a8a",
    "torch.bmm": "#8fb3a5",
    "loop over labels": "#c4a3a3",
    "published way": "#c4a3a3",
    "as images": "#c4a3a3",
    "every part in memory": "#c4a3a3",
    "torch.compile of every part in memory": "#a98b5b",
    "matrix product alone": "#8fb3a5",
    "torch": "#7d5ba6",
    "cpp": "#1f6fb2",
    "cuda": "#2e8b57",
    "triton": "#d9662b",
    "auto": "#1f6fb2",
    "auto, kept": "#6ea5d3",
    "auto, layers": "#a9c9e6",
    "auto, compiled": "#16507f",
    "auto, graphs": "#0c2f4d",
}
ROW_HEIGHT = 0.24


def draw(rows: Sequence[dict[str, str]], family: str, target: Path) -> bool:
    """Draws how many times as fast as the eager reference every provider is.

    Args:
        rows: as :func:`benchmarks.rows.read_csv` gives them.
        family: key of :data:`FAMILIES`.
        target: the picture, written atomically.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["op"] in FAMILIES[family] and row["p50_ms"] and row["implementation"] in COLOURS:
            title = f"{row['op']}  {row['shape']}\n{row['dtype']}, {row['pass']}"
            groups.setdefault(title, {})[row["implementation"]] = row
    groups = {title: found for title, found in groups.items() if REFERENCE in found}
    if not groups:
        return False

    bars = sum(len(found) for found in groups.values())
    height = ROW_HEIGHT * (bars + 1.2 * len(groups)) + 1.6
    figure, axes = plt.subplots(figsize=(9.0, height))
    position = 0.0
    ticks, labels = [], []
    fastest = 1.0
    for title, found in groups.items():
        start = position
        reference = float(found[REFERENCE]["p50_ms"])
        for name in sorted(found, key=list(COLOURS).index):
            row = found[name]
            median = float(row["p50_ms"])
            ratio = reference / median
            fastest = max(fastest, ratio)
            axes.barh(position, ratio, height=0.86, color=COLOURS[name])
            text = f"{name}  {ratio:.1f}x  {median:.3g} ms"
            if row["copy_fraction"] and float(row["copy_fraction"]) >= 0.1:
                text += f"  {float(row['copy_fraction']):.0%} of copy"
            axes.text(ratio, position, f"  {text}", va="center", fontsize=7)
            position += 1.0
        ticks.append((start + position - 1.0) / 2)
        labels.append(title)
        position += 1.2
    axes.axvline(1.0, color="#555555", linewidth=0.8, zorder=0)
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.set_ylim(position - 1.2, -1.0)
    axes.set_xlim(0.0, fastest * 1.45)
    axes.set_xlabel("speed, eager PyTorch = 1 (medians of the same run)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = [row for found in groups.values() for row in found.values()]
    first = drawn[0]
    axes.set_title(
        f"{family}: {first['device']}, {_threads(first)}, {first['allocator']}\n"
        f"PyTorch {first['torch']}, Triton {first['triton']}, CUDA {first['cuda']}; "
        f"commit {_all(drawn, 'commit')}, {_all(drawn, 'date')}",
        fontsize=8,
        loc="left",
    )
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return True


def _all(rows: Sequence[dict[str, str]], column: str) -> str:
    """What a column holds, each value once: rows of one picture may come from several runs."""
    return " and ".join(dict.fromkeys(row[column] for row in rows))


def _threads(row: dict[str, str]) -> str:
    return "1 thread" if row["threads"] == "1" else f"{row['threads']} threads"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 when the file holds no measurement."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    line.add_argument("results", type=Path, metavar="RESULTS.csv")
    line.add_argument("--out", type=Path, default=Path("docs/figures"), metavar="FOLDER")
    options = line.parse_args(arguments)
    try:
        rows = read_csv(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    drawn = 0
    name = slug(options.results.stem)
    for family in FAMILIES:
        target = options.out / f"{name}-{family}.png"
        if draw(rows, family, target):
            print(target)
            drawn += 1
    target = options.out / f"{name}-glance.png"
    if draw_glance(rows, target):
        print(target)
    if not drawn:
        print(f"{options.results}: no measurement in it", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
