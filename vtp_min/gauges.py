"""Detection of collapse from logged values, with advice. The thresholds are ours."""
import math

import torch.nn.functional as F

from .dist import say, total, world
from .losses import full_precision, to_fp32


@full_precision()
def entropy(p):
    """Mean entropy of the teacher's probabilities (..., K), in nats.

    ln K: all prototypes are equally likely. This is a collapse. 0: each row has
    one prototype, which is a collapse if it is the same one for every image.
    """
    p = to_fp32(p)
    return -(p * p.clamp_min(1e-30).log()).sum(-1).mean()


@full_precision()
def spread(x):
    """Root-mean-square distance of the normalised class tokens (B, D) of all ranks from their mean.

    1: random directions. 0: all equal (collapse).
    """
    center = total(F.normalize(to_fp32(x.detach()), dim=-1).mean(0)) / world()
    return (1 - center.square().sum()).clamp_min(0).sqrt()


def advice(args, values, step, warned):
    """Warn about a collapse and name the flags that may help -> the names of all collapses found, for the log

    Each kind is printed once. Before the end of the warm-up nothing is printed.
    """
    if step <= args.warmup:
        return ""
    found = collapses(args, values)
    for kind in found.keys() - warned:
        say(f"\nwarning, step {step + 1}: {found[kind]}")
        warned.add(kind)
    return ", ".join(found)


def collapses(args, values):
    """values  {name: number} of the log -> {kind of collapse: a sentence with its remedies}"""
    found, lnK, lnB = {}, math.log(args.prototypes), math.log(args.batch)
    entropy, spread, clip = (values.get(k) for k in ("teacher_entropy", "spread", "clip"))
    if entropy is not None and entropy > 0.99 * lnK:
        found["uniform teacher"] = (
            f"the teacher's entropy {entropy:.2f} is within 1 % of its maximum, ln K = {lnK:.2f}: "
            f"all prototypes are about equally likely, so DINO and iBOT teach nothing. If this "
            f"lasts, try a lower --teacher-temp, fewer --prototypes, a larger --batch-ssl "
            f"or a smaller --lr.")
    if entropy is not None and entropy < 0.02 * lnK:
        found["constant teacher"] = (
            f"the teacher's entropy {entropy:.3f} is below 2 % of its maximum, ln K = {lnK:.2f}: "
            f"it gives one prototype nearly all of the probability, often the same one for every "
            f"image. Try --teacher sinkhorn, a higher --teacher-temp or a larger --ema.")
    if spread is not None and spread < 0.05:
        found["collapsed features"] = (
            f"the class tokens hardly differ: their spread is {spread:.3f}, that of random "
            f"directions is 1. Try a smaller --lr, a longer --warmup, --w-koleo 0.1 "
            f"or a larger --ema.")
    if clip is not None and clip > 0.98 * lnB and args.clip_loss == "clip":
        where = "at or above" if clip >= lnB else "less than 2 % below"
        found["blind contrast"] = (
            f"clip {clip:.2f} is {where} ln B = {lnB:.2f}, the value of random guessing: images "
            f"and captions are not matched. Look at the captions (python data.py), "
            f"try a smaller --lr or a longer --warmup.")
    return found
