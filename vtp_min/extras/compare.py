"""Is a run on the reference curve? Compare its log with the logs of reference runs.

    OUT/compare.png     one plot per logged quantity: the run and the range of the references

A single line of a log depends on its batch, so means over windows of several lines are compared.
The rule (ours): a quantity is off the curve if, in at least three windows in a row, it is above or
below the mean of the references by more than the largest of

    - the range of the references in this window (0 for a single reference),
    - 2 % of their mean,
    - three standard errors of the difference, estimated from the scatter of neighbouring lines.

Three windows, because about 100 comparisons are made for a run, and another seed can differ for two
windows at the beginning.
docs/curves.md shows where the numbers of this rule come from.

steps (k,) that all logs have    y (k,) values of the run    r (n, k) values of n references
"""
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..config import atomic_write
from ..dist import print0
from ..run import MUTABLE_FLAGS, TIMING
from .files import check_writable, read_json, read_json_lines
from .report import BLUE, GREEN, ORANGE, STYLE, is_number

MAX_WINDOWS = 10
MIN_STEPS = 6              # common steps, for three windows of two
IN_A_ROW = 3               # windows
PERCENT = 2
STANDARD_ERRORS = 3
SHOWN = 4                  # windows that are printed
# logged quantities that are no results: the step, the schedule, the machine, counts of exceptions
NOT_COMPARED = TIMING | {"step", "lr", "weight_decay", "seconds", "bad", "skipped"}
# settings that do not change the curve. --steps does: the schedules of train.py depend on it.
WITHOUT_EFFECT = MUTABLE_FLAGS - {"steps"} | {"command"}
PATHS = "data", "init"     # settings of which only the last part is compared: a folder may move


@dataclass
class Log:
    """A log and the settings of its run"""
    name: str
    folder: Path
    lines: dict              # {step: {name: value}}, in the order of the steps
    settings: dict           # the contents of run.json beside log.jsonl, {} without this file

    def values(self, name, steps):
        """-> float64 (k,), or None if a line has no such number"""
        found = [self.lines[step].get(name) for step in steps]
        if not all(is_number(value) for value in found):
            return None
        return np.array(found, dtype=float)    # also from the strings "nan", "inf" and "-inf"


@dataclass
class Result:
    """The comparison of one quantity in w windows"""
    name: str
    y: np.ndarray            # (k,) values of the run
    yours: np.ndarray        # (w,) means of the run
    low: np.ndarray          # (w,) smallest mean of a reference
    high: np.ndarray         # (w,) largest mean of a reference
    centre: np.ndarray       # (w,) mean over the references
    tolerance: np.ndarray    # (w,) largest difference from the centre on the curve
    verdict: str
    on_curve: bool


