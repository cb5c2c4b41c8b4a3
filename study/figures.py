"""study/results.jsonl -> the figures of study/README.md, the paper's Fig. 4 to 7 in small, and a table.   python study/figures.py [FOLDER]

    scaling                 compute of the tokenizer against what it knows, what it keeps, and every judge of its samples              questions 1 to 3
    objectives              the four objectives at equal steps, mean over seeds, a dot a seed                                         questions 2, 3
    prediction              what predicts generation: the probe, PSNR, or what decoding loses?                                        question 4
    by_size, by_pictures    trunk, decoder, and pictures of the tokenizer's training set                                              questions 5, 6
    by_dit                  the DiT three times as long: what was only a matter of patience?                                          questions 2, 3
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
PROBE, PSNR, RECOGNISED, HALVED = "linear probe latent", "PSNR", "samples recognised", "FD-squeezenet, halved (no FID)"
SIZES = ["pico", "nano", "micro"]


def ranks(x):
    """x (n,) -> places 0..n-1; equals share their mean place"""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def correlation(x, y):
    """-> Pearson's, Spearman's: of the values, of their places; nan below 3 points, or where nothing varies"""
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return np.nan, np.nan
    return np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]


def within(points, x, y):
    """Pearson's correlation once each objective's own mean is taken off: does x tell the trainings of one objective apart? nan below 2 objectives of 2 points"""
    kinds = np.array([r["objective"] for r in points])
    several = [kinds == o for o in COLOURS if (kinds == o).sum() > 1]
    if len(several) < 2:
        return np.nan
    return correlation(*(np.concatenate([v[own] - v[own].mean() for own in several]) for v in (x, y)))[0]


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
    """{metric of the samples: label}; those that every cell has"""
    every = {distance(rows[0]): "FD of samples: lower is better", HALVED: "FD of samples at half size: lower is better", RECOGNISED: "samples recognised: higher is better"}
    return {name: label for name, label in every.items() if all(name in r["metrics"] for r in rows)}


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
    """Lists of cells that differ by their seed alone -> a cell each, with the mean of each metric"""
    return [g[0] | {"seed": 0, "metrics": {name: np.mean([r["metrics"][name] for r in g]) for name in g[0]["metrics"] if all(name in r["metrics"] for r in g)}} for g in by_seed(rows)]


# ---------------------------------------------------------------- the figures: rows -> a figure, or None if nothing is there to be drawn
def scaling(rows):
    """A dot a cell, a line through the means over seeds"""
    rows = nano_cells(rows)
    if len({r["steps"] for r in rows}) < 2:
        return None
    what = known(rows) | judges(rows)
    figure, axes = plt.subplots(2, 3, figsize=(16, 7.5))
    for ax, (name, label) in zip(axes.flat, what.items()):
        for objective, colour in COLOURS.items():
            own = [r for r in rows if r["objective"] == objective]
            mean = sorted(over_seeds(own), key=compute)
            ax.plot([compute(r) for r in own], [r["metrics"][name] for r in own], "o", color=colour, alpha=0.4, ms=4)
            ax.plot([compute(r) for r in mean], [r["metrics"][name] for r in mean], "-", color=colour, label=objective)
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
                ax.bar(k, np.mean([r["metrics"][name] for r in own if r["seed"] in shared]), color=colour, alpha=0.6)
                ax.plot([k] * len(own), [r["metrics"][name] for r in own], "k.", ms=5)
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
                    own = [r["metrics"] for r in some if r["objective"] == objective]
                    ax.plot([m[name] for m in own], [m[judge] for m in own], "o", color=colour, mfc=fill, label=objective if some is points else None)
            x, y = (np.array([r["metrics"][k] for r in points]) for k in (name, judge))
            ax.set(xlabel=label, ylabel=its)
            ax.set_title("Pearson {:.2f}, Spearman {:.2f}, ".format(*correlation(x, y)) + f"within objectives {within(points, x, y):.2f}, n {len(points)}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    return figure


def correlations(rows):
    """The same numbers as text"""
    points = over_seeds(nano_cells(rows))
    yield f"\n{len(points)} trainings: Pearson, Spearman, Pearson within objectives"
    for judge in judges(rows) | {"FD-classifier": ""}:
        for name in known(rows):
            x, y = (np.array([r["metrics"][k] for r in points]) for k in (name, judge))
            yield f"{name:28s} and {judge:32s}{correlation(x, y)[0]:8.2f}{correlation(x, y)[1]:8.2f}{within(points, x, y):8.2f}"


def spread(rows):
    """Trainings of several seeds: mean, and lowest to highest"""
    for g in [g for g in by_seed(nano_cells(rows)) if len(g) > 1]:
        for name in known(rows) | judges(rows) | {"FD-classifier": ""}:
            values = [r["metrics"][name] for r in g]
            yield f"{g[0]['objective']:8s}{g[0]['steps']:6d} steps, {len(g)} seeds  {name:32s}{np.mean(values):12.4g}  from {min(values):.4g} to {max(values):.4g}"


def by_size(rows):
    """Trunks, each with nano's decoder; decoders, each with nano's trunk"""
    rows = [r for r in rows if not r["pictures"] and not r["dit"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["size"] != "nano" or r["decoder"]}
    rows = [r | {"decoder": r["decoder"] or r["size"]} for r in rows if r["steps"] in compared]
    panels = [{o: [(SIZES.index(r[part]), r) for r in rows if r["objective"] == o and r[other] == "nano"] for o in ("AE", "ALL")} for part, other in (("size", "decoder"), ("decoder", "size"))]
    return compared and curves(rows, ["trunk", "decoder"], panels, SIZES)


def by_pictures(rows):
    """Equal steps, so few pictures come often: 100 of them some 600 times where 50,000 come once"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["dit"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["pictures"]}
    panel = {objective: [(r["pictures"] or r["constants"]["training_pictures"], r) for r in rows if r["objective"] == objective and r["steps"] in compared] for objective in ("AE", "ALL")}
    return compared and curves(rows, ["pictures of the tokenizer's training set, equal steps"], [panel])


