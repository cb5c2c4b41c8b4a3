"""Schedules, parameter groups of AdamW, and the moving average of weights."""
import math

import torch

LR_END = 1e-6                             # learning rate at the end of the cosine: DINOv2


# ---------------------------------------------------------------- schedules
def cosine(step, start, end, steps):
    """Half a cosine from `start` at step 0 to `end` at step `steps` - 1"""
    progress = min(step / max(steps - 1, 1), 1)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step, start, end, steps):
    """A straight line from `start` at step 0 to `end` at step `steps`, constant afterwards"""
    return start + (end - start) * min(step / max(steps, 1), 1)


def warmup_cosine(step, lr, warmup, steps, end=LR_END):
    """Linear warm-up to `lr`, where the first step already moves (OpenCLIP), then half a cosine to
    `end` (DINOv2)"""
    if step < warmup:
        return lr * (step + 1) / warmup
    return cosine(step - warmup, lr, min(end, lr), steps - warmup)


# ---------------------------------------------------------------- parameter groups
def param_groups(student, layer_decay=1.0, patch_lr=1.0):
    """Parameters that share weight decay, learning-rate factor and freezing -> groups for AdamW

    No weight decay for vectors (biases, norms, LayerScale, logit scale) and position tables, as in
    OpenCLIP and DINOv2. The class token, the mask token and the gains of the DINO head do decay, as
    in DINOv2. The last layer of the DINO head can be frozen at the start, so it has its own group.

    layer_decay  factor on the learning rate from each block of the trunk to the one below
                 (DINOv2: 0.9)
    patch_lr     factor for the patch embedding (DINOv2: 0.2)
    """
    groups = {}
    for name, p in student.named_parameters():
        decay = p.ndim > 1 and "positional" not in name
        last = "last_layer" in name
        factor = layer_decay ** decay_power(name, len(student.model.trunk.blocks))
        if "patch_embed" in name:
            factor *= patch_lr
        groups.setdefault((decay, last, factor), []).append(p)
    return [{"params": params, "decay": decay, "last": last, "factor": factor}
            for (decay, last, factor), params in groups.items()]


def decay_power(name, depth):
    """Exponent of layer_decay: 1 for the last block of the trunk, depth for the first, depth + 1
    for the embedding and its tokens, 0 outside of the trunk"""
    part, *rest = name.removeprefix("model.trunk.").split(".")
    if part == "blocks":
        return depth - int(rest[0])
    return depth + 1 if part in ("cls_token", "mask_token", "patch_embed") else 0


def set_lr(optimizer, lr, last_layer_lr, weight_decay):
    """The values of this step, for the groups of `param_groups`"""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["last"] else lr) * group["factor"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


# ---------------------------------------------------------------- moving average
@torch.no_grad()
def update_ema(target, source, decay):
    """target <- decay * target + (1 - decay) * source, for two lists of tensors, in place

    In this form, because the released code rounds like this; lerp differs in the last bit.
    """
    target, source = list(target), list(source)
    torch._foreach_mul_(target, decay)
    torch._foreach_add_(target, torch._foreach_mul(source, 1 - decay))
