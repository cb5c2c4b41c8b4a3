"""study/results.jsonl -> the figures of study/README.md, the paper's Fig. 4 to 7 in small, and a table.   python study/figures.py [FOLDER]

    scaling                 compute of the tokenizer against what it knows, what it keeps, and every judge of its samples              questions 1 to 3
    objectives              the four objectives at equal steps, a dot a seed, a bar their mean over the seeds that all have           questions 2, 3
    prediction              what predicts generation: the probe, PSNR, or what decoding loses?                                        question 4
    by_size, by_pictures    trunk, decoder, and pictures of the tokenizer's training set                                              questions 5, 6
    by_dit                  the DiT three times as long: what was only a matter of patience?                                          questions 2, 3
Each data set has figures of its own. Cells and measures that are missing are gaps, and said.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"AE": "#777777", "CLIP+AE": "#d08020", "SSL+AE": "#3070c0", "ALL": "#208050"}
PROBE, PSNR, RECOGNISED, HALVED = "linear probe latent", "PSNR", "samples recognised", "FD-squeezenet, halved (no FID)"
SIZES = ["pico", "nano", "micro"]


def ranks(x):
    """x (n,) -> places 0..n-1; equals share their mean place"""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def correlation(x, y):
    """-> Pearson's, Spearman's: of the values, of their places; a pair with nan is left out; nan below 3 points, or where nothing varies"""
    pairs = np.array([x, y])
    x, y = pairs[:, ~np.isnan(pairs).any(0)]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return np.nan, np.nan
    return np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]


def within(points, x, y):
    """Pearson's correlation once each objective's own mean is taken off: does x tell the trainings of one objective apart? nan below 2 objectives of 2 points"""
    kinds = np.array([r["objective"] for r in points])
    several = [kinds == o for o in COLOURS if (kinds == o).sum() > 1]
    if len(several) < 2:
        return np.nan
    return correlation(*(np.concatenate([v[own] - np.nanmean(v[own]) for own in several]) for v in (x, y)))[0]


def compute(row):
    """GFLOPs of the tokenizer's training: of its matrix products, counted in its first step, forward and backward"""
    return row["gflops_a_step"]["tokenizer"] * row["steps"]


def distance(row):
    """The name of the distance that judges generation: SqueezeNet's on photographs, the classifier's on shapes"""
    return next(name for name in ("FD-squeezenet (no FID)", "FD-classifier") if name in row["metrics"])


def known(rows):
    """{metric of the tokenizer: label}"""
    return {PROBE: "linear probe on latents: higher is better", PSNR: "PSNR, dB: higher is better", f"r{distance(rows[0])}": "FD of reconstructions: lower is better"}


def judges(rows):
    """{metric of the samples: label}; those that any cell has"""
    every = {"FD-classifier": "FD of samples, classifier's features: lower is better", distance(rows[0]): "FD of samples: lower is better",
             HALVED: "FD of samples at half size: lower is better", RECOGNISED: "samples recognised: higher is better"}
    return {name: label for name, label in every.items() if any(name in r["metrics"] for r in rows)}


def values(rows, name):
    """A metric of cells -> array; nan, a gap in a figure, where it was not measured"""
    return np.array([r["metrics"].get(name, np.nan) for r in rows])


def nano_cells(rows):
    """Cells that differ by objective, steps and seed alone"""
    return [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["pictures"] and not r["dit"]]


def by_seed(rows):
    """Cells -> lists of those that differ by their seed alone"""
    groups = {}
    for r in rows:
        groups.setdefault((r["objective"], r["steps"]), []).append(r)
    return list(groups.values())


def over_seeds(rows):
    """Cells that differ by their seed alone -> one, with the mean of each metric"""
    return [g[0] | {"seed": 0, "metrics": {name: np.nanmean(values(g, name)) for name in g[0]["metrics"]}} for g in by_seed(rows)]


def error(rows, name):
    """Two standard errors of a metric that is a share of pictures; None for distances and dB, whose errors are not known"""
    shares, n = values(rows, name), np.array([int(r["constants"]["samples"]) for r in rows])
    return 2 * np.sqrt(shares * (1 - shares) / n) if name in (PROBE, RECOGNISED) else None