def compare(run, references, out=None):
    """Compare the log of a run with reference logs: print the numbers, write OUT/compare.png
    -> True if all quantities are on the curve

    run, references  run folders, or paths of log.jsonl
    out              folder of the figure; None: that of the run
    ValueError if the logs cannot be compared.
    """
    run = read_log(run)
    references = [read_log(path) for path in references]
    out = Path(out or run.folder)
    check_writable(out, "give another folder with --out")
    print0(f"run         {run.name}")
    for reference in references:
        print0(f"reference   {reference.name}")
    steps = common_steps(run, references)
    for sentence in [*lengths(run, references, steps), *different_settings(run, references),
                     *different_rates(run, references, steps)]:
        print0(sentence)
    windows = np.array_split(np.arange(len(steps)), min(MAX_WINDOWS, len(steps) // 2))
    results = compare_all(run, references, steps, windows)
    print0(f"\nThe {len(steps)} lines are averaged in {len(windows)} windows, of which "
           f"{min(SHOWN, len(windows))} are shown.\nThe tolerance (ours) is the largest of the "
           f"range of the references, {PERCENT} % of their mean\nand {STANDARD_ERRORS} standard "
           f"errors of the difference.\n")
    print0("\n".join(table(results, steps, windows)))
    image = plot(results, steps, windows)
    atomic_write(out / "compare.png", lambda part: image.savefig(part, dpi=110, format="png"))
    print0(f"\n{conclusion(results)}\nfigure: {out / 'compare.png'}")
    return all(result.on_curve for result in results)


# ---------------------------------------------------------------- reading
def read_log(path):
    """A run folder, or the path of a log -> Log"""
    path = Path(path)
    if path.is_dir():
        path = path / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a run folder, or its log.jsonl")
    found = read_json_lines(path, lambda line: type(line.get("step")) is int)
    if not found:
        raise ValueError(f"{path} holds no readable line with a step; give another log")
    by_step = {line["step"]: line for line in found}           # the last line of a step counts
    settings = {}
    # a log of another name may be of another run
    if path.name == "log.jsonl" and (path.parent / "run.json").exists():
        settings = read_json(path.parent / "run.json", "restore it, or move it away")
    return Log(str(path), path.parent, dict(sorted(by_step.items())), settings)


def common_steps(run, references):
    """-> sorted list of the steps that all logs have. ValueError if they are too few"""
    common = set(run.lines)
    for reference in references:
        common &= set(reference.lines)
    if len(common) < MIN_STEPS:
        spacing = ", ".join(describe_steps(log) for log in [run, *references])
        raise ValueError(f"the logs have {len(common)} steps in common, but at least {MIN_STEPS} "
                         f"are needed ({spacing}); train with the --log-every of the references")
    return sorted(common)


def describe_steps(log):
    steps = list(log.lines)
    return f"{log.name}: {len(steps)} lines from step {steps[0]} to {steps[-1]}"


# ---------------------------------------------------------------- sentences
def lengths(run, references, steps):
    """-> sentences about different lengths and spacings of the logs"""
    sentences = []
    yours, theirs = max(run.lines), min(max(log.lines) for log in references)
    if yours != theirs:
        sentences.append(f"Your log ends at step {yours}, the shortest reference at {theirs}: "
                         f"steps up to {steps[-1]} are compared.")
    for log in [run, *references]:
        within = [step for step in log.lines if step <= steps[-1]]
        if len(within) > len(steps):
            sentences.append(f"{log.name} has {len(within)} lines up to step {steps[-1]}; the "
                             f"{len(steps)} steps that all logs have are compared.")
    return sentences


def different_settings(run, references):
    """-> sentences about settings of the run that no reference has"""
    known = [log for log in references if log.settings]
    if not run.settings or not known:
        missing = [log.name for log in [run, *references] if not log.settings]
        return [f"Settings are not compared, because run.json is missing beside "
                f"{', '.join(missing)}."]
    lines = []
    for name in sorted(run.settings.keys() - WITHOUT_EFFECT):
        # another version of the code may not have this setting
        theirs = [log.settings[name] for log in known if name in log.settings]
        yours = run.settings[name]
        if name in PATHS:
            yours, *theirs = [Path(str(value)).name for value in [yours, *theirs]]
        if theirs and yours not in theirs:
            different = dict.fromkeys(map(repr, theirs))       # each once, in this order
            lines.append(f"    {name}: yours {yours!r}, reference {' or '.join(different)}")
    if not lines:
        return ["All settings that change the curve are those of a reference."]
    return ["Settings that can change the curve and differ:", *lines]


def different_rates(run, references, steps):
    """-> a sentence if the learning rate in the logs differs"""
    y = run.values("lr", steps)
    for reference in references:
        r = reference.values("lr", steps)
        if y is None or r is None:
            continue
        differs = np.abs(y - r) > 0.01 * np.abs(r)             # 1 %: more than rounding
        if differs.any():
            i = int(differs.argmax())
            return [f"The learning rate differs from step {steps[i]} on: yours {y[i]:.3g}, "
                    f"{reference.name} {r[i]:.3g}."]
    return []


# ---------------------------------------------------------------- the comparison
def compare_all(run, references, steps, windows):
    """-> list of Results for the quantities that can be compared. ValueError if there are none

    Prints the names of the others.
    """
    names = [names_in(log) for log in [run, *references]]
    theirs = set().union(*names[1:])
    results, left_out = [], []
    for name in [name for name in names[0] if name in theirs]:
        y = run.values(name, steps)
        r = [log.values(name, steps) for log in references]
        r = [values for values in r if values is not None and np.isfinite(values).all()]
        if y is None or not r:
            left_out.append(name)
        else:
            results.append(compare_one(name, y, np.stack(r), steps, windows))
    only_yours = [name for name in names[0] if name not in theirs]
    only_theirs = sorted(theirs - set(names[0]))
    for text, found in (("only in your log", only_yours), ("only in references", only_theirs),
                        ("not in every line, or not finite in a reference", left_out)):
        if found:
            print0(f"Not compared, because {text}: {', '.join(found)}.")
    if not results:
        raise ValueError("the logs have no loss or diagnostic in common; compare a tokenizer with "
                         "a tokenizer and a DiT with a DiT")
    return results


def names_in(log):
    """-> names of the numbers in a log, except NOT_COMPARED, in their order"""
    found = {}
    for line in log.lines.values():
        found |= {name: None for name, value in line.items() if is_number(value)}
    return [name for name in found if name not in NOT_COMPARED]


def compare_one(name, y, r, steps, windows):
    """y (k,), r (n, k) -> Result"""
    difference = y - r.mean(0)                                 # (k,)
    lines = np.array([len(window) for window in windows])      # (w,)
    means = np.stack([r[:, window].mean(1) for window in windows], axis=1)           # (n, w)
    low, high, centre = means.min(0), means.max(0), means.mean(0)
    error = scatter(difference) / np.sqrt(lines)
    tolerance = np.stack([high - low, PERCENT / 100 * np.abs(centre), STANDARD_ERRORS * error])
    tolerance = tolerance.max(0)
    yours = np.array([y[window].mean() for window in windows])
    verdict, on_curve = judge(yours - centre, tolerance, steps, windows)
    finite = np.isfinite(y)
    if not finite.all():
        verdict, on_curve = f"not finite at step {steps[int(finite.argmin())]}", False
    return Result(name, y, yours, low, high, centre, tolerance, verdict, on_curve)


def scatter(difference):
    """Standard deviation of the noise of single lines, from the jumps between neighbouring lines

    The jumps of normally distributed noise have a median absolute value of 0.954 of its standard
    deviation. A slow drift hardly changes it, and a few outliers do not change the median.
    """
    jumps = np.abs(np.diff(difference))
    jumps = jumps[np.isfinite(jumps)]
    return np.median(jumps) / 0.954 if len(jumps) else 0.0


def judge(difference, tolerance, steps, windows):
    """difference, tolerance (w,) -> the verdict in words, True if on the curve"""
    sides = np.where(np.abs(difference) > tolerance, np.sign(difference), 0)
    parts, on_curve = [], True
    for side, group in groupby(range(len(windows)), key=lambda w: sides[w]):
        group = list(group)
        if side == 0:
            continue
        first, last = steps[windows[group[0]][0]], steps[windows[group[-1]][-1]]
        where = "above" if side > 0 else "below"
        if len(group) < IN_A_ROW:
            number = "one window" if len(group) == 1 else "two windows"
            parts.append(f"{where} in {number}, steps {first} to {last}")
        else:
            on_curve = False
            until = "on" if group[-1] == len(windows) - 1 else f"to {last}"
            parts.append(f"{where} from step {first} {until}")
    if on_curve:
        parts.insert(0, "on the curve")
    return "; ".join(parts), on_curve


# ---------------------------------------------------------------- output
def table(results, steps, windows):
    """-> lines of text: for each quantity the values in up to SHOWN windows, and the verdict"""
    shown = np.linspace(0, len(windows) - 1, min(SHOWN, len(windows))).round().astype(int)
    spans = [f"{steps[windows[w][0]]} to {steps[windows[w][-1]]}" for w in shown]
    lines = [row("", "steps", spans)]
    for result in results:
        yours = [number(result.yours[w]) for w in shown]
        theirs = [interval(result.low[w], result.high[w]) for w in shown]
        difference = result.yours - result.centre
        differences = [f"{difference[w]:+.2g}" for w in shown]
        allowed = [f"{result.tolerance[w]:.2g}" for w in shown]
        lines += ["", row(result.name, "yours", yours), row("", "reference", theirs),
                  row("", "difference", differences), row("", "tolerance", allowed),
                  f"{'':16} {result.verdict}"]
    return lines


def row(name, label, cells):
    return f"{name:16} {label:11}" + "".join(f"{cell:>20}" for cell in cells)


def number(value):
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"


def interval(low, high):
    low, high = number(low), number(high)
    return low if low == high else f"{low} to {high}"


def conclusion(results):
    """-> the last sentence: which quantities are off the curve"""
    off = [f"{result.name} ({result.verdict})" for result in results if not result.on_curve]
    if not off:
        return f"On the curve: all {len(results)} quantities."
    return f"Off the curve: {len(off)} of {len(results)} quantities, {', '.join(off)}."


def plot(results, steps, windows):
    """One plot per quantity -> Figure: tolerance, range and mean of the references, and the run"""
    steps = np.array(steps)
    centres = [steps[window].mean() for window in windows]
    with matplotlib.rc_context(STYLE):
        rows = math.ceil(len(results) / 3)
        figure = Figure(figsize=(13, 3 * rows), layout="constrained")
        for number, result in enumerate(results, start=1):
            ax = figure.add_subplot(rows, 3, number)
            ax.fill_between(centres, result.centre - result.tolerance,
                            result.centre + result.tolerance, color=ORANGE, alpha=0.15, lw=0,
                            label="tolerance")
            ax.fill_between(centres, result.low, result.high, color=ORANGE, alpha=0.45, lw=0)
            ax.plot(centres, result.centre, color=ORANGE, lw=1.2, label="references")
            ax.plot(steps, result.y, color=BLUE, alpha=0.25, lw=1)
            ax.plot(centres, result.yours, "o-", color=BLUE, lw=1.6, ms=4, label="your run")
            # grad_norm starts near 1000, which would hide the rest
            if result.centre.min() > 0 and result.centre.max() > 10 * np.median(result.centre):
                ax.set_yscale("log")
            ax.set_title(result.name, loc="left", fontweight="bold")
            colour = GREEN if result.on_curve else "#c03030"
            ax.set_title(result.verdict.split(";")[0], loc="right", color=colour, fontsize=11)
            if number == 1:
                ax.legend(frameon=False)
    return figure
