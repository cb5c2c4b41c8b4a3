"""How fast each weight may move, step by step: schedules, and groups of parameters that share one.   Borrowed from OpenCLIP and DINOv2"""
import math

LR_FLOOR = 1e-6                           # where the cosine ends: DINOv2


def cosine(step, a, b, steps):
    """a at step 0, b at the last, half a cosine between"""
    return b + (a - b) * (1 + math.cos(math.pi * min(step / max(steps - 1, 1), 1))) / 2


def ramp(step, a, b, steps):
    """a at step 0, b from `steps` on, a straight line between"""
    return a + (b - a) * min(step / max(steps, 1), 1)


def warmup_cosine(step, lr, warmup, steps, floor=LR_FLOOR):
    """Linear to lr in `warmup` steps (OpenCLIP: the first step already moves), then half a cosine down to `floor` (DINOv2's)"""
    return lr * (step + 1) / warmup if step < warmup else cosine(step - warmup, lr, min(floor, lr), steps - warmup)


def param_groups(student, layer_decay=1.0, patch_lr=1.0):
    """No weight decay for vectors (biases, norms, LayerScale, log-scale) and position tables, as OpenCLIP and DINOv2; class and
    mask token and the head's gains do decay, as in DINOv2. The head's last layer stands apart, because it rests at first.

    layer_decay, patch_lr  DINOv2's factors on the learning rate (0.9, 0.2): one for each block that stands above a parameter of the trunk
    """
    groups, depth = {}, len(student.model.trunk.blocks)
    for name, p in student.named_parameters():
        place = name.removeprefix("model.trunk.").split(".")
        above = depth - int(place[1]) if place[0] == "blocks" else depth + 1 if place[0] in ("cls_token", "mask_token", "patch_embed") else 0
        key = p.ndim > 1 and "positional" not in name, "last_layer" in name, layer_decay ** above * (patch_lr if place[0] == "patch_embed" else 1)
        groups.setdefault(key, []).append(p)
    return [{"params": ps, "decay": decay, "last": last, "factor": factor} for (decay, last, factor), ps in groups.items()]


def set_lr_and_decay(opt, lr, wd, head_rests):
    for g in opt.param_groups:
        g["lr"] = 0.0 if g["last"] and head_rests else lr * g["factor"]
        g["weight_decay"] = wd if g["decay"] else 0.0
