"""study/results.jsonl -> the figures of study/README.md, like the paper's Fig. 4 to 7, and a table.

    python study/figures.py [FOLDER]

scaling      compute of the tokenizer against the probe, reconstruction, and every
             measure of samples                                              questions 1 to 3
objectives   the four objectives at equal steps: a dot per seed, a bar for the
             mean over the seeds that all have                               questions 2, 3
prediction   what predicts generation: the probe, PSNR, or reconstruction?   question 4
by_size, by_pictures   trunk, decoder, and images of the training set        questions 5, 6
by_dit       the DiT trained three times as long                             questions 2, 3

Each data set has its own figures. Missing cells and measures are gaps, and are printed.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt                                            # noqa: E402
import numpy as np                                                         # noqa: E402

COLORS = {"AE": "#777777", "CLIP+AE": "#d08020", "SSL+AE": "#3070c0", "ALL": "#208050"}
PROBE, PSNR, RECOGNISED = "linear probe latent", "PSNR", "samples recognised"
SQUEEZENET, HALVED = "FD-squeezenet (no FID)", "FD-squeezenet, halved (no FID)"
CLASSIFIER = "FD-classifier"
SIZES = ["pico", "nano", "micro"]


# ---------------------------------------------------------------- correlation
def ranks(x):
    """x (n,) -> ranks 0..n-1; equal values share their mean rank"""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def correlation(x, y):
    """-> Pearson's and Spearman's (that of the ranks). Pairs with nan are left out. nan below 3
    points, or if x or y is constant."""
    pairs = np.array([x, y])
    x, y = pairs[:, ~np.isnan(pairs).any(0)]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return np.nan, np.nan
    return np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]


def within(points, x, y):
    """Pearson's correlation after the mean of each objective is subtracted: does x distinguish
    trainings of one objective? nan below 2 objectives of 2 points."""
    kinds = np.array([r["objective"] for r in points])
    groups = [kinds == o for o in COLORS if (kinds == o).sum() > 1]
    if len(groups) < 2:
        return np.nan
    x = np.concatenate([x[own] - np.nanmean(x[own]) for own in groups])
    y = np.concatenate([y[own] - np.nanmean(y[own]) for own in groups])
    return correlation(x, y)[0]


# ---------------------------------------------------------------- rows of results.jsonl
def compute(row):
    """GFLOPs of the tokenizer's training: matrix products, forward and backward"""
    return row["gflops_a_step"]["tokenizer"] * row["steps"]


def distance(row):
    """The distance of generation: SqueezeNet's on photographs, the classifier's on shapes"""
    return SQUEEZENET if SQUEEZENET in row["metrics"] else CLASSIFIER


def known(rows):
    """{metric of the tokenizer: label}"""
    return {PROBE: "linear probe on latents: higher is better",
            PSNR: "PSNR, dB: higher is better",
            f"r{distance(rows[0])}": "FD of reconstructions: lower is better"}


def judges(rows):
    """{metric of the samples: label}; those that any cell has"""
    labels = {CLASSIFIER: "FD of samples, classifier's features: lower is better",
              distance(rows[0]): "FD of samples: lower is better",
              HALVED: "FD of samples at half size: lower is better",
              RECOGNISED: "samples recognised: higher is better"}
    return {name: label for name, label in labels.items()
            if any(name in r["metrics"] for r in rows)}


def values(rows, name):
    """A metric of cells -> array; nan, a gap in a figure, if it was not measured"""
    return np.array([r["metrics"].get(name, np.nan) for r in rows])


def nano_cells(rows):
    """Cells that differ by objective, steps and seed only"""
    return [r for r in rows
            if r["size"] == "nano" and not r["decoder"] and not r["pictures"] and not r["dit"]]


def by_seed(rows):
    """Cells -> lists of those that differ by their seed only"""
    groups = {}
    for r in rows:
        groups.setdefault((r["objective"], r["steps"]), []).append(r)
    return list(groups.values())


def over_seeds(rows):
    """Cells that differ by their seed only -> one row, with the mean of each metric"""
    means = []
    for group in by_seed(rows):
        metrics = {name: np.nanmean(values(group, name)) for name in group[0]["metrics"]}
        means.append(group[0] | {"seed": 0, "metrics": metrics})
    return means


def error(rows, name):
    """Two standard errors of a metric that is a share of images; None for distances and dB, whose
    errors are not known"""
    if name not in (PROBE, RECOGNISED):
        return None
    shares = values(rows, name)
    n = np.array([int(r["constants"]["samples"]) for r in rows])
    return 2 * np.sqrt(shares * (1 - shares) / n)


def of_objective(rows, objective):
    return [r for r in rows if r["objective"] == objective]


