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
# {judge: (name of its Frechet distance, name of the share that it recognises)}
JUDGES = {"classifier": ("FD-classifier", RECOGNISED),
          "EfficientNet": ("FD-EfficientNet (no FID)", "samples recognised (EfficientNet)")}
FD = JUDGES["classifier"][0]
RFD = "rFD-EfficientNet (no FID)"              # of reconstructions


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
        axes[1].plot(*curve(row, FD), **style)
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
        shares, distances = curve(r, RECOGNISED)[1], curve(r, FD)[1]
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


# ---------------------------------------------------------------- matched reconstruction
def decoders_of(row):
    """-> {decoder: measurements of its reconstructions and of the samples of all classes}"""
    return {key.removeprefix("data-"): values for key, values in row["curve"].items()
            if key.startswith("data-")}


def rows_of_seed(rows, seed):
    """-> row of AE, row of ALL; None if one is not measured yet"""
    found = {r["objective"]: r for r in rows if r["seed"] == seed}
    return (found["AE"], found["ALL"]) if {"AE", "ALL"} <= found.keys() else None


def interpolated(ae, name, wanted):
    """AE as if one of its decoders had the wanted value of a measure of its reconstructions: linear
    interpolation between the two decoders next to it

    name  RFD or PSNR
    -> names of the two decoders, {("data" or "ten", name): value}; None if there are no such two
    """
    value = {decoder: found[name] for decoder, found in decoders_of(ae).items()}
    order = sorted(value, key=value.get)
    for lower, upper in zip(order, order[1:]):
        low, high = value[lower], value[upper]
        if low <= wanted <= high:
            weight = (wanted - low) / (high - low) if high > low else 0.0
            return (lower, upper), {
                (data, key): (1 - weight) * x + weight * ae["curve"][f"{data}-{upper}"][key]
                for data in ("data", "ten") for key, x in ae["curve"][f"{data}-{lower}"].items()}
    return None


def matched(ae, joint):
    """ALL's best decoder, and AE at the same rFD and at the same PSNR (study/protocol.md)

    -> (name of ALL's decoder, its values {("data" or "ten", name): value}, {RFD or PSNR: result of
       `interpolated`}), or None if AE's decoders do not reach one of the two
    """
    best = min(decoders_of(joint), key=lambda name: decoders_of(joint)[name][RFD])
    values = {(data, name): x for data in ("data", "ten")
              for name, x in joint["curve"][f"{data}-{best}"].items()}
    equal = {name: interpolated(ae, name, values["data", name]) for name in (RFD, PSNR)}
    return None if None in equal.values() else (best, values, equal)


def compare(ae, joint, data, n):
    """Values of two matched decoders, one judge after the other -> list of (judge, FD of AE, FD of
    ALL, share of AE, share of ALL, True if ALL is better in both as the rule wants, True if in
    neither)

    data  'data' (all classes) or 'ten'
    n     number of samples
    """
    found = []
    for judge, (distance, share) in JUDGES.items():
        d, e, p, q = ae[data, distance], joint[data, distance], ae[data, share], joint[data, share]
        more = q > p and differs(p, q, n)
        closer = e < 0.95 * d
        found.append((judge, d, e, p, q, more and closer, not more and not closer))
    return found


def matched_verdict(rows, data, seeds=(0, 1)):
    """The rule of study/protocol.md for one number of classes; 'open' if a seed is missing and may
    still change the answer"""
    pairs = [rows_of_seed(rows, seed) for seed in seeds]
    found = [matched(*pair) for pair in pairs if pair]
    if None in found:
        return "not decidable: no decoders match"
    n = samples_of(rows[0])
    lines = [line for _, joint, equal in found for _, ae in equal.values()
             for line in compare(ae, joint, data, n)]
    always, never = all(line[-2] for line in lines), all(line[-1] for line in lines)
    if not always and not never:
        return "not decidable"
    if None in pairs:
        return "open"
    return "shown" if always else "not shown"


def matched_figure(rows):
    """FD of samples against rFD of reconstructions, one point for each decoder"""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, data, title in zip(axes, ("data", "ten"), ("all classes", "10 classes")):
        for row in rows:
            points = sorted((values[RFD], row["curve"][f"{data}-{key}"][JUDGES["EfficientNet"][0]],
                             values[PSNR]) for key, values in decoders_of(row).items())
            x, y, psnr = zip(*points)
            axis.plot(x, y, "o-" if row["seed"] == 0 else "s--", color=COLORS[row["objective"]],
                      label=f"{row['objective']}, seed {row['seed']}")
            for k in (0, -1):
                axis.annotate(f"{psnr[k]:.1f} dB", (x[k], y[k]), fontsize=8, xytext=(4, -12),
                              textcoords="offset points")
        axis.set(xlabel="rFD of reconstructions (EfficientNet)",
                 ylabel="FD of samples (EfficientNet)", title=title)
        axis.margins(x=0.2, y=0.08)
    axes[0].legend(fontsize=8)
    return figure


def judged(found):
    """-> cells of a table: FD and share recognised (%) by EfficientNet, and by the classifier"""
    return " | ".join(f"{found[distance]:.1f}, {100 * found[share]:.1f}"
                      for distance, share in (JUDGES["EfficientNet"], JUDGES["classifier"]))


