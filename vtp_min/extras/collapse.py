"""Detection of a collapse in the logged values, with remedies. The thresholds are ours."""
import math

from ..dist import print0


def collapse_warnings(args):
    """-> check(step, values), to be called with each line of the log

    args    warmup, prototypes, batch, clip_loss
    values  {name: number}; teacher_entropy, feature_std and clip are used if they are present

    check returns the kinds of collapse that it found, joined by ", ", or "". It prints each kind
    once, with remedies. Before the end of the warm-up it finds nothing: all of these values look
    collapsed at the start.
    """
    printed = set()

    def check(step, values):
        if step <= args.warmup:
            return ""
        found = find_collapses(args, values)
        for kind in found:
            if kind not in printed:
                print0(f"\nwarning, step {step + 1}: {found[kind]}")
                printed.add(kind)
        return ", ".join(found)

    return check


def find_collapses(args, values):
    """values  {name: number} -> {kind of collapse: a sentence with its remedies}"""
    found = {}
    lnK = math.log(args.prototypes)
    lnB = math.log(args.batch)
    entropy = values.get("teacher_entropy")
    feature_std = values.get("feature_std")
    clip = values.get("clip")
    if entropy is not None and entropy > 0.99 * lnK:
        found["uniform teacher"] = (
            f"the teacher's entropy {entropy:.2f} is within 1 % of its maximum, ln K = {lnK:.2f}: "
            f"all prototypes are about equally likely, so DINO and iBOT teach nothing. If this "
            f"lasts, try a lower temperature (--set teacher_temp=...), fewer prototypes "
            f"(--set prototypes=...), a larger --batch-ssl or a smaller --lr.")
    if entropy is not None and entropy < 0.02 * lnK:
        found["constant teacher"] = (
            f"the teacher's entropy {entropy:.3f} is below 2 % of its maximum, ln K = {lnK:.2f}: "
            f"it gives one prototype nearly all of the probability, often the same one for every "
            f"image. Try --set teacher=sinkhorn, a higher temperature (--set teacher_temp=...) or "
            f"a slower teacher (a larger --set ema=...).")
    if feature_std is not None and feature_std < 0.05:
        found["collapsed features"] = (
            f"the class tokens hardly differ: feature_std is {feature_std:.3f}, that of random "
            f"directions is 1. Try a smaller --lr, a longer --warmup, --set w_koleo=0.1 or a "
            f"slower teacher (a larger --set ema=...).")
    if clip is not None and clip > 0.98 * lnB and args.clip_loss == "clip":
        where = "at or above" if clip >= lnB else "less than 2 % below"
        found["blind contrast"] = (
            f"clip {clip:.2f} is {where} ln B = {lnB:.2f}, the value of random guessing: images "
            f"and captions are not matched. Look at the captions (python data.py), "
            f"try a smaller --lr or a longer --warmup.")
    return found