def by_dit(rows):
    """The same latents, the DiT three times as long"""
    rows = [r for r in rows if r["size"] == "nano" and not r["decoder"] and not r["pictures"] and not r["seed"]]
    compared = {r["steps"] for r in rows if r["dit"]}
    panel = {o: [(r["dit"] or int(r["constants"]["dit"]), r) for r in rows if r["objective"] == o and r["steps"] in compared] for o in COLOURS}
    return compared and curves(rows, ["steps of the DiT"], [panel])


def curves(rows, labels, panels, names=None):
    """panels  [{objective: [(x, row)]}] -> a column each, a line a judge and one for the probe; names: of x = 0, 1, ...; None: x is a number, log scale"""
    what = judges(rows) | {PROBE: known(rows)[PROBE]}
    figure, axes = plt.subplots(len(what), len(panels), figsize=(5 * len(panels), 3 * len(what)), squeeze=False)
    for (metric, title), line in zip(what.items(), axes):
        for ax, label, panel in zip(line, labels, panels):
            for objective, points in panel.items():
                points = sorted(points, key=lambda point: point[0])
                ax.plot([x for x, _ in points], [r["metrics"][metric] for _, r in points], "-o", color=COLOURS[objective], label=objective)
            ax.set(xlabel=label, **({"xticks": range(len(names)), "xticklabels": names} if names else {"xscale": "log"}))
            ax.set_title(title, fontsize=9)
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
        if lacking := [r["cell"] for r in own if HALVED not in r["metrics"]] if any(HALVED in r["metrics"] for r in own) else []:
            print(f"{HALVED} is not drawn: {', '.join(lacking)} lack it")
        for draw in (scaling, objectives, prediction, by_dit, by_size, by_pictures):
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
