"""Warnings when the logged values indicate a collapse of the training, with remedies.

Self-distillation has two trivial solutions: the teacher assigns equal probabilities to all
prototypes, or it assigns all images to one prototype. Both are visible in the teacher's entropy.
The thresholds are ours.
"""
import math

from ..dist import print0


def collapse_warnings(args):
    """-> check(step, values), a function to call with each line of the log

    args    needs warmup (steps), prototypes (K), batch (B) and clip_loss ('clip' or 'siglip')
    values  {name: number}; teacher_entropy, feature_std and clip are checked if they are present

    check returns the names of the collapses that it found, joined by ", ", or "". The first time
    that it finds one, it prints a warning with remedies. It finds none during the warm-up, because
    an untrained model has the same values as a collapsed one.
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
    """values  {name: number} -> {name of a collapse: the value, the limit and the remedies}"""
    found = {}
    lnK = math.log(args.prototypes)
    lnB = math.log(args.batch)
    entropy = values.get("teacher_entropy")
    feature_std = values.get("feature_std")
    clip = values.get("clip")
    if entropy is not None and entropy > 0.99 * lnK:
        found["uniform teacher"] = (
            f"the teacher's entropy {entropy:.2f} is within 1 % of its maximum, ln K = {lnK:.2f}: "
            f"all prototypes are about equally probable, so the targets of DINO and iBOT contain "
            f"no information. If this persists, try a lower temperature (--set teacher_temp=...), "
            f"fewer prototypes (--set prototypes=...), a larger --batch-ssl or a smaller --lr.")
    if entropy is not None and entropy < 0.02 * lnK:
        found["constant teacher"] = (
            f"the teacher's entropy {entropy:.3f} is below 2 % of its maximum, ln K = {lnK:.2f}: "
            f"it assigns nearly all of the probability to one prototype, often the same one for "
            f"every image. Try --set teacher=sinkhorn, a higher temperature "
            f"(--set teacher_temp=...) or a slower teacher (a larger --set ema=...).")
    if feature_std is not None and feature_std < 0.05:
        found["collapsed features"] = (
            f"the class tokens of different images are nearly equal: feature_std is "
            f"{feature_std:.3f}; random directions have 1. Try a smaller --lr, a longer --warmup, "
            f"--set w_koleo=0.1 or a slower teacher (a larger --set ema=...).")
    if clip is not None and clip > 0.98 * lnB and args.clip_loss == "clip":
        position = "at or above" if clip >= lnB else "less than 2 % below"
        found["CLIP at chance"] = (
            f"clip {clip:.2f} is {position} ln B = {lnB:.2f}, the value of random guessing: the "
            f"model does not match images with their captions. Check the captions "
            f"(python data.py), and try a smaller --lr or a longer --warmup.")
    return found
