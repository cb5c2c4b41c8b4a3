"""How a training step's cost grows: study/bench.json -> study/growth.png.   python tests/bench.py growth, then python study/growth.py"""
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

here = Path(__file__).parent
rows = [r for r in json.loads((here / "bench.json").read_text()) if r["bench"] == "growth" and "seconds" in r]
names = list(dict.fromkeys(r["what"].rpartition(" ")[0] for r in rows))
figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2))
for ax, name in zip(axes, names):
    own = [(int(r["what"].rpartition(" ")[2]), r) for r in rows if r["what"].rpartition(" ")[0] == name]
    x, seconds, gflops = [v for v, _ in own], [r["seconds"] for _, r in own], [r["gflops"] for _, r in own]
    ax.loglog(x, seconds, "-o", label="measured")
    ax.loglog(x, [g * seconds[-1] / gflops[-1] for g in gflops], "--", color="#888888", label="as its FLOPs, from the last point")
    for a, (v, r) in zip(x, own[1:]):
        ax.annotate(f"{r['exponent']:.2f}", ((a * v) ** 0.5, r["seconds"] * 0.8), fontsize=8, ha="center", va="top")
    seen = [y for y in (0.05, 0.1, 0.2, 0.4, 0.8) if min(gflops) * seconds[-1] / gflops[-1] < y < 1.1 * max(seconds)]
    ax.set(xlabel=name, xticks=x, xticklabels=x, yticks=seen, yticklabels=seen)
    ax.minorticks_off()
axes[0].set_ylabel("seconds a step")
axes[0].legend(fontsize=7)
figure.suptitle(f"joint step of nano, {rows[0]['protocol'].partition('; ')[2]}, {rows[0]['machine']}; numbers: exponents between neighbours", fontsize=8)
figure.tight_layout()
figure.savefig(here / "growth.png", dpi=100)
