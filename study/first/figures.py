"""Draw the figures of study/README.md, similar to Fig. 4 to 7 of the paper, and print a table.

    python study/figures.py [FOLDER]        read FOLDER/results.jsonl; default: study

scaling      linear probe, reconstruction and quality of samples against the
             training compute of the tokenizer                               questions 1 to 3
objectives   the four combinations of losses after equal steps: a dot for
             each seed, a bar for the mean over the seeds that all have      questions 2, 3
prediction   quality of samples against probe, PSNR and reconstruction:
             which of them predicts it?                                      question 4
by_size      size of the trunk and of the decoder                            question 5
by_pictures  number of training images                                       question 6
by_dit       a DiT that is trained three times as long                       questions 2, 3

Each data set has its own figures. A cell is one tokenizer with its measurements, which is one line
of results.jsonl (see study.py). Cells and metrics that are missing leave gaps in the figures; the
table has a dash for them.
"""
import json
import math
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt                                            # noqa: E402
import numpy as np                                                         # noqa: E402

COLORS = {"AE": "#777777", "CLIP+AE": "#d08020", "SSL+AE": "#3070c0", "ALL": "#208050"}
# names of metrics
PROBE, PSNR, RECOGNISED = "linear probe latent", "PSNR", "samples recognised"
SQUEEZENET, HALVED = "FD-squeezenet (no FID)", "FD-squeezenet, halved (no FID)"
CLASSIFIER = "FD-classifier"
SIZES = ["pico", "nano", "micro"]


# ---------------------------------------------------------------- correlation
def ranks(x):
    """x (n,) -> ranks (n,) from 0 to n - 1; equal values get the mean of their ranks"""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def correlation(x, y):
    """x, y (n,) -> Pearson's correlation, Spearman's correlation (Pearson's of the ranks)

    Pairs with nan are omitted. Both are nan for fewer than 3 pairs, or if x or y is constant.
    """
    pairs = np.array([x, y])
    x, y = pairs[:, ~np.isnan(pairs).any(0)]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return np.nan, np.nan
    return np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]


def correlation_within_objectives(rows, x, y):
    """-> Pearson's correlation after subtracting the mean of each objective

    rows  n rows; x, y (n,): two of their metrics
    It shows whether x distinguishes trainings of the same objective. nan if there are fewer than 2
    objectives with at least 2 rows.
    """
    objective = np.array([r["objective"] for r in rows])
    groups = [objective == o for o in COLORS if (objective == o).sum() > 1]
    if len(groups) < 2:
        return np.nan
    x = np.concatenate([x[group] - np.nanmean(x[group]) for group in groups])
    y = np.concatenate([y[group] - np.nanmean(y[group]) for group in groups])
    return correlation(x, y)[0]


# ---------------------------------------------------------------- rows of results.jsonl
def compute(row):
    """-> GFLOPs of the training of the tokenizer: matrix products, forward and backward"""
    return row["gflops_a_step"]["tokenizer"] * row["steps"]


def distance(row):
    """-> name of the Frechet distance of samples: with SqueezeNet for photographs, with the
    classifier for shapes"""
    return SQUEEZENET if SQUEEZENET in row["metrics"] else CLASSIFIER


def tokenizer_metrics(rows):
    """-> {metric of the tokenizer: label}"""
    return {PROBE: "linear probe on latents: higher is better",
            PSNR: "PSNR, dB: higher is better",
            f"r{distance(rows[0])}": "FD of reconstructions: lower is better"}


def sample_metrics(rows):
    """-> {metric of the samples: label}, for the metrics that at least one cell has"""
    labels = {CLASSIFIER: "FD of samples, classifier features: lower is better",
              distance(rows[0]): "FD of samples: lower is better",
              HALVED: "FD of samples at half size: lower is better",
              RECOGNISED: "samples recognised: higher is better"}
    return {name: label for name, label in labels.items()
            if any(name in r["metrics"] for r in rows)}


def values(rows, name):
    """-> array of one metric of all rows; nan, which leaves a gap, if it was not measured"""
    return np.array([r["metrics"].get(name, np.nan) for r in rows])


