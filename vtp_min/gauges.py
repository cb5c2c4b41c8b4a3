"""Is it still learning? Numbers that show a collapse, which no loss shows by itself, and what to do about it."""
import math

import torch.nn.functional as F

from .dist import say, total, world
from .losses import wide


def entropy(p):
    """Mean entropy of the teacher's answers, in nats. ln K: it says nothing (collapse). 0: one prototype each."""
    return -(p * p.clamp_min(1e-30).log()).sum(-1).mean()


def spread(x):
    """How far class tokens (B, D) of all ranks lie apart: 1 random directions, 0 all in one place (collapse)"""
    center = total(F.normalize(wide(x.detach()), dim=-1).mean(0)) / world()
    return (1 - center.square().sum()).clamp_min(0).sqrt()


def advice(args, values, step, warned):
    """What the gauges say when something has collapsed, and which knob helps: said once a kind, and in the log while it lasts. After warm-up only."""
    lnK, lnB = math.log(args.prototypes), math.log(args.batch)
    entropy, spread, clip = values.get("teacher_entropy", lnK / 2), values.get("spread", 1.0), values.get("clip", 0.0)
    kinds = {"uniform teacher": (entropy > 0.99 * lnK, f"the teacher's entropy {entropy:.2f} is ln K = {lnK:.2f}: it says nothing, DINO and iBOT teach nothing yet. "
                                                       "If it stays: a lower --teacher-temp, fewer --prototypes, a larger --batch-ssl, a smaller --lr"),
             "constant teacher": (entropy < 0.02 * lnK, f"the teacher's entropy {entropy:.3f} is near 0: it is certain of everything, often of one prototype for all. Try --teacher sinkhorn, "
                                                        "a higher --teacher-temp, a larger --ema"),
             "collapsed features": (spread < 0.05, f"class tokens hardly differ (spread {spread:.3f}; random ones have 1). Try a smaller --lr, a longer --warmup, "
                                                   "--w-koleo 0.1, a larger --ema"),
             "blind contrast": (clip > 0.98 * lnB and args.clip_loss == "clip", f"clip {clip:.2f} is ln B = {lnB:.2f}: pictures and captions do not find each other. Look at the "
                                                                              "captions (python data.py), try a smaller --lr or a longer --warmup")}
    found = {kind: words for kind, (true, words) in kinds.items() if true and step > args.warmup}
    for kind in found.keys() - warned:
        say(f"\nwarning, step {step + 1}: {found[kind]}")
        warned.add(kind)
    return ", ".join(found)