# ------------------------------------------------- figures: rows -> a figure, or None without data
def scaling(rows):
    """A dot per cell, a line through the means over seeds; bars: two standard errors of shares"""
    rows = nano_cells(rows)
    if len({r["steps"] for r in rows}) < 2:
        return None
    metrics = known(rows) | judges(rows)
    n_rows = -(-len(metrics) // 3)
    figure, axes = plt.subplots(n_rows, 3, figsize=(16, 3.7 * n_rows))
    for ax, (name, label) in zip(axes.flat, metrics.items()):
        for objective, color in COLORS.items():
            own = of_objective(rows, objective)
            mean = sorted(over_seeds(own), key=compute)
            ax.errorbar([compute(r) for r in own], values(own, name), error(own, name), fmt="o",
                        color=color, alpha=0.4, ms=4)
            ax.plot([compute(r) for r in mean], values(mean, name), "-", color=color,
                    label=objective)
        ax.set(xscale="log",
               xlabel="GFLOP of the tokenizer's training (decoding trained equally after it)")
        ax.minorticks_off()
        ax.set_title(label, fontsize=9)
    for ax in axes.flat[len(metrics):]:
        ax.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def objectives(rows):
    """Bars: means over the seeds that all objectives have, if there are any; dots: all seeds"""
    rows = nano_cells(rows)
    if not rows:
        return None
    counts = [r["steps"] for r in rows]
    steps = max(set(counts), key=lambda s: (counts.count(s), -s))        # of most cells
    rows = [r for r in rows if r["steps"] == steps]
    seeds = [{r["seed"] for r in of_objective(rows, o)} for o in {r["objective"] for r in rows}]
    shared = set.intersection(*seeds) or set.union(*seeds)
    metrics = {PROBE: known(rows)[PROBE]} | judges(rows)
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.6))
    for ax, (name, label) in zip(axes, metrics.items()):
        for k, (objective, color) in enumerate(COLORS.items()):
            own = of_objective(rows, objective)
            if not own:
                continue
            averaged = [r for r in own if r["seed"] in shared]
            ax.bar(k, np.mean(values(averaged, name)), color=color, alpha=0.6)
            ax.plot([k] * len(own), values(own, name), "k.", ms=5)
        ax.set(xticks=range(len(COLORS)), xticklabels=COLORS)
        ax.set_title(f"{label}; {steps} steps", fontsize=9)
    return figure