# ---------------------------------------------------------------- the figures: rows -> a figure, or None if nothing is there to be drawn
def scaling(rows):
    """A dot a cell, a line through the means over seeds; bars: two standard errors each way, of shares"""
    rows = nano_cells(rows)
    if len({r["steps"] for r in rows}) < 2:
        return None
    what = known(rows) | judges(rows)
    lines = -(-len(what) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(16, 3.7 * lines))
    for ax, (name, label) in zip(axes.flat, what.items()):
        for objective, colour in COLOURS.items():
            own = [r for r in rows if r["objective"] == objective]
            mean = sorted(over_seeds(own), key=compute)
            ax.errorbar([compute(r) for r in own], values(own, name), error(own, name), fmt="o", color=colour, alpha=0.4, ms=4)
            ax.plot([compute(r) for r in mean], values(mean, name), "-", color=colour, label=objective)
        ax.set(xscale="log", xlabel="GFLOP of the tokenizer's training (decoding trained equally after it)")
        ax.minorticks_off()
        ax.set_title(label, fontsize=9)
    for ax in axes.flat[len(what):]:
        ax.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def objectives(rows):
    """Bars: means over the seeds that all objectives have, if there are such; dots: all seeds"""
    rows = nano_cells(rows)
    here = [r["steps"] for r in rows]
    if not here:
        return None
    steps = max(set(here), key=lambda s: (here.count(s), -s))                   # where most cells are
    rows = [r for r in rows if r["steps"] == steps]
    seeds = [{r["seed"] for r in rows if r["objective"] == o} for o in {r["objective"] for r in rows}]
    shared, what = set.intersection(*seeds) or set.union(*seeds), {PROBE: known(rows)[PROBE]} | judges(rows)
    figure, axes = plt.subplots(1, len(what), figsize=(4.2 * len(what), 3.6))
    for ax, (name, label) in zip(axes, what.items()):
        for k, (objective, colour) in enumerate(COLOURS.items()):
            own = [r for r in rows if r["objective"] == objective]
            if own:
                ax.bar(k, np.mean(values([r for r in own if r["seed"] in shared], name)), color=colour, alpha=0.6)
                ax.plot([k] * len(own), values(own, name), "k.", ms=5)
        ax.set(xticks=range(len(COLOURS)), xticklabels=COLOURS)
        ax.set_title(f"{label}; {steps} steps", fontsize=9)
    return figure


