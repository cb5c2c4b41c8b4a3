"""study/results.jsonl -> the figures of study/README.md, the paper's Fig. 4 to 7 in small, and a table.   python study/figures.py [FOLDER]

    scaling       compute of the tokenizer against PSNR, distance of reconstructions, latent probe, distance of samples      questions 1 to 3
    objectives    the four objectives at equal steps, mean over seeds, a dot a seed                                         questions 2, 3
    prediction    what predicts generation: the probe, or PSNR? a point a tokenizer                                         question 4
    size, data    trunk, decoder, and pictures of the tokenizer's training set                                              questions 5, 6
Each data set has figures of its own. Cells that are missing are simply absent, and said.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"AE": "#777777", "CLIP+AE": "#d08020", "SSL+AE": "#3070c0", "ALL": "#208050"}
PROBE, PSNR = "linear probe latent", "PSNR"
SIZES = ["pico", "nano", "micro"]


def ranks(x):
    """x (n,) -> places 0..n-1; equals share their mean place"""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def correlation(x, y):
    """-> Pearson's, Spearman's: of the values, of their places; nan below 3 points"""
    if len(x) < 3:
        return np.nan, np.nan
    return np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]


def compute(row):
    """Work of the tokenizer's training: GFLOPs of its matrix products if its log counted them, else seconds of one core of ours"""
    work = row["gflops_a_step"]["tokenizer"]
    return work * row["steps"] if work else row["cpu_seconds"]["tokenizer"]


def distance(row):
    """The name of the distance that judges generation: SqueezeNet's on photographs, the classifier's on shapes"""
    return next(name for name in ("FD-squeezenet (no FID)", "FD-classifier") if name in row["metrics"])


def nano_cells(rows):
    return [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["pictures"]]


# ---------------------------------------------------------------- the figures: rows -> a figure, or None if nothing is there to be drawn
def scaling(rows):
    rows, fd = nano_cells(rows), distance(rows[0])
    what = {PSNR: "PSNR, dB", f"r{fd}": "distance of reconstructions", PROBE: "linear probe on latents", fd: "distance of samples"}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6))
    for ax, (name, label) in zip(axes, what.items()):
        for objective, colour in COLOURS.items():
            own = sorted((r for r in rows if r["objective"] == objective), key=lambda r: r["steps"])
            ax.plot([compute(r) for r in own], [r["metrics"][name] for r in own], "o", color=colour, alpha=0.4, ms=4)
            first = [r for r in own if not r["seed"]]
            ax.plot([compute(r) for r in first], [r["metrics"][name] for r in first], "-o", color=colour, label=objective, ms=4)
        counted = all(r["gflops_a_step"]["tokenizer"] for r in rows)
        ax.set(xscale="log", xlabel="training of the tokenizer, " + ("GFLOP" if counted else "core seconds"), title=label)
    axes[0].legend(fontsize=8)
    return figure


def objectives(rows):
    rows, fd = nano_cells(rows), distance(rows[0])
    here = [r["steps"] for r in rows]
    if not here:
        return None
    steps = max(set(here), key=lambda s: (here.count(s), -s))                   # where most cells are
    rows = [r for r in rows if r["steps"] == steps]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for ax, (name, label) in zip(axes, {PROBE: "linear probe on latents", fd: "distance of samples", "samples recognised": "samples recognised"}.items()):
        for k, (objective, colour) in enumerate(COLOURS.items()):
            values = [r["metrics"][name] for r in rows if r["objective"] == objective]
            if values:
                ax.bar(k, np.mean(values), color=colour, alpha=0.6)
                ax.plot([k] * len(values), values, "k.", ms=5)
        ax.set(title=f"{label}, {steps} steps", xticks=range(len(COLOURS)), xticklabels=COLOURS)
    return figure


def prediction(rows):
    fd = distance(rows[0])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, (name, label) in zip(axes, {PROBE: "linear probe on latents", PSNR: "PSNR, dB"}.items()):
        for objective, colour in COLOURS.items():
            own = [r["metrics"] for r in rows if r["objective"] == objective]
            ax.plot([m[name] for m in own], [m[fd] for m in own], "o", color=colour, label=objective)
        pearson, spearman = correlation(*([r["metrics"][k] for r in rows] for k in (name, fd)))
        ax.set(xlabel=label, ylabel="distance of samples", title=f"Pearson {pearson:.2f}, Spearman {spearman:.2f}, n {len(rows)}")
    axes[0].legend(fontsize=8)
    return figure


def size(rows):
    rows, fd = [r for r in rows if not r["pictures"] and not r["seed"]], distance(rows[0])
    compared = {r["steps"] for r in rows if r["size"] != "nano" or r["decoder"]}
    rows = [r for r in rows if r["steps"] in compared]
    return compared and lines(fd, ["trunk", "decoder"], [
        {objective: [(SIZES.index(r["size"]), r) for r in rows if r["objective"] == objective and not r["decoder"]] for objective in ("AE", "ALL")},
        {objective: [(SIZES.index(r["decoder"] or "nano"), r) for r in rows if r["objective"] == objective and r["size"] == "nano"] for objective in ("AE", "ALL")}], SIZES)


def data(rows):
    rows, fd = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["seed"]], distance(rows[0])
    compared = {r["steps"] for r in rows if r["pictures"]}
    most = {objective: [(r["pictures"] or 50_000, r) for r in rows if r["objective"] == objective and r["steps"] in compared] for objective in ("AE", "ALL")}
    return compared and lines(fd, ["pictures of the tokenizer's training set"], [most], None)


def lines(fd, labels, panels, names):
    """panels  [{objective: [(x, row)]}] -> a panel each, x against the distance of samples; names: of x = 0, 1, ...; None: x is a number, log scale"""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for ax, label, panel in zip(axes[0], labels, panels):
        for objective, points in panel.items():
            points = sorted(points, key=lambda point: point[0])
            ax.plot([x for x, _ in points], [r["metrics"][fd] for _, r in points], "-o", color=COLOURS[objective], label=objective)
        ax.set(xlabel=label, ylabel="distance of samples", **({"xticks": range(len(names)), "xticklabels": names} if names else {"xscale": "log"}))
        ax.legend(fontsize=8)
    return figure


def table(rows):
    fd = distance(rows[0])
    yield f"{'cell':28s}{'probe':>8s}{'PSNR':>8s}{'rFD':>10s}{'FD':>10s}{'recognised':>12s}{'core min':>10s}"
    for r in sorted(rows, key=lambda r: (r["questions"], r["steps"], r["seed"])):
        m = r["metrics"]
        yield f"{r['cell']:28s}{m[PROBE]:8.3f}{m[PSNR]:8.2f}{m[f'r{fd}']:10.4g}{m[fd]:10.4g}{m['samples recognised']:12.3f}{sum(r['cpu_seconds'].values()) / 60:10.1f}"


def main(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for name, quick in sorted({(r["data"], r["quick"]) for r in rows}):
        own = [r for r in rows if (r["data"], r["quick"]) == (name, quick)]
        print("\n".join([f"\n{name}{', --quick' if quick else ''}", *table(own)]))
        for draw in (scaling, objectives, prediction, size, data):
            path = folder / f"{name.partition(':')[0]}{'-quick' * quick}-{draw.__name__}.png"
            if figure := draw(own):
                figure.tight_layout()
                figure.savefig(path, dpi=110)
                plt.close(figure)
                print(f"wrote {path}")
            else:
                print(f"{path.name} is left out: no cell of that question is finished")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