def nano_cells(rows):
    """-> rows of the default size, images and DiT: they differ in objective, steps and seed only"""
    return [r for r in rows
            if r["size"] == "nano" and not r["decoder"] and not r["pictures"] and not r["dit"]]


def by_seed(rows):
    """-> lists of rows that differ only in their seed"""
    groups = {}
    for r in rows:
        groups.setdefault((r["objective"], r["steps"]), []).append(r)
    return list(groups.values())


def over_seeds(rows):
    """-> one row for each list of `by_seed`, with the mean of each metric"""
    means = []
    for group in by_seed(rows):
        metrics = {name: np.nanmean(values(group, name)) for name in group[0]["metrics"]}
        means.append(group[0] | {"seed": 0, "metrics": metrics})
    return means


def error(rows, name):
    """-> two standard errors of a metric that is a fraction of images (binomial distribution)

    None for distances and dB, whose errors are unknown.
    """
    if name not in (PROBE, RECOGNISED):
        return None
    p = values(rows, name)
    n = np.array([int(r["constants"]["samples"]) for r in rows])
    return 2 * np.sqrt(p * (1 - p) / n)


def of_objective(rows, objective):
    """-> rows with this objective"""
    return [r for r in rows if r["objective"] == objective]


# ---------------------------------------------------------------- figures
# Each function maps rows of one data set to a figure, or to None if there are too few cells.
def scaling(rows):
    """A dot for each cell, a line through the means over seeds, and error bars for fractions"""
    rows = nano_cells(rows)
    if len({r["steps"] for r in rows}) < 2:
        return None
    metrics = tokenizer_metrics(rows) | sample_metrics(rows)
    n_rows = math.ceil(len(metrics) / 3)
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
               xlabel="GFLOP of the tokenizer's training, without the decoder training after it")
        ax.minorticks_off()
        ax.set_title(label, fontsize=9)
    for ax in axes.flat[len(metrics):]:
        ax.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def objectives(rows):
    """Bars: means over the seeds that all objectives have; dots: all seeds"""
    rows = nano_cells(rows)
    if not rows:
        return None
    all_steps = [r["steps"] for r in rows]
    # the number of steps that most cells have
    steps = max(set(all_steps), key=lambda s: (all_steps.count(s), -s))
    rows = [r for r in rows if r["steps"] == steps]
    seeds = {}
    for r in rows:
        seeds.setdefault(r["objective"], set()).add(r["seed"])
    shared_seeds = set.intersection(*seeds.values()) or set.union(*seeds.values())
    metrics = {PROBE: tokenizer_metrics(rows)[PROBE]} | sample_metrics(rows)
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.6))
    for ax, (name, label) in zip(axes, metrics.items()):
        for k, (objective, color) in enumerate(COLORS.items()):
            own = of_objective(rows, objective)
            if not own:
                continue
            averaged = [r for r in own if r["seed"] in shared_seeds]
            ax.bar(k, np.mean(values(averaged, name)), color=color, alpha=0.6)
            ax.plot([k] * len(own), values(own, name), "k.", ms=5)
        ax.set(xticks=range(len(COLORS)), xticklabels=COLORS)
        ax.set_title(f"{label}; {steps} steps", fontsize=9)
    return figure


