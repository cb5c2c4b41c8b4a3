"""Draw the figures of study/README.md and print its tables.

    python study/figures.py [FOLDER ...]     read FOLDER/results.jsonl; default: study/race,
                                             study/matched and study/wide, as far as they exist

Each folder has cells of one part (see study.py). A cell is one tokenizer with its measurements,
which is one line of results.jsonl. Cells that are missing leave gaps in figures and tables.
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
STYLES = {"both": "-", "neither": "--", "shuffled": ":"}
PROBE, PSNR, RECOGNISED = "linear probe latent", "PSNR", "samples recognised"
FD = {"race": "FD-classifier", "matched": "FD-EfficientNet (no FID)",
      "wide": "FD-EfficientNet (no FID)"}


# ---------------------------------------------------------------- rows of results.jsonl
def read_rows(folder):
    """-> lines of FOLDER/results.jsonl"""
    text = Path(folder, "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def standard_error(p, n):
    """Standard error of a share p of n samples (binomial distribution)"""
    return math.sqrt(p * (1 - p) / n)


def differs(p, q, n):
    """True if two shares of n samples each differ by more than two standard errors"""
    return abs(p - q) > 2 * math.hypot(standard_error(p, n), standard_error(q, n))


def samples_of(row):
    return int(row["constants"]["samples"])


def curve(row, name):
    """-> steps of the DiT (k,), values of one metric of its samples (k,)"""
    found = {int(steps): metrics[name] for steps, metrics in row["curve"].items()}
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps])


# ---------------------------------------------------------------- the race
def steps_to_share(row, share):
    """-> steps of the DiT at which this share of samples is recognised

    Interpolated between the measured points, linearly in the logarithm of the steps. nan if the
    share is not reached, or was already exceeded at the first point.
    """
    steps, shares = curve(row, RECOGNISED)
    for k in range(1, len(steps)):
        if shares[k - 1] <= share <= shares[k] and shares[k] > shares[k - 1]:
            weight = (share - shares[k - 1]) / (shares[k] - shares[k - 1])
            return math.exp((1 - weight) * math.log(steps[k - 1]) + weight * math.log(steps[k]))
    return math.nan


def speedups(row, reference, at=(1000, 2000, 4000)):
    """-> {steps: steps of the reference divided by the row's steps to the same share}"""
    steps, shares = curve(reference, RECOGNISED)
    return {s: s / steps_to_share(row, share) for s, share in zip(steps, shares) if s in at}


def verdict(rows, objective, at=(1000, 2000, 4000)):
    """The rule of study/protocol.md for one objective -> 'shown', 'not shown' or 'not decidable';
    'open' if fewer than two seeds are there"""
    outcomes = []
    for seed in sorted({r["seed"] for r in rows}):
        cells = {r["objective"]: r for r in rows
                 if r["seed"] == seed and r["captions"] == "both"}
        if "AE" not in cells or objective not in cells:
            continue
        n = samples_of(cells["AE"])
        ours, reference = (dict(zip(*curve(cells[o], RECOGNISED))) for o in (objective, "AE"))
        outcomes.append([ours[s] > reference[s] and differs(ours[s], reference[s], n)
                         for s in at if s in ours and s in reference])
    if len(outcomes) < 2:
        return "open"
    if all(all(seed) for seed in outcomes):
        return "shown"
    return "not decidable" if any(any(seed[1:]) for seed in outcomes) else "not shown"


def race_figure(rows):
    """Share recognised and FD against the steps of the DiT; bars are two standard errors"""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for row in rows:
        label = row["objective"] if row["captions"] == "both" else \
            f"{row['objective']}, captions {row['captions']}"
        style = dict(color=COLORS[row["objective"]], linestyle=STYLES[row["captions"]],
                     marker="o", markersize=3, label=label if row["seed"] == 0 else None,
                     alpha=1 if row["seed"] == 0 else 0.5)
        steps, shares = curve(row, RECOGNISED)
        bars = [200 * standard_error(p, samples_of(row)) for p in shares]
        axes[0].errorbar(steps, 100 * shares, bars, **style)
        axes[1].plot(*curve(row, FD["race"]), **style)
    for axis, title in zip(axes, ("samples recognised, %: higher is better",
                                  "FD of classifier features: lower is better")):
        axis.set(xscale="log", xlabel="training steps of the DiT", title=title)
        axis.set_xticks(steps, steps)
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    return figure


def race_table(rows):
    """One line per cell: what the tokenizer knows, and the share recognised at each length"""
    steps, _ = curve(rows[0], RECOGNISED)
    lengths = ", ".join(map(str, steps))
    print(f"| tokenizer | seed | probe | PSNR | recognised after {lengths} steps | FD "
          f"| faster than AE at {', '.join(map(str, steps[-3:]))} |")
    print("|---|---|---|---|---|---|---|")
    reference = {r["seed"]: r for r in rows if r["objective"] == "AE"}
    for r in rows:
        name = r["objective"] + (r["captions"] != "both") * f", captions {r['captions']}"
        shares, distances = curve(r, RECOGNISED)[1], curve(r, FD["race"])[1]
        faster = "–"
        if r["objective"] != "AE" and r["seed"] in reference:
            faster = ", ".join("–" if math.isnan(x) else f"{x:.2f}"
                               for x in speedups(r, reference[r["seed"]], steps[-3:]).values())
        print(f"| {name} | {r['seed']} | {100 * r['metrics'][PROBE]:.1f} | "
              f"{r['metrics'][PSNR]:.1f} | {', '.join(f'{100 * p:.1f}' for p in shares)} | "
              f"{', '.join(f'{d:.1f}' for d in distances)} | {faster} |")
    errors = [standard_error(p, samples_of(r)) for r in rows for p in curve(r, RECOGNISED)[1]]
    print(f"\nlargest standard error of a share: {100 * max(errors):.1f} points")
    for objective in list(COLORS)[1:]:
        print(f"{objective}: {verdict(rows, objective)}")


PARTS = {"race": (race_figure, race_table)}


def main(folders):
    study = Path(__file__).parent
    folders = folders or [study / part for part in PARTS if (study / part).exists()]
    for folder in map(Path, folders):
        rows = read_rows(folder)
        draw, table = PARTS[rows[0]["part"]]
        draw(rows).savefig(folder / f"{rows[0]['part']}.png", dpi=120)
        table(rows)
        print(f"-> {folder / rows[0]['part']}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