def prediction(rows):
    """A full dot: objective and steps, mean over seeds; these are correlated. Hollow: other sizes, fewer pictures, a longer DiT"""
    points, others = over_seeds(nano_cells(rows)), [r for r in rows if r not in nano_cells(rows)]
    figure, axes = plt.subplots(len(judges(rows)), 3, figsize=(16, 3.7 * len(judges(rows))))
    for line, (judge, its) in zip(axes, judges(rows).items()):
        for ax, (name, label) in zip(line, known(rows).items()):
            for objective, colour in COLOURS.items():
                for some, fill in ((others, "none"), (points, colour)):
                    own = [r for r in some if r["objective"] == objective]
                    ax.plot(values(own, name), values(own, judge), "o", color=colour, mfc=fill, label=objective if some is points else None)
            x, y = values(points, name), values(points, judge)
            ax.set(xlabel=label, ylabel=its)
            ax.set_title("Pearson {:.2f}, Spearman {:.2f}, ".format(*correlation(x, y)) + f"within objectives {within(points, x, y):.2f}, n {(~np.isnan(y)).sum()}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    return figure


def correlations(rows):
    """The same numbers as text; and of all cells with the same DiT, other sizes and fewer pictures too"""
    trainings, cells = over_seeds(nano_cells(rows)), [r for r in rows if not r["dit"]]
    for points, who in [(trainings, "trainings, means over seeds")] + [(cells, "cells, all with the same DiT")] * (len(cells) > len(trainings)):
        yield f"\n{len(points)} {who}: Pearson, Spearman, Pearson within objectives"
        for judge in judges(rows):
            for name in known(rows):
                x, y = values(points, name), values(points, judge)
                yield f"{name:28s} and {judge:32s}{correlation(x, y)[0]:8.2f}{correlation(x, y)[1]:8.2f}{within(points, x, y):8.2f}"


def spread(rows):
    """Trainings of several seeds: mean, and lowest to highest"""
    for g in [g for g in by_seed(nano_cells(rows)) if len(g) > 1]:
        for name in known(rows) | judges(rows):
            x = values(g, name)
            yield f"{g[0]['objective']:8s}{g[0]['steps']:6d} steps, {len(g)} seeds  {name:32s}{np.nanmean(x):12.4g}  from {np.nanmin(x):.4g} to {np.nanmax(x):.4g}"


def by_size(rows):
    """Trunks, each with nano's decoder; decoders, each with nano's trunk"""
    rows = [r for r in rows if not r["pictures"] and not r["dit"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["size"] != "nano" or r["decoder"]}
    rows = [r | {"decoder": r["decoder"] or r["size"]} for r in rows if r["steps"] in compared]
    panels = [{o: [(SIZES.index(r[part]), r) for r in rows if r["objective"] == o and r[other] == "nano"] for o in objectives}
              for part, other, objectives in (("size", "decoder", ("AE", "ALL")), ("decoder", "size", ("ALL",)))]
    return curves(rows, ["trunk", "decoder"], panels, SIZES) if rows else None


def by_pictures(rows):
    """Equal steps, so few pictures come often: 100 of them some 600 times where 50,000 come once"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["dit"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["pictures"]}
    rows = [r for r in rows if r["steps"] in compared]
    panel = {o: [(r["pictures"] or r["constants"]["training_pictures"], r) for r in rows if r["objective"] == o] for o in ("AE", "ALL")}
    return curves(rows, ["pictures of the tokenizer's training set, equal steps"], [panel]) if rows else None


def by_dit(rows):
    """The same latents, the DiT three times as long"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["pictures"] and not r["seed"]]
    compared = {(r["objective"], r["steps"]) for r in rows if r["dit"]}
    rows = [r for r in rows if (r["objective"], r["steps"]) in compared]
    panel = {o: [(r["dit"] or int(r["constants"]["dit"]), r) for r in rows if r["objective"] == o] for o in COLOURS}
    return curves(rows, ["steps of the DiT"], [panel]) if rows else None


def curves(rows, labels, panels, names=None):
    """panels  [{objective: [(x, row)]}] -> two rows of axes each, one axis a measure; names: of x = 0, 1, ...; None: x is a number, log scale"""
    what = known(rows) | judges(rows)
    what.pop(f"r{distance(rows[0])}")
    figure, axes = plt.subplots(2 * len(panels), 3, figsize=(15, 6 * len(panels)))
    for block, label, panel in zip(np.split(axes, len(panels)), labels, panels):
        places = sorted({x for points in panel.values() for x, _ in points})
        for ax, (metric, title) in zip(block.flat, what.items()):
            for objective, points in panel.items():
                points = sorted(points, key=lambda point: point[0])
                own = [r for _, r in points]
                ax.errorbar([x for x, _ in points], values(own, metric), error(own, metric), fmt="-o", color=COLOURS[objective], label=objective if own else None)
            ax.set(xlabel=label, xscale="linear" if names else "log")
            ax.set_xticks(places, [names[x] if names else f"{x:,}" for x in places])
            ax.minorticks_off()
            ax.set_title(title, fontsize=9)
        for ax in block.flat[len(what):]:
            ax.remove()
    axes[0, 0].legend(fontsize=8)
    return figure


def table(rows):
    """A line a cell: percentages of pictures or samples, distances, minutes of a core; a dash where nothing was asked"""
    shares = PROBE, "linear probe full", "zero-shot top1", RECOGNISED
    columns = {PROBE: "probe", "linear probe full": "full", "zero-shot top1": "zero-shot", RECOGNISED: "recognised", PSNR: "PSNR", f"r{distance(rows[0])}": "rFD",
               distance(rows[0]): "FD", HALVED: "FD halved", "FD-classifier": "FD-classifier"}
    columns = {name: title for name, title in columns.items() if any(name in r["metrics"] for r in rows)}
    yield f"{'cell':28s}" + "".join(f"{title:>14s}" for title in columns.values()) + f"{'core min':>14s}"
    for r in sorted(rows, key=lambda r: (r["questions"], r["steps"], r["seed"])):
        cells = ["-" if name not in r["metrics"] else f"{r['metrics'][name]:.1%}" if name in shares else f"{r['metrics'][name]:.4g}" for name in columns]
        yield f"{r['cell']:28s}" + "".join(f"{x:>14s}" for x in cells) + f"{sum(r['cpu_seconds'].values()) / 60:14.1f}"
    for name, value in {name: value for r in rows for name, value in r["metrics"].items() if name.endswith("of real") or name == "classifier accuracy"}.items():
        yield f"real pictures: {name} {value:.4g}"


def main(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for name, quick in sorted({(r["data"], r["quick"]) for r in rows}):
        own = [r for r in rows if (r["data"], r["quick"]) == (name, quick)]
        print("\n".join([f"\n{name}{', --quick' if quick else ''}", *table(own), "", *spread(own), *correlations(own)]))
        for draw in (scaling, objectives, prediction, by_dit, by_size, by_pictures):
            path = folder / f"{name.partition(':')[0]}{'-quick' * quick}-{draw.__name__}.png"
            if figure := draw(own):
                figure.tight_layout()
                figure.savefig(path, dpi=110)
                plt.close(figure)
                print(f"wrote {path}")
            else:
                print(f"{path.name} is left out: too few cells of that question are finished")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