def prediction(rows):
    """Full dots: objective and steps, mean over seeds; the correlations are theirs. Hollow dots:
    other sizes, fewer images, a longer DiT"""
    points = over_seeds(nano_cells(rows))
    others = [r for r in rows if r not in nano_cells(rows)]
    metrics = judges(rows)
    figure, axes = plt.subplots(len(metrics), 3, figsize=(16, 3.7 * len(metrics)))
    for axes_row, (judge, judge_label) in zip(axes, metrics.items()):
        for ax, (name, label) in zip(axes_row, known(rows).items()):
            for objective, color in COLORS.items():
                hollow = of_objective(others, objective)
                full = of_objective(points, objective)
                ax.plot(values(hollow, name), values(hollow, judge), "o", color=color, mfc="none")
                ax.plot(values(full, name), values(full, judge), "o", color=color,
                        label=objective)
            x, y = values(points, name), values(points, judge)
            pearson, spearman = correlation(x, y)
            ax.set(xlabel=label, ylabel=judge_label)
            ax.set_title(f"Pearson {pearson:.2f}, Spearman {spearman:.2f}, within objectives "
                         f"{within(points, x, y):.2f}, n {(~np.isnan(y)).sum()}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    return figure


def by_size(rows):
    """Trunks, each with nano's decoder; decoders, each with nano's trunk"""
    rows = [r for r in rows if not r["pictures"] and not r["dit"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["size"] != "nano" or r["decoder"]}
    rows = [r | {"decoder": r["decoder"] or r["size"]} for r in rows if r["steps"] in compared]
    if not rows:
        return None
    trunks, decoders = {}, {}
    for objective in ("AE", "ALL"):
        trunks[objective] = [(SIZES.index(r["size"]), r) for r in of_objective(rows, objective)
                             if r["decoder"] == "nano"]
    decoders["ALL"] = [(SIZES.index(r["decoder"]), r) for r in of_objective(rows, "ALL")
                       if r["size"] == "nano"]
    return curves(rows, ["trunk", "decoder"], [trunks, decoders], SIZES)


def by_pictures(rows):
    """Equal steps, so few images come often: 100 of them about 600 times, where 50,000 come once"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["dit"]
            and not r["seed"]]
    compared = {r["steps"] for r in rows if r["pictures"]}
    rows = [r for r in rows if r["steps"] in compared]
    if not rows:
        return None
    panel = {}
    for objective in ("AE", "ALL"):
        panel[objective] = [(r["pictures"] or r["constants"]["training_pictures"], r)
                            for r in of_objective(rows, objective)]
    return curves(rows, ["pictures of the tokenizer's training set, equal steps"], [panel])


def by_dit(rows):
    """The same latents, the DiT three times as long"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["pictures"]
            and not r["seed"]]
    compared = {(r["objective"], r["steps"]) for r in rows if r["dit"]}
    rows = [r for r in rows if (r["objective"], r["steps"]) in compared]
    if not rows:
        return None
    panel = {}
    for objective in COLORS:
        panel[objective] = [(r["dit"] or int(r["constants"]["dit"]), r)
                            for r in of_objective(rows, objective)]
    return curves(rows, ["steps of the DiT"], [panel])


def curves(rows, labels, panels, names=None):
    """panels  [{objective: [(x, row)]}] -> two rows of axes for each panel, one axis per measure

    names  of x = 0, 1, ...; None: x is a number, on a logarithmic scale
    """
    metrics = known(rows) | judges(rows)
    metrics.pop(f"r{distance(rows[0])}")
    figure, axes = plt.subplots(2 * len(panels), 3, figsize=(15, 6 * len(panels)))
    for block, label, panel in zip(np.split(axes, len(panels)), labels, panels):
        for ax, (metric, title) in zip(block.flat, metrics.items()):
            draw_curves(ax, panel, metric, names)
            ax.set_xlabel(label)
            ax.set_title(title, fontsize=9)
        for ax in block.flat[len(metrics):]:
            ax.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def draw_curves(ax, panel, metric, names):
    for objective, points in panel.items():
        points = sorted(points, key=lambda point: point[0])
        own = [r for _, r in points]
        ax.errorbar([x for x, _ in points], values(own, metric), error(own, metric), fmt="-o",
                    color=COLORS[objective], label=objective if own else None)
    places = sorted({x for points in panel.values() for x, _ in points})
    ax.set_xscale("linear" if names else "log")
    ax.set_xticks(places, [names[x] if names else f"{x:,}" for x in places])
    ax.minorticks_off()


# ---------------------------------------------------------------- text: rows -> lines
def correlations(rows):
    """Those of `prediction`; and of all cells with the same DiT: other sizes, fewer images too"""
    trainings, cells = over_seeds(nano_cells(rows)), [r for r in rows if not r["dit"]]
    groups = [(trainings, "trainings, means over seeds")]
    if len(cells) > len(trainings):
        groups.append((cells, "cells, all with the same DiT"))
    for points, what in groups:
        yield f"\n{len(points)} {what}: Pearson, Spearman, Pearson within objectives"
        for judge in judges(rows):
            for name in known(rows):
                x, y = values(points, name), values(points, judge)
                pearson, spearman = correlation(x, y)
                yield (f"{name:28s} and {judge:32s}{pearson:8.2f}{spearman:8.2f}"
                       f"{within(points, x, y):8.2f}")


def spread(rows):
    """Trainings with several seeds: mean, lowest and highest"""
    for group in by_seed(nano_cells(rows)):
        if len(group) < 2:
            continue
        objective, steps = group[0]["objective"], group[0]["steps"]
        for name in known(rows) | judges(rows):
            x = values(group, name)
            yield (f"{objective:8s}{steps:6d} steps, {len(group)} seeds  {name:32s}"
                   f"{np.nanmean(x):12.4g}  from {np.nanmin(x):.4g} to {np.nanmax(x):.4g}")


SHARES = PROBE, "linear probe full", "zero-shot top1", RECOGNISED


def table(rows):
    """A line per cell: percentages of images or samples, distances, minutes of a core; a dash for
    what was not measured"""
    columns = {PROBE: "probe", "linear probe full": "full", "zero-shot top1": "zero-shot",
               RECOGNISED: "recognised", PSNR: "PSNR", f"r{distance(rows[0])}": "rFD",
               distance(rows[0]): "FD", HALVED: "FD halved", CLASSIFIER: "FD-classifier"}
    columns = {name: title for name, title in columns.items()
               if any(name in r["metrics"] for r in rows)}
    titles = "".join(f"{title:>14s}" for title in columns.values())
    yield f"{'cell':28s}{titles}{'core min':>14s}"
    for r in sorted(rows, key=lambda r: (r["questions"], r["steps"], r["seed"])):
        texts = "".join(f"{as_text(name, r['metrics'].get(name)):>14s}" for name in columns)
        yield f"{r['cell']:28s}{texts}{sum(r['cpu_seconds'].values()) / 60:14.1f}"
    real = {}
    for r in rows:
        for name, value in r["metrics"].items():
            if name.endswith("of real") or name == "classifier accuracy":
                real[name] = value
    for name, value in real.items():
        yield f"real images: {name} {value:.4g}"


def as_text(name, value):
    if value is None:
        return "-"
    return f"{value:.1%}" if name in SHARES else f"{value:.4g}"


def main(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for name, quick in sorted({(r["data"], r["quick"]) for r in rows}):
        own = [r for r in rows if (r["data"], r["quick"]) == (name, quick)]
        title = f"\n{name}{', --quick' if quick else ''}"
        print("\n".join([title, *table(own), "", *spread(own), *correlations(own)]))
        prefix = name.partition(":")[0] + ("-quick" if quick else "")
        for draw in (scaling, objectives, prediction, by_dit, by_size, by_pictures):
            path = folder / f"{prefix}-{draw.__name__}.png"
            figure = draw(own)
            if not figure:
                print(f"{path.name} is left out: too few cells of that question are finished")
                continue
            figure.tight_layout()
            figure.savefig(path, dpi=110)
            plt.close(figure)
            print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
