"""Plot how the cost of a training step grows with batch, image side, depth and width.

    python study/bench.py growth        measure -> study/bench.json
    python study/growth.py              plot -> study/growth.png
"""
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt                                            # noqa: E402

FOLDER = Path(__file__).parent
TICKS = 0.05, 0.1, 0.2, 0.4, 0.8                 # of the vertical axes, in seconds


def axis_and_value(row):
    """Name of a row, such as 'batch 64' -> 'batch', 64"""
    axis, _, value = row["what"].rpartition(" ")
    return axis, int(value)


def draw(ax, name, points):
    """Plot measured times, and times proportional to FLOPs, against one quantity.

    name    of the quantity, for example 'batch'
    points  list of (value of the quantity, row of bench.json)
    """
    x = [value for value, _ in points]
    seconds = [row["seconds"] for _, row in points]
    gflops = [row["gflops"] for _, row in points]
    scale = seconds[-1] / gflops[-1]
    ax.loglog(x, seconds, "-o", label="measured")
    ax.loglog(x, [g * scale for g in gflops], "--", color="#888888",
              label="proportional to FLOPs, through the last point")
    for before, (value, row) in zip(x, points[1:]):
        middle = (before * value) ** 0.5
        ax.annotate(f"{row['exponent']:.2f}", (middle, row["seconds"] * 0.8), fontsize=8,
                    ha="center", va="top")
    visible = [y for y in TICKS if min(gflops) * scale < y < 1.1 * max(seconds)]
    ax.set(xlabel=name, xticks=x, xticklabels=x, yticks=visible, yticklabels=visible)
    ax.minorticks_off()


def main():
    rows = [row for row in json.loads((FOLDER / "bench.json").read_text())
            if row["bench"] == "growth" and "seconds" in row]
    by_axis = {}
    for row in rows:
        name, value = axis_and_value(row)
        by_axis.setdefault(name, []).append((value, row))
    figure, axes = plt.subplots(1, len(by_axis), figsize=(3.6 * len(by_axis), 3.2))
    for ax, (name, points) in zip(axes, by_axis.items()):
        draw(ax, name, points)
    axes[0].set_ylabel("seconds per step")
    axes[0].legend(fontsize=7)
    settings = rows[0]["protocol"].partition("; ")[2]
    figure.suptitle(f"joint step of nano, {settings}, {rows[0]['machine']}; numbers: exponents "
                    f"between adjacent points", fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "growth.png", dpi=100)


if __name__ == "__main__":
    main()