def matched_table(rows):
    """All decoders, then the comparison of each seed"""
    print("| tokenizer | seed | decoder | probe | PSNR | rFD | classes | FD, recognised "
          "(EfficientNet) | FD, recognised (classifier) |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        for key, values in decoders_of(r).items():
            for data in ("data", "ten"):
                found = r["curve"][f"{data}-{key}"]
                print(f"| {r['objective']} | {r['seed']} | {key} | "
                      f"{100 * r['metrics'][PROBE]:.1f} | {values[PSNR]:.2f} | {values[RFD]:.2f} "
                      f"| {'all' if data == 'data' else 10} | {judged(found)} |")
    for seed in sorted({r["seed"] for r in rows}):
        cells = rows_of_seed(rows, seed)
        if cells is None:
            print(f"\nseed {seed}: AE or ALL is not measured yet")
            continue
        comparison = matched(*cells)
        if comparison is None:
            print(f"\nseed {seed}: no decoders match")
            continue
        best, b, equal = comparison
        for measure, (neighbours, a) in equal.items():
            print(f"\nseed {seed}, equal {measure}: AE between {' and '.join(neighbours)} / ALL's "
                  f"decoder {best}: rFD {a['data', RFD]:.2f} / {b['data', RFD]:.2f}, PSNR "
                  f"{a['data', PSNR]:.2f} / {b['data', PSNR]:.2f}")
            for data in ("data", "ten"):
                for judge, x, y, p, q, _, _ in compare(a, b, data, samples_of(rows[0])):
                    print(f"{data}, {judge}: FD {x:.2f} / {y:.2f}, recognised {100 * p:.1f} / "
                          f"{100 * q:.1f} %")
    for data in ("data", "ten"):
        print(f"{data}: {matched_verdict(rows, data)}")


# ---------------------------------------------------------------- wide latents
def wide_values(row):
    """-> measurements of the reconstructions, and of the samples of 10 classes"""
    return row["curve"]["data-own"] | row["curve"]["ten-own"]


def wide_ratios(rows, seed):
    """-> {width: FD of AE divided by FD of ALL} of one seed, by EfficientNet"""
    distance = JUDGES["EfficientNet"][0]
    found = {(r["objective"], r["width"]): wide_values(r)[distance] for r in rows
             if r["seed"] == seed}
    return {width: found["AE", width] / found["ALL", width]
            for objective, width in sorted(found) if objective == "AE"
            and ("ALL", width) in found}


def wide_verdict(rows):
    """The rule of study/protocol.md"""
    first = {r["objective"]: wide_values(r) for r in rows if (r["seed"], r["width"]) == (0, 48)}
    if len(first) < 2:
        return "open"
    distance, share = JUDGES["EfficientNet"]
    n = samples_of(rows[0])
    ae, joint = first["AE"], first["ALL"]
    closer = joint[distance] <= 0.9 * ae[distance]
    more = joint[share] > ae[share] and differs(joint[share], ae[share], n)
    if not (closer or more):
        return "not shown"
    ratios = [wide_ratios(rows, seed) for seed in (0, 1)]
    if not all({16, 48} <= set(r) for r in ratios):
        return "open"
    if all(r[48] > 1.1 and r[48] > r[16] for r in ratios):
        return "shown"
    return "not decidable"


def wide_figure(rows):
    """FD and share recognised against the width of the latents, a row for each judge; bars are two
    standard errors"""
    figure, axes = plt.subplots(2, 2, figsize=(9, 4.8), layout="constrained", sharex=True)
    for (left, right), (judge, (distance, share)) in zip(axes, JUDGES.items()):
        for row in rows:
            values, seed = wide_values(row), row["seed"]
            style = dict(color=COLORS[row["objective"]], marker="o" if seed == 0 else "s",
                         label=f"{row['objective']}, seed {seed}" if row["width"] == 48 else None)
            x = row["width"] + (0.5 if row["objective"] == "ALL" else -0.5)    # side by side
            bar = 200 * standard_error(values[share], samples_of(row))
            left.plot(x, values[distance], linestyle="", **style)
            right.errorbar(x, 100 * values[share], bar, **style)
        left.set(title=f"FD by {judge}: lower is better")
        right.set(title=f"recognised by {judge}, %: higher is better")
        for axis in (left, right):
            axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    for axis in axes[1]:
        axis.set(xlabel="numbers per latent", xlim=(8, 56), xticks=(16, 32, 48))
    axes[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def wide_table(rows):
    print("| tokenizer | seed | numbers per latent | probe | PSNR | rFD | FD, recognised "
          "(EfficientNet) | FD, recognised (classifier) |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        values = wide_values(r)
        print(f"| {r['objective']} | {r['seed']} | {r['width']} | "
              f"{100 * r['metrics'][PROBE]:.1f} | {values[PSNR]:.1f} | {values[RFD]:.2f} | "
              f"{judged(values)} |")
    for seed in (0, 1):
        ratios = ", ".join(f"{w}: {x:.2f}" for w, x in wide_ratios(rows, seed).items())
        print(f"seed {seed}: FD of AE divided by FD of ALL: {ratios or 'not measured'}")
    print(wide_verdict(rows))


PARTS = {"race": (race_figure, race_table), "matched": (matched_figure, matched_table),
         "wide": (wide_figure, wide_table)}


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