def prediction(rows):
    """Filled dots: means over seeds, from which the correlations are computed. Hollow dots: cells
    with another size, fewer images, or a longer training of the DiT"""
    points = over_seeds(nano_cells(rows))
    others = [r for r in rows if r not in nano_cells(rows)]
    metrics = sample_metrics(rows)
    figure, axes = plt.subplots(len(metrics), 3, figsize=(16, 3.7 * len(metrics)))
    for axes_row, (y_name, y_label) in zip(axes, metrics.items()):
        for ax, (x_name, x_label) in zip(axes_row, tokenizer_metrics(rows).items()):
            for objective, color in COLORS.items():
                hollow = of_objective(others, objective)
                filled = of_objective(points, objective)
                ax.plot(values(hollow, x_name), values(hollow, y_name), "o", color=color,
                        mfc="none")
                ax.plot(values(filled, x_name), values(filled, y_name), "o", color=color,
                        label=objective)
            x, y = values(points, x_name), values(points, y_name)
            pearson, spearman = correlation(x, y)
            within = correlation_within_objectives(points, x, y)
            ax.set(xlabel=x_label, ylabel=y_label)
            ax.set_title(f"Pearson {pearson:.2f}, Spearman {spearman:.2f}, within objectives "
                         f"{within:.2f}, n {(~np.isnan(y)).sum()}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    return figure


def by_size(rows):
    """Upper panel: trunks of three sizes with nano's decoder. Lower panel: decoders of three sizes
    with nano's trunk"""
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
    """Tokenizers trained on fewer images for equal steps: 100 images are seen about 600 times each,
    50,000 images about once"""
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
    return curves(rows, ["images in the tokenizer's training set, equal steps"], [panel])


def by_dit(rows):
    """The DiT trained for the default number of steps and three times as long, on equal latents"""
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
    """Draw the metrics against x -> figure with two rows of axes per panel, one axis per metric

    rows    all rows
    labels  label of x for each panel
    panels  list of {objective: [(x, row)]}
    names   names of x = 0, 1, ...; None: x is a number, shown on a logarithmic scale
    """
    metrics = tokenizer_metrics(rows) | sample_metrics(rows)
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
    """Draw one metric of a panel of `curves`, one line per objective."""
    for objective, points in panel.items():
        points = sorted(points, key=lambda point: point[0])
        own = [r for _, r in points]
        ax.errorbar([x for x, _ in points], values(own, metric), error(own, metric), fmt="-o",
                    color=COLORS[objective], label=objective if own else None)
    ticks = sorted({x for points in panel.values() for x, _ in points})
    ax.set_xscale("linear" if names else "log")
    ax.set_xticks(ticks, [names[x] if names else f"{x:,}" for x in ticks])
    ax.minorticks_off()


# ---------------------------------------------------------------- text
# Each function maps rows of one data set to lines of text.
def correlations(rows):
    """The correlations in the figure `prediction`, and those over all cells with the default DiT,
    which include other sizes and fewer images"""
    trainings = over_seeds(nano_cells(rows))
    cells = [r for r in rows if not r["dit"]]
    groups = [(trainings, "trainings, means over seeds")]
    if len(cells) > len(trainings):
        groups.append((cells, "cells, all with the same DiT"))
    for points, description in groups:
        yield f"\n{len(points)} {description}: Pearson, Spearman, Pearson within objectives"
        for y_name in sample_metrics(rows):
            for x_name in tokenizer_metrics(rows):
                x, y = values(points, x_name), values(points, y_name)
                pearson, spearman = correlation(x, y)
                within = correlation_within_objectives(points, x, y)
                yield (f"{x_name:28s} and {y_name:32s}{pearson:8.2f}{spearman:8.2f}"
                       f"{within:8.2f}")


def spread(rows):
    """Mean, lowest and highest value over seeds, for trainings with several seeds"""
    for group in by_seed(nano_cells(rows)):
        if len(group) < 2:
            continue
        objective, steps = group[0]["objective"], group[0]["steps"]
        for name in tokenizer_metrics(rows) | sample_metrics(rows):
            x = values(group, name)
            yield (f"{objective:8s}{steps:6d} steps, {len(group)} seeds  {name:32s}"
                   f"{np.nanmean(x):12.4g}  from {np.nanmin(x):.4g} to {np.nanmax(x):.4g}")


FRACTIONS = PROBE, "linear probe full", "zero-shot top1", RECOGNISED     # printed in percent


def table(rows):
    """One line per cell: its metrics, and the time in minutes of one CPU core. A dash: not
    measured"""
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
    """Value of a metric, or None -> text"""
    if value is None:
        return "-"
    return f"{value:.1%}" if name in FRACTIONS else f"{value:.4g}"


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
                print(f"{path.name} is not drawn: too few cells for this figure are finished")
                continue
            figure.tight_layout()
            figure.savefig(path, dpi=110)
            plt.close(figure)
            print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
